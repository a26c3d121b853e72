"""Fixtures and command-line options for all tests.

Without a GPU, the Triton kernels run in Triton's interpreter, which must be enabled before Triton is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background processes this way
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent / "support"))  # in importlib mode, tests can't import files beside them
from skips import GPU, HAS_A_GPU, HAS_GPU, SLOW, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the slow tier")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason=SLOW))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=GPU))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter() -> None:
    """Fix two errors of Triton's interpreter.

    It truncates float32 to bfloat16, whereas a GPU rounds to the nearest value. In Triton 3.6, it also converts arrays
    of one element to numbers in a way that NumPy 2.4 rejects.
    """
    if HAS_GPU:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data: object, source: object, target: object, rounding_mode: object) -> object:
        if str(source) == "fp32" and str(target) == "bf16":
            return torch.as_tensor(data).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = nearest
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = with_index


@pytest.fixture(scope="session")
def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return (inputs uint8 [n, 1, 8, 8], targets [n]) of scikit-learn's digits: 160 for training, 64 for testing."""
    from swamp_fast.data.sources import open_source

    opened = open_source("digits", "train", None)
    train, test = opened.source, opened.test
    return tuple(  # type: ignore[return-value]
        (split.inputs[:n].permute(0, 3, 1, 2).contiguous(), split.targets[:n])  # type: ignore[union-attr]
        for split, n in ((train, 160), (test, 64))
    )


@pytest.fixture
def large_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use large tiles in the interpreter, which takes milliseconds per program.

    Tests with the marker `as_launched` keep the tiles that are used on a GPU.
    """
    from swamp_fast.kernels import convolution

    if not HAS_GPU and "as_launched" not in request.keywords:
        for size in (2, 4, 8):
            monkeypatch.setitem(convolution.PIXELS, size, 512)


class Implementation:
    """One implementation of the ops: "generic", "avx2" or "avx512" (C++), "triton" (in the interpreter) or "cuda"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if name == "cuda" else "cpu")

    def __call__(self, op: str, *args: object, **kwargs: object) -> object:
        """Call an op by its contract. For the interpreter, call its launcher directly, which checks no arguments."""
        import swamp_fast._C as _C
        from swamp_fast import ops

        if self.name == "triton":
            return _launch(op, *args, **kwargs)
        if self.name != "cuda":
            assert _C.active() == self.name
        return getattr(ops, op)(*args, **kwargs)


def _launch(op: str, *args: object, **kwargs: object) -> object:
    from importlib import import_module

    launcher = getattr(import_module(f"swamp_fast.kernels.{op.rstrip('_')}"), op)
    if op == "masked_sgd_":
        rates = [kwargs[name] for name in ("lr", "momentum", "weight_decay")]
        rest = [kwargs.get("nesterov", False), *map(kwargs.get, ("grad_scale", "swa", "swa_weight", "segment_ends"))]
        return launcher(*args, *rates, *rest)
    if op == "masked_adamw_":
        names = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "grad_scale", "swa", "swa_weight")
        names += ("segment_ends",)
        return launcher(*args, *map(kwargs.get, names))
    if op == "gather_augment":
        images, table, index, keys = args
        samples = kwargs.get("samples", index)
        rest = [kwargs.get(name, default) for name, default in (("pad", 0), ("flip", False), ("channels_last", False))]
        return launcher(images, table, index, samples, keys, *rest)
    if op == "global_threshold":
        return launcher(*args)[:2]
    return launcher(*args, **kwargs)


IMPLEMENTATIONS = ["generic", "avx2", "avx512", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> object:
    """Yield each Implementation that this machine can run. Tensors that it allocates are filled with NaN first."""
    import swamp_fast._C as _C

    name = request.param
    if name in ("generic", "avx2", "avx512"):
        if name not in _C.available():
            pytest.skip(f"this processor has no {name}")
        _C.use(name)
    elif name == "triton" and HAS_GPU:
        pytest.skip(f"{HAS_A_GPU}: the kernels are compiled, see the cuda tests")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield Implementation(name)
    torch.use_deterministic_algorithms(False)
    _C.use(_C.available()[-1])


@pytest.fixture
def on():
    """Return a function from an execution mode to the settings of a short run in that mode."""
    from stops import MODES, RUN

    return lambda mode: RUN | {"engine": MODES[mode]}
