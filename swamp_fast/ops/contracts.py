"""What the contracts of the ops share: binding the letters of shapes, and registering with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
LIBRARY = torch.library.Library("swamp_fast", "DEF")


class Contract:
    """Checks the tensors of one call; a letter means the same size wherever it stands.

    The first tensor sets the device. Errors say what was expected, what came, and what to do.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {}
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
        """Check one argument against `shape`, letters or numbers apart by blanks.

        rows  a stride between rows is welcome; elements within a row must be contiguous. Without it the
              whole tensor must be contiguous.
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
        if rows:
            if value.stride(-1) != 1 and value.shape[-1] > 1:
                raise ValueError(
                    f"{self.op}: the rows of `{name}` must be contiguous, got strides {tuple(value.stride())}. "
                    f"Pass {name}.contiguous()."
                )
            if value.dim() > 1 and value.shape[0] > 1 and value.stride(0) < value.shape[-1]:
                raise ValueError(
                    f"{self.op}: the rows of `{name}` must not overlap, got strides {tuple(value.stride())}. "
                    f"Pass {name}.contiguous()."
                )
        elif not value.is_contiguous():
            raise ValueError(
                f"{self.op}: `{name}` must be contiguous, got strides {tuple(value.stride())}. "
                f"Pass {name}.contiguous()."
            )
        return value

    def lanes(self, masks: Tensor, run_of_lane: Tensor) -> None:
        """Check the masks [R, Q] of a bank whose [L, P] is known, and which of them each lane wears."""
        self.tensor("run_of_lane", run_of_lane, "L", [torch.int64])
        self.tensor(
            "masks", masks, "R Q", [torch.bool], rows=True, advice="Lanes of a run share one mask; pass one row a run."
        )
        if self.size("Q") > self.size("P"):
            raise self.fail(
                f"`masks` covers Q = {self.size('Q')} weights, more than the P = {self.size('P')} there are."
            )
        self.in_range("run_of_lane", run_of_lane, self.size("R"), "R")

    def rates(self, **rates: Tensor) -> None:
        """Check what holds a number a lane."""
        for name, rate in rates.items():
            self.tensor(name, rate, "L", [torch.float64], advice="Rates are per lane.")

    def update(self, weights: Tensor, grad_scale: Tensor | None, swa: Tensor | None, swa_weight: Tensor | None) -> None:
        """Check what every update of weights [L, P] may be given besides."""
        if grad_scale is not None:
            self.rates(grad_scale=grad_scale)
        if (swa is None) != (swa_weight is None):
            raise self.fail("`swa` and `swa_weight` go together; pass both or neither.")
        if swa is not None and swa_weight is not None:
            self.tensor("swa", swa, "L P", [weights.dtype], rows=True)
            self.rates(swa_weight=swa_weight)

    def size(self, letter: str) -> int:
        """The size that a letter was bound to."""
        return self.sizes[letter][0]

    def fail(self, message: str) -> ValueError:
        """An error of this op."""
        return ValueError(f"{self.op}: {message}")

    def in_range(self, name: str, value: Tensor, end: int, letter: str) -> None:
        """Refuse entries outside [0, end). Entries on a GPU are trusted: looking would stop the stream."""
        if value.device.type != "cpu" or value.numel() == 0:
            return
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= end:
            raise self.fail(f"`{name}` must lie in [0, {letter}) = [0, {end}), got {low} … {high}.")

    def _shape(self, name: str, value: Tensor, letters: list[str], advice: str) -> None:
        wanted = [int(s) if s.isdigit() else self.sizes.get(s, (None,))[0] for s in letters]
        fits = value.dim() == len(letters) and all(
            want in (None, have) for want, have in zip(wanted, value.shape, strict=True)
        )
        if not fits:
            known = [str(s if want is None else want) for s, want in zip(letters, wanted, strict=True)]
            expected = f"[{', '.join(letters)}]"
            if known != letters:
                expected += f" = [{', '.join(known)}]"
            raise ValueError(
                f"{self.op}: `{name}` must have shape {expected}, got {list(value.shape)}."
                + (f" {advice}" if advice else "")
            )
        for letter, have in zip(letters, value.shape, strict=True):
            if not letter.isdigit():
                self.sizes.setdefault(letter, (have, name))


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one op as torch.ops.swamp_fast.<name>: C++ on CPU, Triton on CUDA, shapes for torch.compile."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"swamp_fast::{name}", fake, lib=LIBRARY)


def native() -> ModuleType:
    """The C++ kernels; raises if the extension was not built."""
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
    """One module of swamp_fast.kernels; raises if Triton is missing."""
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
