"""Analyses."""

from swamp_fast.analysis.barrier import BarrierMatrix, Path, barrier_matrix, consecutive, loss_barrier
from swamp_fast.analysis.core import Analysis, Scores, State, averages, particles
from swamp_fast.analysis.cost import InferenceCost, LayerCost, inference_cost
from swamp_fast.analysis.ensemble import Ensemble, Predictions, ensemble, predictions
from swamp_fast.analysis.hessian import HessianTrace, LayerTrace, hessian_trace
from swamp_fast.analysis.hull import Hull, hull
from swamp_fast.analysis.masks import Channels, MaskOverlap, Overlap, channels, densities, mask_overlap
from swamp_fast.analysis.plane import Plane, contour, loss_plane, random_plane
from swamp_fast.analysis.ticket import TicketStability, ticket_stability
from swamp_fast.analysis.whole import analyze, table

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
    "ensemble",
    "hessian_trace",
    "hull",
    "inference_cost",
    "loss_barrier",
    "loss_plane",
    "mask_overlap",
    "particles",
    "predictions",
    "random_plane",
    "table",
    "ticket_stability",
]
