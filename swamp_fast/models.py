"""The protocol's networks by name, for the command line, the demo and the benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.common.signatures import misfit

VGG_WIDTHS: dict[str, list[int | str]] = {  # channels of each convolution; "M" is a pooling that halves the picture
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet with 6 * blocks + 2 layers: He et al. 2016, arXiv 1512.03385, section 4.2."""

    def __init__(self, blocks: int, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range(blocks):
                stages.append(ResNetBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to logits [B, classes]."""
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


class WideBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; BatchNorm and ReLU come before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width, without dropout: Zagoruyko and Komodakis 2016, arXiv 1605.07146."""

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"`depth` must be 6 n + 4, such as 16 or 28, got {depth}.")
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * width << stage
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to logits [B, classes]."""
        x = F.relu(self.norm(self.blocks(self.conv(x))))
        return self.head(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG as used on CIFAR, with BatchNorm and one linear layer: Simonyan and Zisserman 2015, arXiv 1409.1556."""

    def __init__(self, widths: list[int | str], channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to logits [B, classes]."""
        return self.head(self.features(x).mean((2, 3)))


class SmallCNN(nn.Module):
    """The demo's network for pictures of 8 x 8: three 3x3 convolutions with BatchNorm."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = [channels, width, width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to logits [B, classes]."""
        for conv, norm, pool in zip(self.convs, self.norms, (1, 2, 2), strict=True):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, pool) if pool > 1 else x
        return self.head(x.mean((2, 3)))


class MLP(nn.Module):
    """A multilayer perceptron with `depth` hidden layers."""

    def __init__(self, inputs: int, classes: int, width: int = 1024, depth: int = 2) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise([inputs, *[width] * depth]))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, ...] to logits [B, classes]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)


# name -> (channels, height, width, classes, **arguments) -> network. The keyword arguments are the network's own; the
# first four are positional-only, because a network's width is not that of its pictures.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": lambda channels, _h, _w, classes, /, width=16: ResNet(3, channels, classes, width),
    "resnet32": lambda channels, _h, _w, classes, /, width=16: ResNet(5, channels, classes, width),
    "resnet56": lambda channels, _h, _w, classes, /, width=16: ResNet(9, channels, classes, width),
    "wrn28_2": lambda channels, _h, _w, classes, /, depth=28, width=2: WideResNet(depth, width, channels, classes),
    "vgg13": lambda channels, _h, _w, classes, /: VGG(VGG_WIDTHS["vgg13"], channels, classes),
    "vgg16": lambda channels, _h, _w, classes, /: VGG(VGG_WIDTHS["vgg16"], channels, classes),
    "vgg19": lambda channels, _h, _w, classes, /: VGG(VGG_WIDTHS["vgg19"], channels, classes),
    "small_cnn": lambda channels, _h, _w, classes, /, width=32: SmallCNN(channels, classes, width),
    "mlp": lambda channels, h, w, classes, /, width=1024, depth=2: MLP(channels * h * w, classes, width, depth),
}


def build_model(
    name: str, channels: int, height: int, width: int, classes: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the network with a name from MODELS, or call the factory that is named as "package.module:factory".

    arguments  the network's own keyword arguments, such as {"width": 32}

    Raises ValueError for an unknown name or for arguments that don't fit, TypeError if the factory returns something
    other than an nn.Module.
    """
    return model_factory(name, channels, height, width, classes)(**(arguments or {}))


def model_factory(name: str, channels: int, height: int, width: int, classes: int) -> Callable[..., nn.Module]:
    """Return the factory of a network, which takes only the network's own arguments. For the names, see build_model."""
    factory = functools.partial(MODELS[name], channels, height, width, classes) if name in MODELS else _imported(name)

    def made(**arguments: Any) -> nn.Module:
        """Build the network."""
        reason = misfit(factory, arguments)
        if reason is not None:
            raise ValueError(f'`--model`: "{name}" {reason}. Set its arguments by --model-args.')
        try:
            model = factory(**arguments)
        except Exception as error:  # the user's own code may raise anything
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
            text = f"{type(error).__name__}: {error}"
            raise ValueError(f'`--model`: "{name}" is called with {given}, and raised {text}.') from error
        if not isinstance(model, nn.Module):
            raise TypeError(f'`--model`: "{name}" must return an nn.Module, got {type(model).__name__}.')
        return model

    return functools.update_wrapper(made, factory, assigned=(), updated=())  # so that its signature is the factory's


def _imported(name: str) -> Callable[..., Any]:
    """Import the factory that is named as "package.module:factory"."""
    package, colon, factory = name.partition(":")
    if not colon:
        raise ValueError(f'`--model` must be one of {", ".join(MODELS)}, or package.module:factory; got "{name}".')
    try:
        found: Callable[..., Any] = getattr(import_module(package), factory)
    except Exception as error:  # the imported code may raise anything
        raise ValueError(f'`--model`: "{name}" can\'t be imported: {error}') from error
    if not callable(found):
        raise TypeError(f'`--model`: "{name}" must be a factory, got {type(found).__name__}.')
    return found
