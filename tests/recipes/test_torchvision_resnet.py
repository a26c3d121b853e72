"""torchvision's reference training of ResNets in the settings of swamp_fast, at a tiny size.

The original is references/classification/train.py of torchvision, with the arguments of its second ResNet-50 weights:

    --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear --epochs 600
    --batch-size 128 --weight-decay 2e-5 --norm-weight-decay 0.0 --label-smoothing 0.1 --mixup-alpha 0.2
    --cutmix-alpha 1.0 --auto-augment ta_wide --random-erase 0.1 --model-ema --model-ema-steps 32
    --model-ema-decay 0.99998 --ra-sampler --ra-reps 4

What it has that can't be said here:

- Repeated augmentation (--ra-sampler), in which a batch has several views of the same sample.
- A warm-up that starts at a given fraction of the rate (--lr-warmup-decay), and rates that change once per epoch. Here
  they change with each step. `Recipe(schedule=...)` can say both, but then the whole schedule is written by hand.
- An EMA that restarts after the warm-up, and whose decay is scaled by --model-ema-steps and the batch size. Here the
  decay is that of one sample of the average. `swa_start` says when the average begins.
- An EMA of the buffers. Here the BatchNorm statistics of an average are estimated anew on the training data.
- Mixing a batch with itself shifted by one. Here it is mixed with a permutation of itself.
- float16 with a gradient scaler (--amp). Here there is bfloat16.
- DistributedDataParallel with synchronised BatchNorm. Here ranks share the particles, and a batch is on one device.
"""

from __future__ import annotations

import pytest
import torch
from examples import ignored, same_masks
from torch import Tensor, nn
from torch.utils.data import Dataset

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
from torchvision.models.resnet import BasicBlock, ResNet  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

RECIPE = {
    "optimizer": "sgd",
    "lr": 0.5,
    "momentum": 0.9,
    "batch_size": 128,
    "schedule": "cosine",
    "warmup_epochs": 5,
    "weight_decay": 2e-5,
    "decay_norms_and_biases": False,
    "average": "ema",
    "ema_decay": 0.99998,
    "average_every": 32,
    "swa_start": 0.0,
    "mixup": 0.2,
    "cutmix": 1.0,
}
TINY = {"batch_size": 16, "epochs": 3, "warmup_epochs": 1, "lr": 0.05, "average_every": 3, "ema_decay": 0.9}

AUGMENT = v2.Compose(
    [
        v2.RandomResizedCrop(16, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.TrivialAugmentWide(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        v2.RandomErasing(0.1),
    ]
)
PLAIN = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])


class Pictures(Dataset):
    """Pictures [n, 3, 16, 16] uint8, as torchvision.datasets.ImageFolder gives them with a transform."""

    def __init__(self, count: int, transform: v2.Transform) -> None:
        generator = torch.Generator().manual_seed(count)
        self.pictures = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
        self.targets = (torch.arange(count) % 5).tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.targets[index]


def small_resnet() -> nn.Module:
    """A ResNet of torchvision with only two of its stages, which have less than a tenth of its weights."""
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    return model


LOSS = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")


@pytest.mark.slow
def test_every_setting_has_an_effect():
    assert ignored(small_resnet(), Pictures(64, AUGMENT), RECIPE | TINY, loss=LOSS) == []


def test_torchvisions_resnet():
    result = same_masks(small_resnet(), Pictures(48, AUGMENT), Pictures(32, PLAIN), loss=LOSS, **RECIPE | TINY)
    assert "fc.weight" not in result.masks
    assert "layer2.0.conv2.weight" in result.masks
