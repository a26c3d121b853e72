"""benchmarks.golden: a difference is found and named, and equal code gives no difference."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from paths import ROOT

from benchmarks import golden

CHANGE = """
_before = fast_swamp

def fast_swamp(*arguments, **settings):
    return _before(*arguments, **{**settings, "lr": 0.0999})
"""


def test_bits_are_compared():
    before = {"engine": "fused", "loss": [0.5, float("nan")], "w": torch.tensor([0.0, float("nan"), 1.0])}
    assert golden.difference(before, {**before, "w": before["w"].clone()}) is None
    assert golden.difference(before, {**before, "loss": [0.5, 0.25]}) == "loss was [0.5, nan], is [0.5, 0.25]"
    one = torch.tensor([-0.0, float("nan"), 2.0])
    assert golden.difference(before, {**before, "w": one}) == "w: 2 of 3 differ; [0] was 0.0, is -0.0"
    assert golden.difference(before, {**before, "w": one.double()}) == "w was torch.float32 [3], is torch.float64 [3]"
    assert golden.difference(before, {**before, "more": 1}) == "more is new"
    assert golden.difference({**before, "more": 1}, before) == "more is missing"


def test_the_code_of_the_other_tree_runs(tmp_path, monkeypatch, capfd):
    """The other tree is changed to train with another learning rate, which shows in the results."""
    tree = tmp_path / "tree"
    links = shutil.ignore_patterns(*(link.rpartition("/")[2] for link in golden.LINKS))
    shutil.copytree(ROOT / "swamp_fast", tree / "swamp_fast", ignore=links)
    for link, target in golden.LINKS.items():
        (tree / link).symlink_to(ROOT / target)
    with (tree / "swamp_fast" / "__init__.py").open("a") as file:
        file.write(CHANGE)
    monkeypatch.setattr(golden, "tree_of", lambda commit: contextlib.nullcontext(tree))
    assert golden.main(["--against", "planted", "--only", "dropout"]) == 1
    printed = capfd.readouterr().out
    assert "dropout: cycle 0, " in printed
    assert "1 of 1 calls differ from planted" in printed


@pytest.mark.slow
def test_this_commit_against_itself(capfd):
    """The results of HEAD and of this checkout are equal, as uncommitted changes must not change them either."""
    assert golden.main(["--against", "HEAD"]) == 0
    assert "0 of 8 calls differ" in capfd.readouterr().out
