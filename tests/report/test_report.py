"""Reports: their content, the escaping of user text, and their display in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from shlex import quote

import browser
import pytest
import reported
import torch
from jinja2 import UndefinedError

from swamp_fast import fast_swamp, sweep
from swamp_fast.cli import main
from swamp_fast.report import write_report
from swamp_fast.report.analysis_charts import draw_dead_channels
from swamp_fast.report.canvas import COLOURS
from swamp_fast.report.charts import draw_score
from swamp_fast.report.facts import RunFacts
from swamp_fast.report.page import code, render
from swamp_fast.report.run_page import run_page
from swamp_fast.report.tables import summary_table

VOID = {"meta", "link", "br"}
EVERY_FIGURE = {"accuracy", "barriers", "matrix", "plane", "overlap", "flatness", "layers", "dead-channels", "time"}


class Parsed(HTMLParser):
    """Collects a page's elements, text, ids and links. Asserts that elements are closed in order and no script runs."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.said = ""
        content = page.read_text()
        self.feed(content)
        self.close()
        assert self.open == []
        assert not re.search(r"@import|<script|javascript:", content)
        assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", content))
        assert not any(light in content.partition("</style>")[2] for light, _ in COLOURS.values())

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert not [key for key in given if key.startswith("on")]
        self.seen.append(name)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if name == "a":
            self.links.append(str(given["href"]))
        else:
            self.loaded += [str(given[key]) for key in ("src", "href", "xlink:href", "data") if key in given]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.said += data


def parsed(page: Path) -> Parsed:
    """Parse a page. Asserts that it is well-formed, loads nothing, and has no dead links."""
    found = Parsed(page)
    assert len(found.ids) == len(set(found.ids))
    assert all(address == "data:," or address[1:] in found.ids for address in found.loaded)
    for address in found.links:
        if address.startswith("#"):
            assert address[1:] in found.ids
        elif not address.startswith("https://arxiv.org/"):
            assert (page.parent / address).exists(), address
    return found


def figures(folder: Path) -> set[str]:
    """The names of a report's figures. Asserts that each figure has its three files."""
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")}
    for name in names:
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert len(numbers(folder, name)) > 0
    return names


