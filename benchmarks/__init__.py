"""What swamp_fast costs, beside what it replaces; see cpu.py."""
