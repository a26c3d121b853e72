"""Helpers that don't depend on SWAMP: trees of tensors, fingerprints, memory, time, statistics and formats."""
