"""The fused engine on CPU: a Plan on the kernels of csrc/cpu/fused, without autograd, over the kept weights only."""
