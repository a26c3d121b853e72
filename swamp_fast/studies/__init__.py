"""Many runs: sweeps over a grid of settings, trained together where they can be, and comparisons of methods."""
