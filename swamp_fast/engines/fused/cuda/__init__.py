"""The fused engine on CUDA: each operation of a Plan is one launch over all lanes."""
