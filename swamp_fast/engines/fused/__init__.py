"""The fused engine: a Plan on this project's own kernels, without autograd, over the kept weights only."""
