"""A run's record: its folder, checkpoints, console and result."""
