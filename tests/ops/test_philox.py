"""philox: the reference gives the published words, and implementations are compared with the reference."""

from __future__ import annotations

import pytest
import torch

from swamp_fast import ops
from swamp_fast.ops import reference

# Counter, key and words of the test vectors for philox4x32-10 in the Random123 library.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    from swamp_fast.ops.reference.philox import philox_blocks

    seed = key[0] | key[1] << 32
    keys = torch.tensor([[seed - (1 << 64) if seed >> 63 else seed, counter[2], counter[1]]])
    found = philox_blocks(keys, counter[3], torch.tensor([counter[0]]))
    assert [int(word) & 0xFFFFFFFF for word in found[0]] == words


@pytest.mark.parametrize("purpose", [0, 1, 77, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 257, 5000])
def test_against_reference(implementation, count, purpose):
    keys = torch.tensor([[0, 0, 0], [-1, 5, 9], [2**63 - 1, 2**31 + 1, 2**32 - 1]], device=implementation.device)
    found = implementation("philox", keys, purpose, count)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference.philox(keys, purpose, count))


def test_lanes_and_lengths_stand_alone(implementation):
    keys = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]], device=implementation.device)
    together = implementation("philox", keys, 2, 1000)
    assert torch.equal(implementation("philox", keys[1:2], 2, 1000)[0], together[1])
    assert torch.equal(implementation("philox", keys, 2, 90), together[:, :90])


def test_words_are_uniform_and_streams_differ():
    words = ops.philox(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 3, 3], [2, 2, 3]]), 0, 200_000).double() / 2**32
    assert words.mean(1).abs().max() < 4 * (1 / 12 / 200_000) ** 0.5
    assert (words.std(1) - (1 / 12) ** 0.5).abs().max() < 0.002
    assert torch.corrcoef(words).fill_diagonal_(0).abs().max() < 0.01


@pytest.mark.parametrize(
    ("keys", "purpose", "count", "text"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 0, 1, r"`keys` must have shape \[L, 3\], got \[2, 2\]"),
        (torch.zeros(2, 3), 0, 1, "`keys` must be int64, got float32"),
        (torch.zeros(2, 3, dtype=torch.int64), -1, 1, "`purpose` must lie in"),
        (torch.zeros(2, 3, dtype=torch.int64), 0, -1, "`count` must lie in"),
    ],
)
def test_refuses(keys, purpose, count, text):
    with pytest.raises((ValueError, TypeError), match=text):
        ops.philox(keys, purpose, count)


def test_opcheck():
    torch.library.opcheck(torch.ops.swamp_fast.philox, (torch.ones(2, 3, dtype=torch.int64), 3, 10))
