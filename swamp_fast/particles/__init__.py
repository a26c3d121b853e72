"""Particles: rows of the bank, with their random draws, schedules, dropout and norm layers.

A TorchFunctionMode around the user's forward pass draws dropout. Unlike replaced modules, it also covers F.dropout and
attention. The backward pass runs outside the mode, so activation checkpointing of dropout is refused.
"""
