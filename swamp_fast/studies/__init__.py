"""Many runs: sweeps over a grid of settings, trained together where they can be, and comparisons of methods.

Runs that share a bank write their checkpoints after the same step: when one is due, all are. Whether runs may share a
bank is decided by the whole model except its trained weights and running statistics, since a factory may draw more than
those under its seed.
"""
