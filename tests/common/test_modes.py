"""A call has the same result whatever global mode surrounds it, and leaves the modes as they were."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from networks import ResidualCNN
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.common.modes import current_modes

SETTINGS = {
    "particles": 2,
    "cycles": 1,
    "epochs": 2,
    "ticket_epochs": 1,
    "batch_size": 16,
    "lr": 0.1,
    "progress": False,
}
DRIVERS = {
    "eager": lambda *args, **kwargs: fast_swamp(*args, engine="eager", **kwargs),
    "fused": lambda *args, **kwargs: fast_swamp(*args, engine="fused", **kwargs),
    "naive": naive_swamp,
}


@contextmanager
def changed(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        assert read() == value
        write(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        assert torch.get_default_device() == torch.device(device)
        torch.set_default_device(None)


@contextmanager
def errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def halved(tensor):
    return tensor / 2


def as_it_is(tensor):
    return tensor


def deterministic():
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "a device as a context": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "convolution precision": lambda: changed(
        lambda: torch.backends.mkldnn.conv.fp32_precision,
        lambda value: setattr(torch.backends.mkldnn.conv, "fp32_precision", value),
        "bf16",
    ),
    "warnings as errors": errors,
    "hooks on saved tensors": lambda: saved_tensors_hooks(as_it_is, halved),
    "attention by its definition": lambda: sdpa_kernel(SDPBackend.MATH),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "cached parametrizations": parametrize.cached,
}


def pictures(samples=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 1, 8, 8, generator=generator), torch.arange(samples) % 10


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)
        nn.utils.parametrizations.weight_norm(self.net)

    def forward(self, x):
        return self.net(x.flatten(1))


def network(kind=ResidualCNN):
    torch.manual_seed(0)
    return kind()


def bits(result):
    model, masks = result.at(1)
    tensors = [*model.state_dict().values(), *masks.values()]
    scores = [result.history[-1][name] for name in ("loss", "accuracy", "train_loss", "dropped")]
    return [tensor.numpy(force=True).tobytes() for tensor in tensors], scores


@pytest.fixture(scope="module")
def expected():
    made = {}

    def of(driver, precision):
        if (driver, precision) not in made:
            made[driver, precision] = bits(
                DRIVERS[driver](network(), pictures(), pictures(), precision=precision, **SETTINGS)
            )
        return made[driver, precision]

    return of


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("mode", AROUND)
def test_bits_do_not_depend_on_the_modes_around_a_call(mode, driver, precision, expected):
    model, data, wanted = network(), pictures(), expected(driver, precision)
    with AROUND[mode]():
        inside = current_modes()
        result = DRIVERS[driver](model, data, data, precision=precision, **SETTINGS)
        assert current_modes() == inside
    assert bits(result) == wanted


@pytest.mark.parametrize("driver", ["eager", "naive"])
def test_a_parametrized_weight_is_computed_anew_at_each_step(driver):
    settings = {**SETTINGS, "prunable": "*.original1"}
    wanted = bits(DRIVERS[driver](network(Parametrized), pictures(), pictures(), **settings))
    with parametrize.cached():
        result = DRIVERS[driver](network(Parametrized), pictures(), pictures(), **settings)
    assert bits(result) == wanted


@pytest.mark.parametrize("driver", DRIVERS)
def test_subnormal_numbers_are_kept(driver):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers")
    torch.set_flush_denormal(False)
    settings = {**SETTINGS, "lr": 1e-36, "swa_lr": 1e-37, "precision": "float32"}
    wanted = bits(DRIVERS[driver](network(), pictures(), pictures(), **settings))
    torch.set_flush_denormal(True)
    try:
        result = DRIVERS[driver](network(), pictures(), pictures(), **settings)
        assert float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0
    finally:
        torch.set_flush_denormal(False)
    assert bits(result) == wanted


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_callback_sees_the_modes_around_the_call_and_changes_no_bit(driver, expected):
    threads, seen = torch.get_num_threads(), []

    def on_cycle(row):
        seen.append((torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        seen[-1] += (str(torch.get_default_device()), torch.get_num_threads())
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")

    model, data = network(), pictures()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            result = DRIVERS[driver](model, data, data, on_cycle=on_cycle, **SETTINGS)
        assert torch.get_num_threads() == threads + 1
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    assert bits(result) == expected(driver, "float32")
    assert seen == [(torch.float64, False, True, "meta", count) for count in (threads, threads + 1)]


def test_a_model_that_changes_the_number_of_threads_is_refused():
    class Greedy(ResidualCNN):
        def forward(self, x):
            torch.set_num_threads(threads + 1)
            return super().forward(x)

    threads = torch.get_num_threads()
    for driver in (fast_swamp, naive_swamp):
        with pytest.raises(ValueError, match=r"changes the number of threads of the whole process from \d+ to \d+"):
            driver(Greedy(), pictures(), **SETTINGS)
        assert torch.get_num_threads() == threads


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, data = network(), pictures()
    for driver in (fast_swamp, naive_swamp):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="outside FakeTensorMode"):
            driver(model, data, **SETTINGS)


def test_an_error_restores_the_modes():
    before = current_modes()
    with torch.autocast("cpu", torch.bfloat16):
        inside = current_modes()
        with pytest.raises(ValueError, match="batch_size"):
            fast_swamp(network(), pictures(), **{**SETTINGS, "batch_size": 1000})
        assert current_modes() == inside
    assert current_modes() == before


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_warning_is_no_error_that_loses_a_cycle(driver, tmp_path):
    """The one cycle that prunes empties a layer, of which the drivers warn before they write the cycle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
    settings = {**SETTINGS, "prune": 0.99, "run_dir": str(tmp_path / "run")}
    with errors():
        result = DRIVERS[driver](model, pictures(), pictures(), **settings)
    assert len(result.history) == 2
    assert any("are pruned" in text for text in result.history[-1]["warnings"])
