"""The fused engine: runs a Plan on this project's own kernels, without autograd, and computes kept weights only."""
