"""Runs the code for GPUs on the simulated GPU (pretended.py), which checks devices and replays captured steps."""

from __future__ import annotations

import copy
import dataclasses
import json

import networks
import pytest
import torch
from equality import same
from host_kernels import launch_on_host
from operations import problem_of
from pretended import CUDA, Graph, OnGpu, gpu
from skips import HAS_A_GPU, HAS_GPU
from stops import ALWAYS, Interrupted, before_steps, stop_at

from benchmarks import protocol
from swamp_fast import Recipe, fast_swamp, naive_swamp, sweep
from swamp_fast.analysis import Analysis, barrier_matrix, ensemble, hessian_trace, loss_barrier
from swamp_fast.engines.eager.fastest import fastest_choice
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.trainer import first_handle
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.solutions import initial

pytestmark = pytest.mark.skipif(HAS_GPU, reason=HAS_A_GPU)
SETTINGS = {"particles": 2, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "batch_size": 48, "progress": False}
ON_GPU = SETTINGS | {"device": "cuda", "precision": "float64", "keep_particles": True}


def tiny(digits):
    (inputs, targets), (test_inputs, test_targets) = digits
    return (inputs[:12, :, ::2, ::2], targets[:12]), (test_inputs[:4, :, ::2, ::2], test_targets[:4])


def test_it_refuses_what_a_gpu_refuses():
    with gpu():
        here = torch.arange(4.0, device="cuda")
        assert (type(here), here.device, (here * 2).device) == (OnGpu, CUDA, CUDA)
        with pytest.raises(RuntimeError, match="on the same device: add"):
            here + torch.ones(4)
        with pytest.raises(TypeError, match="to numpy"):
            here.numpy()
        weight = torch.nn.Parameter(here)
        (weight**2).sum().backward()
        assert torch.equal(weight.grad.cpu(), 2 * torch.arange(4.0))
        for refused in (
            *(lambda: here.sum().item(), lambda: here.tolist(), lambda: bool((here > 0).all()), here.cpu),
            *(lambda: here.copy_(torch.ones(4)), lambda: torch.tensor([1.0], device="cuda"), lambda: here.nonzero()),
            *(torch.cuda.synchronize, torch.cuda.get_rng_state, lambda: torch.ones(2).to("cuda")),
        ):
            refused()
            with pytest.raises(RuntimeError, match="during capture") as told, Graph.capture(Graph()):
                refused()
            assert "when stream is capturing" in str(told.value.__cause__)
            Graph.end_pool(0, None)


def test_a_replay_repeats_operations_at_their_places_with_the_numbers_of_the_capture():
    with gpu():
        total, step, rate, calls = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"), torch.tensor(3.0), []
        graph = Graph()
        with Graph.capture(graph):
            calls.append(1)
            total.add_(step * rate)
        step.fill_(10)
        rate.fill_(1000)
        graph.replay()
        assert total.tolist() == [33.0, 33.0]
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "way", "settings"),
    [
        ("residual", "fold_grouped", {"clip_norm": 1.0}),
        ("dropout", "fold", {"augment": "crop_flip"}),
        ("vit_dropout", "lanes", {"optimizer": "adamw", "lr": 1e-3, "swa_lr": 5e-4}),
        ("branching", "lanes", {"schedule": "cosine"}),
    ],
)
def test_a_run_equals_the_naive_loops(name, way, settings, digits):
    model = networks.build(name)
    naive = naive_swamp(model, *digits, **{**ON_GPU, **settings, "device": "cpu"})
    with gpu():
        fast = fast_swamp(model, *digits, **{**ON_GPU, **settings}, engine=f"eager:{way}")
        on_gpu = naive_swamp(model, *digits, **{**ON_GPU, **settings})
    assert fast.engine["cuda_graph"] == (name != "branching"), fast.engine
    assert next(fast.model.parameters()).device.type == "cpu"  # the device of the user's model
    for each in (fast, on_gpu):
        same(each, naive)


