"""SwampConfig holds all settings of a run as plain values, checks them on creation, and reads and writes TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swamp_fast.common.checked import checked_path
from swamp_fast.common.parameter_group import ParameterGroup, groups_of

CHOICES = {
    "augment": ("auto", "none", "crop_flip"),
    "rewind": ("ticket", "average"),
    "average": ("swa", "ema", "none"),
    "schedule": ("auto", "swa", "cosine", "linear", "step", "constant"),
    "mask_score": ("abs-mean", "mean-abs", "rms", "signal-to-noise", "random"),
    "mask_from": ("last", "dense"),
    "combine": ("mean", "best"),
    "precision": ("float32", "float64", "bfloat16"),
    "optimizer": ("sgd", "adamw"),
    "on_divergence": ("stop", "drop"),
}
ENGINES = ("auto", "eager", "fused", "fastest")
# `engine` also accepts the names in this pattern; swamp_fast/engines/selection.py explains them.
ENGINE_NAME = re.compile(
    r"fused|(fused@(?P<up_to>0\.\d{0,5}[1-9]),)?eager:(?P<mode>lanes|fold|fold_grouped)(?P<last>:channels_last)?"
)
# Settings that have an effect only with certain values of another setting -> that setting, and those values.
EFFECTIVE_WITH = {
    **dict.fromkeys(("momentum", "nesterov"), ("optimizer", ("sgd",))),
    **dict.fromkeys(("beta1", "beta2", "adam_eps"), ("optimizer", ("adamw",))),
    "ema_decay": ("average", ("ema",)),
    "average_every": ("average", ("swa", "ema")),
    "step_epochs": ("schedule", ("step",)),
    "step_factor": ("schedule", ("step",)),
}
MIN_EPS = 2.0**-126  # the smallest normal float32 number
# Settings that don't change what a run computes, only where it runs, what it records and what it shows. They include
# `on_divergence`, so that a run that stopped because a particle diverged can be continued without that particle.
RUN_ID_EXCLUDES = (
    *("device", "run_dir", "resume", "progress", "tensorboard", "data_dir"),
    *("checkpoint_minutes", "on_divergence"),
)
# Settings that decide how many cycles a run has. Runs that differ only in these have equal first cycles.
LENGTH_SETTINGS = ("cycles", "target_density", "layer_kept")
LR = {"sgd": 0.1, "adamw": 1e-3}  # optimizer -> the learning rate where `lr` is None
MAX_PARTICLES = 1 << 16  # the address of a random draw has 16 bits for the particle's number
MAX_CYCLES = (1 << 16) - 2  # the address of a random draw has 16 bits for the cycle + 1; 0 is the ticket


@dataclass(frozen=True, kw_only=True)
class SwampConfig:
    """The settings of one run. The defaults are the paper's CIFAR protocol as far as it is known.

    Settings marked *ours* are our choice, because the paper's text about them was not available.

    Attributes:
        particles: N, the number of particles that each cycle trains and averages: an int, or a list of cycles + 1
            ints, one per training (SWAMP+). *Ours*: 4.
        cycles: C, the number of prunings. There are C + 1 trainings; the first one is dense. With 0, only the dense
            training runs.
        target_density: an alternative to `cycles`: prune until this fraction of the prunable weights is kept. The last
            cycle removes only as many weights as needed.
        prune: the fraction of the remaining weights that each cycle removes.
        epochs: the number of epochs of each cycle's training.
        ticket_epochs: T0, the number of epochs for which the ticket is trained before the first cycle, dense and at the
            constant rate `lr`. With 0, the ticket is the model as it is given, for example with pretrained weights.
            *Ours*: 10.
        batch_size: the number of samples per particle and step. If `train` is a DataLoader, its batch size is used
            instead. *Ours*: 128.
        lr: the learning rate at the start of each training. None is 0.1 for SGD and 1e-3 for AdamW.
        average: what each particle of a cycle becomes: with "swa", the average of its weights over the averaging
            window; with "ema", their exponential moving average over the window; with "none", its last iterate.
        average_every: the number of steps between two samples of the average; with 0, a sample is taken at the end of
            each epoch in the window.
        ema_decay: for average="ema", the weight of the previous average at each sample. The average starts as the first
            sample.
        schedule: how the learning rate falls during a cycle. "swa" is a cosine from `lr` to `swa_lr`, which is reached
            at the start of the averaging window and then kept. "cosine" is a cosine from `lr` to 0 at the end, and
            "linear" a straight line. "step" multiplies the rate by `step_factor` at `step_epochs`. "constant" keeps
            `lr`. "auto" is "swa" with average="swa", else "cosine". The combination schedule="swa", average="none"
            separates the gain of averaging from the gain of SWA's schedule. *Ours*.
        swa_lr: for schedule="swa", the constant rate in the averaging window; at most `lr`. None is half of `lr`, as in
            the paper. The cosine from `lr` down to `swa_lr` is *ours*.
        swa_start: the averaging window begins at epoch floor(swa_start * epochs). With swa_start=0,
            average="ema" averages from the first step on.
        warmup_epochs: the length in epochs, which may be a fraction, of the warm-up at the start of each training,
            including the ticket's. Step t of the w warm-up steps has the rate lr (t + 1) / w. A cosine or straight line
            begins after the warm-up.
        step_epochs: for schedule="step", the epochs at which the rate falls: a list, or a number k for k, 2 k, 3 k, ….
        step_factor: for schedule="step", the factor by which the rate falls.
        optimizer: "sgd" or "adamw". AdamW needs learning rates about a hundred times smaller; see `lr`.
        momentum: SGD's momentum; 0 is plain SGD.
        nesterov: whether SGD uses Nesterov momentum.
        beta1: the decay of AdamW's running mean of the gradient.
        beta2: the decay of AdamW's running mean of the squared gradient.
        adam_eps: a constant that AdamW adds to its denominator, the root of the mean squared gradient.
        weight_decay: the weight decay of every parameter; coupled with SGD, decoupled with AdamW. *Ours*: 5e-4.
        clip_norm: the largest allowed norm of each particle's gradient, taken over its kept weights and all
            parameters that are not prunable. A larger gradient is scaled down to this norm; None means no clipping.
        groups: parameters with a learning rate or weight decay of their own: a list of tables such as
            `{params = ["head.*", "*.bias"], lr = 0.1, weight_decay = 0.0}`. `params` is a pattern of parameter names
            or a list of patterns (fnmatch), `lr` is a factor of the learning rate, and `weight_decay` replaces the
            setting `weight_decay`. A group sets one of the two or both. With lr = 0, its parameters keep their values.
            Each group must match a parameter, and no parameter may be in two groups.
        decay_norms_and_biases: whether weight decay applies to the parameters of norm layers and to all others with
            fewer than two axes, such as biases. If False, their weight decay is 0 unless a group sets it.
        accumulate: the number of batches whose gradients are averaged for one optimizer step. Each batch has
            `batch_size` samples and its own batch statistics; the last step of an epoch may have fewer batches.
            Schedules, averages and checkpoints count steps. On CUDA, steps are captured as graphs only with
            accumulate=1.
        mixup: the strength a of mixup (1710.09412); 0 turns it off. Each particle's batch is mixed with a permutation
            of itself, with a weight drawn from Beta(a, a), and the losses with both targets are averaged with the same
            weight. Inputs must be floating-point. Batches are mixed after `augment` and `transform`, and only in
            training. On CUDA, steps with mixed batches aren't captured as graphs.
        cutmix: the strength a of CutMix (1905.04899): a box in each picture is replaced by the same box of another
            picture of the batch. If both `mixup` and `cutmix` are set, each batch uses one of them, with equal
            probability.
        shared_order: an ablation: whether all particles of a cycle train on the same batches, in the same order and
            with the same augmentation, `transform` and mixing. Each particle still has its own dropout. A sample of
            streamed data is then decoded once instead of N times.
        augment: "crop_flip" pads pictures by 4 pixels, then crops and mirrors them at random. "none" does nothing.
            "auto" is "crop_flip" for CIFAR, else "none". *Ours*.
        rewind: where each cycle starts: at the "ticket" (SWAMP), or at the previous cycle's "average" (Sparse Model
            Soups, 2306.16788).
        combine: how the particles become one solution, which is then reported and pruned: as their "mean" (SWAMP), or
            by taking the "best" particle on `val`, according to `select_by`.
        select_by: the metric by which every choice on validation data is made: "accuracy", "loss", or the name of one
            of `metrics`. "auto" is the accuracy, or the loss if there are no accuracies.
        mask_score: the score by which the global threshold ranks a weight, where w_n is the weight in particle n:
            "abs-mean" is |mean w_n| (SWAMP); "mean-abs" is the mean of |w_n|; "rms" is the root of the mean of w_n
            squared; "signal-to-noise" is |mean w_n| divided by the standard deviation of the w_n (with the divisor N,
            not N - 1; infinite where all w_n are equal, 0 where all are 0). Graves (2011) and Blundell et al.
            (1505.05424, section 5.1) rank by signal-to-noise over a posterior; here particles take the place of the
            posterior. "random" doesn't rank: it keeps as many weights of each layer as "abs-mean" would, drawn at
            random by seed and cycle. All scores except "abs-mean" are *ours* here.
        layer_kept: for mask_score="random", how many weights of each prunable parameter to keep: one list per cycle
            from 1 on, with one number per parameter in the model's order. With the numbers of another run, only the
            masks differ from that run's.
        mask_from: the solution from whose weights masks are made: the "last" cycle's, or always the "dense" one of
            cycle 0. With "dense", each cycle is one-shot magnitude pruning to its density.
        seed: the seed of the batch order, augmentation and dropout. The initial weights are those of the model.
        device: "cpu", "cuda", "cuda:N", or "auto": the model's GPU, else the current GPU, else the CPU.
        engine: "auto" chooses by a fixed rule, so that a seed always gives the same result on a machine: the fused
            engine in cycles where it supports the model and the mask is sparse enough, else the eager engine. "eager"
            and "fused" use that engine in every cycle. "fastest" times the engines and uses the fastest one. To
            repeat a run's choice, pass its `result.engine["name"]`.
        precision: the number format of activations and weights; "bfloat16" keeps float32 weights and uses autocast.
        keep_particles: whether the result includes the last cycle's particles, each as its SWA mean.
        on_divergence: what happens if a particle's loss or weights are not finite at the end of an epoch: "stop" ends
            the run with an error, "drop" leaves the particle out of its cycle's average. Other particles are not
            affected.
        run_dir: a folder that records the run. A run that is started again with the same folder continues.
        checkpoint_minutes: the minutes between two checkpoints during a training. There is also one checkpoint per
            cycle; with 0, there are no others.
        resume: whether to continue the run in run_dir; if False, run_dir must be empty.
        progress: whether to show progress on standard error.
        tensorboard: whether to write TensorBoard events to run_dir/tensorboard; needs the extra "tensorboard".
        data_dir: the folder of the named data sets; None is the environment variable SWAMP_DATA, else "data".

    Raises ValueError or TypeError for a setting that is unknown, out of range, or contradicts another.
    """

    particles: int | tuple[int, ...] = 4
    cycles: int = 14
    target_density: float | None = None
    prune: float = 0.2
    epochs: int = 150
    ticket_epochs: int = 10
    batch_size: int = 128
    lr: float | None = None
    average: str = "swa"
    average_every: int = 0
    ema_decay: float = 0.999
    schedule: str = "auto"
    swa_lr: float | None = None
    swa_start: float = 0.75
    warmup_epochs: float = 0.0
    step_epochs: int | tuple[int, ...] = 30
    step_factor: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    groups: tuple[ParameterGroup, ...] = ()
    decay_norms_and_biases: bool = True
    accumulate: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    shared_order: bool = False
    augment: str = "auto"
    rewind: str = "ticket"
    combine: str = "mean"
    select_by: str = "auto"
    mask_score: str = "abs-mean"
    layer_kept: tuple[tuple[int, ...], ...] | None = None
    mask_from: str = "last"
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    precision: str = "float32"
    keep_particles: bool = False
    on_divergence: str = "stop"
    run_dir: str | None = None
    checkpoint_minutes: float = 5.0
    resume: bool = True
    progress: bool = True
    tensorboard: bool = False
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check every field, and compute `cycles` from `target_density` if it is set."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), str(field.type)))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(f'"{choice}"' for choice in known)
                raise ValueError(f'`{name}` must be one of {choices}; got "{getattr(self, name)}".')
        if self.engine not in ENGINES and ENGINE_NAME.fullmatch(self.engine) is None:
            raise ValueError(
                f"`engine` must be one of {', '.join(json.dumps(engine) for engine in ENGINES)}, or a result's "
                f'engine["name"] such as "eager:lanes:channels_last"; got "{self.engine}".'
            )
        for name in ("run_dir", "data_dir"):
            if getattr(self, name) is not None:
                checked_path(name, getattr(self, name))
        self._check_ranges()
        self._check_effects()
        self._check_schedule()
        self._check_optimizer()
        if self.target_density is not None:
            self._derive_cycles(self.target_density)
        _in_range("cycles", self.cycles, 0, MAX_CYCLES)
        if isinstance(self.particles, tuple) and len(self.particles) != self.cycles + 1:
            raise ValueError(
                f"`particles` as a list needs one number per training, cycles + 1 = {self.cycles + 1}; "
                f"got {len(self.particles)}. Cycle 0 is the dense training."
            )
        self._check_scores()

    def _check_ranges(self) -> None:
        for particles in self.particles if isinstance(self.particles, tuple) else (self.particles,):
            _in_range("particles", particles, 1, MAX_PARTICLES)
        if not 0 < self.prune < 1 or 1 - self.prune == 1:  # so small that it removes nothing
            raise ValueError(f"`prune` must lie strictly between 0 and 1, got {self.prune}; 0.2 removes a fifth.")
        _in_range("epochs", self.epochs, 1, 1 << 31)
        _in_range("ticket_epochs", self.ticket_epochs, 0, 1 << 31)
        _in_range("batch_size", self.batch_size, 1, 1 << 31)
        rates = {"lr": self.initial_lr, "swa_lr": self.window_lr, "weight_decay": self.weight_decay}
        for name, value in {**rates, "checkpoint_minutes": self.checkpoint_minutes}.items():
            _in_range(name, value, 0.0, math.inf)
        for name in ("mixup", "cutmix"):
            _in_range(name, getattr(self, name), 0.0, math.inf)
        _in_range("accumulate", self.accumulate, 1, 1 << 31)
        seed_of("seed", self.seed)

    def _check_effects(self) -> None:
        """Raise ValueError for a setting that is changed but has no effect, because of another setting."""
        for name, (setting, values) in EFFECTIVE_WITH.items():
            value, default, other = getattr(self, name), default_of(name), getattr(self, setting)
            if value != default and other not in values:
                wanted = " or ".join(f'{setting}="{each}"' for each in values)
                raise ValueError(
                    f'`{name}` is a setting of {wanted}, got {name} = {value} with {setting}="{other}". Leave it at '
                    f"{default}, or set {wanted}."
                )

    def _check_schedule(self) -> None:
        """Raise ValueError if a setting of the learning rate or of the average is out of range or has no effect."""
        if not 0 <= self.swa_start < 1:
            raise ValueError(f"`swa_start` must lie in [0, 1), got {self.swa_start}; 0.75 averages the last quarter.")
        _in_range("average_every", self.average_every, 0, 1 << 31)
        _in_range("warmup_epochs", self.warmup_epochs, 0.0, self.epochs)
        _in_range("step_factor", self.step_factor, 0.0, 1.0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}; 0.999 spans about 1,000 samples.")
        for epoch in self._falls:
            _in_range("step_epochs", epoch, 1, 1 << 31)
        if self.schedule == "step" and not any(1 <= epoch < self.epochs for epoch in self._falls):
            raise ValueError(
                f"`step_epochs` = {self.step_epochs} never lowers the rate in {self.epochs} epochs; name epochs from 1 "
                f"to {self.epochs - 1}, or set another `schedule`."
            )
        if self.ends_at_swa_lr and self.window_lr > self.initial_lr:
            raise ValueError(
                f"`swa_lr` must be at most `lr`, got swa_lr = {self.window_lr} and lr = {self.initial_lr}: "
                "the rate falls from lr to swa_lr. Set both."
            )

    def _check_optimizer(self) -> None:
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        _in_range("adam_eps", self.adam_eps, MIN_EPS, math.inf)
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"`clip_norm` must be above 0 and finite, got {self.clip_norm}; None doesn't clip.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs momentum; set momentum above 0 or nesterov=False.")

    def _check_scores(self) -> None:
        """Raise ValueError if `mask_score` or `layer_kept` contradicts the other settings."""
        if self.combine == "best" and self.mask_score not in ("abs-mean", "random"):
            raise ValueError(
                f'`mask_score` = "{self.mask_score}" ranks by all particles, but combine="best" keeps one of '
                'them; set mask_score="abs-mean" or combine="mean".'
            )
        if self.layer_kept is not None and (self.mask_score != "random" or len(self.layer_kept) != self.cycles):
            raise ValueError(
                f'`layer_kept` needs mask_score="random" and one list for each of {self.cycles} cycles; got '
                f'{len(self.layer_kept)} lists with mask_score="{self.mask_score}".'
            )
        alone = [cycle for cycle in range(self.cycles) if self.scored_at(cycle) and self.particles_at(cycle) == 1]
        if self.mask_score == "signal-to-noise" and alone:
            raise ValueError(
                f'`mask_score` = "signal-to-noise" needs the spread of at least 2 particles, but cycle {alone[0]} has '
                'one; set more `particles`, or mask_score="abs-mean".'
            )

    def _derive_cycles(self, target: float) -> None:
        if not 0 < target < 1:
            raise ValueError(f"`target_density` must lie strictly between 0 and 1, got {target}.")
        # The last term keeps a rounding error from adding a cycle.
        cycles = math.ceil(math.log(target) / math.log(1 - self.prune) - 1e-9)
        if self.cycles not in (default_of("cycles"), cycles):
            raise ValueError(
                f"`target_density` = {target} takes {cycles} cycles at prune = {self.prune}, but cycles = "
                f"{self.cycles} was also given. Give only one of them."
            )
        object.__setattr__(self, "cycles", cycles)

    @classmethod
    def quick(cls, **changes: Any) -> SwampConfig:
        """Settings with short trainings for a first try: minutes on a laptop for a small network.

        They are not the paper's protocol. `changes` are settings that replace those of the quick run.
        """
        return cls(**{"epochs": 12, "ticket_epochs": 3, "batch_size": 64, **changes})

    @classmethod
    def of(cls, config: SwampConfig | None, settings: Mapping[str, Any]) -> SwampConfig:
        """Return `config` (None: the defaults) with the given `settings` replaced.

        Raises TypeError for an unknown setting, and ValueError for settings that contradict each other.
        """
        _refuse_unknown(settings)
        if config is not None and not isinstance(config, SwampConfig):
            raise TypeError(f"`config` must be a SwampConfig, got {type(config).__name__}.")
        merged = cls(**settings) if config is None else config.replace(**settings)
        if settings.get("target_density") is not None and settings.get("cycles", merged.cycles) != merged.cycles:
            raise ValueError(
                f"`target_density` = {merged.target_density} takes {merged.cycles} cycles at prune = {merged.prune}, "
                f"but cycles = {settings['cycles']} was also given. Give only one of them."
            )
        return merged

    def replace(self, **changes: Any) -> SwampConfig:
        """Return a copy with the settings in `changes` replaced.

        Changing `cycles` unsets `target_density`; changing `target_density` recomputes `cycles`.
        """
        _refuse_unknown(changes)
        if "cycles" in changes:
            changes = {"target_density": None, **changes}
        elif self.target_density is not None or changes.get("target_density") is not None:
            changes = {"cycles": default_of("cycles"), **changes}
        return dataclasses.replace(self, **changes)

    @property
    def _falls(self) -> tuple[int, ...]:
        """The epochs in `step_epochs`, or the one number."""
        return self.step_epochs if isinstance(self.step_epochs, tuple) else (self.step_epochs,)

    def particles_at(self, cycle: int) -> int:
        """The number of particles that a cycle trains."""
        return self.particles[cycle] if isinstance(self.particles, tuple) else self.particles

    def scored_at(self, cycle: int) -> bool:
        """Whether a later mask needs a score that depends on this cycle's particles, not only on their average."""
        makes_masks = self.mask_from == "last" or cycle == 0
        return makes_masks and self.mask_score not in ("abs-mean", "random")

    @property
    def initial_lr(self) -> float:
        """The learning rate at the start of each training: `lr`, or the optimizer's if that is None."""
        return LR[self.optimizer] if self.lr is None else self.lr

    @property
    def window_lr(self) -> float:
        """The learning rate in the SWA window: `swa_lr`, or half of `initial_lr` if that is None."""
        return self.initial_lr / 2 if self.swa_lr is None else self.swa_lr

    @property
    def ends_at_swa_lr(self) -> bool:
        """Whether the learning rate falls to `swa_lr` during a cycle rather than to 0."""
        return self.schedule == "swa" or (self.schedule == "auto" and self.average == "swa")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings by name as plain values; tuples become lists, and groups become tables."""
        return {field.name: _as_lists(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes."""
        settings = {**self.to_dict(), "lr": self.initial_lr, "swa_lr": self.window_lr}
        return {name: value for name, value in settings.items() if name not in RUN_ID_EXCLUDES}

    def to_toml(self) -> str:
        """Return the settings as TOML text, without those that are None."""
        lines = [f"{name} = {_toml(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str | Path) -> SwampConfig:
        """Read settings from TOML text, or from a file, given as a Path or as a str that ends in ".toml"."""
        if not isinstance(text, str | Path):
            raise TypeError(f"`text` must be TOML text or a path, got {type(text).__name__}.")
        if isinstance(text, str) and text.endswith(".toml") and not set("=\n") & set(text):
            text = Path(text)
        try:
            values = tomllib.loads(text.expanduser().read_text() if isinstance(text, Path) else text)
        except OSError as error:
            raise type(error)(error.errno, f"the file of the settings can't be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"the settings are not valid TOML: {error}") from error
        return cls.of(None, values)


def default_of(name: str) -> Any:
    """The default value of a setting."""
    return SwampConfig.__dataclass_fields__[name].default


def seed_of(name: str, value: object) -> int:
    """Return a seed as an int. Raises TypeError for a bool or any other type, ValueError for more than 64 bits."""
    seed: int = _typed(name, value, "int")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"`{name}` must fit 64 bits, got {seed}.")
    return seed


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(SwampConfig)]
    for name in settings:
        if name == "recipe":
            raise TypeError("`recipe` is a Recipe, which is code and no setting; pass it from Python as recipe=….")
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known: {', '.join(known)}."
            raise TypeError(f"unknown setting `{name}`.{hint}")


