"""Plan: the intermediate representation of a model, operations that the fused engine runs without autograd."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]  # one sample's: (channels, height, width) or (features,)


@dataclass(frozen=True)
class Op:
    """One operation: its place in the model, and the numbers of the values that it reads and writes."""

    place: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Convolution(Op):
    """A convolution; a linear layer is one over a single pixel. `weight` and `bias` are names of parameters."""

    weight: str
    bias: str | None
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Norm(Op):
    """BatchNorm, then the sum with a second input if there is one, then ReLU if `relu`."""

    weight: str | None
    bias: str | None
    eps: float
    relu: bool = False


@dataclass(frozen=True)
class Pointwise(Op):
    """An activation; `kind` is a name in KINDS."""

    kind: str
    parameter: float = 0.0


@dataclass(frozen=True)
class Add(Op):
    """The sum of its inputs."""


@dataclass(frozen=True)
class Concatenate(Op):
    """The inputs' channels one after another."""


@dataclass(frozen=True)
class Pool(Op):
    """The average over windows, or the maximum if there are no divisors; windows are ranges of rows and of columns."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    divisors: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Flatten(Op):
    """A value [C, H, W] as features [C * H * W]."""


@dataclass(frozen=True)
class Dropout(Op):
    """Dropout of single units, or of whole channels if `channels`."""

    p: float
    channels: bool


@dataclass(frozen=True)
class Plan:
    """Operations in order, the shape of every value, and the numbers of the model's input and output.

    norms  the paths of the Norm operations' modules, in their order
    """

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    input: int
    output: int
    norms: tuple[str, ...]

    def count(self) -> dict[str, int]:
        """The number of operations of each kind."""
        kinds = [type(op).__name__ for op in self.ops]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def needs_gradient(self) -> set[int]:
        """The numbers of the values that depend on a parameter."""
        needed: set[int] = set()
        for op in self.ops:
            if isinstance(op, Convolution | Norm) or needed.intersection(op.inputs):
                needed.add(op.output)
        return needed


KINDS = {  # of Pointwise, numbered as in csrc/cpu/fused/fused.h
    name: number
    for number, name in enumerate(
        [
            "relu",
            "leaky_relu",
            "elu",
            "gelu",
            "gelu_tanh",
            "silu",
            "tanh",
            "sigmoid",
            "softplus",
            "hardswish",
            "mish",
        ]
    )
}
