"""The report of `backends`: for every backend, whether it is active, and why."""

from __future__ import annotations

import sys

import pytest
import torch

from swamp_fast.ops import backends as module
from swamp_fast.ops.backends import backends, why_no_nvrtc


def test_every_backend_says_why():
    found = backends()
    assert list(found) == ["cpp", "triton", "cuda", "nvrtc"]
    for report in found.values():
        assert isinstance(report["active"], bool)
        assert report["why"]


@pytest.mark.parametrize(
    ("missing", "has_gpu", "active", "why"),
    [
        ("NVRTC doesn't load", False, False, "NVRTC doesn't load"),
        ("NVRTC doesn't load", True, False, "NVRTC doesn't load"),
        (None, False, False, "no CUDA device to run"),
        (None, True, True, "compiles the fused engine's bfloat16 convolutions"),
    ],
)
def test_nvrtc(missing, has_gpu, active, why, monkeypatch):
    monkeypatch.setattr(module, "why_no_nvrtc", lambda: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    report = backends()["nvrtc"]
    assert report["active"] is active
    assert why in report["why"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-bindings" in why_no_nvrtc()
