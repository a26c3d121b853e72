"""Plan: a model as a list of operations, which the fused engine runs without autograd."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]  # the shape of one sample: (channels, height, width) or (features,)


@dataclass(frozen=True)
class Op:
    """One operation of a Plan.

    place   where in the model the operation comes from, for messages
    inputs  the numbers of the values that it reads; a plan numbers its values from 0
    output  the number of the value that it writes
    """

    place: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Convolution(Op):
    """A convolution, or a linear layer as a convolution over a single pixel.

    weight, bias  names of parameters; `bias` is None if there is no bias
    """

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
    """An activation function.

    kind       a key of KINDS
    parameter  the negative slope of leaky_relu or the alpha of elu
    """

    kind: str
    parameter: float = 0.0


@dataclass(frozen=True)
class Add(Op):
    """The sum of two values of the same shape."""


@dataclass(frozen=True)
class Concatenate(Op):
    """The concatenation of its inputs along the channels."""


@dataclass(frozen=True)
class Pool(Op):
    """Average pooling, or max pooling if `divisors` is None.

    rows      the range (begin, end) of input rows that each output row covers
    columns   the range (begin, end) of input columns that each output column covers
    divisors  [output height][output width]  what the sum of each window is divided by
    """

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    divisors: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Flatten(Op):
    """The reshaping of a value [C, H, W] to features [C * H * W]."""


@dataclass(frozen=True)
class Dropout(Op):
    """Dropout with probability p, of single elements or, if `channels` is set, of whole channels."""

    p: float
    channels: bool


@dataclass(frozen=True)
class Plan:
    """A model as operations in the order in which they run.

    shapes         the shape of one sample of each value, by the value's number
    input, output  the numbers of the model's input and output
    norms          the module path of each Norm operation, in order
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
        """The numbers of the values that depend on a parameter, and so need a gradient."""
        needed: set[int] = set()
        for op in self.ops:
            if isinstance(op, Convolution | Norm) or needed.intersection(op.inputs):
                needed.add(op.output)
        return needed


KINDS = {  # activation functions, numbered as PointwiseKind in csrc/cpu/fused/fused.h
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
