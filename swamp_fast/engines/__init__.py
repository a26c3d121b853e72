"""How lanes are run: by the eager engine (any model) or by the fused one (models that the project's kernels cover).

Which engine runs is chosen by a rule (selection.py). It was once chosen by a stopwatch, and six equal calls gave two
models. On a processor for which the rule is wrong a run is slower, never different.

The fused engine has no dense path through a library. Where autograd is faster on dense masks, those cycles run on the
eager engine (switching.py): a cycle starts from the ticket, so the engine can change between two cycles.

A CUDA graph capture that fails leaves torch's stream and memory pool as they are; the trainer restores both, or no
later run of the process could capture.
"""