@pytest.mark.parametrize("branch", [None, 1])
def test_an_engine_alone_captures_on_the_gpu_of_its_problem(branch):
    """Steps are captured even if another GPU is the current one; a run doesn't change the current GPU."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    with gpu(elsewhere=True):
        problem = problem_of(model, 4, "float32", (1, 4, 4), "cuda:0")
        engine = FusedEngine(problem, fused_plan(problem), "forced", {}, None, branch)
        bank = engine.spawn(initial(problem), problem.mask, range(2), None)
        trainer, before = engine.trainer, bank.weights.clone()
        trainer.runner.set_buffers(bank.buffers)
        trainer.lr.fill_(0.1)
        trainer.step(first_handle(problem, bank))
        assert trainer.not_captured is None
        ((_, graph),) = trainer.graphs.values()
        assert graph.calls
        assert not torch.equal(bank.weights.cpu(), before.cpu())
        assert [each.device for each in trainer.runner.streams] == ([] if branch is None else [CUDA, CUDA])
        assert torch.cuda.current_device() == 1


def test_what_can_t_be_captured_runs_all_the_same_and_leaves_the_next_run_s_alone(digits):
    def loss(outputs, targets):
        weight = torch.tensor([1.0] * 10, dtype=outputs.dtype, device=outputs.device)  # copied from the host
        return torch.nn.functional.cross_entropy(outputs, targets, weight, reduction="none")

    with gpu():
        fast = fast_swamp(networks.build("dropout"), *digits, **ON_GPU, engine="eager", loss=loss)
        after = fast_swamp(networks.build("dropout"), *digits, **ON_GPU, engine="eager")
    assert not fast.engine["cuda_graph"]
    assert fast.engine["no_cuda_graph"].startswith("capture failed: operation not permitted when stream is capturing")
    assert after.engine["cuda_graph"], after.engine
    same(fast, naive_swamp(networks.build("dropout"), *digits, **{**ON_GPU, "device": "cpu"}, loss=loss))


def test_the_fastest_way_is_measured_and_folding_proven_there(digits):
    with gpu():
        problem = prepare(networks.build("residual"), *digits, settings=ON_GPU)
        choice = fastest_choice(problem, 2)
    assert any("fold_grouped" in way for way in choice.milliseconds)


class Rows(torch.utils.data.Dataset):
    """A data set whose samples are read only when they are requested."""

    def __init__(self, pictures, targets):
        self.pictures, self.targets = pictures, targets

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, number):
        return self.pictures[number].float() / 16, int(self.targets[number])


def test_streamed_data_and_a_user_s_transform(digits):
    train, test = (Rows(*split) for split in digits)
    settings = {"transform": lambda x: x + 0.1 * torch.randn_like(x), "engine": "eager"}
    with gpu():
        result = fast_swamp(networks.build("residual"), train, test, **ON_GPU | settings)
    assert not result.engine["cuda_graph"]


@pytest.mark.parametrize(
    ("settings", "why_not"),
    [
        ({"mixup": 0.5, "cutmix": 1.0}, "mixup and CutMix draw on the host"),
        ({"mixup": 0.5, "accumulate": 2}, "a step takes several batches"),
        ({"shared_order": True, "augment": "crop_flip"}, None),
        ({"recipe": Recipe(sample_weights=torch.arange(160) % 7), "augment": "crop_flip"}, None),
    ],
)
def test_batches_on_a_gpu(settings, why_not, digits):
    """Draws of samples are captured; mixing and accumulation are not."""
    model = networks.build("residual")
    with gpu():
        fast = fast_swamp(model, *digits, **ON_GPU | settings, engine="eager:fold")
    assert fast.engine["no_cuda_graph"] == why_not
    same(fast, naive_swamp(model, *digits, **ON_GPU | settings | {"device": "cpu"}))


def test_a_stopped_run_and_a_packed_sweep_go_on_to_what_an_unstopped_one_gives(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("swamp_fast.studies.packing.runs_at_once", lambda engine, problems: (len(problems), "forced"))
    settings = ON_GPU | {"engine": "eager:fold", "checkpoint_minutes": ALWAYS}
    points = [{"seed": 0}, {"seed": 1, "lr": 0.05}]
    with gpu():
        whole = [fast_swamp(networks.build("residual"), *digits, **settings, **point) for point in points]
        for stop in (5, 11):
            with before_steps(stop_at(stop)), pytest.raises(Interrupted):
                sweep(made, *digits, points, **settings, out=tmp_path / str(stop))
            found = sweep(made, *digits, points, **settings, out=tmp_path / str(stop))
            assert [run.error for run in found.runs] == [None, None]
            for run, alone in zip(found.runs, whole, strict=True):
                for name, value in alone.state_dict.items():
                    torch.testing.assert_close(run.result.state_dict[name], value, rtol=0, atol=1e-8)


def made():
    return networks.build("residual")


def test_analyses_give_there_what_they_give_here(digits):
    model = networks.build("residual")
    found = []
    for device in ("cpu", "cuda"):
        with gpu():
            config = protocol.SwampConfig.of(
                None, {"device": device, "engine": "eager", "precision": "float64", "progress": False}
            )
            on = Analysis(copy.deepcopy(model), *digits, config=config)
            states = [dict(networks.build("residual").state_dict()) for _ in range(2)]
            states[1] = {
                name: value * 1.01 if value.is_floating_point() else value for name, value in states[1].items()
            }
            masks = {
                name: torch.ones_like(value, dtype=torch.bool) for name, value in states[0].items() if value.dim() == 4
            }
            trace = hessian_trace(on, states[0], masks, probes=2, samples=48)
            found.append(
                (loss_barrier(on, *states).barriers(), trace.trace, barrier_matrix(on, states), ensemble(on, states))
            )
    flat = [torch.utils._pytree.tree_flatten(_plain(each))[0] for each in found]
    assert flat[1] == pytest.approx(flat[0], abs=1e-9)


def test_what_the_protocol_measures_besides_runs(tmp_path, monkeypatch):
    studies = [
        dataclasses.replace(study, settings={**study.settings, "device": "cuda"})
        for study in protocol.studies(1, rehearse=True)
    ]
    monkeypatch.setattr(protocol, "studies", lambda *_: studies)
    monkeypatch.setattr("swamp_fast.engines.fused.estimate.MATRIX_SIDE", {"cuda": 64})
    with gpu():
        there = protocol.Protocol(tmp_path, rehearse=True)
        assert there.naive("small_cnn")
        assert there.roofline("small_cnn")
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cost").iterdir()}
    assert found["naive_small_cnn"]["seconds_an_epoch"] > 0
    assert found["roofline_small_cnn"]["flops"] > 0


def _plain(value):
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


class Small(torch.nn.Module):
    """A convolution of one channel, a norm, a convolution that the kernels of csrc/cuda can run, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16)
        self.conv, self.head = torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Linear(16, 10)

    def forward(self, x):
        x = self.conv(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.head(torch.nn.functional.dropout(x, 0.2, self.training))


@pytest.mark.usefixtures("large_tiles")
def test_a_fused_run_equals_the_naive_loops(digits):
    model, few = Small(), {"batch_size": 6, "epochs": 1}
    with gpu(triton=True):
        fast = fast_swamp(model, *tiny(digits), **{**ON_GPU, **few}, engine="fused")
    assert fast.engine["cuda_graph"], fast.engine
    same(fast, naive_swamp(model, *tiny(digits), **{**ON_GPU, **few, "device": "cpu"}))


@pytest.mark.slow
@pytest.mark.usefixtures("large_tiles")
def test_the_fused_engine_s_graph_gives_what_its_steps_give(digits):
    """The replayed graph gives the same results as separate steps, with the kernels of csrc/cuda."""
    model, results = Small(), []
    for why_not in (None, "it is told not to"):
        with gpu(triton=True, launch=launch_on_host), pytest.MonkeyPatch.context() as patch:
            if why_not:
                patch.setattr("swamp_fast.engines.trainer._why_not_captured", lambda problem, why=why_not: why)
            settings = ON_GPU | {"precision": "bfloat16", "batch_size": 6, "epochs": 1}
            results.append(fast_swamp(model, *tiny(digits), **settings, engine="fused"))
        assert results[-1].engine["no_cuda_graph"] == why_not
        assert results[-1].engine["tensor_cores"]
    for name, value in results[0].particles.items():
        assert torch.equal(value, results[1].particles[name]), name
