"""What a particle's batch is, on every engine: fast_swamp trains as naive_swamp does, and a particle stays itself."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from operations import NETS, error, masked, seeded, step
from stops import ALWAYS, Interrupted, before_steps, stop_at
from torch.utils.data import DataLoader, Dataset

from benchmarks.durability import same_bits
from swamp_fast import Recipe, fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.schedule import cycle_training
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

RUN = {"batch_size": 32, "cycles": 2, "epochs": 2, "ticket_epochs": 1, "particles": 2, "prune": 0.5, "swa_start": 0.0}
RUN |= {"precision": "float64", "keep_particles": True, "progress": False}
RARE = Recipe(sample_weights=torch.arange(160.0) % 7)


def softened(inputs, targets):
    """Noise on the inputs and on the probabilities of the classes."""
    noise, classes = torch.rand(len(targets), 1, dtype=torch.float64), 5 if inputs.shape[1] == 3 else 10
    probabilities = (1 - noise) * F.one_hot(targets, classes) + noise / classes
    return inputs + 0.1 * torch.randn_like(inputs), probabilities


ALL = {
    "transform": softened,
    "mixup": 0.4,
    "cutmix": 1.0,
    "recipe": RARE,
    "accumulate": 2,
    "augment": "crop_flip",
    "clip_norm": 1.0,
}
FEATURES = {
    "transform": {"transform": softened},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "sample_weights": {"recipe": RARE, "augment": "crop_flip"},
    "shared_order": {"shared_order": True, "augment": "crop_flip"},
    "accumulate": {"accumulate": 2},
    "all": ALL,
    "all, shared": ALL | {"shared_order": True},
}


@pytest.mark.parametrize("name", list(FEATURES))
def test_both_engines_equal_naive_swamp(name, digits):
    model = networks.build("dropout")
    naive = naive_swamp(model, *digits, **RUN | FEATURES[name])
    for engine in ("eager", "fused"):
        same(fast_swamp(model, *digits, **RUN | FEATURES[name], engine=engine), naive)
    plain = fast_swamp(model, *digits, **RUN, engine="eager:lanes")
    assert any(not torch.equal(plain.state_dict[key], value) for key, value in naive.state_dict.items())


@pytest.mark.parametrize("mode", ["fold", "fold_grouped"])
def test_folded_lanes_equal_naive_swamp(mode, digits):
    naive = naive_swamp(networks.build("residual"), *digits, **RUN | ALL)
    same(fast_swamp(networks.build("residual"), *digits, **RUN | ALL, engine=f"eager:{mode}"), naive)


def trained(engine_of, problem, particles: list[int]) -> torch.Tensor:
    """Train some particles of cycle 0 together; returns their SWA means [L, P]."""
    parameters, buffers = problem.template.named_parameters(), problem.template.named_buffers()
    start = Solution(problem.layout.flat(dict(parameters), problem.dtype, problem.device), dict(buffers))
    engine = engine_of(problem)
    bank = engine.spawn(start, problem.mask, particles, 0)
    engine.train(bank, cycle_training(problem.config, problem.steps_per_epoch), lambda *_: None, lambda *_: None)
    return bank.swa.clone()


@pytest.mark.parametrize(
    "engine_of",
    [
        lambda problem: EagerEngine(problem, Choice("lanes", False, "forced", {})),
        lambda problem: FusedEngine(problem, fused_plan(problem), "forced", {}),
    ],
)
def test_a_particle_is_the_same_among_others_and_alone(engine_of, digits):
    settings = {name: value for name, value in ALL.items() if name not in ("transform", "recipe")}
    arguments = Arguments(transform=softened, recipe=RARE)
    problem = prepare(
        networks.build("dropout"),
        *digits,
        arguments,
        settings=RUN | settings | {"particles": 4, "precision": "float32"},
    )
    four = trained(engine_of, problem, [0, 1, 2, 3])
    assert torch.equal(trained(engine_of, problem, [3, 1]), four[[3, 1]])
    assert torch.equal(trained(engine_of, problem, [2]), four[2:3])


@pytest.mark.parametrize("engine", ["eager:lanes", "eager:fold", "fused"])
def test_an_interrupted_run_goes_on_bit_for_bit(engine, digits, tmp_path):
    """An epoch has three steps, of 2, 2 and 1 batches: 3 of the ticket, and 6 of each cycle."""
    settings = RUN | ALL | {"precision": "float32", "engine": engine, "cycles": 1, "checkpoint_minutes": ALWAYS}
    fast_swamp(networks.build("residual"), *digits, **settings, run_dir=tmp_path / "whole")
    for steps in (4, 7):
        with before_steps(stop_at(steps)), pytest.raises(Interrupted):
            fast_swamp(networks.build("residual"), *digits, **settings, run_dir=tmp_path / "cut")
    with before_steps() as count:
        fast_swamp(networks.build("residual"), *digits, **settings, run_dir=tmp_path / "cut")
    assert count[0] == 15 - 4 - 7
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("change", [{"cutmix": 1.0}, {"mixup": 1.0, "transform": softened}])
def test_a_step_of_the_gpu_kernels(change):
    """In Triton's interpreter without a GPU, against autograd."""
    data = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5
    arguments = Arguments(transform=change.get("transform"))
    settings = {"batch_size": 5, "precision": "float64", "device": "cpu", "cycles": 0, "progress": False}
    settings |= {name: value for name, value in change.items() if name != "transform"}
    problem = prepare(seeded(NETS["norm"]), data, arguments=arguments, settings=settings)
    mask = masked(problem, 0.5)
    for what, each in error(step(problem, "cuda", mask), step(problem, "autograd", mask)).items():
        assert each <= 1e-10, what


