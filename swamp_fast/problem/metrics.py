"""The user's metrics: functions that return one number per sample, and torchmetrics objects.

They are tried before training. The history has six keys for each metric. For a metric named "mae", they are mae,
particle_mae and ensemble_mae on test data, and val_mae, val_particle_mae and val_ensemble_mae on validation data.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.fingerprint import callable_fingerprint
from swamp_fast.common.tree import tree_map
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import Data
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.arguments import Forward, Loss, Metric, Metrics
from swamp_fast.problem.checks import particle_of
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.probe import MAX_SAMPLES, Trial, other_size
from swamp_fast.problem.scoring import evaluated
from swamp_fast.problem.shapes import shapes_of

LAST_KEY = "val_ensemble_"  # the prefix of a key that each metric has, and nothing else
# No metric's name may begin with one of these, because its six keys must differ from all others.
PREFIXES = ("particle_", "ensemble_", "val_", "best_", "mean_", "model.")
# No metric may have one of these names or the name of a setting: the history, the tables of studies or `select_by` use
# them for something else.
RESERVED = (
    *("run", "point", "recipe"),
    *("auto", "accuracy", "loss", "cycle", "particles", "density", "kept", "flops", "train_loss", "train_seconds"),
    *("dropped", "seconds", "peak_memory", "warnings", "id", "error", "seeds", "method", "difference", "low", "high"),
    *("matching_sgd", "matching_swa", "particle_epochs"),
)


@dataclasses.dataclass(frozen=True)
class MetricValues:
    """The values of a metric on one split: of the average, of each particle, and of their ensemble."""

    average: float
    particles: list[float]
    ensemble: float


class Meter:
    """Computes a metric of one model over a split, batch by batch.

    The metric gets copies of outputs and targets, because it may keep or change them. A metric object is copied, too.
    The copy doesn't synchronize with other processes, because only the first rank evaluates.
    """

    def __init__(self, name: str, metric: Metric, device: torch.device) -> None:
        self.name, self.metric, self.collects = name, metric, collects(metric)
        self.sum: Tensor | float = 0.0
        self.samples = 0
        if self.collects:
            own = _empty(metric)
            own = own.to(device) if isinstance(own, nn.Module) else own
            if hasattr(own, "distributed_available_fn"):
                own.distributed_available_fn = None
            self.metric = own

    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        """Add a batch. Raises ValueError if a metric function doesn't return one number per sample."""
        outputs, targets = _copied(outputs), _copied(targets)
        if self.collects:
            self.metric.update(outputs, targets)  # type: ignore[attr-defined]
            return
        values = self.metric(outputs, targets)
        if not isinstance(values, Tensor) or values.shape != (samples,) or values.is_complex():
            raise ValueError(
                f'`metrics`: "{self.name}" must return one number per sample, [{samples}], got {shapes_of(values)} '
                f"from outputs {shapes_of(outputs)} and targets {shapes_of(targets)}. Return a tensor, without the "
                "mean over the batch, or pass a torchmetrics object."
            )
        self.sum = self.sum + values.double().sum()
        self.samples += samples

    def value(self) -> float:
        """Return the metric over all batches. Raises ValueError if a metric object doesn't compute one number."""
        if not self.collects:
            return float(self.sum / self.samples)
        value = self.metric.compute()  # type: ignore[attr-defined]
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = shapes_of(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f'`metrics`: "{self.name}".compute() must return one number, got {kind}. Average it, or pass each of '
                "several metrics by its own name."
            ) from error


def _empty(metric: Metric) -> Any:
    """Return a copy of a metric object, reset so that it has collected nothing."""
    own: Any = copy.deepcopy(metric)
    own.reset()
    return own


def fingerprint_of(metric: Metric) -> str | None:
    """Return a hash of a metric function, or of a metric object without the batches that it has collected."""
    own = callable_fingerprint(_empty(metric) if collects(metric) else metric)
    return f"{own} {'higher' if higher_is_better(metric) else 'lower'} is better"


def collects(metric: object) -> bool:
    """Whether a metric collects batches, as a torchmetrics object does. Otherwise it is a function of one batch."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def keys_of(name: str) -> tuple[str, ...]:
    """Return the six keys of a metric in a row of the history."""
    return tuple(f"{split}{kind}{name}" for split in ("", "val_") for kind in ("", "particle_", "ensemble_"))


def names_in(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics in a row of the history."""
    return [key.removeprefix(LAST_KEY) for key in row if key.startswith(LAST_KEY)]


def ensemble_outputs(labels: Labels | str, particles: Sequence[Any], dtype: torch.dtype) -> Any:
    """Return the outputs of an ensemble, given the outputs of its particles.

    If accuracies are counted, they are the logarithm of the particles' mean softmax. These are logits again: their
    softmax is that mean. Otherwise, floating-point tensors are averaged, and all else is the first particle's.
    """
    if isinstance(labels, Labels):
        together = torch.stack([outputs.double().softmax(1) for outputs in particles]).mean(0)
        return together.clamp_min(torch.finfo(torch.float64).tiny).log().to(dtype)

    def mean(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor) or not leaves[0].is_floating_point():
            return leaves[0]
        return torch.stack(leaves).double().mean(0).to(leaves[0].dtype)

    return tree_map(mean, *particles)


