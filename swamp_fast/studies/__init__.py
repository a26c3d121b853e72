"""Many runs: sweeps over a grid, packed into shared steps, and comparisons of methods."""
