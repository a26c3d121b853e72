"""The fused engine on CPU: a lane after the other through the C++ kernels of csrc/cpu/fused."""
