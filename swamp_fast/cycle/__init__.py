"""What one cycle does: train the particles, average them, evaluate the average, prune by it."""
