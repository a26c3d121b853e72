"""A model traced by torch.fx and read node by node into a Plan; what isn't covered is named with its place."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from swamp_fast.engines.fused.plan import (
    Add,
    Concatenate,
    Convolution,
    Dropout,
    Flatten,
    Norm,
    Op,
    Plan,
    Pointwise,
    Pool,
    Shape,
)


class NotCovered(Exception):
    """Why the fused engine can't run a model, with the place in it."""


def plan_of(model: nn.Module, forward: Callable[[nn.Module, Any], Any], inputs: Tensor) -> Plan:
    """The plan of a model on inputs [B, ...]. Raises NotCovered."""
    if not isinstance(inputs, Tensor) or inputs.dim() not in (2, 4) or not inputs.is_floating_point():
        raise NotCovered("its input is not a tensor [B, channels, height, width] or [B, features]")
    for path, module in model.named_modules():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            raise NotCovered(f"{path or 'the model'} has hooks")
    called = _Called(copy.deepcopy(model), forward)
    graphs = [_trace(called.train()), _trace(called.eval())]
    if _text(graphs[0]) != _text(graphs[1]):
        raise NotCovered("its forward differs between training and evaluation")
    if any(node.target in _FUNCTIONAL_DROPOUTS and _dropout_arguments(node)[1] for node in graphs[1].nodes):
        raise NotCovered("its dropout stays on in evaluation")
    return _Reader(called, graphs[0], inputs).plan()


class _Called(nn.Module):
    """forward(model, inputs) as a module's own, to be traced."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self.model, inputs)


def _trace(module: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(module)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotCovered(f"its forward can't be traced ({reason})") from error


def _text(graph: fx.Graph) -> list[str]:
    """The nodes but for dropout's `training`, which alone may tell training from evaluation."""
    lines = []
    for node in graph.nodes:
        if node.target in _FUNCTIONAL_DROPOUTS:
            p, _, inplace = _dropout_arguments(node)
            lines.append(f"{node.op} {node.target} {_source(node)} {p} {inplace}")
            continue
        lines.append(f"{node.op} {node.target} {node.args} {node.kwargs}")
    return lines


def _dropout_arguments(node: fx.Node) -> tuple[float, bool, bool]:
    given = _given(node, "p", "training", "inplace")
    return given.get("p", 0.5), given.get("training", True), given.get("inplace", False)


