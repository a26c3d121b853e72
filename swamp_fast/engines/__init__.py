"""How lanes are run: by the eager engine (any model) or by the fused one (models that the project's kernels cover)."""
