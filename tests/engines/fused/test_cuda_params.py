"""The structs of csrc/cuda/params.h have the layout of their mirrors in params.py, by a C++ compiler and by NVRTC."""

from __future__ import annotations

import ctypes
import re
import subprocess

import pytest
from paths import ROOT

from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.engines.fused.cuda.params import DOUBLE, INT, LONG, POINTER, ConvolveParams, WeightGradParams
from swamp_fast.ops.backends import why_no_nvrtc

HEADER = ROOT / "csrc" / "cuda" / "params.h"
CONSTANTS, _ = Halo(4, 4, 16, 16).convolve_constants(False, True, True, False, True)
GRAD_CONSTANTS, _ = Halo(4, 4, 16, 16).weight_grad_constants(True)
STRUCTS = {
    "convolve": ("ConvolveParams", ConvolveParams, CONSTANTS),
    "weight_grad": ("WeightGradParams", WeightGradParams, GRAD_CONSTANTS),
}
C_TYPES = {r".*\*": POINTER, "long long": LONG, "double": DOUBLE, "int": INT}
OFFSET = """
#ifdef __CUDACC_RTC__
#define OFFSET(type, field) __INTADDR__(&static_cast<type*>(nullptr)->field)
#else
#define OFFSET(type, field) __builtin_offsetof(type, field)
#endif
"""
needs_nvrtc = pytest.mark.skipif(why_no_nvrtc() is not None, reason=f"{why_no_nvrtc()}")


def layout_check(header_name: str, mirror: type[ctypes.Structure]) -> str:
    """C++ source that compiles only if a struct of the header has the same layout as its mirror."""
    lines = [f"static_assert(sizeof({header_name}) == {ctypes.sizeof(mirror)});"]
    for name, _ in mirror._fields_:
        offset, size = getattr(mirror, name).offset, getattr(mirror, name).size
        lines.append(f"static_assert(OFFSET({header_name}, {name}) == {offset});")
        lines.append(f"static_assert(sizeof({header_name}::{name}) == {size});")
    return OFFSET + "\n".join(lines) + "\n"


def host_compiles(source: str) -> bool:
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{HEADER.parent}", "-include", "params.h", "-x", "c++", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


class Shifted(ctypes.Structure):
    """A mirror with two fields of different sizes exchanged, which the check must reject."""

    _fields_ = (*ConvolveParams._fields_[:-4], *reversed(ConvolveParams._fields_[-4:]))


@pytest.mark.parametrize("kernel", STRUCTS)
def test_layout_by_the_hosts_compiler(kernel):
    header_name, mirror, _ = STRUCTS[kernel]
    assert host_compiles(layout_check(header_name, mirror))


def test_another_layout_is_found():
    assert not host_compiles(layout_check("ConvolveParams", Shifted))
    assert not host_compiles(layout_check("ConvolveParams", WeightGradParams))


@needs_nvrtc
@pytest.mark.parametrize("kernel", STRUCTS)
def test_layout_by_nvrtc(kernel):
    """NVRTC compiles each kernel's source followed by the checks, and reports the expected size of its parameters."""
    header_name, mirror, constants = STRUCTS[kernel]
    sources = nvrtc.sources_of(kernel)
    sources[f"{kernel}.cu"] += layout_check(header_name, mirror).encode()
    code, _ = nvrtc.build(kernel, sources, constants, "compute_90")
    (parameter,) = re.findall(r"\.param \.align 8 \.b8 \w+\[(\d+)\]", code.decode())
    assert int(parameter) == ctypes.sizeof(mirror)


@pytest.mark.parametrize("kernel", STRUCTS)
def test_fields_in_order_and_of_one_type(kernel):
    """The header declares the same fields in the same order and of the same types as the mirror."""
    header_name, mirror, _ = STRUCTS[kernel]
    body = re.search(rf"struct {header_name} {{(.*?)\n}};", HEADER.read_text(), re.DOTALL)[1]
    declared = re.findall(r"(\S[^;]*?)(\w+);", re.sub(r"//[^\n]*", "", body))
    found = [
        (name, next(kind for pattern, kind in C_TYPES.items() if re.fullmatch(pattern, c_type.strip())))
        for c_type, name in declared
    ]
    assert found == list(mirror._fields_)


def test_fields_that_do_not_exist_raise():
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        ConvolveParams(sample=3)
    with pytest.raises(AttributeError, match="no attribute 'stride'"):
        WeightGradParams().stride = 3