class Counting(Dataset):
    """A random Dataset that counts how often it is read."""

    def __init__(self, inputs, targets) -> None:
        self.inputs, self.targets, self.reads = inputs.double() / 16, targets, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index):
        self.reads += 1
        return self.inputs[index] + 0.1 * torch.rand(()), self.targets[index]


def listed(samples):
    """A custom collate function."""
    return torch.stack([inputs for inputs, _ in samples]), torch.stack([target for _, target in samples])


@pytest.mark.parametrize("collate", [None, listed])
def test_a_shared_order_reads_each_sample_once(collate, digits):
    (inputs, targets), _ = digits
    settings = RUN | {"cycles": 0, "particles": 4, "engine": "eager:lanes", "transform": lambda x: x.mul_(2)}
    reads, results = {}, {}
    for shared in (False, True):
        data = Counting(inputs, targets)
        loader = DataLoader(data, batch_size=32, collate_fn=collate)
        results[shared] = fast_swamp(networks.build("tied"), loader, **settings | {"shared_order": shared})
        reads[shared] = data.reads
    # The ticket's epoch, and then two epochs of four particles, which read 160 samples each or together.
    assert reads[False] - reads[True] == 2 * 3 * 160
    naive = naive_swamp(networks.build("tied"), loader, **settings | {"shared_order": True})
    same(results[True], naive)


@pytest.mark.parametrize("form", ["one", "mixup", "cutmix", "composed"])
def test_transforms_of_torchvision(form, digits):
    """Those of the inputs alone, and those that need the targets, which they make probabilities."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    either = v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])
    transform = {
        "one": v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip(), v2.Lambda(lambda x: 2 * x)]),
        "mixup": v2.MixUp(alpha=1.0, num_classes=10),
        "cutmix": v2.CutMix(alpha=1.0, num_classes=10),
        "composed": v2.Compose([v2.RandomHorizontalFlip(), either]),
    }[form]
    settings = RUN | {"transform": transform, "cycles": 1}
    fast = fast_swamp(networks.build("residual"), *digits, **settings, engine="fused")
    same(fast, naive_swamp(networks.build("residual"), *digits, **settings))
    assert fast.history[-1]["accuracy"] is not None
