"""SwampConfig: every setting of a run as plain values, checked on creation, to and from TOML."""

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

CHOICES = {
    "augment": ("auto", "none", "crop_flip"),
    "rewind": ("ticket", "average"),
    "schedule": ("auto", "swa", "cosine"),
    "mask_score": ("abs-mean", "mean-abs", "rms", "signal-to-noise", "random"),
    "mask_from": ("last", "dense"),
    "combine": ("mean", "best"),
    "precision": ("float32", "float64", "bfloat16"),
    "optimizer": ("sgd", "adamw"),
    "on_divergence": ("stop", "drop"),
}
ENGINES = ("auto", "eager", "fused", "fastest")
# The other values of `engine`, which swamp_fast/engines/selection.py describes.
ENGINE_NAME = re.compile(
    r"fused|(fused@(?P<up_to>0\.\d{0,5}[1-9]),)?eager:(?P<mode>lanes|fold|fold_grouped)(?P<last>:channels_last)?"
)
# The settings of one optimizer only.
OPTIMIZERS = {"momentum": "sgd", "nesterov": "sgd", "beta1": "adamw", "beta2": "adamw", "adam_eps": "adamw"}
LEAST_EPS = 2.0**-126  # the smallest normal float32 number
# Settings that don't change what a run computes: where it runs, what it records and what it shows. `on_divergence` is
# one of them, so that a run that stopped because a particle diverged can go on without that particle.
RUN_ID_EXCLUDES = (
    *("device", "run_dir", "resume", "progress", "tensorboard", "data_dir"),
    *("checkpoint_minutes", "on_divergence"),
)
MOST_PARTICLES = 1 << 16  # a particle's number has 16 bits in the address of its draws
MOST_CYCLES = (1 << 16) - 2


