"""Small networks that each test one operation, and a function that runs a step of them on any engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cpu.runner import CpuPrograms
from swamp_fast.engines.fused.cuda.runner import CudaPrograms
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.particles.random import lane_keys, stream_of
from swamp_fast.problem.prepare import prepare


class Net(nn.Module):
    """A network of named layers. Its forward is `run(net, x)`, followed by flattening and a linear head."""

    def __init__(self, run, features: int, **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), run
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.run(self.layers, x), 1))


def convolution(*args, size: int, **settings):
    """A network with a convolution between two others, so that its input gradient is needed."""
    channels = args[1]
    return lambda: Net(
        lambda m, x: m["last"](F.relu(m["conv"](m["first"](x)))),
        4 * size,
        first=nn.Conv2d(3, args[0], 3, padding=1),
        conv=nn.Conv2d(*args, **settings),
        last=nn.Conv2d(channels, 4, 1),
    )


def after_convolution(operation, features: int, channels: int = 6):
    return lambda: Net(lambda m, x: operation(m["conv"](x)), features, conv=nn.Conv2d(3, channels, 3, padding=1))


def dense_block(m, x):
    for name in ("a", "b"):
        x = torch.cat([x, F.relu(m[name](x))], 1)
    return m["c"](x)


def branches(m, x):
    x = m["a"](x)
    y = F.relu(m["na"](x))
    return F.relu(m["nb"](m["b"](y)) + y) + m["c"](x)


ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}


NETS = {
    "3x3": convolution(6, 8, 3, padding=1, size=81),
    "stride 2": convolution(6, 8, 3, stride=2, padding=1, size=25),
    "stride 3, no padding": convolution(5, 7, 3, stride=3, size=9),
    "1x1, stride 2": convolution(4, 8, 1, stride=2, size=25),
    "5x5": convolution(4, 4, 5, padding=2, size=81),
    "more padding than the kernel reaches": convolution(4, 4, 2, padding=2, size=144),
    "3x1": convolution(4, 4, (3, 1), padding=(1, 0), size=81),
    "dilated": convolution(4, 6, 3, dilation=2, padding=2, size=81),
    "dilated, stride 2": convolution(4, 6, 3, stride=2, dilation=2, padding=1, size=16),
    "same": convolution(4, 6, 3, padding="same", bias=False, size=81),
    "grouped": convolution(6, 12, 3, padding=1, groups=3, size=81),
    "depthwise": convolution(8, 8, 3, padding=1, groups=8, size=81),
    "whole picture": convolution(4, 6, 9, size=1),
    **{f"activation {name}": after_convolution(each, 6 * 81) for name, each in ACTIVATIONS.items()},
    "maximum": after_convolution(lambda x: F.max_pool2d(x, 2), 6 * 16),
    "maximum, overlapping": after_convolution(lambda x: F.max_pool2d(x, 3, 2, 1), 6 * 25),
    "maximum, ceil": after_convolution(lambda x: F.max_pool2d(x, 2, ceil_mode=True), 6 * 25),
    "average": after_convolution(lambda x: F.avg_pool2d(x, 3, 2, 1), 6 * 25),
    "average, its own counts": after_convolution(lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), 6 * 25),
    "average, ceil": after_convolution(lambda x: F.avg_pool2d(x, 2, ceil_mode=True), 6 * 25),
    "adaptive": after_convolution(lambda x: F.adaptive_avg_pool2d(x, (2, 4)), 6 * 8),
    "adaptive maximum": after_convolution(lambda x: F.adaptive_max_pool2d(x, (2, 4)), 6 * 8),
    "sizes from the forward": after_convolution(lambda x: F.avg_pool2d(x, x.size()[3]), 6),
    "sizes by axis": after_convolution(lambda x: F.max_pool2d(x, (x.size(2), x.shape[3])).squeeze(), 6),
    "by keyword": after_convolution(lambda x: torch.flatten(input=torch.cat(tensors=[x, x], dim=1), start_dim=1), 972),
    "mean": after_convolution(lambda x: x.mean((2, 3)), 6),
    "mean, kept": after_convolution(lambda x: x.mean([-2, -1], keepdim=True), 6),
    "norm": lambda: Net(lambda m, x: m["n"](m["a"](x)), 6 * 81, a=nn.Conv2d(3, 6, 3, padding=1), n=nn.BatchNorm2d(6)),
    "norm of the input": lambda: Net(
        lambda m, x: F.relu(m["a"](F.relu(m["n"](x)))), 6 * 81, n=nn.BatchNorm2d(3), a=nn.Conv2d(3, 6, 3, padding=1)
    ),
    "norm without weights": lambda: Net(
        lambda m, x: m["n"](m["a"](x)), 486, a=nn.Conv2d(3, 6, 3, padding=1), n=nn.BatchNorm2d(6, 0.1, affine=False)
    ),
    "norm of features": lambda: Net(
        lambda m, x: F.relu(m["n"](m["a"](x.flatten(1)))), 20, a=nn.Linear(243, 20), n=nn.BatchNorm1d(20, momentum=0.3)
    ),
    "concatenated": lambda: Net(
        dense_block, 4, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(7, 5, 3, padding=1), c=nn.Conv2d(12, 4, 9)
    ),
    "branches": lambda: Net(
        branches, 4 * 81, a=nn.Conv2d(3, 4, 3, padding=1), na=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 3, padding=1),
        nb=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1),
    ),
    "norm and its input": lambda: Net(
        lambda m, x: (y := m["a"](x)) + m["n"](y), 6 * 81, a=nn.Conv2d(3, 6, 3, padding=1), n=nn.BatchNorm2d(6)
    ),
    "sizes of one number": after_convolution(lambda x: F.avg_pool2d(F.max_pool2d(x, [2]), (3,), (1,), [1]), 6 * 16),
    "added twice": lambda: Net(lambda m, x: (y := m["a"](x)) + y, 4 * 81, a=nn.Conv2d(3, 4, 3, padding=1)),
    "dropout": lambda: Net(
        lambda m, x: m["e"](m["d"](m["a"](x))), 4 * 81, a=nn.Conv2d(3, 4, 3, padding=1), d=nn.Dropout2d(0.4),
        e=nn.Dropout(0.3),
    ),
}  # fmt: skip


SETTINGS = {"cycles": 1, "epochs": 1, "ticket_epochs": 0, "progress": False}


def problem_of(model: nn.Module, batch: int, precision: str = "float64", shape=(3, 9, 9), device: str = "cpu"):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(2 * batch + 3, *shape, generator=generator), torch.arange(2 * batch + 3) % 5
    return prepare(model, data, settings={**SETTINGS, "batch_size": batch, "precision": precision, "device": device})


def masked(problem, density: float) -> Tensor:
    drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(2))
    return problem.mask & (drawn < density).to(problem.device)


def step(problem, kind: str, mask: Tensor, lanes: int = 2, rows=None, launch=None) -> dict[str, Tensor]:
    """Run one step of lanes that have different weights, and then evaluate them.

    Returns the losses, the gradients of the kept weights, the running statistics and the outputs in evaluation.

    kind  "autograd", "fused" (the C++ kernels) or "cuda" (the GPU kernels; without a GPU, in Triton's interpreter)
    """
    compact = Compact(problem.layout, mask)
    own = problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device)
    weights = torch.stack([own * (1 - 0.1 * lane) for lane in range(lanes)])
    weights = compact.expand(compact.compact(weights))
    keys = lane_keys([0] * lanes, [stream_of(0, lane) for lane in range(lanes)], problem.device)
    order = torch.stack([torch.arange(problem.train.length).roll(-3 * lane) for lane in range(lanes)])
    order = order.to(problem.device)
    batch = problem.train.fetch(next(iter(problem.train.batches(order, keys, problem.bounds[:1]))), None)
    if kind != "autograd":
        plan = fused_plan(problem)
        assert isinstance(plan, Plan), plan
        grads = torch.zeros(lanes, compact.P, dtype=problem.dtype, device=problem.device)
        programs: CpuPrograms | CudaPrograms
        if kind == "fused":
            programs = CpuPrograms(problem, plan, mask, rows if rows is not None else {})
        else:
            programs = CudaPrograms(problem, plan, mask, launch)
        way = programs.lanes(programs.compact.compact(weights), grads)
    else:
        grads = torch.zeros_like(weights)
        way = LaneByLane(problem, weights, grads, False)
    for module in way.modules:
        module.train()
    found = {"losses": way.backward(batch, keys)}
    found["gradients"] = compact.compact(grads if kind == "autograd" else programs.compact.expand(grads))
    found |= {name: buffer.clone() for name, buffer in way.buffers().items()}
    for module in way.modules:
        module.eval()
    with torch.no_grad():
        found["outputs"] = torch.stack(way.outputs(batch.lane(0)[0], keys))
    return found


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference from the exact values, relative to the largest exact value, by name."""
    return {
        name: float((found[name].double() - each.to(found[name].device).double()).abs().max())
        / float(each.double().abs().max().clamp(min=1e-300))
        for name, each in exact.items()
    }


def seeded(make) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.bias, 0.1, 0.5)  # not 0, where ReLU has a kink
    return model
