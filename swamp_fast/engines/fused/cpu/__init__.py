"""The fused engine on CPU: one lane after another through the C++ kernels of csrc/cpu/fused."""
