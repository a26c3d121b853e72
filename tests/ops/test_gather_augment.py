"""gather_augment: implementations are compared with the reference, and the reference with a simple crop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swamp_fast import ops
from swamp_fast.ops import reference

SIZES = [(5, 1, 1, 1), (9, 7, 9, 3), (4, 32, 32, 3), (6, 28, 28, 1)]


def case(size, uint8: bool, dtype: torch.dtype, device: torch.device, lanes: int = 3, batch: int = 4):
    samples, _, _, channels = size
    images = torch.randint(0, 256, size, dtype=torch.uint8) if uint8 else torch.randn(size, dtype=dtype)
    table = torch.randn(channels, 256, dtype=dtype) if uint8 else None
    index = torch.randint(0, samples, (lanes, batch))
    keys = torch.tensor([[7, lane, 3] for lane in range(lanes)])
    return tuple(None if each is None else each.to(device) for each in (images, table, index, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uint8", [True, False])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, False), (4, True)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_reference(implementation, size, pad, flip, uint8, dtype):
    given = case(size, uint8, dtype, implementation.device)
    for channels_last in (False, True):
        found = implementation("gather_augment", *given, pad=pad, flip=flip, channels_last=channels_last)
        expected = reference.gather_augment(*given, pad=pad, flip=flip, channels_last=channels_last)
        assert torch.equal(found, expected)
        if channels_last:
            assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        else:
            assert found.is_contiguous()


def test_the_reference_crops_the_padded_picture():
    images, table, index, keys = case((9, 8, 8, 3), True, torch.float64, torch.device("cpu"))
    found = reference.gather_augment(images, table, index, keys, pad=2, flip=True)
    for lane in range(3):
        for place in range(4):
            sample = int(index[lane, place])
            words = ops.philox(keys[lane : lane + 1], 1, 4 * (sample + 1))[0, -4:].long() & 0xFFFFFFFF
            dy, dx, flip = int(words[0] * 5 >> 32), int(words[1] * 5 >> 32), int(words[2] >> 31)
            picture = torch.stack([table[c][images[sample, :, :, c].long()] for c in range(3)])
            black = table[:, 0, None, None].expand(3, 12, 12).clone()
            black[:, 2:-2, 2:-2] = picture
            crop = black[:, dy : dy + 8, dx : dx + 8]
            assert torch.equal(found[lane, place], crop.flip(-1) if flip else crop)


def test_without_augmentation_it_is_the_table():
    images, table, index, keys = case((9, 8, 8, 3), True, torch.float32, torch.device("cpu"))
    found = ops.gather_augment(images, table, index, keys)
    expected = torch.stack([table[c][images[index][..., c].long()] for c in range(3)], 2)
    assert torch.equal(found, expected)


def test_draws_follow_the_sample_not_the_place(implementation):
    images, table, index, keys = case((9, 8, 8, 3), True, torch.float32, implementation.device)
    whole = implementation("gather_augment", images, table, index, keys, pad=4, flip=True)
    part = images[index.flatten()]
    local = torch.arange(12, device=implementation.device).view(3, 4)
    streamed = implementation("gather_augment", part, table, local, keys, samples=index, pad=4, flip=True)
    assert torch.equal(streamed, whole)
    order = [2, 0, 1]
    permuted = implementation("gather_augment", images, table, index[order], keys[order], pad=4, flip=True)
    assert torch.equal(permuted, whole[order])


def test_places_and_flips_are_all_met():
    images = torch.zeros(4000, 3, 3, 1)
    images[:, 1, 1] = 1.0
    index, keys = torch.arange(4000)[None], torch.tensor([[1, 2, 3]])
    shifted = ops.gather_augment(images, None, index, keys, pad=1)
    counts = shifted.sum((0, 1, 2))
    assert counts.min() > 4000 / 9 * 0.8
    images = F.pad(torch.ones(4000, 3, 1, 1), (0, 0, 0, 2))
    flipped = ops.gather_augment(images, None, index, keys, flip=True)
    assert abs(float(flipped[..., 0].mean()) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"table": None}, "uint8 `images` need a `table`"),
        ({"table": torch.randn(2, 256)}, r"`table` must have shape \[C, 256\] = \[3, 256\], got \[2, 256\]"),
        ({"index": torch.tensor([[0, 9]])}, r"`index` must lie in \[0, n\) = \[0, 9\), got 0 … 9"),
        ({"index": torch.tensor([[0, -1]])}, r"`index` must lie in"),
        ({"pad": 65}, r"`pad` must lie in \[0, 64\] pixels, got 65"),
        ({"keys": torch.zeros(2, 3, dtype=torch.int64)}, r"`keys` must have shape \[L, 3\] = \[1, 3\]"),
        ({"images": torch.zeros(9, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)}, "`images` must be contiguous"),
    ],
)
def test_refuses(change, text):
    images, table, index, keys = case((9, 8, 8, 3), True, torch.float32, torch.device("cpu"), lanes=1)
    given = {"images": images, "table": table, "index": index, "keys": keys, **change}
    with pytest.raises(ValueError, match=text):
        ops.gather_augment(given["images"], given["table"], given["index"], given["keys"], pad=given.get("pad", 0))


def test_opcheck():
    images, table, index, keys = case((9, 8, 8, 3), True, torch.float32, torch.device("cpu"))
    for channels_last in (False, True):
        arguments = (images, table, index, index, keys, 4, True, channels_last)
        torch.library.opcheck(torch.ops.swamp_fast.gather_augment, arguments)
