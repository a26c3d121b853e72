"""Data: what a user may pass (sources), reading it (samples), batches of it (store), and what is drawn (streams)."""