def goodness(values: Sequence[float], higher_is_better: bool) -> list[float]:
    """Return a number for each value, larger for a better value. NaN is worse than any other value."""
    return [-math.inf if math.isnan(value) else value if higher_is_better else -value for value in values]


def checked_metrics(metrics: object) -> dict[str, Metric]:
    """Return `metrics` as a dict. Raises TypeError or ValueError for an unsuitable name or metric."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"`metrics` must be a dict from names to metrics, got {type(metrics).__name__}.")
    settings = [field.name for field in dataclasses.fields(SwampConfig)]
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise TypeError(f"`metrics`: each name must be a printable text that is not empty, got {name!r}.")
        if name in RESERVED or name in settings or name.startswith(PREFIXES) or name.endswith("_std"):
            raise ValueError(
                f'`metrics`: the name "{name}" would collide with other keys of the history or its tables; choose '
                f"another, without {', '.join(PREFIXES)} at its beginning or _std at its end."
            )
        if isinstance(metric, type):
            raise TypeError(f'`metrics`: "{name}" must be an instance, got the class {metric.__name__}; call it first.')
        if not callable(metric) and not collects(metric):
            raise TypeError(
                f'`metrics`: "{name}" must be a function of outputs and targets, or an object with update, compute '
                f"and reset; got {type(metric).__name__}."
            )
    return dict(metrics)


def check_metrics(
    template: nn.Module, splits: Mapping[str, Data], config: SwampConfig, forward: Forward, loss: Loss, metrics: Metrics
) -> None:
    """Compute each metric on a few samples of val and test, as in evaluation, with a copy of the model.

    Raises ValueError if a metric doesn't fit the model and the data, if a metric function returns NaN for a sample, or
    if `select_by` can't be used.
    """
    _check_select_by(config, metrics, splits.get("val"))
    for split, data in splits.items():
        if split == "train" or not metrics:
            continue
        keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
        samples = min(MAX_SAMPLES, data.length, config.batch_size)
        sizes = (samples, other_size(samples, data.length), data.length % config.batch_size)
        for size in filter(None, sizes):  # one shape may be right by chance, and the last batch may be smaller
            trial = Trial(data, size, keys, forward, loss, None)
            outputs = evaluated(particle_of(template).eval(), trial)
            together = ensemble_outputs(data.labels, [outputs, outputs], weight_dtype(config))
            for name, metric in metrics.items():
                for each in (outputs, together):
                    _try(split, Meter(name, metric, data.device), each, trial)


def _try(split: str, meter: Meter, outputs: Any, trial: Trial) -> None:
    """Compute a metric on a batch of a split. Raises ValueError if that fails, or if a metric function returns NaN."""
    try:
        with torch.no_grad(), generators_left_alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about so few samples mean nothing
            meter.update(outputs, trial.targets, trial.samples)
            value = meter.value()
    except Exception as error:  # the metric is the user's code
        if str(error).startswith("`metrics`"):
            raise
        raise ValueError(
            f'`metrics`: "{meter.name}" can\'t take outputs {shapes_of(outputs)} with targets '
            f"{shapes_of(trial.targets)} of `{split}`: {error}"
        ) from error
    if math.isnan(value) and not meter.collects:
        raise ValueError(
            f'`metrics`: "{meter.name}" is NaN for the first samples of `{split}`, before any training. Its mean over '
            "the split would be NaN; return a number for every sample."
        )


def _check_select_by(config: SwampConfig, metrics: Metrics, val: Data | None) -> None:
    """Raise ValueError if `select_by` is not known, or can't be computed on the validation data."""
    select_by = config.select_by
    if select_by == "auto":
        return
    known = ("auto", "accuracy", "loss", *metrics)
    if select_by not in known:
        names = ", ".join(f'"{name}"' for name in known)
        raise ValueError(f'`select_by` must be one of {names}; got "{select_by}". Pass other metrics as `metrics`.')
    if val is None:
        raise ValueError(
            f'`select_by` = "{select_by}" chooses a particle on validation data, but `val` is None; pass data, or a '
            "fraction of train to hold out, such as 0.1."
        )
    if select_by == "accuracy" and isinstance(val.labels, str):
        raise ValueError(f'`select_by` = "accuracy", but val has no accuracies: {val.labels}. Set select_by="loss".')
    if select_by in metrics and not isinstance(_direction(metrics[select_by]), bool):
        raise ValueError(
            f'`select_by` = "{select_by}" is a metric that doesn\'t say whether higher values are better; set its '
            "attribute `higher_is_better` to True or False."
        )


def higher_is_better(metric: Metric) -> bool:
    """Whether higher values of a metric are better: its attribute of this name; True if it has none."""
    return bool(_direction(metric))


def _direction(metric: Metric) -> object:
    return getattr(metric, "higher_is_better", True)


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
