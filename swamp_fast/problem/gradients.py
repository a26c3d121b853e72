"""Checks that the loss depends on the model that `forward` is given, and finds what else it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from swamp_fast.common.warn import warn_user

WRONG_MODULE = (
    "Use the module that `forward(model, inputs)` is given: particles are copies of your model, so a function that "
    "refers to your model itself trains none of them. A function assigned to model.forward also refers to your model; "
    "define forward in a class."
)


@contextmanager
def gradients_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context that clears the gradients of tensors, and restores them when it ends."""
    saved = [(tensor, tensor.grad) for tensor in tensors]
    for tensor, _ in saved:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, grad in saved:
            tensor.grad = grad


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors for which a backward pass from a loss would leave a gradient, each once."""
    leaves: list[Tensor] = []
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [child for child, _ in node.next_functions]
    return leaves


def check_gradients(model: nn.Module, original: nn.Module, outside: Sequence[Tensor]) -> list[str]:
    """Return the names of a copy's trained parameters for which one backward pass left no gradient.

    original  the user's model, from which `model` is copied
    outside   the tensors outside of the copy for which the loss has gradients

    Raises ValueError if no parameter has a gradient, or if the user's model was used in place of the copy.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    reached = {id(tensor) for tensor in outside}
    of_original = [name for name, parameter in original.named_parameters() if id(parameter) in reached]
    replaced = [name for name in of_original if name in without]
    if replaced:
        raise ValueError(
            f"the loss has gradients for {listed(replaced)} of your own model, but not of its copy. {WRONG_MODULE}"
        )
    if of_original:
        warn_user(
            f"the loss also has gradients for {listed(of_original)} of your own model, which no training changes. A "
            "penalty on model.parameters() therefore has no effect: compute it in `forward`, from the module that "
            "`forward` is given, and return it with the outputs. If your model is a teacher, use torch.no_grad()."
        )
    if len(without) == len(trained):
        raise ValueError(
            f"the loss has no gradient for any of the model's trained parameters: {listed(without)}. {WRONG_MODULE}"
        )
    return without


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names as text: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
