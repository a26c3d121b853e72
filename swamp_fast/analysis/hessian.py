"""Flatness: the trace of the training loss's Hessian, by Hutchinson's estimator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swamp_fast.analysis.evaluator import Analysis, some_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.statistics import half_width
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.engines.lane_by_lane import Bound
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import at_time, evaluation_time, generators_left_alone


@dataclass(frozen=True)
class LayerTrace:
    """One parameter's part: the trace of its block, half the width of its 95 % interval, its norm, its kept weights."""

    trace: float
    half_width: float
    norm: float
    kept: int


@dataclass(frozen=True)
class HessianTrace:
    """tr(H) of the training loss at one solution; half widths are those of 95 % intervals over the probes.

    scaled  sum over parameters l of |w_l|^2 / n_l tr(H_ll), n_l its kept weights: it stays as it is when a layer's
            weights are multiplied by a number that the function doesn't notice
    norm    of all weights that are in the trace
    """

    trace: float
    half_width: float
    scaled: float
    scaled_half_width: float
    norm: float
    probes: int
    samples: int
    layers: dict[str, LayerTrace]


def hessian_trace(
    on: Analysis,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    probes: int = 32,
    samples: int | None = None,
    *,
    seed: int = 0,
) -> HessianTrace:
    """The trace of the Hessian over the kept weights and all other trained parameters: how sharp the minimum is.

    It is that of the mean loss of `samples` training samples (see Analysis; None: all of them), un-augmented,
    without weight decay, with the state's own BatchNorm statistics. Each probe is a vector v of signs on what is
    trained, 0 where pruned, and gives v H v, whose expectation is the trace (Hutchinson 1990; as in PyHessian, Yao et
    al. 2020, arXiv 1912.07145). A weight's sign depends on `seed`, the probe and its place alone, so that two models
    are compared with the same probes.

    BatchNorm makes the loss blind to the scale of weights, and averaging shrinks them, which raises the raw trace of
    an average (Dinh et al. 2017, arXiv 1703.04933): compare `scaled`, and look at the norms. Of fewer kept weights a
    trace is a sum of fewer terms: compare at equal density.
    """
    if probes < 2:
        raise ValueError(f"`probes` must be at least 2, for an interval; got {probes}.")
    layout, point, mask = on.problem.layout, on.solution(state), on.mask(masks)
    generator = torch.Generator().manual_seed(seed)
    trained = torch.zeros(layout.P, dtype=torch.int8)
    for entry in layout.entries:
        trained[entry.begin : entry.end] = 1
    trained[: layout.Q] *= mask.cpu()
    signs = torch.stack(
        [torch.randint(0, 2, (layout.P,), generator=generator, dtype=torch.int8) for _ in range(probes)]
    )
    data = some_of(on.train, samples)
    forms = quadratic_forms(on, point, (2 * signs - 1) * trained, data)
    norms, kept = {}, on.problem.kept(mask)
    for name, own in layout.views(point.weights).items():
        norms[name] = float(own.double().norm())
        kept.setdefault(name, own.numel())
    every = torch.stack(list(forms.values()))
    scales = torch.tensor([norms[name] ** 2 / max(kept[name], 1) for name in forms], dtype=torch.float64)
    total, scaled = every.sum(0).tolist(), (scales @ every).tolist()
    return HessianTrace(
        trace=sum(total) / probes,
        half_width=half_width(total),
        scaled=sum(scaled) / probes,
        scaled_half_width=half_width(scaled),
        norm=sum(norm**2 for norm in norms.values()) ** 0.5,
        probes=probes,
        samples=data.length,
        layers={
            name: LayerTrace(sum(values) / probes, half_width(values), norms[name], kept[name])
            for name, values in zip(forms, every.tolist(), strict=True)
        },
    )


@one_at_a_time
def quadratic_forms(on: Analysis, point: Solution, vectors: Tensor, data: Data) -> dict[str, Tensor]:
    """v_l (H v)_l of each vector and each parameter l, by name, [V] float64 each; their sum over l is v H v.

    vectors  [V, P]  of any type; H is the Hessian of the mean loss over `data`

    One graph of the gradient a batch, and a backward through it a vector: measured twice as fast on a CPU as the
    vectors in folded lanes, each with a graph of its own, and right for every model.
    """
    problem, layout = on.problem, on.problem.layout
    module = copy.deepcopy(problem.template).eval()
    Bound(module, layout, point.weights.clone(), None).hold()
    for name, buffer in module.named_buffers():
        buffer.copy_(point.buffers[name])
    named: dict[str, nn.Parameter] = dict(module.named_parameters())
    parameters = [named[entry.name] for entry in layout.entries]
    forms = torch.zeros(len(parameters), len(vectors), dtype=torch.float64)
    batches = pass_in_stored_order(data, problem.config.batch_size)
    # The fused attention kernels have no second derivative.
    with generators_left_alone(), sdpa_kernel(SDPBackend.MATH):
        for number, (inputs, targets, count) in enumerate(batches):
            key = at_time(on.keys(1), evaluation_time(0, number))
            problem.seeded(key)
            with DropoutStream(key):
                loss = problem.losses(problem.forward(module, inputs), targets).mean()
            share, gradients = count / data.length, _grad([loss], parameters, None, True)
            for place, vector in enumerate(vectors):
                own = layout.views(vector.to(problem.device, problem.dtype))
                directions = [own[entry.name] for entry in layout.entries]
                products = _grad(gradients, parameters, directions, False)
                found = [(a.double() * b.double()).sum() for a, b in zip(directions, products, strict=True)]
                forms[:, place] += share * torch.stack(found).cpu()
    return {entry.name: own for entry, own in zip(layout.entries, forms, strict=True)}


def _grad(
    outputs: list[Tensor], inputs: list[nn.Parameter], directions: list[Tensor] | None, create_graph: bool
) -> list[Tensor]:
    """Gradients of outputs, zero where one doesn't depend on an input; they may be asked for again."""
    there = [place for place, output in enumerate(outputs) if output.requires_grad]
    if not there:
        return [torch.zeros_like(each) for each in inputs]
    return list(
        torch.autograd.grad(
            [outputs[place] for place in there],
            inputs,
            None if directions is None else [directions[place] for place in there],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
