"""Helpers that know nothing of SWAMP: trees of tensors, fingerprints, memory, statistics, formats."""
