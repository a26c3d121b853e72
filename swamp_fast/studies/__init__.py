"""Studies of many runs: sweeps over a grid of settings, and comparisons of methods.

Runs with compatible settings are trained together in one bank. They write their checkpoints after the same step: as
soon as one run needs a checkpoint, all of them write one. Two runs may share a bank only if their models agree in
everything but trained weights and running statistics, because a model factory may draw other values from its seed too.
"""
