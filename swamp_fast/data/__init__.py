"""Data: what a user may pass (sources), how it is read (samples), and batches of it on the device (store)."""
