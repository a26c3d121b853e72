"""The modes of torch and Python that apply to a whole process or thread, and that would change a driver's results.

A driver sets them to PyTorch's defaults while it runs, so that its result doesn't depend on the modes around the call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

AUTOCAST_DTYPES = {"cpu": torch.bfloat16, "cuda": torch.float16}  # PyTorch's defaults
SUBNORMAL = 1e-310  # a float64 number that becomes 0 if subnormal numbers are flushed
ONEDNN = ("matmul", "conv", "rnn")  # the operations that have a precision of their own on a CPU
ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")


@dataclass(frozen=True)
class _Mode:
    """A mode: its name for error messages, how to read and write it, and the value that a driver runs with.

    neutral  computes the driver's value from the value around the call
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    neutral: Callable[[Any], Any]


def _autocast() -> tuple[Any, ...]:
    devices = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST_DTYPES
    }
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return devices, torch.is_autocast_cache_enabled(), nesting


def _set_autocast(value: tuple[Any, ...]) -> None:
    devices, cached, nesting = value
    for device, (enabled, dtype) in devices.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)
    # Only the outermost autocast clears the cached copies of weights. If it surrounds steps, they become stale.
    torch.clear_autocast_cache()
    while (now := _autocast()[2]) != nesting:
        torch.autocast_increment_nesting() if now < nesting else torch.autocast_decrement_nesting()


def _precisions() -> tuple[str | None, ...]:
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by fp32_precision, which torch doesn't express as one of the older values
        matmul = None
    own = (getattr(torch.backends.mkldnn, operation).fp32_precision for operation in ONEDNN)
    return matmul, torch.backends.cuda.matmul.fp32_precision, *own


def _set_precisions(value: tuple[str | None, ...]) -> None:
    matmul, on_cuda, *own = value
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    torch.backends.cuda.matmul.fp32_precision = on_cuda
    for operation, precision in zip(ONEDNN, own, strict=True):
        getattr(torch.backends.mkldnn, operation).fp32_precision = precision


def _saved_tensors_hooks() -> list[Any]:
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _set_saved_tensors_hooks(hooks)
    return hooks


def _set_saved_tensors_hooks(value: list[Any]) -> None:
    """Set the stack of hooks; `value` begins with its top."""
    while torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for hooks in reversed(value):
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _flushes_subnormals() -> bool:
    return not bool(torch.full((1,), SUBNORMAL, dtype=torch.float64, device="cpu") * 1)


def _attentions() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ATTENTIONS)


def _set_attentions(value: tuple[bool, ...]) -> None:
    for kind, enabled in zip(ATTENTIONS, value, strict=True):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(enabled)


def _set_onednn(enabled: bool) -> None:
    torch._C._set_mkldnn_enabled(enabled)


def _cached_parametrizations() -> tuple[int, Any]:
    return parametrize._cache_enabled, parametrize._cache


def _set_cached_parametrizations(value: tuple[int, Any]) -> None:
    parametrize._cache_enabled, parametrize._cache = value


def _filters() -> list[Any]:
    return list(warnings.filters)


def _set_filters(value: list[Any]) -> None:
    warnings.filters[:] = value  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _shown(filters: list[Any]) -> list[Any]:
    return [("default" if action == "error" else action, *rest) for action, *rest in filters]


def _always(value: object) -> Callable[[Any], Any]:
    return lambda _: value


# The modes that a user's callables may not change, because a change would affect all that a driver does afterwards.
KEPT_MODES = (
    _Mode("the default dtype", torch.get_default_dtype, torch.set_default_dtype, _always(torch.float32)),
    _Mode("the number of threads", torch.get_num_threads, torch.set_num_threads, lambda threads: threads),
)
MODES = (
    *KEPT_MODES,
    _Mode(
        *("autocast", _autocast, _set_autocast),
        _always(({device: (False, dtype) for device, dtype in AUTOCAST_DTYPES.items()}, True, 0)),
    ),
    _Mode(
        *("the precision of float32 products", _precisions, _set_precisions),
        _always(("highest", "ieee", *("ieee" for _ in ONEDNN))),
    ),
    _Mode("hooks on saved tensors", _saved_tensors_hooks, _set_saved_tensors_hooks, _always([])),
    _Mode("anomaly detection", _anomaly, lambda value: torch.set_anomaly_enabled(*value), _always((False, True))),
    _Mode("flushing of subnormal numbers", _flushes_subnormals, torch.set_flush_denormal, _always(False)),
    _Mode("the kernels for attention", _attentions, _set_attentions, _always((True,) * len(ATTENTIONS))),
    _Mode(
        "the fast path of attention layers",
        *(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, _always(True)),
    ),
    _Mode("oneDNN", torch._C._get_mkldnn_enabled, _set_onednn, _always(True)),
    _Mode(
        "cached parametrizations",
        *(_cached_parametrizations, _set_cached_parametrizations, lambda _: (0, {})),
    ),
    _Mode("the filters of warnings", _filters, _set_filters, _shown),
)


def current_modes() -> dict[str, Any]:
    """Return the values of all modes by name."""
    return {mode.name: mode.read() for mode in MODES}


def set_modes(values: dict[str, Any]) -> None:
    """Set the modes to values that `current_modes` returned."""
    for mode in MODES:
        mode.write(values[mode.name])


@dataclass
class _Surroundings:
    """The modes around the running driver, which user callbacks see. `modes` is None if no driver runs."""

    modes: dict[str, Any] | None = None
    inference: bool = False
    gradients: bool = True
    device: torch.device = torch.device("cpu")  # noqa: RUF009  a plain value


_around = _Surroundings()


@contextmanager
def neutral_modes() -> Iterator[None]:
    """A context in which all modes have a driver's values. Inside another such context, it changes nothing.

    Raises RuntimeError where tensors have no values, as inside FakeTensorMode.
    """
    global _around
    if _around.modes is not None:
        yield
        return
    if type(torch.empty(0, device="cpu")) is not torch.Tensor:
        raise RuntimeError("tensors hold no values here; call this outside FakeTensorMode and similar contexts.")
    outer, modes = _around, current_modes()
    _around = _Surroundings(
        modes, torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_device()
    )
    try:
        set_modes({mode.name: mode.neutral(modes[mode.name]) for mode in MODES})
        with torch.inference_mode(False), torch.enable_grad(), _default_device(torch.device("cpu")):
            yield
    finally:
        assert _around.modes is not None
        set_modes(_around.modes)
        _around = outer


@contextmanager
def surrounding_modes() -> Iterator[None]:
    """A context in which a user's callback sees the modes around the driver's call.

    A mode that the callback changes stays changed for later callbacks and after the driver's call. The driver itself
    isn't affected.
    """
    global _around
    around = _around
    if around.modes is None:
        yield
        return
    own = current_modes()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(around.inference))
        stack.enter_context(torch.set_grad_enabled(around.gradients))
        stack.enter_context(_default_device(around.device))
        set_modes(around.modes)
        _around = _Surroundings()
        try:
            yield
        finally:
            around.modes = current_modes()
            _around = around
            set_modes(own)


def _default_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context with another default device. It slows down all operations, so it is entered only if it differs."""
    return nullcontext() if torch.get_default_device() == device else device
