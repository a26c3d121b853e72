"""The CUDA sources, installed as swamp_fast.cuda_sources; swamp_fast/engines/fused/cuda/nvrtc.py compiles them."""
