"""How lanes are run: eager, for any model, or fused, for what this project's kernels cover; and which of the two."""