@dataclass(frozen=True, kw_only=True)
class SwampConfig:
    """The settings of one run, whose defaults are the paper's CIFAR protocol as far as it is known.

    Those marked *ours* are our choice, as the paper's text about them was not available.

    Attributes:
        particles: N, the particles that are trained from one ticket and averaged; an int, or a list of cycles + 1
            ints, one per training (SWAMP+). *Ours*: 4.
        cycles: C, the number of prunings. There are C + 1 trainings, the first of them dense. 0 trains dense only.
        target_density: instead of `cycles`: prune until kept / prunable is at most this.
        prune: the fraction of the remaining weights that each cycle removes.
        epochs: the length of every training.
        ticket_epochs: T0, the length of the dense training at the constant rate `lr` before the first cycle. 0: the
            given weights are the ticket, which is also a way to warm-start. *Ours*: 10.
        batch_size: samples per particle and step. A DataLoader's own batch size replaces it. *Ours*: 128.
        lr: the learning rate at the start of each training.
        swa: whether to average the weights over the last part of each training, or to take the last iterate.
        schedule: how the rate falls in a cycle: "swa" is a cosine from `lr` to `swa_lr` at the start of the SWA window,
            constant in it; "cosine" one to 0 at the end; "auto" is "swa" with `swa`, else "cosine". "swa" without
            `swa` separates the gain of averaging from that of its schedule. *Ours*.
        swa_lr: the constant rate in the SWA window; at most `lr`. The cosine from `lr` down to it is *ours*.
        swa_start: the window begins at epoch floor(swa_start * epochs), with one SWA sample at the end of each epoch.
        optimizer: "sgd", or "adamw", which needs about a hundredth of the rates: lr=1e-3, swa_lr=5e-4.
        momentum: of SGD; 0 is plain SGD.
        nesterov: whether SGD's momentum is Nesterov's.
        beta1: the decay of AdamW's running mean of the gradient.
        beta2: the decay of AdamW's running mean of the squared gradient.
        adam_eps: added to the root of the latter in AdamW's denominator.
        weight_decay: of every parameter; coupled with SGD, decoupled with AdamW. *Ours*: 5e-4.
        clip_norm: each particle's gradient is scaled down to this norm, taken over its kept weights and all other
            parameters; None doesn't clip.
        augment: "crop_flip" pads pictures by 4 pixels, crops and mirrors them; "auto" does so for CIFAR. *Ours*.
        rewind: where a cycle starts: at the "ticket" (SWAMP), or at the last "average" (Sparse Model Soups,
            2306.16788).
        combine: what the particles become: their "mean" (SWAMP), or the "best" of them on val by accuracy (by loss if
            there are no accuracies), which is then reported and pruned.
        mask_score: what the global threshold ranks, with w_n the particles: "abs-mean" is |mean w_n| (SWAMP);
            "mean-abs" the mean of |w_n|; "rms" the root of the mean of w_n squared; "signal-to-noise" |mean w_n| over
            the standard deviation of the w_n (of N, not N - 1; infinite where all agree, 0 where all are 0), the
            ranking of Graves (2011) and Blundell et al. (1505.05424, section 5.1) over particles in place of a
            posterior. "random" draws, by seed and cycle, as many weights of each layer as "abs-mean" would keep. All
            but "abs-mean" are *ours* here.
        layer_kept: for "random", the number of weights to keep of each prunable parameter, in the model's order, in
            each cycle from 1 on, cycles x layers: for example those of another run, so that only the masks differ.
        mask_from: the solution that masks are made from: that of the "last" cycle, or always the "dense" one of cycle
            0, so that each cycle is one-shot magnitude pruning to its density.
        seed: of the batch order, augmentation and dropout. The initial weights are those of the model.
        device: "auto" is CUDA if there is any, else the CPU; or any torch device.
        engine: "auto" chooses by a rule, so that a seed has one result on a machine: the fused engine in the cycles
            where it covers the model and the mask is sparse enough for it, else the eager one. "eager" and "fused" run
            every cycle on one of them; "fastest" takes what a stopwatch finds fastest here and now. The string in
            `result.engine["name"]` selects the same engines again.
        precision: of activations and weights; "bfloat16" runs under autocast over float32 weights.
        keep_particles: whether the result holds the last cycle's particles, as SWA means.
        on_divergence: if a particle's loss or weights are not finite at the end of an epoch, "stop" ends the run with
            an error, "drop" leaves the particle out of its cycle's average. It affects no other particle.
        run_dir: a folder that records the run; started again with it, the run goes on.
        checkpoint_minutes: how often a checkpoint is written during a training, besides one per cycle; 0: never.
        resume: whether to go on from the run in run_dir; if not, run_dir must be empty.
        progress: whether to show progress on standard error.
        tensorboard: whether to write TensorBoard events to run_dir/tensorboard; needs the extra "tensorboard".
        data_dir: the folder of named data sets; None: that of the environment variable SWAMP_DATA.

    Raises ValueError or TypeError for a setting that is unknown, out of range, or contradicts another.
    """

    particles: int | tuple[int, ...] = 4
    cycles: int = 14
    target_density: float | None = None
    prune: float = 0.2
    epochs: int = 150
    ticket_epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    swa: bool = True
    schedule: str = "auto"
    swa_lr: float = 0.05
    swa_start: float = 0.75
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    augment: str = "auto"
    rewind: str = "ticket"
    combine: str = "mean"
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
        """Check every field, and derive `cycles` from `target_density`."""
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
        self._check_ranges()
        self._check_optimizer()
        if self.target_density is not None:
            self._derive_cycles(self.target_density)
        _in_range("cycles", self.cycles, 0, MOST_CYCLES)
        if isinstance(self.particles, tuple) and len(self.particles) != self.cycles + 1:
            raise ValueError(
                f"`particles` as a list needs one number per training, cycles + 1 = {self.cycles + 1}; "
                f"got {len(self.particles)}. Cycle 0 is the dense training."
            )
        self._check_scores()

    def _check_ranges(self) -> None:
        for particles in self.particles if isinstance(self.particles, tuple) else (self.particles,):
            _in_range("particles", particles, 1, MOST_PARTICLES)
        if not 0 < self.prune < 1:
            raise ValueError(f"`prune` must lie strictly between 0 and 1, got {self.prune}; 0.2 removes a fifth.")
        _in_range("epochs", self.epochs, 1, 1 << 31)
        _in_range("ticket_epochs", self.ticket_epochs, 0, 1 << 31)
        _in_range("batch_size", self.batch_size, 1, 1 << 31)
        for name in ("lr", "swa_lr", "weight_decay", "checkpoint_minutes"):
            _in_range(name, getattr(self, name), 0.0, math.inf)
        if not 0 <= self.swa_start < 1:
            raise ValueError(f"`swa_start` must lie in [0, 1), got {self.swa_start}; 0.75 averages the last quarter.")
        if self.ends_at_swa_lr and self.swa_lr > self.lr:
            raise ValueError(
                f"`swa_lr` must be at most `lr`, got swa_lr = {self.swa_lr} and lr = {self.lr}: "
                "the rate falls from lr to swa_lr. Set both."
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"`seed` must fit 64 bits, got {self.seed}.")

    def _check_optimizer(self) -> None:
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        _in_range("adam_eps", self.adam_eps, LEAST_EPS, math.inf)
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"`clip_norm` must be above 0 and finite, got {self.clip_norm}; None doesn't clip.")
        for name, optimizer in OPTIMIZERS.items():
            value, default = getattr(self, name), default_of(name)
            if self.optimizer != optimizer and value != default:
                raise ValueError(
                    f'`{name}` is a setting of optimizer="{optimizer}", got {name} = {value} with '
                    f'optimizer="{self.optimizer}". Leave it at {default}, or choose the other optimizer.'
                )
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs momentum; set momentum above 0 or nesterov=False.")

    def _check_scores(self) -> None:
        """Refuse a `mask_score` that the other settings can't provide."""
        if self.combine == "best" and self.mask_score not in ("abs-mean", "random"):
            raise ValueError(
                f'`mask_score` = "{self.mask_score}" ranks by all particles, but combine="best" keeps one of '
                'them; set mask_score="abs-mean" or combine="mean".'
            )
        if self.layer_kept is not None and (self.mask_score != "random" or len(self.layer_kept) != self.cycles):
            raise ValueError(
                f'`layer_kept` needs mask_score="random", and one list for each of {self.cycles} cycles; got '
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
        # Without the last term, rounding could ask for a cycle more.
        cycles = math.ceil(math.log(target) / math.log(1 - self.prune) - 1e-9)
        if self.cycles not in (default_of("cycles"), cycles):
            raise ValueError(
                f"`target_density` stands instead of `cycles`: {target} takes {cycles} cycles at prune = {self.prune}, "
                f"got cycles = {self.cycles} too. Give one of them."
            )
        object.__setattr__(self, "cycles", cycles)

    @classmethod
    def quick(cls, **changes: Any) -> SwampConfig:
        """Short trainings for a first look, minutes on a laptop for a small network; not the protocol of the paper."""
        return cls(**{"epochs": 12, "ticket_epochs": 3, "batch_size": 64, **changes})

    @classmethod
    def of(cls, config: SwampConfig | None, settings: Mapping[str, Any]) -> SwampConfig:
        """`config`, or the defaults, with `settings` in place of its own. Raises TypeError for an unknown name."""
        _refuse_unknown(settings)
        if config is not None and not isinstance(config, SwampConfig):
            raise TypeError(f"`config` must be a SwampConfig, got {type(config).__name__}.")
        merged = cls(**settings) if config is None else config.replace(**settings)
        if settings.get("target_density") is not None and settings.get("cycles", merged.cycles) != merged.cycles:
            raise ValueError(
                f"`target_density` stands instead of `cycles`: {merged.target_density} takes {merged.cycles} cycles at "
                f"prune = {merged.prune}, got cycles = {settings['cycles']} too. Give one of them."
            )
        return merged

    def replace(self, **changes: Any) -> SwampConfig:
        """A copy with other values of some settings; a new `cycles` or `target_density` replaces the other."""
        _refuse_unknown(changes)
        if "cycles" in changes:
            changes = {"target_density": None, **changes}
        elif self.target_density is not None or changes.get("target_density") is not None:
            changes = {"cycles": default_of("cycles"), **changes}
        return dataclasses.replace(self, **changes)

    def particles_at(self, cycle: int) -> int:
        """The number of particles of one cycle."""
        return self.particles[cycle] if isinstance(self.particles, tuple) else self.particles

    def scored_at(self, cycle: int) -> bool:
        """Whether a later mask ranks a score of this cycle's particles that can't be made from their average alone."""
        makes_masks = cycle < self.cycles and (self.mask_from == "last" or cycle == 0)
        return makes_masks and self.mask_score not in ("abs-mean", "random")

    @property
    def ends_at_swa_lr(self) -> bool:
        """Whether the rate falls to `swa_lr` in a cycle, not to 0."""
        return self.schedule == "swa" or (self.schedule == "auto" and self.swa)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; tuples become lists."""
        return {name: _as_lists(value) for name, value in dataclasses.asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes."""
        return {name: value for name, value in self.to_dict().items() if name not in RUN_ID_EXCLUDES}

    def to_toml(self) -> str:
        """TOML text; settings that are None are left out."""
        # A plain value is written the same way in JSON and in TOML, except None.
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in self.to_dict().items()
            if value is not None
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str | Path) -> SwampConfig:
        """Read TOML text, or a file if a Path is given."""
        try:
            values = tomllib.loads(text.read_text() if isinstance(text, Path) else text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"the settings are not valid TOML: {error}") from error
        return cls.of(None, values)


def default_of(name: str) -> Any:
    """The default of a setting."""
    return SwampConfig.__dataclass_fields__[name].default


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(SwampConfig)]
    for name in settings:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known: {', '.join(known)}."
            raise TypeError(f"unknown setting `{name}`.{hint}")


def _as_lists(value: Any) -> Any:
    """Nested tuples as lists, the form in which they are read from a file."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _typed(name: str, value: Any, annotation: str) -> Any:
    """A value as its field's type: an int may stand for a float, a list for a tuple, a Path for a str.

    Raises TypeError for other types.
    """
    if value is None and "None" in annotation:
        return None
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
    if not fits:
        expected = annotation.replace("tuple[tuple[int, ...], ...]", "a list of lists of ints")
        raise TypeError(f"`{name}` must be {expected.replace('tuple[int, ...]', 'a list of ints')}, got {value!r}.")
    # NumPy's numbers become plain ones.
    return {"bool": bool, "int": int, "float": float, "str": str}[kind](value)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high) or math.isinf(value):
        limit = "finite" if math.isinf(high) else f"at most {high}"
        raise ValueError(f"`{name}` must be at least {low:g} and {limit}, got {value}.")
