"""Plan: a model as a list of operations that the fused engine runs without autograd; trace.py reads it off."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]  # of one sample: (channels, height, width), or (features,)


@dataclass(frozen=True)
class Op:
    """One operation: its place in the model, and the values it reads and writes, by number."""

    place: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Convolution(Op):
    """A convolution, or a linear layer as one over a single pixel."""

    weight: str  # names of parameters
    bias: str | None
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Norm(Op):
    """BatchNorm, and what follows it: a second input that is added, and ReLU."""

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
    """Its inputs' channels one after the other."""


@dataclass(frozen=True)
class Pool(Op):
    """Maximum (no divisors) or average over windows, given as ranges of rows and of columns."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    divisors: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Flatten(Op):
    """A spatial value as features."""


@dataclass(frozen=True)
class Dropout(Op):
    """Dropout of units, or of whole channels."""

    p: float
    channels: bool


@dataclass(frozen=True)
class Plan:
    """Operations in order, the shape of every value, and which values are the model's input and output."""

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    input: int
    output: int
    norms: tuple[str, ...]  # the modules of the Norm ops, in their order

    def count(self) -> dict[str, int]:
        """How many operations there are of each kind."""
        kinds = [type(op).__name__ for op in self.ops]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def needs_gradient(self) -> set[int]:
        """The values that depend on a parameter."""
        needed: set[int] = set()
        for op in self.ops:
            if isinstance(op, Convolution | Norm) or needed.intersection(op.inputs):
                needed.add(op.output)
        return needed


KINDS = {  # as csrc/cpu/fused/fused.h numbers them
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
