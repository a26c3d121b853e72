"""The CUDA sources, installed as swamp_fast.cuda_sources: swamp_fast/nvrtc.py compiles them at run time."""
