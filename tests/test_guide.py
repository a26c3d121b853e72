"""The guide's code runs as it stands."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

from swamp_fast import SwampConfig

GUIDE = (ROOT / "swamp_fast" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.M | re.S)


def test_the_guides_code_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "guide"}
    code = blocks("python")
    assert len(code) >= 6
    for block in code:
        exec(compile(block, "guide", "exec"), scope)
    assert scope["result"].history[-1]["top_3"] > 0.5
    assert [run.point["recipe"] for run in scope["swept"].runs] == ["sgd", "rmsprop"] * 2


def test_the_guides_settings_are_read():
    (toml,) = blocks("toml")
    assert SwampConfig.from_toml(toml).groups[0].params == ("*.bias",)


@pytest.mark.parametrize("path", re.findall(r"\]\((\.\./[^)]+)\)", GUIDE))
def test_the_guides_links_lead_somewhere(path):
    assert (ROOT / "swamp_fast" / path).exists()