def numbers(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / "numbers" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_with_its_analysis(tmp_path):
    folder = reported.write_run(tmp_path / "a", dropped=True)
    reported.write_analysis(folder)
    page = write_report(folder)
    found = parsed(page)
    assert page == folder / "report.html"
    assert figures(folder) == EVERY_FIGURE
    assert found.seen.count("svg") == len(EVERY_FIGURE)
    for said in (
        "a: SmallCNN on digits",
        "3 particles from one ticket, 7 trainings of 4 epochs",
        "particle 1 diverged",
        "cycle 1 to cycle 6",
        "only reported",
        "averaging shrinks",
        'SwampResult.load("a", model)',
        'build_model("small_cnn"',
        "seed = 7",
        "2026-11-21 09:30 UTC",
        "8651c26e",
        "98.60\xa0%",  # the accuracy of the ensemble
        "swamp-fast run --model small_cnn --data digits --config a/config.toml --out a-again",
    ):
        assert said in found.said, said
    assert "swamp-fast analyze" not in found.said
    assert "no-repeat local" in page.read_text()  # the CSS for the shadow at the edge of a wide table
    rows = numbers(folder, "accuracy")
    assert [row["particle 1"] for row in rows][1:4] == [rows[1]["particle 1"], "", rows[3]["particle 1"]]
    assert float(rows[2]["particle 2"]) == pytest.approx(0.97 - 0.04 / 6 + 0.008)
    assert float(numbers(folder, "barriers")[0]["test_error over mean"]) == 0.006
    assert float(numbers(folder, "layers")[0]["convs.0.weight"]) == 1.0
    assert float(numbers(folder, "overlap")[6]["iou of convs.1.weight"]) == pytest.approx(0.4)
    for said in ("Against b", "0.900"):
        assert said in found.said, said
    assert len(numbers(folder, "cycles")) == 7


def test_the_average_does_not_hide_a_particle_at_its_place():
    rows = [{"density": 1.0, "accuracy": 0.9, "particle_accuracy": [0.9]}]
    dots, line = draw_score(rows, "accuracy").axes[0].lines
    assert (dots.get_label(), dots.get_markerfacecolor(), line.get_label()) == ("a particle", "none", "their average")
    assert dots.get_zorder() > line.get_zorder()


def test_only_settings_that_differ_come_first(tmp_path):
    found = parsed(write_report(reported.write_run(tmp_path / "a", cycles=1, done=2, lr=0.07)))
    first = found.said.partition("All settings")[0]
    assert "0.07" in first
    assert "weight_decay" not in first
    assert "run_dir" not in first


def test_a_run_without_test_data_or_analysis_unfinished(tmp_path):
    folder = reported.write_run(tmp_path / "a", done=3, test=False, val=False)
    found = parsed(write_report(folder, model="resnet20"))
    assert figures(folder) == {"accuracy", "layers", "time"}
    for said in (
        "Unfinished: 4 of 7 trainings",
        "there is no analysis yet: swamp-fast analyze a --model resnet20 --data DATA",
        "--config a/config.toml --out a",
        "the run had no test data",
        "Training loss over sparsity",
    ):
        assert said in found.said, said
    assert "model.safetensors" not in found.said  # only a finished run has this file
    assert "None" not in found.said


@pytest.mark.parametrize(
    "lacks",
    [
        ("particles", "plane", "cost", "hull"),
        ("consecutive", "against", "hessian", "masks", "ensemble"),
    ],
)
def test_an_analysis_that_lacks_parts(tmp_path, lacks):
    folder = reported.write_run(tmp_path / "a", cycles=1, done=2)
    reported.write_analysis(folder, 2)
    path = folder / "analysis.json"
    analysis = json.loads(path.read_text())
    path.write_text(json.dumps({name: part for name, part in analysis.items() if name not in lacks}))
    found = parsed(write_report(folder))
    drawn = {"particles": "matrix", "hessian": "flatness", "masks": "dead-channels", "consecutive": "barriers"}
    drawn |= {"against": "overlap"}
    assert figures(folder) == EVERY_FIGURE - {drawn.get(part, part) for part in lacks}
    assert ("--keep-particles" in found.said) == ("particles" in lacks)
    assert ("barriers between cycles, flatness, dead channels" in found.said) == ("masks" in lacks)


def test_an_analysis_without_test_data(tmp_path):
    folder = reported.write_run(tmp_path / "a", cycles=1, done=2, test=False, val=False)
    reported.write_analysis(folder, 2)
    path = folder / "analysis.json"
    analysis = json.loads(path.read_text())
    for part in (*analysis["consecutive"], analysis["hull"], analysis["plane"], analysis["particles"]["matrix"]):
        part |= {"test_loss": None, "test_error": None}
    for part in analysis["consecutive"]:
        part["barriers"] = {name: both for name, both in part["barriers"].items() if name.startswith("train")}
    path.write_text(json.dumps(analysis | {"ensemble": None}))
    assert figures(folder) == set()
    found = parsed(write_report(folder))
    assert figures(folder) == EVERY_FIGURE
    assert "Level lines of the training loss" in found.said


def edited(path: Path, **changes) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"combine": "best"},
            ("the best particle reaches 97.90", "the one that is best on validation data", "the best of several"),
        ),
        ({"mask_score": "random"}, ("Random pruning with averaged", "drawn at random")),
        ({"mask_from": "dense"}, ("every mask from the dense solution", "One global threshold")),
        ({"particles": 1}, ("Iterative magnitude pruning of one particle", "the particle reaches 97.90")),
    ],
)
def test_a_run_that_is_not_swamp_is_not_described_as_swamp(tmp_path, settings, said):
    folder = reported.write_run(tmp_path / "a", **settings)
    found = parsed(write_report(folder)).said.replace("\xa0", " ")
    for words in said:
        assert words in found, words
    assert "Iterative magnitude pruning with averaged particles" not in found
    assert ("the average reaches" in found) == ("mask_score" in settings or "mask_from" in settings)
    assert ("points above" in found) == (settings.get("particles") != 1)
    assert ("One global threshold prunes all layers" in found) == ("mask_score" not in settings)


