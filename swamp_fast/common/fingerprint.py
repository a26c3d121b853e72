"""Hashes of models, tensors and callables, by which a resumed run checks that it gets the same ones as before."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Callable, Collection, Iterator
from types import CodeType, ModuleType
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


def callable_fingerprint(function: Callable[..., Any] | None, apart_from: Collection[str] = ()) -> str | None:
    """Return the hash of a callable's code, defaults and closure, as far as they can be read; None for None.

    apart_from  the names of parts, as in `callable_parts`, that are left out
    """
    if function is None:
        return None
    if not apart_from:
        return hashlib.blake2b(_bytes(function, 0), digest_size=16).hexdigest()
    parts = callable_parts(function)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(set(parts) - set(apart_from)):
        digest.update(name.encode() + parts[name].encode())
    return digest.hexdigest()


def value_fingerprint(value: object) -> str:
    """Return a hash of a value, such as a list of tensors or the state of a generator."""
    if isinstance(value, torch.Generator):
        value = value.get_state()
    return hashlib.blake2b(_bytes(value, 0), digest_size=16).hexdigest()


def callable_parts(function: Callable[..., Any] | None) -> dict[str, str]:
    """Return the hashes of a callable's parts, by name: its code, and the values in its closure and its attributes.

    Comparing those of two times shows what the calls in between have changed, such as a log or a counter.
    """
    return {} if function is None else dict(_parts(function, "", 0))


def changed_parts(before: dict[str, str], after: dict[str, str]) -> frozenset[str]:
    """Return the names of parts, as in `callable_parts`, that were changed, added or removed."""
    return frozenset(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _parts(thing: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    held = _held(thing) if depth <= 2 else None
    own = _bytes(thing, 3) if held is None else _own_bytes(thing)  # 3 reads what lists and dicts hold, and no further
    yield name, hashlib.blake2b(own, digest_size=16).hexdigest()
    for key, value in (held or {}).items():
        yield from _parts(value, f"{name}.{key}".lstrip("."), depth + 1)


def _held(thing: Any) -> dict[str, Any] | None:
    """Return the values by which a callable, an object or a dict may differ between calls; None for other values."""
    if inspect.ismethod(thing):
        return {"self": thing.__self__}
    if isinstance(thing, functools.partial):
        return {"func": thing.func, "args": thing.args, "keywords": thing.keywords}
    if inspect.isfunction(thing):
        defaults, keyword_defaults, nonlocals, read = _context(thing)
        numbered = {f"default {number}": value for number, value in enumerate(defaults or ())}
        return {**numbered, **(keyword_defaults or {}), **nonlocals, **read}
    if isinstance(thing, dict):
        return thing if all(isinstance(key, str) for key in thing) else None
    if isinstance(thing, nn.Module):
        own = {} if is_compiled(thing) else vars(thing)
        own = {key: value for key, value in own.items() if key not in _OF_ANY_MODULE}
        return {**own, **thing._parameters, **thing._buffers, **thing._modules}
    if _plain_bytes(thing) is not None or isinstance(thing, type | ModuleType | list | tuple | set | frozenset):
        return None
    return getattr(thing, "__dict__", None)


def _own_bytes(thing: Any) -> bytes:
    """Return bytes that identify a value's class and code, without what it holds."""
    if inspect.ismethod(thing):
        thing = thing.__func__
    if inspect.isfunction(thing):
        return thing.__qualname__.encode() + _source(thing) + _code(thing)
    return f"{type(thing).__module__}.{type(thing).__qualname__}:".encode() + _class_source(type(thing))


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
        return name + _own_bytes(thing) + _bytes(_context(thing), depth + 1)
    if inspect.isclass(thing):
        return name + thing.__qualname__.encode() + _class_source(thing)
    if inspect.isbuiltin(thing):
        return name + thing.__qualname__.encode()
    return name + _class_source(type(thing)) + _bytes(getattr(thing, "__dict__", None), depth + 1)


def _context(function: Any) -> tuple[Any, ...]:
    """Return a function's defaults, keyword defaults, closure, and those globals it reads that count by content."""
    closure = inspect.getclosurevars(function)
    read = {key: value for key, value in closure.globals.items() if _counts_by_content(value)}
    return function.__defaults__, function.__kwdefaults__, closure.nonlocals, read


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


def _class_source(kind: type) -> bytes:
    """Return the source of a class and of those that it derives from, without libraries' classes."""
    return b"".join(_source(each) for each in kind.__mro__ if _counts_by_content(each))


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
        if inspect.isclass(value) and str(value.__module__).partition(".")[0] == "swamp_fast":
            return False
        file = getattr(inspect.getmodule(value), "__file__", None) or ""
        return not ("site-packages" in file or file.startswith(_STANDARD_LIBRARY))
    return value is None or isinstance(value, Tensor | bool | int | float | str | bytes | tuple | list | dict)


_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
