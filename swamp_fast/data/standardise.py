"""Standardises uint8 pictures per channel, with a table of the 256 values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.checked import checked, checked_list, shown

VALUES = torch.arange(256, dtype=torch.float64) / 255


@dataclass(frozen=True)
class Standardise:
    """The mean and standard deviation [C] float64 of pixel / 255 in the training split."""

    mean: Tensor
    std: Tensor

    @classmethod
    def measured(cls, pictures: Tensor) -> Standardise:
        """Measure the mean and standard deviation of uint8 pictures [n, H, W, C] by counting their values."""
        counts = torch.zeros(pictures.shape[-1], 256, dtype=torch.int64)
        for part in pictures.split(1000):
            for channel, row in enumerate(counts):
                row += torch.bincount(part[..., channel].flatten().int(), minlength=256).cpu()
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ VALUES
        return cls(mean, (share * (VALUES - mean[:, None]).square()).sum(1).sqrt())

    @classmethod
    def of(cls, given: Mapping[str, Sequence[float]]) -> Standardise:
        """Make a Standardise from the lists that `to_dict` returns, such as those in a result's `standardise`.

        Raises TypeError or ValueError for anything else.
        """
        if not isinstance(given, Mapping) or {*given} != {"mean", "std"}:
            raise TypeError(
                f'`standardise` must be a dict with the lists "mean" and "std", such as result.standardise; got '
                f"{shown(given)}."
            )
        mean, std = (_per_channel(given[name], low) for name, low in (("mean", -math.inf), ("std", 0)))
        if len(mean) != len(std):
            raise ValueError(f"`standardise` must have one mean and std per channel, got {len(mean)} and {len(std)}.")
        return cls(mean, std)

    def check_channels(self, name: str, channels: int) -> None:
        """Raise ValueError unless there is one mean per channel of the pictures called `name`."""
        if len(self.mean) != channels:
            raise ValueError(
                f"`standardise` has {len(self.mean)} channels, but the pictures of {name} have {channels}; all "
                "pictures need as many channels as the training pictures."
            )

    def table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a table [C, 256] with the standardised value of every byte per channel.

        A constant channel is centred but not scaled.
        """
        scale = torch.where(self.std > 0, self.std, 1.0)
        return ((VALUES - self.mean[:, None]) / scale[:, None]).to(device, dtype)

    def to_dict(self) -> dict[str, list[float]]:
        """Return mean and standard deviation as lists; whoever uses the model must standardise pixel / 255 by them."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}


def _per_channel(given: object, low: float) -> Tensor:
    """One finite number per channel, at least `low`, as a tensor [C] float64."""
    values: list[Any] = checked_list("standardise", given.tolist() if isinstance(given, Tensor) else given, object)
    return torch.tensor([checked("standardise", value, float, low) for value in values], dtype=torch.float64)