def test_a_run_without_flops(tmp_path):
    folder = reported.write_run(tmp_path / "a", cycles=1, done=2, flops=0)
    assert re.search(r"FLOPs left\s*–", parsed(write_report(folder)).said)


def test_the_command_has_the_data_that_was_held_out(tmp_path):
    facts = RunFacts.read(reported.write_run(tmp_path / "a", cycles=2, done=2))
    about = facts.about | {"fingerprints": facts.about["fingerprints"] | {"val": "d24b4251"}}
    said = run_page(dataclasses.replace(facts, about=about)).html()
    assert "--data DATA --val VAL --config a/config.toml --out a-again" in said
    data = ["train    x.npz train: 1,294 samples on cpu", "val      held out of x.npz train: 144 samples on cpu"]
    lines = [about["lines"][0], *data, "test     y.npz test: 359 samples on cpu"]
    said = run_page(dataclasses.replace(facts, about=about | {"lines": lines})).html()
    for command in ("--config a/config.toml --out a-again", "--config a/config.toml --out a"):
        assert f"swamp-fast run --model MODEL --data DATA --val 0.1 --test TEST {command}" in said
    assert "train, test, val=0.1, config=config" in said


def test_an_analysis_of_fewer_cycles_than_the_run_has(tmp_path):
    folder = reported.write_run(tmp_path / "a", done=7, keep_particles=True)
    reported.write_analysis(folder, 3)
    edited(folder / "analysis.json", particles=None)
    said = parsed(write_report(folder)).said
    assert "The analysis covers 3 cycles, but the run has 7: analyse the run again." in said
    assert "this one covers 3: swamp-fast analyze a --model small_cnn --data digits" in said
    assert "--keep-particles" not in said


def test_what_is_not_known_is_not_drawn():
    masks = [{"cycle": cycle, "dead_in": 2, "dead_out": None} for cycle in (0, 1)]
    (line,) = draw_dead_channels(masks, {0: 1.0, 1: 0.8}).axes[0].lines
    assert list(line.get_ydata()) == [2, 2]


def test_milliseconds_are_of_a_batch(tmp_path):
    folder = reported.write_run(tmp_path / "a")
    reported.write_analysis(folder)
    assert "Milliseconds are measured on this CPU for a batch:" in parsed(write_report(folder)).said
    cost = json.loads((folder / "analysis.json").read_text())["cost"]
    edited(folder / "analysis.json", cost=[row | {"batch_size": 128} for row in cost])
    assert "Milliseconds are measured on this CPU for 128 samples at once:" in parsed(write_report(folder)).said


@pytest.mark.parametrize("page", ["comparison", "run", "sweep"])
def test_a_file_of_another_version(tmp_path, page, capsys):
    """The error message names the file, and there is no traceback."""
    folder = tmp_path / "a"
    if page == "comparison":
        reported.write_comparison(folder)
        edited(folder / "comparison.json", summary=[{"method": "imp"}])
        said = "comparison.json is damaged or of another version (KeyError: 'density')"
    elif page == "run":
        reported.write_run(folder)
        reported.write_analysis(folder)
        edited(folder / "analysis.json", against={"overlap": []})
        said = "run.json or analysis.json or a cycle's row is damaged or of another version (KeyError: 'run')"
    else:
        folder.mkdir()
        (folder / "results.csv").write_text("id,lr,seed,cycle,error\na,0.1,0,0,\n")
        (folder / "summary.csv").write_text("lr,cycle,density\n0.1,0,1.0\n")
        said = "summary.csv or results.csv is damaged or of another version (KeyError: 'seeds')"
    assert main(["report", str(folder)]) == 2
    assert said in capsys.readouterr().err


HOSTILE = "<script>alert(1)</script>\"'&"


