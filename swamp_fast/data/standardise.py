"""Per-channel standardisation of uint8 pictures by a table of the 256 values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VALUES = torch.arange(256, dtype=torch.float64) / 255


@dataclass(frozen=True)
class Standardise:
    """Mean and standard deviation [C] float64 of pixel / 255, of the training split."""

    mean: Tensor
    std: Tensor

    @classmethod
    def measured(cls, pictures: Tensor) -> Standardise:
        """Mean and standard deviation of pictures [n, H, W, C] uint8, by counting their values."""
        counts = torch.zeros(pictures.shape[-1], 256, dtype=torch.int64)
        for part in pictures.split(1000):
            for channel, row in enumerate(counts):
                row += torch.bincount(part[..., channel].flatten().int(), minlength=256).cpu()
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ VALUES
        return cls(mean, (share * (VALUES - mean[:, None]).square()).sum(1).sqrt())

    @classmethod
    def of(cls, given: Mapping[str, Sequence[float]]) -> Standardise:
        """The inverse of `to_dict`, for example of a result's `standardise`."""
        return cls(*(torch.tensor(given[name], dtype=torch.float64) for name in ("mean", "std")))

    def table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The standardised value [C, 256] of every byte in every channel; a constant channel is only centred."""
        scale = torch.where(self.std > 0, self.std, 1.0)
        return ((VALUES - self.mean[:, None]) / scale[:, None]).to(device, dtype)

    def to_dict(self) -> dict[str, list[float]]:
        """Mean and standard deviation as lists, by which to standardise pixel / 255 when the model is used."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}
