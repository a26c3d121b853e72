"""What is shown of a run: progress on the console, tables and figures."""
