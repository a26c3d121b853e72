"""Analyses of trained solutions: connectivity, flatness, masks, ensembles and cost.

Each file answers one question. All of them use evaluator.py, which evaluates many solutions at once, as lanes.

The three examples below take seconds on scikit-learn's digits. Real conclusions need longer trainings, several seeds
and real pictures. All three examples use the same network and settings:

>>> import torch
>>> from swamp_fast import fast_swamp
>>> from swamp_fast.analysis import Analysis, hessian_trace, hull, loss_barrier, particles
>>> from swamp_fast.models import SmallCNN
>>> _ = torch.manual_seed(0)
>>> model = SmallCNN(1, 10, width=8)
>>> settings = {"epochs": 3, "ticket_epochs": 2, "batch_size": 64, "progress": False}

**Are two particles linearly connected?** Look at the error barrier between them on test data, and at the loss of
their mixtures. The customary threshold is 2 % error (arXiv 1912.05671).

>>> result = fast_swamp(model, "digits", particles=2, cycles=1, keep_particles=True, **settings)
>>> on = Analysis(model, "digits", config=result.config)
>>> a, b = particles(result)
>>> path = loss_barrier(on, a, b, points=11)
>>> len(path.t), path.barrier("test_error") < 0.02
(11, True)
>>> mixtures = hull(on, [a, b], mixtures=8)
>>> max(mixtures.train_loss) <= max(mixtures.corners.train_loss) + 0.01
True

**Is SWAMP's minimum flatter than IMP's, at equal sparsity?** Look at the trace of the Hessian and its interval. It is
scaled by the layers' norms, because BatchNorm makes the function independent of their scale.

>>> traces = {}
>>> for name, method in {"imp": {"particles": 1, "average": "none"}, "swamp": {"particles": 4}}.items():
...     pruned = fast_swamp(model, "digits", cycles=2, **method, **settings)
...     traces[name] = hessian_trace(on, pruned.state_dict, pruned.masks, probes=16, samples=512)
>>> [len(trace.layers) for trace in traces.values()]
[11, 11]
>>> f"{traces['swamp'].scaled:.3g} ± {traces['swamp'].scaled_half_width:.2g}, norm {traces['swamp'].norm:.3g}"
'... ± ..., norm ...'

**What do more particles gain?** Compare N = 1, 2, 4, 8. The random draws are nested: particle 3, for example, draws
the same numbers for every N that includes it.

>>> accuracy = {}
>>> for n in (1, 2, 4, 8):
...     accuracy[n] = fast_swamp(model, "digits", particles=n, cycles=1, **settings).history[-1]["accuracy"]
>>> all(0.9 < value <= 1 for value in accuracy.values())
True
"""

from swamp_fast.analysis.connectivity import BarrierMatrix, Hull, Path, barrier_matrix, consecutive, hull, loss_barrier
from swamp_fast.analysis.cost import InferenceCost, LayerCost, inference_cost
from swamp_fast.analysis.ensemble import Ensemble, Predictions, ensemble, predictions
from swamp_fast.analysis.evaluator import Analysis, Scores, State, averages, particles
from swamp_fast.analysis.hessian import HessianTrace, LayerTrace, hessian_trace
from swamp_fast.analysis.masks import Channels, MaskOverlap, Overlap, channels, densities, mask_overlap
from swamp_fast.analysis.plane import Plane, contour, loss_plane
from swamp_fast.analysis.suite import analyze, differing
from swamp_fast.analysis.summary import table
from swamp_fast.analysis.ticket_stability import TicketStability, ticket_stability

__all__ = [
    "Analysis",
    "BarrierMatrix",
    "Channels",
    "Ensemble",
    "HessianTrace",
    "Hull",
    "InferenceCost",
    "LayerCost",
    "LayerTrace",
    "MaskOverlap",
    "Overlap",
    "Path",
    "Plane",
    "Predictions",
    "Scores",
    "State",
    "TicketStability",
    "analyze",
    "averages",
    "barrier_matrix",
    "channels",
    "consecutive",
    "contour",
    "densities",
    "differing",
    "ensemble",
    "hessian_trace",
    "hull",
    "inference_cost",
    "loss_barrier",
    "loss_plane",
    "mask_overlap",
    "particles",
    "predictions",
    "table",
    "ticket_stability",
]
