"""The fused engine: runs a Plan on this project's own kernels without autograd; pruned weights take part in no sum."""
