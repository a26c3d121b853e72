"""The CUDA graph of the eager step. Without a GPU its bookkeeping is run with a graph that calls the step again: what
a step reads must stand at fixed addresses, and capturing must change nothing.
"""

from __future__ import annotations

import contextlib

import networks
import pytest
import torch

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines import trainer
from swamp_fast.engines.eager import Choice

SETTINGS = {
    "engine": "eager",
    "batch_size": 48,
    "cycles": 2,
    "epochs": 3,
    "ticket_epochs": 1,
    "particles": 3,
    "progress": False,
}
WAYS = ["lanes", "fold", "fold grouped"]


class Replayed:
    """A graph whose replay runs the step that was captured."""

    def __init__(self) -> None:
        self.step = None

    def replay(self) -> None:
        self.step()


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for what capturing takes from torch.cuda; gives the list of captures."""
    captures = []

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph):
        captures.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(trainer, "_why_not_captured", lambda problem: None)
    step = trainer.Trainer._step

    def remembered(self, handle):
        step(self, handle)
        if captures and captures[-1].step is None:
            captures[-1].step = lambda: step(self, handle)

    monkeypatch.setattr(trainer.Trainer, "_step", remembered)
    return captures


@pytest.mark.parametrize("way", WAYS)
def test_replaying_is_stepping(way, digits, graphs, monkeypatch):
    monkeypatch.setattr("swamp_fast.engines.choose", lambda *_: Choice(way, False, "forced", {}))
    settings = SETTINGS | {"precision": "float64"}
    fast = fast_swamp(networks.build("dropout"), *digits, **settings)
    assert fast.engine["cuda_graph"]
    assert len(graphs) == 4  # whole and last batches, of the ticket's lane and of the particles'
    naive = naive_swamp(networks.build("dropout"), *digits, **settings)
    for cycle in range(3):
        for name, value in naive._snapshot(cycle).state.items():
            assert torch.allclose(fast._snapshot(cycle).state[name], value, atol=1e-9), name


def test_what_can_t_be_captured_runs_all_the_same_and_says_so(digits, graphs, monkeypatch):
    monkeypatch.setattr("swamp_fast.engines.choose", lambda *_: Choice("lanes", False, "forced", {}))

    @contextlib.contextmanager
    def failing(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    settings = SETTINGS | {"precision": "float64"}
    fast = fast_swamp(networks.build("dropout"), *digits, **settings)
    assert not fast.engine["cuda_graph"]
    assert fast.engine["no_cuda_graph"] == "capture failed: operation not permitted when stream is capturing"
    naive = naive_swamp(networks.build("dropout"), *digits, **settings)
    assert all(torch.allclose(fast.state_dict[n], v, atol=1e-9) for n, v in naive.state_dict.items())


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_on_a_gpu_equal_to_the_naive_loop(name, way, digits, monkeypatch):
    if way != "lanes" and name not in networks.FOLDS:
        pytest.skip("can't be folded, which test_fold proves is seen")
    monkeypatch.setattr("swamp_fast.engines.choose", lambda *_: Choice(way, False, "forced", {}))
    settings = SETTINGS | {"precision": "float64", "device": "cuda"}
    fast, naive = (function(networks.build(name), *digits, **settings) for function in (fast_swamp, naive_swamp))
    assert fast.engine["cuda_graph"] == (name != "branching")
    for mask, expected in zip(fast.masks.values(), naive.masks.values(), strict=True):
        assert torch.equal(mask, expected)
    assert all(torch.allclose(fast.state_dict[n], v, atol=1e-8) for n, v in naive.state_dict.items())
    assert next(fast.model.parameters()).device.type == "cpu"  # where the user's model was


@pytest.mark.gpu
def test_streams_are_the_same_on_a_gpu(digits):
    from swamp_fast.data.streams import epoch_order, lane_keys, stream_of

    keys = [lane_keys([7], [stream_of(2, 1)], torch.device(device)) for device in ("cpu", "cuda")]
    assert torch.equal(epoch_order(keys[0], 50_000), epoch_order(keys[1], 50_000).cpu())
