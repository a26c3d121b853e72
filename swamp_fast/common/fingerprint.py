"""Hashes of models, tensors and callables, by which a resumed run checks that it gets the same ones as before."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swamp_fast.common.copying import is_compiled


def model_fingerprint(model: nn.Module, apart_from: Collection[str] = ()) -> str:
    """Return the hash of a model.

    It covers the model's printed structure, the code and plain attributes of its modules, its parameters and buffers,
    and which of them need gradients.

    apart_from  the names of parameters and buffers of which the values are left out
    """
    text = _ADDRESS.sub("", str(model))
    digest = hashlib.blake2b(f"{type(model).__qualname__}\n{text}".encode(), digest_size=16)
    for kind in sorted({type(module) for module in model.modules()}, key=lambda kind: kind.__qualname__):
        if not kind.__module__.startswith("torch."):
            digest.update(_source(kind))
    digest.update(state_fingerprint(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}{tensor.requires_grad}".encode())
        digest.update(str(tuple(tensor.shape)).encode() if name in apart_from else _tensor_bytes(tensor))
    return digest.hexdigest()


def state_fingerprint(model: nn.Module) -> str:
    """Return the hash of all modules' plain attributes and hooks.

    Parameters, buffers, nn.Module's other attributes and what torch.compile adds are left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():  # the keys count all hooks of a process
                digest.update(name.encode() + kind.encode() + _hook_bytes(hook))
        if is_compiled(module):
            continue
        for key, value in vars(module).items():
            if key not in _OF_ANY_MODULE:
                digest.update(name.encode() + key.encode() + _bytes(value, 3))
    return digest.hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return the hash of a tensor's type, shape and values."""
    return hashlib.blake2b(_tensor_bytes(tensor), digest_size=16).hexdigest()


def callable_fingerprint(function: Callable[..., Any] | None) -> str | None:
    """Return the hash of a callable's code, defaults and closure, as far as they can be read; None for None."""
    return None if function is None else hashlib.blake2b(_bytes(function, 0), digest_size=16).hexdigest()


_OF_ANY_MODULE = {*vars(nn.Module()), "training", "_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ADDRESS = re.compile(r"( at)? 0x[0-9a-f]+", re.IGNORECASE)


def _tensor_bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().flatten()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()


def _bytes(thing: Any, depth: int) -> bytes:
    """Return bytes that identify a value.

    An object of an unknown class is identified by its class's code and its attributes, at most four levels deep.
    """
    name = f"{type(thing).__module__}.{type(thing).__qualname__}:".encode()
    plain = _plain_bytes(thing)
    if plain is not None or depth > 4:
        return name + (plain or b"")
    if isinstance(thing, functools.partial):
        return name + _bytes((thing.func, thing.args, thing.keywords), depth + 1)
    if isinstance(thing, dict):
        return name + b",".join(_bytes(each, depth + 1) for each in thing.items())
    if isinstance(thing, list | tuple | set | frozenset):
        parts = [_bytes(each, depth + 1) for each in thing]
        return name + b",".join(sorted(parts) if isinstance(thing, set | frozenset) else parts)
    if isinstance(thing, nn.Module):
        return name + _module_bytes(thing)
    if inspect.ismethod(thing):
        return name + _bytes((thing.__func__, thing.__self__), depth + 1)
    if inspect.isfunction(thing):
        closure = inspect.getclosurevars(thing)
        read = {key: value for key, value in closure.globals.items() if _counts_by_content(value)}
        context = (thing.__defaults__, thing.__kwdefaults__, closure.nonlocals, read)
        return name + thing.__qualname__.encode() + _source(thing) + _code(thing) + _bytes(context, depth + 1)
    if inspect.isclass(thing) or inspect.isbuiltin(thing):
        return name + thing.__qualname__.encode()
    return name + _source(type(thing)) + _bytes(getattr(thing, "__dict__", None), depth + 1)


def _plain_bytes(thing: Any) -> bytes | None:
    """Return bytes that identify a tensor, an array or a plain value; None for anything else."""
    if isinstance(thing, Tensor):
        return _tensor_bytes(thing)
    if isinstance(thing, RemovableHandle):
        return b""  # it holds the hook's number, which counts all hooks of a process
    if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
        return repr((thing.dtype, thing.shape)).encode() + thing.tobytes()
    if thing is None or isinstance(thing, bool | int | float | str | bytes | complex):
        return repr(thing).encode()
    return None


def _module_bytes(module: nn.Module) -> bytes:
    """Return the bytes of a module that is held as a value; none inside its own, as of a parent that a child holds."""
    if id(module) in _open_modules:
        return b""
    _open_modules.add(id(module))
    try:
        return model_fingerprint(module).encode()
    finally:
        _open_modules.discard(id(module))


_open_modules: set[int] = set()  # those whose bytes are being computed


def _hook_bytes(hook: Any) -> bytes:
    """Return bytes that identify a hook's code. What it has collected is left out."""
    function = getattr(hook, "__func__", hook)
    if inspect.isfunction(function):
        return function.__qualname__.encode() + _source(function) + _code(function)
    return type(hook).__qualname__.encode() + _source(type(hook))


def _source(thing: Any) -> bytes:
    try:
        return inspect.getsource(thing).encode()
    except (OSError, TypeError):
        return b""


def _code(function: Any) -> bytes:
    """Return the bytecode of a function, names and constants, by which two lambdas on one line differ.

    Inner functions among the constants are left out, because their text contains a memory address.
    """
    code: CodeType = function.__code__
    plain = [
        sorted(map(repr, each)) if isinstance(each, frozenset) else each  # its order differs between processes
        for each in code.co_consts
        if not inspect.iscode(each)
    ]
    return code.co_code + repr((code.co_names, plain)).encode()


def _counts_by_content(value: Any) -> bool:
    """Whether the content of a global that a function reads is part of the function's hash.

    It is for plain values and the user's functions and classes. It isn't for libraries, which don't change within a
    version, nor for other objects, which may change while they are used.
    """
    if inspect.isfunction(value) or inspect.isclass(value):
        file = getattr(inspect.getmodule(value), "__file__", None) or ""
        return not ("site-packages" in file or file.startswith(_STANDARD_LIBRARY))
    return value is None or isinstance(value, Tensor | bool | int | float | str | bytes | tuple | list | dict)


_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
