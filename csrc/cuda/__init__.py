"""CUDA sources, installed as swamp_fast.cuda_sources and compiled by swamp_fast/engines/fused/cuda/nvrtc.py."""
