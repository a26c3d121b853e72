"""Build the network that a command names, with the shape that its data need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from swamp_fast.config import SwampConfig
from swamp_fast.data.samples import one_input
from swamp_fast.data.sources import Arrays, open_source
from swamp_fast.models import build_model

DEFAULT_CLASSES = 10  # for a data set without a list of classes


def picture_shape(data: str, config: SwampConfig) -> tuple[int, int, int, int]:
    """The channels, height, width and number of classes of the training pictures."""
    source = open_source(data, "train", config.data_dir).source
    if isinstance(source, Arrays):
        sample, classes = source.inputs[0], int(source.targets.max()) + 1
    else:
        sample, classes = one_input(source), len(getattr(source.dataset, "classes", ())) or DEFAULT_CLASSES
    height, width, channels = sample.shape
    return channels, height, width, classes


def seeded_network(name: str, arguments: Mapping[str, Any], data: str, config: SwampConfig) -> nn.Module:
    """The named network for these data, with initial weights drawn from the seed of the settings.

    arguments  the network's own arguments, as --model-args gives them
    """
    shape = picture_shape(data, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(name, *shape, arguments)
