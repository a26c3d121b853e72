"""What knows nothing of SWAMP: trees of tensors, fingerprints, memory, statistics, formats."""
