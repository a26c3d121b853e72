"""Small networks of all kinds that fast_swamp must train to the same result as naive_swamp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualCNN(nn.Module):
    """A CNN with BatchNorm, a residual addition, and optional dropout."""

    def __init__(self, channels: int = 8, inputs: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = dropout
        self.drop = nn.Dropout2d(dropout)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = self.drop(F.relu(x + self.norm2(self.conv(x))))
        return self.head(F.dropout(x.mean((2, 3)), self.dropout, self.training))


class VisionTransformer(nn.Module):
    """A vision transformer whose class token and position table are bare parameters."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 5, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class SequenceFirst(nn.Module):
    """An nn.TransformerEncoder with batch_first=False, so that the batch is axis 1."""

    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1).transpose(0, 1)  # [H, B, W]: each row of the picture is a token
        return self.head(self.encoder(self.embed(rows)).mean(0))


class Depthwise(nn.Module):
    """A CNN with a depthwise, dilated convolution, GroupNorm and PReLU."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.GroupNorm(2, channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels, bias=False),
            nn.GroupNorm(4, channels),
            nn.PReLU(),
            nn.Conv2d(channels, 2 * channels, 1, padding_mode="circular"),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Tied(nn.Module):
    """An MLP in which two layers share one weight."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.middle = nn.Linear(width, width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.middle.weight
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.head(F.relu(self.again(F.relu(self.middle(x)))))


class Branching(nn.Module):
    """An MLP that uses one of two layers, depending on the mean over the batch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = self.left(x) if x.mean() > 0 else self.right(x)
        return self.head(torch.tanh(x))


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 for pictures with one channel and ten classes."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model


NETWORKS = {
    "residual": ResidualCNN,
    "vit": VisionTransformer,
    "sequence_first": SequenceFirst,
    "depthwise": Depthwise,
    "dropout": lambda: ResidualCNN(dropout=0.2),
    "vit_dropout": lambda: VisionTransformer(dropout=0.2),
    "tied": Tied,
    "branching": Branching,
    "resnet18": resnet18,
}
FOLDS = {"residual", "depthwise", "dropout", "tied", "resnet18"}


def build(name: str) -> nn.Module:
    """Build a network by name. Its initial weights are the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]()


EAGER_MODES = [("lanes", False), ("lanes", True), ("fold", False), ("fold", True), ("fold_grouped", False)]
# Every network in every execution mode that can run it; test_fold.py names the networks that can't be folded. ResNet-18
# takes half a minute per mode.
CASES = [
    pytest.param(name, mode, channels_last, marks=[pytest.mark.slow] * (name == "resnet18"))
    for name in NETWORKS
    for mode, channels_last in EAGER_MODES
    if (mode == "lanes" or name in FOLDS) and not (name == "resnet18" and channels_last)
]


class Product(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
