"""Re-estimating running statistics: averaged weights with a particle's statistics give chance accuracy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.random import evaluation_time


@torch.no_grad()
def reestimate(
    modules: list[nn.Module],
    run: Callable[[Any, int], object],
    data: Data,
    batch_size: int,
    channels_last: bool = False,
) -> None:
    """Set the running statistics to the mean over the batches of a pass in stored order, weighted by samples.

    run(inputs [B, ...], time) runs all modules on one batch. Only norms are in train mode: dropout stays off. Each call
    of a norm that a forward uses several times counts as a batch. Leaves the modules in eval mode.
    """
    norms = norms_of(modules)
    momenta = [norm.momentum for norm in norms]
    for module in modules:
        module.eval()
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen, count, own = 0, 0, dict.fromkeys(norms, 0)

    def before_call(norm: Any, _: object) -> None:
        own[norm] += count
        norm.momentum = count / own[norm]

    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(before_call))
        for number, (inputs, _, count) in enumerate(pass_in_stored_order(data, batch_size, channels_last)):
            seen += count
            for norm in norms:
                norm.momentum = count / seen  # the fused engine reads it and calls no module
            run(inputs, evaluation_time(0, number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
