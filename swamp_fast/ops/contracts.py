"""Functions that all ops share: they check arguments by the letters of their shapes, and register ops with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
LIBRARY = torch.library.Library("swamp_fast", "DEF")


class Contract:
    """Checks the arguments of one call of an op.

    The first tensor whose shape has a letter determines the letter's size; every later tensor must have the same size
    there. All tensors must be on the device of the first one. An error says what was expected, what was passed, and
    what to do.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: tuple[torch.device, str] | None = None

    def tensor(
        self,
        name: str,
        value: object,
        shape: str,
        dtypes: Iterable[torch.dtype],
        *,
        rows: bool = False,
        advice: str = "",
    ) -> Tensor:
        """Check one tensor and return it.

        shape   letters or numbers, separated by blanks
        rows    True if only the rows must be contiguous, False if the whole tensor must be
        advice  text to add to the error about a wrong shape

        Raises TypeError for a wrong type or dtype, and ValueError for a wrong shape, device or layout.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: `{name}` must be a tensor [{_comma(shape)}], got {type(value).__name__}.")
        dtypes = tuple(dtypes)
        if value.dtype not in dtypes:
            raise TypeError(
                f"{self.op}: `{name}` must be {' or '.join(map(_dtype, dtypes))}, got {_dtype(value.dtype)}."
            )
        self._shape(name, value, shape.split(), advice)
        if self.device is None:
            self.device = (value.device, name)
        elif value.device != self.device[0]:
            raise ValueError(
                f"{self.op}: `{name}` must be on {self.device[0]} as `{self.device[1]}` is, got {value.device}."
            )
        self._layout(name, value, rows)
        return value

    def lanes(self, masks: Tensor, run_of_lane: Tensor) -> None:
        """Check a bank's masks [R, Q] and the run of each lane [L]. L and P must be known from earlier tensors."""
        self.tensor("run_of_lane", run_of_lane, "L", [torch.int64])
        self.tensor(
            "masks",
            masks,
            "R Q",
            [torch.bool],
            rows=True,
            advice="Lanes of a run share one mask; pass one row per run.",
        )
        if self.size("Q") > self.size("P"):
            raise self.fail(
                f"`masks` covers Q = {self.size('Q')} weights, more than the P = {self.size('P')} parameters."
            )
        self.in_range("run_of_lane", run_of_lane, self.size("R"), "R")

    def rates(self, **rates: Tensor) -> None:
        """Check settings that are float64 tensors [L], with one number per lane."""
        for name, rate in rates.items():
            self.tensor(name, rate, "L", [torch.float64], advice="Rates are per lane.")

    def segments(self, segment_ends: Tensor | None, **rates: Tensor) -> None:
        """Check rates that are float64 tensors [L, S], and the ends of the segments [R, S], or None for one segment.

        The values of ends on a GPU are not checked, because the host would have to wait for the GPU.
        """
        if segment_ends is None:
            self.sizes["S"] = 1
        else:
            self.tensor("segment_ends", segment_ends, "R S", [torch.int64])
            for ends in segment_ends.tolist() if segment_ends.device.type == "cpu" else ():
                if sorted(ends) != ends or ends[:1] < [0] or ends[-1] != self.size("P"):
                    raise self.fail(
                        f"`segment_ends` must rise from at least 0 to P = {self.size('P')} in each row, got {ends}."
                    )
        for name, rate in rates.items():
            advice = "Pass one rate per lane and segment."
            self.tensor(name, rate, "L S", [torch.float64], advice=advice)

    def update(self, weights: Tensor, grad_scale: Tensor | None, swa: Tensor | None, swa_weight: Tensor | None) -> None:
        """Check the optional arguments of every op that updates weights [L, P]."""
        if grad_scale is not None:
            self.rates(grad_scale=grad_scale)
        if (swa is None) != (swa_weight is None):
            raise self.fail("`swa` and `swa_weight` go together; pass both or neither.")
        if swa is not None and swa_weight is not None:
            self.tensor("swa", swa, "L P", [weights.dtype], rows=True)
            self.rates(swa_weight=swa_weight)

    def size(self, letter: str) -> int:
        """The size of a letter, from the tensors checked so far."""
        return self.sizes[letter]

    def fail(self, message: str) -> ValueError:
        """Make an error whose message begins with the op's name; the caller raises it."""
        return ValueError(f"{self.op}: {message}")

    def in_range(self, name: str, value: Tensor, end: int, letter: str) -> None:
        """Raise ValueError if an entry is outside [0, end).

        GPU tensors are not checked, because the host would have to wait for the GPU.

        letter  the name of `end` in the message
        """
        if value.device.type != "cpu" or value.numel() == 0:
            return
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= end:
            raise self.fail(f"`{name}` must lie in [0, {letter}) = [0, {end}), got {low} … {high}.")

    def _layout(self, name: str, value: Tensor, rows: bool) -> None:
        """Check that a tensor is contiguous. With `rows`, check only that its rows are contiguous and don't overlap."""
        if not rows:
            wrong = None if value.is_contiguous() else f"`{name}` must be contiguous"
        elif value.stride(-1) != 1 and value.shape[-1] > 1:
            wrong = f"the rows of `{name}` must be contiguous"
        elif value.dim() > 1 and value.shape[0] > 1 and value.stride(0) < value.shape[-1]:
            wrong = f"the rows of `{name}` must not overlap"
        else:
            wrong = None
        if wrong is not None:
            raise self.fail(f"{wrong}, got strides {tuple(value.stride())}. Pass {name}.contiguous().")

    def _shape(self, name: str, value: Tensor, letters: list[str], advice: str) -> None:
        """Check a tensor's shape, and store the sizes of new letters."""
        expected_sizes = [int(letter) if letter.isdigit() else self.sizes.get(letter) for letter in letters]
        fits = value.dim() == len(letters) and all(
            size in (None, actual) for size, actual in zip(expected_sizes, value.shape, strict=True)
        )
        if not fits:
            known = [
                letter if size is None else str(size) for letter, size in zip(letters, expected_sizes, strict=True)
            ]
            expected = f"[{', '.join(letters)}]"
            if known != letters:
                expected += f" = [{', '.join(known)}]"
            raise ValueError(
                f"{self.op}: `{name}` must have shape {expected}, got {list(value.shape)}."
                + (f" {advice}" if advice else "")
            )
        for letter, size in zip(letters, value.shape, strict=True):
            if not letter.isdigit():
                self.sizes.setdefault(letter, size)


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one op as torch.ops.swamp_fast.<name>.

    cpu, cuda  the implementations for the CPU (C++) and for CUDA (Triton)
    fake       returns tensors of the results' shapes, for torch.compile
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"swamp_fast::{name}", fake, lib=LIBRARY)


def native() -> ModuleType:
    """The module with the C++ kernels. Raises ImportError if it is not built."""
    try:
        import swamp_fast._C as _C
    except ImportError as error:
        raise ImportError(
            "swamp_fast's CPU kernels (swamp_fast._C) are not built here: reinstall with "
            "`pip install --no-binary swamp-fast swamp-fast`, or run `pip install -e .` in a checkout; "
            f"a C++17 compiler is needed. ({error})"
        ) from error
    module: ModuleType = _C
    return module


def triton_kernels(name: str) -> ModuleType:
    """The module swamp_fast.kernels.<name>. Raises ImportError if Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`{name}` on a GPU needs Triton, which is not installed here: `pip install triton` (Linux)."
        ) from error
    from importlib import import_module

    return import_module(f"swamp_fast.kernels.{name}")


def _comma(shape: str) -> str:
    return ", ".join(shape.split())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
