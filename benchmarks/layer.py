"""One 3x3 convolution, forward and both gradients: the fused engine, PyTorch's dense one, and SparseProp.

    python -m benchmarks.layer [--density 0.05]

The layers are those of ResNet-20 at batch 128, under a mask that is uniform at random. SparseProp (on PyPI) is timed
where it is installed, in both of its modes.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import header, interleaved, write
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.program import Program
from swamp_fast.layout import Layout
from swamp_fast.trace import plan_of

BATCH = 128
LAYERS = ((16, 32), (32, 16), (64, 8))  # channels and width of the map


def masked(channels: int, density: float) -> tuple[nn.Conv2d, Tensor]:
    """A layer whose weights are pruned at random."""
    with torch.random.fork_rng():
        torch.manual_seed(channels)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        mask = torch.rand(layer.weight.shape) < density
    layer.weight.data.mul_(mask)
    return layer, mask


def fused(
    layer: nn.Conv2d, mask: Tensor, inputs: Tensor, out_grad: Tensor
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """The engine's three calls for the layer, between two of one pixel; and what they have computed."""
    channels = layer.in_channels
    first, last = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
    for each in (first, last):
        nn.init.dirac_(each.weight)
    model = nn.Sequential(first, layer, last)
    layout = Layout.of(model.named_parameters(), {"1.weight"})
    kept = layout.full_mask(torch.device("cpu"))
    layout.mask_views(kept)["1.weight"].copy_(mask)
    compact = Compact(layout, kept)
    plan = plan_of(model, lambda module, x: module(x), inputs)
    program = Program(plan, compact, len(inputs), torch.float32, torch.float32, {}, trains=True)
    weights = compact.compact(layout.flat(dict(model.named_parameters()), torch.float32, torch.device("cpu")))
    outputs = program.run(inputs, weights, True, None)
    grads = compact.expand(program.backward(out_grad))
    found = layout.views(grads)["1.weight"]
    forward, (by_weights, by_input) = program.training_calls[1], program.backward_calls[2:4]

    def step() -> None:
        forward()
        by_weights()
        by_input()

    return step, lambda: (outputs, found)


def by_autograd(layer: nn.Module, inputs: Tensor, out_grad: Tensor) -> Callable[[], None]:
    """Forward and backward of a module."""
    inputs = inputs.clone(memory_format=torch.preserve_format).requires_grad_()

    def step() -> None:
        inputs.grad = None
        layer.zero_grad()
        layer(inputs).backward(out_grad)

    return step


def main() -> None:
    """Time each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    table = []
    for channels, width in LAYERS:
        layer, mask = masked(channels, given.density)
        generator = torch.Generator().manual_seed(0)
        inputs, out_grad = (torch.randn(BATCH, channels, width, width, generator=generator) for _ in range(2))
        ours, found = fused(layer, mask, inputs, out_grad)
        contenders = {"fused": ours, "dense, channels first": by_autograd(layer, inputs, out_grad)}
        last = torch.channels_last
        contenders["dense, channels last"] = by_autograd(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=last),
            *(inputs.contiguous(memory_format=last), out_grad.contiguous(memory_format=last)),
        )
        if importlib.util.find_spec("sparseprop"):
            from sparseprop.modules import SparseConv2d  # type: ignore[import-not-found]

            for mode in (False, True):
                name = f"SparseProp, over {'outputs' if mode else 'the batch'}"
                contenders[name] = by_autograd(SparseConv2d.from_dense(layer, mode), inputs, out_grad)
        check(layer, mask, inputs, out_grad, found())
        times = {name: each["median"] * 1e3 for name, each in interleaved(contenders, given.rounds).items()}
        theirs = min((each for name, each in times.items() if "SparseProp" in name), default=float("nan"))
        dense = min(each for name, each in times.items() if "dense" in name)
        table.append(
            {"layer": f"{channels} x {width} x {width}", "kept": int(mask.sum()),
             **{f"{name}, ms": round(each, 3) for name, each in times.items()},
             "SparseProp / fused": round(theirs / times["fused"], 1), "dense / fused": round(dense / times["fused"], 1)}
        )  # fmt: skip
    about = header(given.rounds) | {"batch": BATCH, "density": given.density, "masks": "uniform at random"}
    write("layer", f"python -m benchmarks.layer --density {given.density}", about, table)


def check(layer: nn.Conv2d, mask: Tensor, inputs: Tensor, out_grad: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """The engine's outputs and gradient by the weights are autograd's."""
    outputs = layer(inputs)
    (grad,) = torch.autograd.grad(outputs, layer.weight, out_grad)
    torch.testing.assert_close(found[0], outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], grad * mask, rtol=1e-3, atol=1e-2)


if __name__ == "__main__":
    main()