class _Values(fx.Interpreter):
    """What every node gave on the inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


class _Reader:
    """Turns the nodes of a graph into operations, one handler a kind of node."""

    def __init__(self, called: _Called, graph: fx.Graph, inputs: Tensor) -> None:
        self.modules = dict(called.named_modules())
        self.names = {id(p): name.removeprefix("model.") for name, p in called.named_parameters()}
        self.graph = graph
        self.ops: list[Op] = []
        self.shapes: list[Shape] = []
        self.numbers: dict[fx.Node, int] = {}
        self.norms: dict[int, str] = {}  # of the output of a Norm
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        values = _Values(fx.GraphModule(called, graph))
        with torch.no_grad():
            values.run(inputs.clone())
        self.values = values.found
        self.batch = len(inputs)
        for node in graph.nodes:  # sizes and numbers that the forward computes are known: they become plain arguments
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._known)

    def _known(self, node: fx.Node) -> Any:
        value = self.values[node]
        return node if _holds_tensors(value) or node.op == "output" else value

    def plan(self) -> Plan:
        output = -1
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.numbers[node] = self.value(node)
            elif node.op == "output":
                output = self.read(_source(node), node)
            elif isinstance(self.values[node], Tensor):
                try:
                    self.numbers[node] = self.translate(node)
                except NotCovered:
                    raise
                except Exception as error:
                    raise NotCovered(f"{self.place(node)} can't be read ({type(error).__name__}: {error})") from error
            elif node.op == "call_module" or _holds_tensors(self.values[node]):
                raise NotCovered(f"{self.place(node)} does not give a tensor")
        if not any(isinstance(op, Convolution) for op in self.ops):
            raise NotCovered("it has neither convolutions nor linear layers")
        taken: set[str] = set()
        for op in self.ops:
            for what in ("weight", "bias"):
                name = getattr(op, what, None)
                if name in taken:
                    raise NotCovered(f"{op.place} shares its {what} with another layer")
                taken |= {name} if name else set()
        read = {output} | {number for op in self.ops for number in op.inputs}
        for op in self.ops:
            if op.output not in read:
                raise NotCovered(f"{op.place} gives what is not used")
        ops, norms = _fused(self.ops, self.norms, output)
        return Plan(tuple(ops), tuple(self.shapes), 0, output, norms)

    def value(self, node: fx.Node) -> int:
        """A new value of a node's shape."""
        tensor = self.values[node]
        if tensor.dim() not in (2, 4) or len(tensor) != self.batch:
            raise NotCovered(
                f"{self.place(node)} gives a tensor {list(tensor.shape)}, not [B, C, H, W] or [B, features]"
            )
        self.shapes.append(tuple(tensor.shape[1:]))
        return len(self.shapes) - 1

    def read(self, node: Any, reader: fx.Node) -> int:
        if not isinstance(node, fx.Node) or node not in self.numbers:
            raise NotCovered(f"{self.place(reader)} reads something other than a value of the batch")
        return self.numbers[node]

    def place(self, node: fx.Node) -> str:
        """Where in the model a node is."""
        if node.op == "call_module":
            path = "" if node.target == "model" else str(node.target).removeprefix("model.")
            return f"{path or 'the model'} ({type(self.modules[str(node.target)]).__name__})"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        inside = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        where = str(inside[-1]).removeprefix("model.") if inside and str(inside[-1]) != "model" else "its forward"
        return f"{name} in {where}"

    def translate(self, node: fx.Node) -> int:
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
        """An operation in place is one of its own unless its input is read again."""
        source = _source(node)
        number = self.numbers.get(source)
        alike = [each for each, other in self.numbers.items() if other == number]
        if any(self.order[user] > self.order[node] for each in alike for user in each.users):
            raise NotCovered(f"{self.place(node)} changes in place what is read again")

    def append(self, node: fx.Node, make: Callable[..., Op], *inputs: Any, **attributes: Any) -> int:
        numbers = tuple(self.read(each, node) for each in inputs)
        output = self.value(node)
        self.ops.append(make(self.place(node), numbers, output, **attributes))
        return output

    def convolution(self, node: fx.Node, module: Any) -> int:
        padding = module.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(each % 2 for each in total):
                raise NotCovered(f"{self.place(node)} pads one side more than the other")
            padding = tuple(each // 2 for each in total)
        elif padding == "valid":
            padding = (0, 0)
        if module.padding_mode != "zeros":
            raise NotCovered(f"{self.place(node)} pads with {module.padding_mode}")
        if module.stride[0] != module.stride[1]:
            raise NotCovered(f"{self.place(node)} has unequal strides")
        return self.append(
            *(node, Convolution, _source(node)),
            weight=self.names[id(module.weight)],
            bias=None if module.bias is None else self.names[id(module.bias)],
            stride=module.stride[0],
            padding=padding,
            dilation=module.dilation,
            groups=module.groups,
        )

    def linear(self, node: fx.Node, module: nn.Linear) -> int:
        if self.values[node].dim() != 2:
            raise NotCovered(f"{self.place(node)} has an input that is not [B, features]")
        bias = None if module.bias is None else self.names[id(module.bias)]
        return self.append(node, Convolution, _source(node), weight=self.names[id(module.weight)], bias=bias)

    def norm(self, node: fx.Node, module: Any) -> int:
        if module.momentum is None or module.running_mean is None or not module.track_running_stats:
            raise NotCovered(f"{self.place(node)} keeps its statistics in another way (momentum=None, or none at all)")
        path = str(node.target).removeprefix("model.")
        if path in self.norms.values():
            raise NotCovered(f"{self.place(node)} is used twice")
        weight, bias = (None if p is None else self.names[id(p)] for p in (module.weight, module.bias))
        output = self.append(node, Norm, _source(node), weight=weight, bias=bias, eps=module.eps)
        self.norms[output] = path
        return output

    def pool(self, node: fx.Node, source: Any, rows: Any, columns: Any, divisors: Any) -> int:
        if len(self.values[source].shape) != 4:
            raise NotCovered(f"{self.place(node)} has an input that is not [B, C, H, W]")
        return self.append(node, Pool, source, rows=rows, columns=columns, divisors=divisors)

    def windows(self, node: fx.Node, given: dict[str, Any], average: bool) -> int:
        """Pooling by kernel size, stride and padding."""
        size, stride, padding = (
            _pair(given.get(name, default)) for name, default in (("kernel_size", 1), ("stride", None), ("padding", 0))
        )
        stride = size if stride is None or stride == () else stride
        if _pair(given.get("dilation", 1)) != (1, 1) or given.get("return_indices", False):
            raise NotCovered(f"{self.place(node)} is dilated or returns indices")
        source = _source(node)
        inside, outside = self.values[source].shape[2:], self.values[node].shape[2:]
        spans = [  # before clipping
            [
                (i * stride[axis] - padding[axis], i * stride[axis] - padding[axis] + size[axis])
                for i in range(outside[axis])
            ]
            for axis in (0, 1)
        ]
        clipped = [tuple((max(begin, 0), min(end, inside[axis])) for begin, end in spans[axis]) for axis in (0, 1)]
        if not average:
            return self.pool(node, source, clipped[0], clipped[1], None)
        fixed = given.get("divisor_override")
        if given.get("count_include_pad", True):
            counts = [[min(end, inside[axis] + padding[axis]) - begin for begin, end in spans[axis]] for axis in (0, 1)]
        else:
            counts = [[end - begin for begin, end in clipped[axis]] for axis in (0, 1)]
        divisors = tuple(tuple(float(fixed or h * w) for w in counts[1]) for h in counts[0])
        return self.pool(node, source, clipped[0], clipped[1], divisors)

    def adaptive(self, node: fx.Node, average: bool) -> int:
        """Pooling to a given size."""
        source, outside = _source(node), self.values[node].shape[2:]
        inside = self.values[source].shape[2:]
        spans = [
            tuple((i * have // want, -(-(i + 1) * have // want)) for i in range(want))
            for have, want in zip(inside, outside, strict=True)
        ]
        divisors = tuple(tuple(float((b - a) * (d - c)) for c, d in spans[1]) for a, b in spans[0])
        return self.pool(node, source, spans[0], spans[1], divisors if average else None)

    def mean(self, node: fx.Node) -> int:
        """The mean over the picture, with or without its axes kept."""
        source, axes = _source(node), _given(node, "dim").get("dim")
        shape = self.values[source].shape
        axes = [axes] if isinstance(axes, int) else axes
        if len(shape) != 4 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise NotCovered(f"{self.place(node)} is not over height and width")
        number, size = self.read(source, node), (int(shape[1]), 1, 1)
        self.shapes.append(size)
        pooled = len(self.shapes) - 1
        whole = (((0, int(shape[2])),), ((0, int(shape[3])),), ((float(shape[2] * shape[3]),),))
        self.ops.append(Pool(self.place(node), (number,), pooled, *whole))
        if self.values[node].dim() == 4:
            return pooled
        output = self.value(node)
        self.ops.append(Flatten(self.place(node), (pooled,), output))
        return output

    def flatten(self, node: fx.Node) -> int:
        """Anything that makes [B, C, H, W] (or [B, features]) a row of features in the same order."""
        source = _source(node)
        before, after = self.values[source], self.values[node]
        if after.shape == before.shape:
            return self.read(source, node)
        if after.dim() != 2 or len(after) != self.batch:
            raise NotCovered(f"{self.place(node)} makes {list(after.shape)} of {list(before.shape)}")
        return self.append(node, Flatten, source)

    def activation(self, node: fx.Node, kind: str, parameter: float = 0.0) -> int:
        return self.append(node, Pointwise, _source(node), kind=kind, parameter=parameter)

    def softplus(self, node: fx.Node, given: dict[str, Any]) -> int:
        if given.get("beta", 1) != 1 or given.get("threshold", 20) != 20:
            raise NotCovered(f"{self.place(node)} has a beta or a threshold of its own")
        return self.activation(node, "softplus")

    def add(self, node: fx.Node) -> int:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            raise NotCovered(f"{self.place(node)} is not a plain sum")
        a, b = (self.values.get(each) if isinstance(each, fx.Node) else None for each in node.args)
        if a is None or b is None or a.shape != b.shape:
            raise NotCovered(f"{self.place(node)} does not add two values of one shape")
        return self.append(node, Add, *node.args)

    def concatenate(self, node: fx.Node) -> int:
        tensors, axis = _source(node), _given(node, "dim").get("dim", 0)
        if axis % self.values[node].dim() != 1:
            raise NotCovered(f"{self.place(node)} is not along the channels")
        return self.append(node, Concatenate, *tensors)

    def dropout(self, node: fx.Node, p: float, channels: bool) -> int:
        if p == 0:
            return self.read(_source(node), node)
        return self.append(node, Dropout, _source(node), p=p, channels=channels)

    def functional_dropout(self, node: fx.Node, channels: bool) -> int:
        p, training, inplace = _dropout_arguments(node)
        if not training:
            return self.read(_source(node), node)
        if inplace:
            self.refuse_later_readers(node)
        return self.dropout(node, p, channels)


def _fused(ops: list[Op], norms: dict[int, str], output: int) -> tuple[list[Op], tuple[str, ...]]:
    """A Norm takes over the sum and the ReLU behind it, where nothing else reads what is between."""
    readers: dict[int, int] = {output: 1}
    for op in ops:
        for number in op.inputs:
            readers[number] = readers.get(number, 0) + 1
    done: list[Op] = []
    made: dict[int, int] = {}  # output of a Norm -> its place in `done`
    for op in ops:
        norm = next((done[made[n]] for n in reversed(op.inputs) if n in made and readers[n] == 1), None)
        if isinstance(norm, Norm) and not norm.relu:
            place = made[norm.output]
            rest = tuple(n for n in op.inputs if n != norm.output)
            path = norms[norm.output]
            if isinstance(op, Add) and len(norm.inputs) == 1 and len(rest) == 1:
                del done[place]
                made = {n: at - (at > place) for n, at in made.items() if n != norm.output}
                done.append(replace(norm, inputs=(*norm.inputs, *rest), output=op.output))
                norms[op.output], made[op.output] = path, len(done) - 1
                continue
            if isinstance(op, Pointwise) and op.kind == "relu":
                done[place] = replace(norm, output=op.output, relu=True)
                norms[op.output] = path
                continue
        done.append(op)
        if isinstance(op, Norm):
            made[op.output] = len(done) - 1
    return done, tuple(norms[op.output] for op in done if isinstance(op, Norm))


def _pair(value: Any) -> Any:
    if value is None:
        return None
    pair = tuple(int(each) for each in (value if isinstance(value, list | tuple) else (value,)))
    return pair * 2 if len(pair) == 1 else pair


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list) or (isinstance(value, tuple) and any(map(_holds_tensors, value)))


def _source(node: fx.Node) -> Any:
    """A node's first argument."""
    return node.args[0] if node.args else node.kwargs["tensors" if "tensors" in node.kwargs else "input"]


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the input, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def _settings(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


_MODULES: dict[type[nn.Module], Callable[[_Reader, fx.Node, Any], int]] = {
    nn.Conv2d: _Reader.convolution,
    nn.Linear: _Reader.linear,
    nn.BatchNorm1d: _Reader.norm,
    nn.BatchNorm2d: _Reader.norm,
    nn.Identity: lambda r, node, m: r.read(_source(node), node),
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

_FUNCTIONAL_DROPOUTS = {F.dropout, F.dropout2d}
_FUNCTIONS: dict[Any, Callable[[_Reader, fx.Node], int]] = {
    **dict.fromkeys((F.relu, torch.relu), lambda r, node: r.activation(node, "relu")),
    F.leaky_relu: lambda r, node: r.activation(
        node, "leaky_relu", _given(node, "negative_slope").get("negative_slope", 0.01)
    ),
    F.elu: lambda r, node: r.activation(node, "elu", _given(node, "alpha").get("alpha", 1.0)),
    F.gelu: lambda r, node: r.activation(node, _gelu(_given(node, "approximate").get("approximate", "none"))),
    F.silu: lambda r, node: r.activation(node, "silu"),
    **dict.fromkeys((F.tanh, torch.tanh), lambda r, node: r.activation(node, "tanh")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid), lambda r, node: r.activation(node, "sigmoid")),
    F.hardswish: lambda r, node: r.activation(node, "hardswish"),
    F.softplus: lambda r, node: r.softplus(node, _given(node, "beta", "threshold")),
    F.mish: lambda r, node: r.activation(node, "mish"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _Reader.add),
    **dict.fromkeys((torch.cat, torch.concat), _Reader.concatenate),
    F.max_pool2d: lambda r, node: r.windows(node, _given(node, *_MAX), False),
    F.avg_pool2d: lambda r, node: r.windows(node, _given(node, *_AVERAGE), True),
    F.adaptive_avg_pool2d: lambda r, node: r.adaptive(node, True),
    F.adaptive_max_pool2d: lambda r, node: r.adaptive(node, False),
    **dict.fromkeys((torch.flatten, torch.squeeze), _Reader.flatten),
    torch.mean: _Reader.mean,
    F.dropout: lambda r, node: r.functional_dropout(node, False),
    F.dropout2d: lambda r, node: r.functional_dropout(node, True),
}
_METHODS: dict[str, Callable[[_Reader, fx.Node], int]] = {
    "relu": lambda r, node: r.activation(node, "relu"),
    "relu_": lambda r, node: r.activation(node, "relu"),
    "tanh": lambda r, node: r.activation(node, "tanh"),
    "sigmoid": lambda r, node: r.activation(node, "sigmoid"),
    **dict.fromkeys(("add", "add_", "__add__"), _Reader.add),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "contiguous"), _Reader.flatten),
    "mean": _Reader.mean,
}
