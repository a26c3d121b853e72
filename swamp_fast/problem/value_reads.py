"""Detects whether a forward pass reads the values of tensors, so that it may branch on them.

Lanes that are folded into one batch would all take the same branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# The names of dispatcher operations that read values to return them, or to determine the shape of their result.
READING_OPERATIONS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("unique", "_unique2", "_to_sparse"),
)
# Methods that read values without an operation that the dispatcher sees.
READING_METHODS = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr}


class ValueReads(TorchFunctionMode):
    """A mode that records operations which read the values of tensors.

    operation  the name of the last such operation; None if there was none
    """

    def __init__(self) -> None:
        super().__init__()
        self.operation: str | None = None
        self.below = _DispatchedReads(self)

    def __enter__(self) -> ValueReads:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.below.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.below.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self.operation = getattr(func, "__name__", str(func))
        return func(*args, **(kwargs or {}))


class _DispatchedReads(TorchDispatchMode):
    def __init__(self, reads: ValueReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READING_OPERATIONS or by_mask:
            self.reads.operation = "a boolean index" if by_mask else name
        return func(*args, **(kwargs or {}))
