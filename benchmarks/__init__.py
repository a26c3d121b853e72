"""Benchmarks of swamp_fast against the alternatives that it replaces; start with cpu.py or gpu.py."""
