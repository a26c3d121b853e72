"""The steps of one cycle: train the particles, average them, evaluate the average, and prune by it.

With several ranks, only the first one averages, evaluates and prunes; it sends the results to the others. This takes no
longer than if every rank did the work, leaves the whole memory bandwidth to one process, and prevents ranks with
different processors from computing different averages.
"""
