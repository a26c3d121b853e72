"""The parameters of the CUDA kernels as ctypes structures, which mirror the structs of csrc/cuda/params.h.

The header says what each field means. A field that isn't set is zero: a null pointer, or a stride that is not read.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

POINTER, LONG, INT, DOUBLE = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_double


class ConvolveParams(ctypes.Structure):
    """The parameters of the kernel in convolve.cu."""

    __slots__ = ()  # so that setting a field that doesn't exist raises AttributeError
    _fields_ = (
        ("source", POINTER),
        ("weights", POINTER),
        ("out", POINTER),
        ("scale", POINTER),
        ("offset", POINTER),
        ("bias", POINTER),
        ("weights_stride", LONG),
        ("prologue_stride", LONG),
        ("bias_stride", LONG),
        ("scratch", POINTER),
        ("mean", POINTER),
        ("variance", POINTER),
        ("out_scale", POINTER),
        ("out_offset", POINTER),
        ("norm_weight", POINTER),
        ("norm_bias", POINTER),
        ("arrivals", POINTER),
        ("statistics_stride", LONG),
        ("norm_weights_stride", LONG),
        ("arrivals_stride", LONG),
        ("eps", DOUBLE),
        ("samples", INT),
        ("tiles", INT),
        ("block_tiles", INT),
    )


class WeightGradParams(ctypes.Structure):
    """The parameters of the kernel in weight_grad.cu."""

    __slots__ = ()
    _fields_ = (
        ("source", POINTER),
        ("out_grad", POINTER),
        ("scale", POINTER),
        ("offset", POINTER),
        ("partial", POINTER),
        ("prologue_stride", LONG),
        ("partial_stride", LONG),
        ("samples", INT),
        ("tiles", INT),
    )


Params = ConvolveParams | WeightGradParams


def address(tensor: Tensor, first: int = 0) -> int:
    """The memory address of element `first` of the tensor's first row."""
    return tensor.data_ptr() + first * tensor.element_size()