def test_text_of_the_run_is_escaped(tmp_path):
    folder = reported.write_run(tmp_path / "a&<b>", name=HOSTILE, done=2, cycles=1)
    found = parsed(write_report(folder, model=HOSTILE))
    assert "script" not in found.seen
    assert "b" not in found.seen
    assert HOSTILE in found.said
    assert 'SwampResult.load("a&<b>", model)' in found.said
    assert f"--model {quote(HOSTILE)} --data DATA --config 'a&<b>/config.toml' --out 'a&<b>-again'" in found.said


def test_what_a_template_gets_is_escaped():
    assert "<li>&lt;b&gt;</li>" in render("failed.html", errors=["<b>"])
    assert "<li><code>&lt;b&gt;</code></li>" in render("failed.html", errors=[code("<b>")])
    with pytest.raises(UndefinedError):
        render("failed.html")


def test_text_of_a_comparison_is_escaped(tmp_path):
    """Text is escaped on the page and in the drawings, where matplotlib escapes it."""
    folder = reported.write_comparison(tmp_path / "c", methods=("imp", HOSTILE), seeds=2)
    edited(folder / "comparison.json", errors=[{"method": HOSTILE, "seed": 3, "error": HOSTILE}])
    (folder / "comparison.csv").write_text("method\n")
    found = parsed(write_report(folder))
    assert "script" not in found.seen
    assert f"{HOSTILE}, seed 3: {HOSTILE}" in found.said
    assert found.said.count(HOSTILE) > 20


def test_a_comparison(tmp_path):
    folder = reported.write_comparison(tmp_path / "c", seeds=5)
    (folder / "comparison.csv").write_text("method\n")
    found = parsed(write_report(folder))
    assert figures(folder) == {"accuracy", "differences", "cost"}
    assert "10 methods, 5 seeds each. Differences are measured from imp." in found.said
    assert "Fewer than ten" in found.said
    assert "the spread over seeds is in the table" in found.said
    assert re.search(r"SGD down to.*swamp\s*6.87\s%\s*88.00 ± 0.30\s%\s*16.78\s%\s*40.96\s%", found.said, re.S)
    assert {row["method"] for row in numbers(folder, "differences")} == set(reported.METHODS) - {"imp"}


def test_equal_differences_are_no_verdict(tmp_path):
    folder = reported.write_comparison(tmp_path / "c", methods=("imp", "sms"), seeds=2)
    found = json.loads((folder / "comparison.json").read_text())
    for row in found["paired"]:
        row |= {"difference": -0.01, "low": -0.01, "high": -0.01}
    (folder / "comparison.json").write_text(json.dumps(found))
    (folder / "comparison.csv").write_text("method\n")
    assert "below" not in parsed(write_report(folder)).said


def test_a_comparison_of_one_seed_and_one_method_without_a_baseline(tmp_path):
    folder = reported.write_comparison(tmp_path / "c", methods=("imp",), seeds=1)
    (folder / "comparison.csv").write_text("method\n")
    found = parsed(write_report(folder))
    assert figures(folder) == {"accuracy", "cost"}
    assert "1 seed each" in found.said
    assert "One seed, so no spread." in found.said
    assert "the band is one standard deviation" in found.said


def test_a_sweep_and_its_runs(tmp_path, digits):
    (inputs, targets), test = digits
    settings = {"particles": 2, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "progress": False}

    def made() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )

    grid = [{"lr": 0.1}, {"lr": 1e38, "swa_lr": 1e38}]
    swept = sweep(made, (inputs, targets), test, grid, out=tmp_path / "s", **settings)
    assert [run.error is None for run in swept.runs] == [True, False]
    found = parsed(write_report(tmp_path / "s"))
    assert figures(tmp_path / "s") == {"accuracy"}
    assert "2 runs of 2 points" in found.said
    assert "FloatingPointError" in found.said
    assert f"swamp-fast report s/runs/{swept.runs[0].id}" in found.said
    again = swept.runs[0].folder
    said = parsed(write_report(again)).said
    assert f"{again.name}: Sequential" in said
    assert "1,024 prunable" in said  # from the console's line about the model, which run.json keeps


