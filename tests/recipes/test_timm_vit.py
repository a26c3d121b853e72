"""timm's training of a ViT-tiny in the settings of swamp_fast, at a tiny size.

The original is train.py of timm (pytorch-image-models), with arguments after DeiT (2012.12877, table 9):

    --model vit_tiny_patch16_224 --opt adamw --lr 1e-3 --weight-decay 0.05 --sched cosine --epochs 300
    --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5 --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --clip-grad 1.0
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --drop-path 0.1 --batch-size 128 --grad-accum-steps 8

What it has that can't be said here:

- --warmup-lr and --min-lr above 0, except by `Recipe(schedule=...)`, which writes the whole schedule by hand.
- Mixing that is given up after some epochs (--mixup-off-epoch), that leaves out batches (--mixup-prob), whose choice
  between mixup and CutMix isn't even (--mixup-switch-prob), or that differs from sample to sample (--mixup-mode elem).
- Repeated augmentation (--aug-repeats), and augmentation that is split from a clean copy of the batch (--aug-splits).
- Clipping by value or adaptively (--clip-mode). Here a gradient is clipped by its norm.
- float16 with a gradient scaler (--amp). Here there is bfloat16.
- A batch that is split between processes. Here ranks share the particles.

--layer-decay is a group per block here. timm leaves the class token and the position embedding without decay, because
its models say so (no_weight_decay()); here a group does.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from examples import ignored, same_masks
from torch import Tensor, nn

RECIPE = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "batch_size": 128,
    "accumulate": 8,
    "schedule": "cosine",
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,
    "mixup": 0.8,
    "cutmix": 1.0,
    "clip_norm": 1.0,
    "groups": [{"params": ["cls_token", "pos_embed"], "weight_decay": 0.0}],
    "average": "none",
}
TINY = {"batch_size": 8, "lr": 2e-3, "accumulate": 2, "epochs": 3, "warmup_epochs": 1}


class SmallViT(nn.Module):
    """A vision transformer for pictures [B, 3, 16, 16], of torch's own modules."""

    def __init__(self, width: int = 24, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 3, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures to logits [B, classes]."""
        patches = self.patch_embed(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def timms_vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=0.1)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 5


LOSS = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")


def test_every_setting_has_an_effect():
    assert ignored(SmallViT(), pictures(48), RECIPE | TINY | {"clip_norm": 0.1}, loss=LOSS) == []


@pytest.mark.parametrize("make", [SmallViT, timms_vit])
def test_a_vit(make):
    result = same_masks(make(), pictures(48), pictures(32), loss=LOSS, **RECIPE | TINY)
    assert "head.weight" not in result.masks
    assert not {"cls_token", "pos_embed"} & {*result.masks}
