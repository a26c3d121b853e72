"""What one cycle does: train the particles, average them, evaluate the average, prune by it.

Among several ranks the first one alone averages, evaluates and prunes, and sends the result. That takes the same time
as if all did, leaves the memory's bandwidth to one, and processors that differ can't come to different averages.
"""