def test_a_sweep_over_particles_and_points_that_set_different_things(tmp_path, digits):
    """There is one line per point, even if it sets a column of the history, and no spread with one seed."""

    def made() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )

    settings = {"cycles": 1, "epochs": 1, "ticket_epochs": 0, "progress": False, "swa_lr": 0.01}
    swept = sweep(made, *digits, [{"particles": 1}, {"particles": [1, 2], "lr": 0.05}], out=tmp_path / "s", **settings)
    found = parsed(write_report(tmp_path / "s"))
    assert "2 runs of 2 points, 1 seed each." in found.said
    assert re.search(r"particles = 1\b.*particles = \[1, 2\], lr = 0.05", found.said, re.S)
    assert "dropped" not in found.said
    assert "±" not in found.said
    assert len(numbers(tmp_path / "s", "accuracy")) == 4
    assert numbers(tmp_path / "s", "accuracy")[0]["accuracy_std"] == ""
    assert "±" not in summary_table(swept.summary(), swept.names)


def test_on_the_command_line(tmp_path, capsys, digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    settings = {"particles": 2, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "progress": False}
    result = fast_swamp(model, *digits, run_dir=tmp_path / "run", **settings)
    assert main(["report", str(tmp_path / "run"), "--model", "my.nets:mlp"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    said = parsed(tmp_path / "run" / "report.html").said
    assert f"{result.history[-1]['accuracy'] * 100:.2f}\xa0%" in said
    assert "from my.nets import mlp" in said
    began = json.loads((tmp_path / "run" / "run.json").read_text())["began"]
    # A report doesn't change the run, so it can be loaded again.
    again = fast_swamp(model, *digits, run_dir=tmp_path / "run", **settings)
    assert again.history == result.history
    assert json.loads((tmp_path / "run" / "run.json").read_text())["began"] == began
    assert write_report(tmp_path / "run").exists()


def test_mistakes(tmp_path, capsys, monkeypatch):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds nothing to report" in capsys.readouterr().err
    (tmp_path / "comparison.json").write_text("[1")
    assert main(["report", str(tmp_path)]) == 2
    assert "comparison.json is damaged" in capsys.readouterr().err
    folder = reported.write_run(tmp_path / "none", done=0)
    assert main(["report", str(folder)]) == 2
    assert "no cycle of this run is finished" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(reported.write_run(tmp_path / "run", done=1))]) == 2
    assert "swamp-fast[report]" in capsys.readouterr().err


def test_the_same_folder_gives_the_same_page(tmp_path):
    folder = reported.write_run(tmp_path / "a", cycles=2, done=3)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    reported.write_run(folder / "run", cycles=14, done=15, dropped=True, keep_particles=True)
    reported.write_analysis(folder / "run", 15)
    reported.write_comparison(folder / "comparison")
    return [write_report(folder / name) for name in ("run", "comparison")]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser(chromium, pages, width, theme):
    for page in pages:
        look = chromium.look(page, width, theme)
        assert look.messages == []
        assert look.requests == [page.as_uri()]
        assert look.inner_width == width
        assert look.scroll_width <= width
        red, green, blue = map(int, re.findall(r"\d+", look.background)[:3])
        assert (red + green + blue > 600) == (theme == "light")
        assert look.picture[:4] == b"\x89PNG"
        assert len(look.picture) > 20_000  # in bytes; an empty page has about 3,000


def test_the_browser_notices_a_bad_page(chromium, tmp_path):
    """The browser tests notice if a page makes a request, logs an error or overflows."""
    bad = (
        '<meta name=viewport content="width=device-width"><p style="width: 2000px">x<img src="http://a.invalid/b.png">'
    )
    (tmp_path / "bad.html").write_text(f"<!doctype html>{bad}<script>console.error('no'); missing()</script>")
    look = chromium.look(tmp_path / "bad.html", 375, "light")
    assert look.scroll_width > 375
    assert "http://a.invalid/b.png" in look.requests
    assert len(look.messages) >= 2


@pytest.mark.parametrize("wrong", [1, "width=32", ["width"], True])
def test_arguments_of_the_network_that_are_no_dict(tmp_path, wrong):
    with pytest.raises(TypeError, match="^`model_args` must be a dict of the network's arguments"):
        write_report(reported.write_run(tmp_path / "a"), "mlp", wrong)
