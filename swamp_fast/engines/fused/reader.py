"""Reader: translates a traced graph into operations, and refuses a node that the fused engine doesn't cover."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from swamp_fast.engines.fused.nodes import arguments_of, dropout_arguments, holds_tensors, source_of, values_of
from swamp_fast.engines.fused.plan import (
    Add,
    Concatenate,
    Convolution,
    Dropout,
    Flatten,
    Norm,
    Op,
    Pointwise,
    Pool,
    Shape,
)


class NotCovered(Exception):
    """The fused engine can't run a model; the message names the reason and the place in the model."""


class Reader:
    """Translates the nodes of a traced graph into operations, with one handler per kind of node.

    ops      the operations so far, in order
    shapes   the shape of one sample of each value, by the value's number
    numbers  the number of the value that each node computes
    norms    the module path of each Norm, by the number of the Norm's output
    values   what each node computes on the example inputs
    """

    def __init__(self, called: nn.Module, graph: fx.Graph, inputs: Tensor) -> None:
        self.modules = dict(called.named_modules())
        self.names = {id(p): name.removeprefix("model.") for name, p in called.named_parameters()}
        self.graph = graph
        self.ops: list[Op] = []
        self.shapes: list[Shape] = []
        self.numbers: dict[fx.Node, int] = {}
        self.norms: dict[int, str] = {}
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.values = values_of(called, graph, inputs)
        self.batch = len(inputs)
        for node in graph.nodes:  # sizes and numbers that the forward computes are replaced by their values
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._known)

    def _known(self, node: fx.Node) -> Any:
        """The value of a node if it holds no tensors, otherwise the node itself."""
        value = self.values[node]
        return node if holds_tensors(value) or node.op == "output" else value

    def run(self) -> int:
        """Translate all nodes; returns the number of the model's output.

        Raises NotCovered if a node can't be translated.
        """
        output = -1
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.numbers[node] = self.new_value(node)
            elif node.op == "output":
                output = self.number_of(source_of(node), node)
            elif isinstance(self.values[node], Tensor):
                self.numbers[node] = self.translate_or_refuse(node)
            elif node.op == "call_module" or holds_tensors(self.values[node]):
                raise NotCovered(f"{self.place(node)} does not return a tensor")
        return output

    def new_value(self, node: fx.Node) -> int:
        """Add a value with the shape of a node's result; returns the value's number.

        Raises NotCovered for any shape other than [B, C, H, W] or [B, features].
        """
        tensor = self.values[node]
        if tensor.dim() not in (2, 4) or len(tensor) != self.batch:
            raise NotCovered(
                f"{self.place(node)} returns a tensor {list(tensor.shape)}, not [B, C, H, W] or [B, features]"
            )
        self.shapes.append(tuple(tensor.shape[1:]))
        return len(self.shapes) - 1

    def number_of(self, node: Any, reader: fx.Node) -> int:
        """The number of the value that `node`, an argument of the node `reader`, computes."""
        if not isinstance(node, fx.Node) or node not in self.numbers:
            raise NotCovered(f"{self.place(reader)} has an argument that is not computed from the batch")
        return self.numbers[node]

    def place(self, node: fx.Node) -> str:
        """The name and the place of a node in the model, for messages."""
        if node.op == "call_module":
            path = "" if node.target == "model" else str(node.target).removeprefix("model.")
            return f"{path or 'the model'} ({type(self.modules[str(node.target)]).__name__})"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        inside = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        where = str(inside[-1]).removeprefix("model.") if inside and str(inside[-1]) != "model" else "its forward"
        return f"{name} in {where}"

    def translate_or_refuse(self, node: fx.Node) -> int:
        """Call `translate`, and turn any error that it raises into NotCovered."""
        try:
            return self.translate(node)
        except NotCovered:
            raise
        except Exception as error:
            raise NotCovered(f"{self.place(node)} can't be translated ({type(error).__name__}: {error})") from error

    def translate(self, node: fx.Node) -> int:
        """Append a node's operations; returns the number of its value."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            handler = _MODULES.get(type(module))
            if handler is None:
                raise NotCovered(f"{self.place(node)} is not covered")
            if getattr(module, "inplace", False):
                self.refuse_later_readers(node)
            return handler(self, node, module)
        if node.op == "get_attr":
            raise NotCovered(f"its forward uses {str(node.target).removeprefix('model.')} outside a module")
        function = _FUNCTIONS.get(node.target) if node.op == "call_function" else _METHODS.get(str(node.target))
        if function is None:
            raise NotCovered(f"{self.place(node)} is not covered")
        if node.kwargs.get("inplace") or str(node.target).endswith("_") or node.target is operator.iadd:
            self.refuse_later_readers(node)
        return function(self, node)

    def refuse_later_readers(self, node: fx.Node) -> None:
        """Raise NotCovered if a later node reads the input of an in-place operation.

        All other in-place operations give the same result as their out-of-place forms.
        """
        number = self.numbers.get(source_of(node))
        aliases = [other for other, other_number in self.numbers.items() if other_number == number]
        if any(self.order[user] > self.order[node] for alias in aliases for user in alias.users):
            raise NotCovered(f"{self.place(node)} changes its input in place, and the input is read again")

    def append(self, node: fx.Node, make: Callable[..., Op], *inputs: Any, **attributes: Any) -> int:
        """Append the operation of a node; returns the number of its output.

        make        the operation's class
        inputs      the nodes that the operation reads
        attributes  the other fields of the operation
        """
        numbers = tuple(self.number_of(argument, node) for argument in inputs)
        output = self.new_value(node)
        self.ops.append(make(self.place(node), numbers, output, **attributes))
        return output

    def convolution(self, node: fx.Node, module: Any) -> int:
        """Translate nn.Conv2d."""
        padding = module.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(pad % 2 for pad in total):
                raise NotCovered(f"{self.place(node)} pads one side more than the other")
            padding = tuple(pad // 2 for pad in total)
        elif padding == "valid":
            padding = (0, 0)
        if module.padding_mode != "zeros":
            raise NotCovered(f"{self.place(node)} pads with {module.padding_mode}")
        if module.stride[0] != module.stride[1]:
            raise NotCovered(f"{self.place(node)} has unequal strides")
        return self.append(
            *(node, Convolution, source_of(node)),
            weight=self.names[id(module.weight)],
            bias=None if module.bias is None else self.names[id(module.bias)],
            stride=module.stride[0],
            padding=padding,
            dilation=module.dilation,
            groups=module.groups,
        )

    def linear(self, node: fx.Node, module: nn.Linear) -> int:
        """Translate nn.Linear to a convolution over a single pixel."""
        if self.values[node].dim() != 2:
            raise NotCovered(f"{self.place(node)} has an input that is not [B, features]")
        bias = None if module.bias is None else self.names[id(module.bias)]
        return self.append(node, Convolution, source_of(node), weight=self.names[id(module.weight)], bias=bias)

    def norm(self, node: fx.Node, module: Any) -> int:
        """Translate nn.BatchNorm1d or nn.BatchNorm2d."""
        if module.momentum is None or module.running_mean is None or not module.track_running_stats:
            raise NotCovered(
                f"{self.place(node)} has no running statistics, or averages them over all batches (momentum=None)"
            )
        path = str(node.target).removeprefix("model.")
        if path in self.norms.values():
            raise NotCovered(f"{self.place(node)} is used twice")
        weight, bias = (None if p is None else self.names[id(p)] for p in (module.weight, module.bias))
        output = self.append(node, Norm, source_of(node), weight=weight, bias=bias, eps=module.eps)
        self.norms[output] = path
        return output

    def pool(self, node: fx.Node, source: Any, rows: Any, columns: Any, divisors: Any) -> int:
        """Append a Pool with the given windows and divisors, which are described at Pool."""
        if len(self.values[source].shape) != 4:
            raise NotCovered(f"{self.place(node)} has an input that is not [B, C, H, W]")
        return self.append(node, Pool, source, rows=rows, columns=columns, divisors=divisors)

    def windows(self, node: fx.Node, settings: dict[str, Any], average: bool) -> int:
        """Translate pooling with a kernel size, stride and padding.

        settings  the arguments of the pooling, by name
        average   average pooling instead of max pooling
        """
        size, stride, padding = (
            _pair(settings.get(name, default))
            for name, default in (("kernel_size", 1), ("stride", None), ("padding", 0))
        )
        stride = size if stride is None or stride == () else stride
        if _pair(settings.get("dilation", 1)) != (1, 1) or settings.get("return_indices", False):
            raise NotCovered(f"{self.place(node)} is dilated or returns indices")
        source = source_of(node)
        inside, outside = self.values[source].shape[2:], self.values[node].shape[2:]
        spans = [  # begin and end of each window; may reach into the padding
            [
                (i * stride[axis] - padding[axis], i * stride[axis] - padding[axis] + size[axis])
                for i in range(outside[axis])
            ]
            for axis in (0, 1)
        ]
        clipped = [tuple((max(begin, 0), min(end, inside[axis])) for begin, end in spans[axis]) for axis in (0, 1)]
        if not average:
            return self.pool(node, source, clipped[0], clipped[1], None)
        fixed = settings.get("divisor_override")
        if settings.get("count_include_pad", True):
            counts = [[min(end, inside[axis] + padding[axis]) - begin for begin, end in spans[axis]] for axis in (0, 1)]
        else:
            counts = [[end - begin for begin, end in clipped[axis]] for axis in (0, 1)]
        divisors = tuple(tuple(float(fixed or h * w) for w in counts[1]) for h in counts[0])
        return self.pool(node, source, clipped[0], clipped[1], divisors)

    def adaptive(self, node: fx.Node, average: bool) -> int:
        """Translate adaptive average or max pooling, whose output size is given."""
        source, outside = source_of(node), self.values[node].shape[2:]
        inside = self.values[source].shape[2:]
        spans = [
            tuple((i * size // windows, -(-(i + 1) * size // windows)) for i in range(windows))
            for size, windows in zip(inside, outside, strict=True)
        ]
        divisors = tuple(tuple(float((b - a) * (d - c)) for c, d in spans[1]) for a, b in spans[0])
        return self.pool(node, source, spans[0], spans[1], divisors if average else None)

    def mean(self, node: fx.Node) -> int:
        """Translate a mean over height and width, whether or not it keeps these axes."""
        source, axes = source_of(node), arguments_of(node, "dim").get("dim")
        shape = self.values[source].shape
        axes = [axes] if isinstance(axes, int) else axes
        if len(shape) != 4 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise NotCovered(f"{self.place(node)} is not a mean over height and width")
        number, size = self.number_of(source, node), (int(shape[1]), 1, 1)
        self.shapes.append(size)
        pooled = len(self.shapes) - 1
        whole = (((0, int(shape[2])),), ((0, int(shape[3])),), ((float(shape[2] * shape[3]),),))
        self.ops.append(Pool(self.place(node), (number,), pooled, *whole))
        if self.values[node].dim() == 4:
            return pooled
        output = self.new_value(node)
        self.ops.append(Flatten(self.place(node), (pooled,), output))
        return output

    def flatten(self, node: fx.Node) -> int:
        """Translate a reshaping of [B, C, H, W] to [B, C * H * W], or one that changes nothing."""
        source = source_of(node)
        before, after = self.values[source], self.values[node]
        if after.shape == before.shape:
            return self.number_of(source, node)
        if after.dim() != 2 or len(after) != self.batch:
            raise NotCovered(f"{self.place(node)} reshapes {list(before.shape)} to {list(after.shape)}")
        return self.append(node, Flatten, source)

    def activation(self, node: fx.Node, kind: str, parameter: float = 0.0) -> int:
        """Append an activation function; `kind` and `parameter` are described at Pointwise."""
        return self.append(node, Pointwise, source_of(node), kind=kind, parameter=parameter)

    def softplus(self, node: fx.Node, settings: dict[str, Any]) -> int:
        """Translate softplus. Raises NotCovered unless beta and threshold have their defaults."""
        if settings.get("beta", 1) != 1 or settings.get("threshold", 20) != 20:
            raise NotCovered(f"{self.place(node)} has a beta or threshold other than the default")
        return self.activation(node, "softplus")

    def add(self, node: fx.Node) -> int:
        """Translate the sum of two values of the same shape."""
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            raise NotCovered(f"{self.place(node)} is not a plain sum")
        a, b = (self.values.get(term) if isinstance(term, fx.Node) else None for term in node.args)
        if a is None or b is None or a.shape != b.shape:
            raise NotCovered(f"{self.place(node)} does not add two tensors of the same shape")
        return self.append(node, Add, *node.args)

    def concatenate(self, node: fx.Node) -> int:
        """Translate a concatenation along the channels."""
        tensors, axis = source_of(node), arguments_of(node, "dim").get("dim", 0)
        if axis % self.values[node].dim() != 1:
            raise NotCovered(f"{self.place(node)} does not concatenate along the channels")
        return self.append(node, Concatenate, *tensors)

    def dropout(self, node: fx.Node, p: float, channels: bool) -> int:
        """Translate dropout; with p = 0 it appends no operation.

        channels  drop whole channels instead of single elements
        """
        if p == 0:
            return self.number_of(source_of(node), node)
        return self.append(node, Dropout, source_of(node), p=p, channels=channels)

    def functional_dropout(self, node: fx.Node, channels: bool) -> int:
        """Translate F.dropout or F.dropout2d; with training=False it appends no operation."""
        p, training, inplace = dropout_arguments(node)
        if not training:
            return self.number_of(source_of(node), node)
        if inplace:
            self.refuse_later_readers(node)
        return self.dropout(node, p, channels)


def _pair(value: Any) -> Any:
    """(height, width) from an argument of a pooling that is one number or two; None for None."""
    if value is None:
        return None
    pair = tuple(int(size) for size in (value if isinstance(value, list | tuple) else (value,)))
    return pair * 2 if len(pair) == 1 else pair


def _settings(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


_MODULES: dict[type[nn.Module], Callable[[Reader, fx.Node, Any], int]] = {
    nn.Conv2d: Reader.convolution,
    nn.Linear: Reader.linear,
    nn.BatchNorm1d: Reader.norm,
    nn.BatchNorm2d: Reader.norm,
    nn.Identity: lambda r, node, m: r.number_of(source_of(node), node),
    nn.ReLU: lambda r, node, m: r.activation(node, "relu"),
    nn.LeakyReLU: lambda r, node, m: r.activation(node, "leaky_relu", m.negative_slope),
    nn.ELU: lambda r, node, m: r.activation(node, "elu", m.alpha),
    nn.GELU: lambda r, node, m: r.activation(node, _gelu(m.approximate)),
    nn.SiLU: lambda r, node, m: r.activation(node, "silu"),
    nn.Tanh: lambda r, node, m: r.activation(node, "tanh"),
    nn.Sigmoid: lambda r, node, m: r.activation(node, "sigmoid"),
    nn.Hardswish: lambda r, node, m: r.activation(node, "hardswish"),
    nn.Softplus: lambda r, node, m: r.softplus(node, _settings(m, "beta", "threshold")),
    nn.Mish: lambda r, node, m: r.activation(node, "mish"),
    nn.MaxPool2d: lambda r, node, m: r.windows(node, _settings(m, *_MAX), False),
    nn.AvgPool2d: lambda r, node, m: r.windows(node, _settings(m, *_AVERAGE), True),
    nn.AdaptiveAvgPool2d: lambda r, node, m: r.adaptive(node, True),
    nn.AdaptiveMaxPool2d: lambda r, node, m: r.adaptive(node, False),
    nn.Flatten: lambda r, node, m: r.flatten(node),
    nn.Dropout: lambda r, node, m: r.dropout(node, m.p, False),
    nn.Dropout2d: lambda r, node, m: r.dropout(node, m.p, True),
}

_FUNCTIONS: dict[Any, Callable[[Reader, fx.Node], int]] = {
    **dict.fromkeys((F.relu, torch.relu), lambda r, node: r.activation(node, "relu")),
    F.leaky_relu: lambda r, node: r.activation(
        node, "leaky_relu", arguments_of(node, "negative_slope").get("negative_slope", 0.01)
    ),
    F.elu: lambda r, node: r.activation(node, "elu", arguments_of(node, "alpha").get("alpha", 1.0)),
    F.gelu: lambda r, node: r.activation(node, _gelu(arguments_of(node, "approximate").get("approximate", "none"))),
    F.silu: lambda r, node: r.activation(node, "silu"),
    **dict.fromkeys((F.tanh, torch.tanh), lambda r, node: r.activation(node, "tanh")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid), lambda r, node: r.activation(node, "sigmoid")),
    F.hardswish: lambda r, node: r.activation(node, "hardswish"),
    F.softplus: lambda r, node: r.softplus(node, arguments_of(node, "beta", "threshold")),
    F.mish: lambda r, node: r.activation(node, "mish"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), Reader.add),
    **dict.fromkeys((torch.cat, torch.concat), Reader.concatenate),
    F.max_pool2d: lambda r, node: r.windows(node, arguments_of(node, *_MAX), False),
    F.avg_pool2d: lambda r, node: r.windows(node, arguments_of(node, *_AVERAGE), True),
    F.adaptive_avg_pool2d: lambda r, node: r.adaptive(node, True),
    F.adaptive_max_pool2d: lambda r, node: r.adaptive(node, False),
    **dict.fromkeys((torch.flatten, torch.squeeze), Reader.flatten),
    torch.mean: Reader.mean,
    F.dropout: lambda r, node: r.functional_dropout(node, False),
    F.dropout2d: lambda r, node: r.functional_dropout(node, True),
}
_METHODS: dict[str, Callable[[Reader, fx.Node], int]] = {
    "relu": lambda r, node: r.activation(node, "relu"),
    "relu_": lambda r, node: r.activation(node, "relu"),
    "tanh": lambda r, node: r.activation(node, "tanh"),
    "sigmoid": lambda r, node: r.activation(node, "sigmoid"),
    **dict.fromkeys(("add", "add_", "__add__"), Reader.add),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "contiguous"), Reader.flatten),
    "mean": Reader.mean,
}
