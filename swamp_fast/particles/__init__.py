"""What a particle is: a row of the bank with its random draws, schedule, dropout and norms.

Dropout is drawn by a TorchFunctionMode around the user's forward instead of by replacing modules, so it also reaches
F.dropout and attention. The backward pass runs outside it, so activation checkpointing with dropout is refused.
"""
