"""Opens the data that a user passes (sources), reads samples (samples), and makes batches on the device (store)."""
