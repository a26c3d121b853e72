"""The engines, which train and evaluate the lanes of a bank.

The eager engine runs any model by autograd. The fused engine runs the models that the project's kernels cover.

A rule chooses the engine (selection.py). An earlier version chose it by measured time, and six identical calls gave two
different models. If the rule is wrong for a processor, a run is slower but its results are the same.

The fused engine never calls a library for dense matrix products. Where autograd is faster under dense masks, the eager
engine runs those cycles (switching.py). The engine can change between two cycles because each cycle starts from the
ticket.

A failed CUDA graph capture leaves the capture's stream current and its memory pool in use. The trainer restores both;
otherwise no later run in the process could capture a graph.
"""
