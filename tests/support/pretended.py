"""A simulated GPU for tests: tensors that claim to be on cuda:0 but live on the CPU, and CUDA graphs that replay.

It raises the errors that a GPU would raise: for an operation on tensors of two devices, for NumPy's access to a GPU
tensor, and, while a step is captured, for everything that waits for the GPU or copies from the host. A replay repeats
the captured operations on the captured tensors. It doesn't run the Python code around them, and Python numbers keep the
values that they had during the capture. Triton kernels run in Triton's interpreter; the kernels of csrc/cuda run thread
by thread.

It can't reveal errors in machine code, in the use of streams or in memory management.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 8 << 30
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
TAKE_TWO_DEVICES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class OnGpu(Tensor):
    """A tensor that claims to be on the GPU; `inner` is the CPU tensor that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        return Tensor._make_wrapper_subclass(
            *(cls, inner.shape, inner.stride(), inner.storage_offset()), dtype=inner.dtype, device=CPU
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnGpu) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        is_parameter = isinstance(self, nn.Parameter)
        memo[id(self)] = (nn.Parameter if is_parameter else Tensor.requires_grad_)(copied, self.requires_grad)
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _operate(func, args, kwargs or {})


class Graph:
    """Simulates torch.cuda.CUDAGraph."""

    capturing: list[Call] | None = None
    underway: list[object] = []  # noqa: RUF012
    elsewhere = False  # whether the current GPU is another one than the tensors' GPU

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @staticmethod
    @contextlib.contextmanager
    def capture(graph: Graph, pool: object = None) -> Iterator[None]:
        """Simulates torch.cuda.graph. After a failed capture, no other can begin until its memory pool is ended.

        Only operations on the current GPU are captured, so none are if the tensors are on another GPU.
        """
        if Graph.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        Graph.underway.append(pool)
        Graph.capturing = None if Graph.elsewhere else graph.calls
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        else:
            Graph.underway.clear()
        finally:
            Graph.capturing = None

    @staticmethod
    def end_pool(device: int, pool: object) -> None:
        """Simulates torch._C._cuda_endAllocateToPool."""
        assert device == CUDA.index
        Graph.underway.remove(pool)

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for new, old in zip(_tensors(again), _tensors(out), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def current(device: Any) -> Iterator[None]:
    """Simulates torch.cuda.device."""
    before, Graph.elsewhere = Graph.elsewhere, _index(device) != CUDA.index
    try:
        yield
    finally:
        Graph.elsewhere = before


def stream(device: Any = None) -> Any:
    """Simulates torch.cuda.Stream and torch.cuda.current_stream."""
    index = int(Graph.elsewhere) if device is None else _index(device)
    own = torch.device("cuda", index)
    return SimpleNamespace(cuda_stream=0, device=own, wait_stream=lambda other: None, synchronize=lambda: None)


def _index(device: Any) -> int:
    if device is None or isinstance(device, int):
        return CUDA.index if device is None else device
    index: int | None = torch.device(device).index
    return int(Graph.elsewhere) if index is None else index


def not_captured(what: str) -> None:
    """Raise RuntimeError if a step is being captured, as CUDA does for an operation that can't be captured."""
    if Graph.capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _called(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function with the tensors' `inner` tensors, and record the call if a graph is being captured."""

    def inside(each: Tensor) -> Tensor:
        if isinstance(each, OnGpu):
            return each.inner
        return each if Graph.capturing is None else each.clone()  # a graph keeps a host tensor's value, not the tensor

    args, kwargs = tree_map_only(Tensor, inside, (args, kwargs))
    out = function(*args, **kwargs)
    if Graph.capturing is not None:
        Graph.capturing.append((function, args, kwargs, out))
    return out


def _operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = _tensors((args, kwargs))
    here = [each for each in tensors if isinstance(each, OnGpu)]
    elsewhere = [each for each in tensors if not isinstance(each, OnGpu)]
    if name == "_to_copy" and here and _engine_runs():
        kwargs = {**kwargs, "device": None}
    device = kwargs.get("device")
    to_gpu = bool(here) if device is None else torch.device(device).type == "cuda"
    if name == "copy_":
        to_gpu = isinstance(args[0], OnGpu)
    if not here and not to_gpu:
        return func(*args, **kwargs)
    strangers = [each for each in elsewhere if each.dim() and (each.any() or not _engine_runs())]
    if here and strangers and name not in TAKE_TWO_DEVICES:
        shapes = [(type(each).__name__, list(each.shape)) for each in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {shapes}")
    crosses = name in TAKE_TWO_DEVICES and (elsewhere or not to_gpu)
    if name in WAITS or crosses:
        not_captured(name)
    if device is not None:
        kwargs = {**kwargs, "device": CPU if to_gpu else device}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    out = _called(func, args, kwargs)
    if not to_gpu or name == "_local_scalar_dense":
        return out
    given = {id(each.inner): each for each in here}  # an in-place operation must return the same wrapper
    changes = any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.returns)
    return tree_map_only(Tensor, lambda each: given[id(each)] if changes and id(each) in given else OnGpu(each), out)


def _engine_runs() -> bool:
    """Whether autograd's engine is running. It reads a tensor's device in C++, where that is the CPU."""
    return torch._C._current_graph_task_id() != -1


class _Operations(TorchDispatchMode):
    """Dispatches every operation. This project's own operations run their Triton kernels or their CPU kernels."""

    def __init__(self, triton: bool) -> None:
        super().__init__()
        self.triton = triton

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        on_gpu = any(isinstance(each, OnGpu) for each in _tensors((args, kwargs)))
        if self.triton and on_gpu and func.namespace == "swamp_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return _operate(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Replaces the functions in which PyTorch makes a choice by a tensor's device before it dispatches an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _whole(kwargs["device"])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            kwargs.pop("device")
            return _moved(func(*args, **kwargs), CUDA)
        first = args[0] if args else None
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cuda:
            return _moved(first, CUDA)
        if isinstance(first, OnGpu):
            if func is Tensor.cpu:
                return _moved(first, CPU)
            if func is Tensor.tolist:
                return _moved(first, CPU).tolist()
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func is Tensor.new_tensor:
                return _moved(func(first.inner, *args[1:], **kwargs), CUDA)
        return func(*args, **kwargs)


def _whole(device: Any) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return CUDA if device.type == "cuda" else device


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Simulates Tensor.to."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options = {"dtype": dtype or tensor.dtype, "memory_format": memory_format or torch.preserve_format}
    if device is None or device.type == tensor.device.type:
        return tensor.to(**options, copy=copy)
    return torch.ops.aten._to_copy(tensor, device=_whole(device), **options)


def _launched(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a Triton launch so that it raises for CPU tensors, which a GPU could not read."""

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for each in _tensors((args, kwargs)):
            if not isinstance(each, OnGpu):
                raise ValueError(f"Pointer argument (at {executor.fn}) cannot be accessed from Triton (cpu tensor?)")
        return _called(lambda *own, **named: call(executor, *own, **named), args, kwargs)

    return launch


@contextlib.contextmanager
def gpu(triton: bool = False, launch: Callable[..., None] | None = None, elsewhere: bool = False) -> Iterator[None]:
    """Make PyTorch see the simulated GPU while the context is open.

    triton     whether this project's operations run their Triton kernels in the interpreter instead of CPU kernels
    launch     replaces nvrtc.Launcher.__call__; if it is None, the kernels of csrc/cuda are not available
    elsewhere  whether the current GPU is a second one, which holds no tensors
    """
    from triton.runtime.interpreter import GridExecutor

    properties = SimpleNamespace(name="pretended", total_memory=MEMORY, L2_cache_size=50 << 20, major=9, minor=0)
    properties.multi_processor_count = 132
    instead = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1 + elsewhere,
        "current_device": lambda: int(Graph.elsewhere),
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: not_captured("empty_cache"),
        "synchronize": lambda *_: not_captured("synchronize"),
        "get_rng_state": lambda *_: not_captured("get_rng_state") or torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: not_captured("get_rng_state") or [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state": lambda *_: not_captured("set_rng_state"),
        "set_rng_state_all": lambda _: not_captured("set_rng_state"),
        "manual_seed": lambda _: not_captured("manual_seed"),
        "manual_seed_all": lambda _: not_captured("manual_seed"),
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda own: current(own.device),
        "device": current,
        "device_of": lambda tensor: current(tensor.device),
        "set_stream": lambda _: None,
        "graph_pool_handle": object,
        "CUDAGraph": Graph,
        "graph": Graph.capture,
    }
    autocast = torch.autocast
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.enter_context(current(int(elsewhere)))
        for name, value in instead.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(
            mock.patch.object(torch, "autocast", lambda _, *rest, **more: autocast("cpu", *rest, **more))
        )
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", _launched(GridExecutor.__call__)))
        stack.enter_context(mock.patch("torch.optim.Optimizer._accelerator_graph_capture_health_check"))
        stack.enter_context(mock.patch("torch._C._cuda_endAllocateToPool", Graph.end_pool))
        if launch is None:
            stack.enter_context(mock.patch("swamp_fast.engines.fused.check.why_no_nvrtc", return_value="no launcher"))
        else:
            of_the_host = lambda launcher, *given: _called(launch, given, {})  # noqa: E731
            stack.enter_context(mock.patch("swamp_fast.engines.fused.cuda.nvrtc.Launcher.__call__", of_the_host))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else .to() can't change a parameter's class
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(_Functions())
        stack.enter_context(_Operations(triton))
        yield
