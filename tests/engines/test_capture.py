"""The CUDA graph of the eager engine's step, on a GPU. test_pretended.py tests it without a GPU."""

from __future__ import annotations

import networks
import pytest
import torch

from swamp_fast import fast_swamp, naive_swamp

SETTINGS = {
    "engine": "eager",
    "batch_size": 48,
    "cycles": 2,
    "epochs": 3,
    "ticket_epochs": 1,
    "particles": 3,
    "progress": False,
}
MODES = ["lanes", "fold", "fold_grouped"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in networks.NETWORKS for mode in (MODES if name in networks.FOLDS else MODES[:1])],
)
def test_on_a_gpu_equal_to_the_naive_loop(name, mode, digits):
    settings = SETTINGS | {"precision": "float64", "device": "cuda", "engine": f"eager:{mode}"}
    fast, naive = (function(networks.build(name), *digits, **settings) for function in (fast_swamp, naive_swamp))
    assert fast.engine["cuda_graph"] == (name != "branching")
    for mask, expected in zip(fast.masks.values(), naive.masks.values(), strict=True):
        assert torch.equal(mask, expected)
    assert all(torch.allclose(fast.state_dict[n], v, atol=1e-8) for n, v in naive.state_dict.items())
    assert next(fast.model.parameters()).device.type == "cpu"  # the device of the user's model


@pytest.mark.gpu
def test_streams_are_the_same_on_a_gpu(digits):
    from swamp_fast.particles.random import epoch_order, lane_keys, stream_of

    keys = [lane_keys([7], [stream_of(2, 1)], torch.device(device)) for device in ("cpu", "cuda")]
    assert torch.equal(epoch_order(keys[0], 50_000), epoch_order(keys[1], 50_000).cpu())