def _toml(value: Any) -> str:
    """Write a value as TOML. Except for tables and None, JSON writes plain values in the same way."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _as_lists(value: Any) -> Any:
    """Convert nested tuples to lists and groups to tables, as they are read from files."""
    if isinstance(value, ParameterGroup):
        return value.to_dict()
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _typed(name: str, value: Any, annotation: str) -> Any:
    """Convert a setting's value to the type of its field.

    An int is accepted for a float, a list for a tuple, and a Path for a str. Raises TypeError for any other type.
    """
    if value is None and "None" in annotation:
        return None
    if annotation == "tuple[ParameterGroup, ...]":
        return groups_of(value)
    if isinstance(value, list | tuple) and annotation.endswith("tuple[int, ...]"):
        return tuple(_typed(name, item, "int") for item in value)
    if isinstance(value, list | tuple) and annotation.startswith("tuple[tuple[int, ...], ...]"):
        return tuple(_typed(name, item, "tuple[int, ...]") for item in value)
    if isinstance(value, Path) and annotation.startswith("str"):
        return str(value)
    kind = next((kind for kind in ("bool", "int", "float", "str") if annotation.startswith(kind)), "list")
    fits = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, numbers.Integral) and not isinstance(value, bool),
        "float": isinstance(value, numbers.Real) and not isinstance(value, bool),
        "str": isinstance(value, str),
        "list": False,
    }[kind]
    if callable(value) and name in ("optimizer", "schedule", "mask_score"):
        part = "score" if name == "mask_score" else name
        raise TypeError(f"`{name}` is a name; code goes into recipe=Recipe({part}=...).")
    if not fits:
        expected = annotation.removesuffix(" | None").replace("tuple[tuple[int, ...], ...]", "a list of lists of ints")
        raise TypeError(f"`{name}` must be {expected.replace('tuple[int, ...]', 'a list of ints')}, got {value!r}.")
    try:  # this turns NumPy's numbers into Python's
        return {"bool": bool, "int": int, "float": float, "str": str}[kind](value)
    except OverflowError as error:
        raise ValueError(f"`{name}` is too large for a float; give a smaller number.") from error


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high) or math.isinf(value):
        limit = "finite" if math.isinf(high) else f"at most {high}"
        raise ValueError(f"`{name}` must be at least {low:g} and {limit}, got {value}.")
