"""Times a 3x3 convolution, forward and both gradients, by the fused engine, by PyTorch (dense), and by SparseProp.

    python -m benchmarks.layer [--density 0.05]

The layers are those of ResNet-20 at batch 128, under masks that are uniform at random. SparseProp (on PyPI) is timed in
both of its modes if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import header, interleaved, write
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.program import Program
from swamp_fast.engines.fused.trace import plan_of
from swamp_fast.particles.layout import Layout

BATCH = 128
LAYERS = ((16, 32), (32, 16), (64, 8))  # channels, width of the feature map


def masked(channels: int, density: float) -> tuple[nn.Conv2d, Tensor]:
    """Return a layer whose weights are pruned at random, and its mask."""
    with torch.random.fork_rng():
        torch.manual_seed(channels)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        mask = torch.rand(layer.weight.shape) < density
    layer.weight.data.mul_(mask)
    return layer, mask


def fused(layer: nn.Conv2d, mask: Tensor, inputs: Tensor, out_grad: Tensor) -> Callable[[], None]:
    """Return a call of the fused engine's forward and two gradients for a layer, after comparing them with autograd.

    The layer is put between two 1x1 convolutions, so that the engine computes its gradient by the input too.
    """
    channels = layer.in_channels
    model = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), layer, nn.Conv2d(channels, channels, 1))
    layout = Layout.of(model.named_parameters(), {"1.weight"})
    kept = layout.full_mask(torch.device("cpu"))
    layout.mask_views(kept)["1.weight"].copy_(mask)
    compact = Compact(layout, kept)
    plan = plan_of(model, lambda module, x: module(x), inputs)
    program = Program(plan, compact, len(inputs), torch.float32, torch.float32, {}, trains=True)
    weights = compact.compact(layout.flat(dict(model.named_parameters()), torch.float32, torch.device("cpu")))
    by_engine = program.run(inputs, weights, True, None)
    outputs = model(inputs)
    torch.testing.assert_close(by_engine, outputs, rtol=1e-4, atol=1e-4)
    outputs.backward(out_grad)
    grads = layout.views(compact.expand(program.backward(out_grad)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad * mask if name == "1.weight" else parameter.grad
        error = float((grads[name] - grad).norm() / grad.norm())
        if not error < 1e-5:
            raise RuntimeError(f"the gradient of {name} differs from autograd's by {error:.2g}, so nothing is timed")
    forward, (by_weights, by_input) = program.training_calls[1], program.backward_calls[2:4]

    def step(owner: Program = program) -> None:  # keeps the program alive, whose memory the calls use
        forward()
        by_weights()
        by_input()

    return step


def by_autograd(layer: nn.Module, inputs: Tensor, out_grad: Tensor) -> Callable[[], None]:
    """Return a call of the forward and backward pass of a module by autograd."""
    inputs = inputs.clone(memory_format=torch.preserve_format).requires_grad_()

    def step() -> None:
        inputs.grad = None
        layer.zero_grad()
        layer(inputs).backward(out_grad)

    return step


def main() -> None:
    """Time each layer and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    table: list[dict[str, Any]] = []
    for channels, width in LAYERS:
        layer, mask = masked(channels, given.density)
        generator = torch.Generator().manual_seed(0)
        inputs, out_grad = (torch.randn(BATCH, channels, width, width, generator=generator) for _ in range(2))
        contenders = {
            "fused": fused(layer, mask, inputs, out_grad),
            "dense, channels first": by_autograd(layer, inputs, out_grad),
        }
        last = torch.channels_last
        contenders["dense, channels last"] = by_autograd(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=last),
            *(inputs.contiguous(memory_format=last), out_grad.contiguous(memory_format=last)),
        )
        if importlib.util.find_spec("sparseprop"):
            from sparseprop.modules import SparseConv2d  # type: ignore[import-not-found]

            for mode in (False, True):
                name = f"SparseProp, over {'outputs' if mode else 'the batch'}"
                sparseprop = SparseConv2d.from_dense(layer, mode)
                torch.testing.assert_close(sparseprop(inputs), layer(inputs), rtol=1e-3, atol=1e-3)
                contenders[name] = by_autograd(sparseprop, inputs, out_grad)
        quantiles = interleaved(contenders, given.rounds)
        times = {name: seconds["median"] * 1e3 for name, seconds in quantiles.items()}
        sparse = [milliseconds for name, milliseconds in times.items() if "SparseProp" in name]
        dense = min(milliseconds for name, milliseconds in times.items() if "dense" in name)
        row: dict[str, Any] = {"layer": f"{channels} x {width} x {width}", "kept": int(mask.sum())}
        row |= {f"{name}, ms": round(milliseconds, 3) for name, milliseconds in times.items()}
        row["SparseProp / fused"] = round(min(sparse) / times["fused"], 1) if sparse else None
        table.append(row | {"dense / fused": round(dense / times["fused"], 1)})
    about = header(given.rounds) | {"batch": BATCH, "density": given.density, "masks": "uniform at random"}
    if importlib.util.find_spec("sparseprop"):
        about["SparseProp"] = importlib.metadata.version("sparseprop")
    write("layer", f"python -m benchmarks.layer --density {given.density}", about, table)


if __name__ == "__main__":
    main()
