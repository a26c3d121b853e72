"""How flat is the minimum? Estimates the trace of the training loss's Hessian, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swamp_fast.analysis.evaluator import Analysis, some_of
from swamp_fast.common.checked import checked, checked_count
from swamp_fast.common.copying import copy_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.statistics import half_width
from swamp_fast.config import seed_of
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.engines.lane_by_lane import Bound
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import at_time, evaluation_time, generators_left_alone


@dataclass(frozen=True)
class LayerTrace:
    """One parameter: the trace of its diagonal block of H, with its 95 % interval's half width, and the weights' norm.

    kept  number of kept weights
    """

    trace: float
    half_width: float
    norm: float
    kept: int


@dataclass(frozen=True)
class HessianTrace:
    """The trace of the Hessian H of the training loss at one solution, with half widths of 95 % intervals over probes.

    scaled  sum over parameters l of |w_l|^2 / n_l tr(H_ll), where n_l is the number of kept weights. It doesn't change
            if the weights of a layer are rescaled and BatchNorm makes the function independent of their scale.
    norm    norm of all weights that the trace covers
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
    """Estimate how sharp a minimum is, by the trace of the Hessian over all trained parameters that are not pruned.

    H is the Hessian of the mean loss over `samples` training samples (as for Analysis; None uses all), without
    augmentation or weight decay, with the BatchNorm statistics of the state. A probe is a vector v with a random sign
    for each trained weight and 0 for each pruned weight. The expectation of v H v is the trace (Hutchinson 1990; as in
    PyHessian, Yao et al. 2020, arXiv 1912.07145). The sign of a weight depends only on `seed`, the index of the probe
    and the weight's position, so different models are compared with the same probes.

    Compare `scaled` instead of the raw trace, and look at the norms: BatchNorm makes the function independent of the
    scale of weights, and averaging shrinks weights, which raises the raw trace of an average (Dinh et al. 2017, arXiv
    1703.04933). Compare at equal density, because with fewer kept weights the trace has fewer terms.

    Raises ValueError for fewer than 2 probes, TypeError or ValueError for a state or masks that don't fit the model.
    """
    checked("on", on, Analysis)
    probes, seed = checked_count("probes", probes, 2, advice="An interval needs two."), seed_of("seed", seed)
    data = some_of(on.train, samples)
    layout, point, mask = on.problem.layout, on.solution(state), on.mask(masks)
    generator = torch.Generator().manual_seed(seed)
    trained = torch.zeros(layout.P, dtype=torch.int8)
    for entry in layout.entries:
        trained[entry.begin : entry.end] = 1
    trained[: layout.Q] *= mask.cpu()
    signs = torch.stack(
        [torch.randint(0, 2, (layout.P,), generator=generator, dtype=torch.int8) for _ in range(probes)]
    )
    forms = quadratic_forms(on, point, (2 * signs - 1) * trained, data)
    norms, kept = {}, on.problem.kept(mask)
    for name, weights in layout.views(point.weights).items():
        norms[name] = float(weights.double().norm())
        kept.setdefault(name, weights.numel())
    by_layer = torch.stack(list(forms.values()))  # [layers, probes]
    scales = torch.tensor([norms[name] ** 2 / max(kept[name], 1) for name in forms], dtype=torch.float64)
    total, scaled = by_layer.sum(0).tolist(), (scales @ by_layer).tolist()
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
            for name, values in zip(forms, by_layer.tolist(), strict=True)
        },
    )


@one_at_a_time
def quadratic_forms(on: Analysis, point: Solution, vectors: Tensor, data: Data) -> dict[str, Tensor]:
    """The products v_l (H v)_l of V vectors v for each parameter l, as name -> [V] float64. Their sum over l is v H v.

    H is the Hessian of the mean loss over `data`.

    vectors  [V, P]  of any type

    The graph of the gradient is built once per batch, and every vector is propagated backwards through it. On a CPU
    this was measured to be twice as fast as folded lanes, one per vector, and it is correct for every model.
    """
    problem, layout = on.problem, on.problem.layout
    module = copy_of(problem.template).eval()
    Bound(module, layout, point.weights.clone(), None).hold()
    for name, buffer in module.named_buffers():
        buffer.copy_(point.buffers[name])
    named: dict[str, nn.Parameter] = dict(module.named_parameters())
    parameters = [named[entry.name] for entry in layout.entries]
    forms = torch.zeros(len(parameters), len(vectors), dtype=torch.float64)
    batches = pass_in_stored_order(data, problem.config.batch_size)
    # Fused attention kernels have no second derivative, so attention uses the plain math backend.
    with generators_left_alone(), sdpa_kernel(SDPBackend.MATH):
        for number, (inputs, targets, count) in enumerate(batches):
            key = at_time(on.keys(1), evaluation_time(0, number))
            problem.seeded(key)
            with DropoutStream(key):
                loss = problem.losses(problem.forward(module, inputs), targets).mean()
            share, gradients = count / data.length, _grad([loss], parameters, None, True)
            for place, vector in enumerate(vectors):
                views = layout.views(vector.to(problem.device, problem.dtype))
                directions = [views[entry.name] for entry in layout.entries]
                products = _grad(gradients, parameters, directions, False)
                values = [(v.double() * hv.double()).sum() for v, hv in zip(directions, products, strict=True)]
                forms[:, place] += share * torch.stack(values).cpu()
    return {entry.name: values for entry, values in zip(layout.entries, forms, strict=True)}


def _grad(
    outputs: list[Tensor], inputs: list[nn.Parameter], directions: list[Tensor] | None, create_graph: bool
) -> list[Tensor]:
    """The gradients of outputs, weighted by `directions`, by each input: zero for an input without influence.

    The graph is kept, so that it can be used again.
    """
    differentiable = [place for place, output in enumerate(outputs) if output.requires_grad]
    if not differentiable:
        return [torch.zeros_like(parameter) for parameter in inputs]
    return list(
        torch.autograd.grad(
            [outputs[place] for place in differentiable],
            inputs,
            None if directions is None else [directions[place] for place in differentiable],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
