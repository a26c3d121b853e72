"""The command line, as a user types it."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from html import unescape

import pytest

from swamp_fast import SwampConfig, backends
from swamp_fast.cli import main
from swamp_fast.cli.flags import SETTINGS, add_model, add_settings, given_settings, named_values
from swamp_fast.common.format import duration, percent
from swamp_fast.runs.console import Console

FAST = ["--cycles", "1", "--epochs", "1", "--ticket-epochs", "0", "--particles", "2", "--no-progress"]


def test_run_show_and_continue(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["run", "--model", "mlp", "--data", "digits", "--val", "0.1", "--out", str(out), *FAST]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +1 +80.00 %", text, re.M)
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["show", str(out)]) == 0
    text = capsys.readouterr().out
    assert "cycles = 1" in text
    assert re.search(r"engine = (eager|fused|by density)", text)  # a stopwatch decides which
    assert re.search(r"^ +1 +80.00 %", text, re.M)
    assert main(command) == 0  # the run is finished, so this only reads it
    assert main([*command, "--lr", "0.2"]) == 2
    assert "lr was 0.1, is 0.2" in capsys.readouterr().err


def test_settings_from_toml_and_flags(tmp_path, capsys):
    config = SwampConfig(cycles=2, epochs=1, ticket_epochs=0, particles=3, progress=False)
    (tmp_path / "a.toml").write_text(config.to_toml())
    out = tmp_path / "run"
    command = ["run", "--model", "mlp", "--data", "digits", "--config", str(tmp_path / "a.toml"), "--out", str(out)]
    assert main([*command, "--particles", "1,2,1", *("--average", "none"), "--seed", "-3"]) == 0
    about = json.loads((out / "run.json").read_text())["config"]
    assert about["clip_norm"] is None
    assert (about["particles"], about["average"], about["seed"], about["cycles"]) == ([1, 2, 1], "none", -3, 2)


def test_another_optimizer_by_flags(tmp_path, capsys):
    out, adamw = tmp_path / "run", ["--optimizer", "adamw", "--lr", "1e-3", "--swa-lr", "1e-3", "--beta1", "0.8"]
    command = ["run", "--model", "mlp", "--data", "digits", "--out", str(out), "--clip-norm", "0.5", *FAST]
    assert main([*command, *adamw]) == 0
    about = json.loads((out / "run.json").read_text())["config"]
    assert [about[name] for name in ("optimizer", "beta1", "clip_norm")] == ["adamw", 0.8, 0.5]
    assert main([*command, *adamw, "--nesterov"]) == 2
    assert '`nesterov` is a setting of optimizer="sgd"' in capsys.readouterr().err


def test_every_setting_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}" in text, name
    assert "the number of prunings" in text


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["run", "--model", "mlp", "--data", "nowhere"], "there is no file or folder"),
        (["run", "--model", "nothing", "--data", "digits"], "`--model` must be one of resnet20"),
        (["run", "--model", "mlp", "--data", "digits", "--prune", "2"], "`prune` must lie strictly between 0 and 1"),
        (["run", "--model", "mlp", "--data", "digits", "--config", "no.toml"], "No such file"),
        (["show", "nowhere"], "holds no run of swamp_fast"),
    ],
)
def test_mistakes_are_reported_in_one_line(command, text, capsys):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("swamp-fast: ")
    assert text in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["run"], "swamp-fast run: the following arguments are required: --model, --data. Run swamp-fast run --help"),
        (["run", "--mod", "mlp", "--data", "digits"], "the following arguments are required: --model"),
        (["plan", "--model", "mlp", "--shape", "0,8,8"], "three integers of at least 1 are needed, such as 3,32,32"),
        (["plan", "--model", "mlp", "--shape", "8,8"], "three integers of at least 1"),
        (["plan", "--model", "mlp", "--batch-size", "0"], 'an integer of at least 1 is needed, got "0"'),
        (["plan", "--model", "mlp", "--classes", "-3"], "an integer of at least 1"),
        (["run", "--model", "mlp", "--data", "digits", "--particles", "1,x"], "integers separated by commas"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_usage_errors_take_one_line(command, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("torch.nn:Linear", "missing a required argument: 'in_features'; it takes in_features, out_features"),
        ("json:dumps", "missing a required argument: 'obj'; it takes obj, skipkeys"),
        ("os:getcwd", "must return an nn.Module, got str"),
        ("no_such_package:x", "can't be imported"),
    ],
)
def test_factories_that_build_no_model(model, text, capsys):
    assert main(["plan", "--model", model]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "usage: swamp-fast" in text
    assert "analyze" in text


def test_show_as_json(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "--model", "mlp", "--data", "digits", "--out", str(out), *FAST]) == 0
    capsys.readouterr()
    assert main(["show", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["cycle"] for row in content["history"]] == [0, 1]
    assert content["config"]["cycles"] == 1
    assert content["engine"]["name"]


def test_interrupting(monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swamp_fast.cli.demo_run_show.fast_swamp", interrupt)
    assert main(["run", "--model", "mlp", "--data", "digits"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


def test_backends_shows_what_is_active(capsys):
    found = backends()
    assert found["cpp"]["active"]
    assert found["cpp"]["instruction_set"] in ("generic", "avx2", "avx512")
    assert main(["backends"]) == 0
    text = capsys.readouterr().out
    for name, backend in found.items():
        assert name in text
        assert backend["why"] in text


def test_as_a_module_and_with_plain_lines_where_there_is_no_terminal(tmp_path):
    arguments = ["demo", "--out", str(tmp_path), "--epochs", "1"]
    done = subprocess.run([sys.executable, "-m", "swamp_fast", *arguments], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert len(re.findall(r"^cycle +\d+/14  density", done.stderr, re.M)) == 15
    assert re.search(r"time     about .* left at this pace", done.stderr)
    assert re.search(r"^ +14 +4.40 %  +1,228", done.stdout, re.M)
    assert (tmp_path / "accuracy.png").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_moving_line():
    stream = Terminal()
    console = Console(True, stream)
    console.line("one")
    console.status("half way")
    console.status("too soon")
    console.line("two")
    console.close()
    assert re.sub(r"(\r\x1b\[K)+", "|", stream.getvalue()) == "|one\n|half way|two\n|"
    silent = Terminal()
    Console(False, silent).line("one")
    assert silent.getvalue() == ""


def test_numbers_as_people_read_them():
    assert [duration(s) for s in (0.04, 9.94, 42, 185, 7400)] == ["0.0 s", "9.9 s", "42 s", "3:05 min", "2:03 h"]
    assert [percent(None), percent(0.98765), percent(1.0, 0)] == ["–", "98.77 %", "100 %"]


@pytest.mark.slow
def test_the_demo_reaches_98_percent_at_4_4_percent_density_in_under_two_minutes(tmp_path):
    import time

    began = time.perf_counter()
    command = [sys.executable, "-m", "swamp_fast", "demo", "--out", str(tmp_path), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    assert time.perf_counter() - began < 120
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["density"] < 0.0441
    assert rows[-1]["accuracy"] >= 0.98


def test_plan_shows_what_a_step_costs(capsys):
    assert main(["plan", "--model", "small_cnn", "--shape", "1,8,8", "--particles", "3", "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    for word in (
        "Convolution",
        "GFLOP",
        "measured now",
        "a step of 3",
        "fused engine",
        "eager engine",
        "particles fit at once",
    ):
        assert word in said
    assert all(f"{engine} engine" in said for engine in ("fused", "eager"))
    assert main(["plan", "--model", "networks:Depthwise", "--shape", "1,8,8"]) == 2
    assert "doesn't cover networks:Depthwise" in capsys.readouterr().err


SWEEP = """
model = "small_cnn"
data = "digits"
out = "{out}"
[settings]
particles = 2
cycles = 1
epochs = 1
ticket_epochs = 0
progress = false
[grid]
seed = [0, 1]
lr = [0.1, 0.05]
"""


def test_sweep(tmp_path, capsys):
    file = tmp_path / "sweep.toml"
    file.write_text(SWEEP.replace("{out}", str(tmp_path / "out")))
    assert main(["sweep", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:1] for line in shown.splitlines()[2:]] == [["0.1"], ["0.05"]]
    assert shown.count("±") == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs",
        "results.csv",
        "summary.csv",
        "accuracy.png",
    }
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4
    assert main(["sweep", str(file)]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "not valid TOML"),
        ('model = "small_cnn"\ndata = "digits"', "either a table [grid] or tables [[points]]"),
        ('model = "small_cnn"\ndata = "digits"\ngird = 1', "unknown `gird`"),
        ('model = "small_cnn"\ndata = "digits"\n[grid]\nlr = 0.1', "list of values for `lr`"),
        ('model = 3\ndata = "digits"', "`model` must be str"),
    ],
)
def test_sweep_refuses(text, said, tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text(text)
    assert main(["sweep", str(tmp_path / "sweep.toml")]) == 2
    assert said in capsys.readouterr().err


def test_sweep_over_the_networks_arguments(tmp_path, capsys):
    """The three forms that TOML has for the key "model.width", a file's own arguments, and the flag before them."""
    text = SWEEP.replace("{out}", str(tmp_path / "out")).replace("[settings]", "model_args = {width = 4}\n[settings]")
    text = text[: text.index("[grid]")].replace("particles = 2", "particles = 1")
    file = tmp_path / "sweep.toml"
    for grid in ('[grid]\n"model.width" = [8, 4]', "[grid]\nmodel.width = [8, 4]", "[grid.model]\nwidth = [8, 4]"):
        file.write_text(text + grid)
        assert main(["sweep", str(file)]) == 0
        shown = capsys.readouterr().out
        assert [line.split()[:1] for line in shown.splitlines()[2:]] == [["8"], ["4"]]
        assert shown.splitlines()[0].split()[0] == "model.width"
    for points, flags, runs in (("[[points]]\nmodel.width = 8\n", [], 2), ("[grid]\n", ["--model-args", "width=2"], 3)):
        file.write_text(text + points)
        assert main(["sweep", str(file), *flags]) == 0
        assert len(list((tmp_path / "out" / "runs").iterdir())) == runs


@pytest.mark.parametrize(
    ("rest", "flags", "said"),
    [
        (
            "[grid.model]\nwidht = [8]",
            [],
            "`model.widht`: the model factory got an unexpected keyword argument 'widht'",
        ),
        ("[grid.model]\nwidth = 8", [], "list of values for `model.width`"),
        ('[grid]\nrecipe = ["sam"]', [], "A Recipe is code, so no TOML file can hold it: call sweep from Python."),
        ("[grid]\nseed = [0]", ["--model-args", "widht=8"], "\"small_cnn\" got an unexpected keyword argument 'widht'"),
        ("points = [3]", [], "[[points]] must be tables, got 3"),
        ('[settings]\nrecipe = "sam"\n[grid]\nseed=[0]', [], "`recipe` is a Recipe, which is code"),
    ],
)
def test_sweep_refuses_arguments(rest, flags, said, tmp_path, capsys):
    (tmp_path / "sweep.toml").write_text(f'model = "small_cnn"\ndata = "digits"\n{rest}')
    assert main(["sweep", str(tmp_path / "sweep.toml"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_compare_with_the_networks_arguments(tmp_path):
    text = SWEEP[: SWEEP.index("[grid]")].replace("{out}", str(tmp_path / "out"))
    (tmp_path / "compare.toml").write_text(f'methods = ["imp"]\nseeds = [0]\n{text}')
    assert main(["compare", str(tmp_path / "compare.toml"), "--model-args", "width=4"]) == 0
    for run in (tmp_path / "out" / "runs").iterdir():
        assert "SmallCNN: 468 prunable" in (run / "run.json").read_text()


def test_the_networks_arguments(tmp_path, capsys):
    """`run`, `analyze` and `ticket` take them; the page repeats them; a run with others is another run."""
    out, flags = tmp_path / "run", ["--model", "mlp", "--model-args", "width=12,depth=3", "--data", "digits"]
    assert main(["run", *flags, "--val", "0.1", "--out", str(out), *FAST]) == 0
    assert "MLP: 1,056 prunable" in (out / "run.json").read_text()
    assert main(["run", "--model", "mlp", "--data", "digits", "--val", "0.1", "--out", str(out), *FAST]) == 2
    fast = ["--points", "3", "--probes", "0", "--mixtures", "0", "--size", "0", "--repeats", "0", "--samples", "64"]
    assert main(["analyze", str(out), *flags, "--val", "0.1", *fast]) == 0
    assert json.loads((out / "analysis.json").read_text())["about"]["model_args"] == {"width": 12, "depth": 3}
    assert main(["report", str(out)]) == 0
    page = unescape((out / "report.html").read_text())
    assert "swamp-fast run --model mlp --model-args width=12,depth=3 --data digits" in page
    assert "build_model(\"mlp\", channels, height, width, classes, {'width': 12, 'depth': 3})" in page
    assert main(["report", str(out), "--model", "a.b:net", "--model-args", "act='relu'"]) == 0
    page = unescape((out / "report.html").read_text())
    assert "--model a.b:net --model-args " in page
    assert "model = net(**{'act': 'relu'})" in page
    flags += ["--val", "0.1", "--samples", "64", "--points", "3", "--epochs", "1", "--no-progress"]
    assert main(["ticket", *flags, "--candidates", "0"]) == 0


def test_plan_with_the_networks_arguments(capsys):
    pictures = ["--shape", "1,8,8", "--batch-size", "8", "--particles", "2"]
    assert main(["plan", "--model", "small_cnn", "--model-args", "width=8", *pictures]) == 0
    assert main(["plan", "--model", "torch.nn:Linear", "--model-args", "in_features=8,out_features=3", *pictures]) == 2
    assert "--model-args" not in capsys.readouterr().err
    for name, values, said in (
        ("small_cnn", "widht=8", "\"small_cnn\" got an unexpected keyword argument 'widht'; it takes width. Set"),
        ("vgg13", "width=8", "it takes no arguments"),
        ("mlp", "width='x'", "\"mlp\" is called with width='x', and raised TypeError"),
        ("wrn28_2", "depth=20", "`depth` must be 6 n + 4, such as 16 or 28, got 20"),
    ):
        assert main(["plan", "--model", name, "--model-args", values, *pictures]) == 2
        assert said in capsys.readouterr().err


def test_values_with_names():
    assert named_values("width=32,depth=3") == {"width": 32, "depth": 3}
    text = "act='relu', bias=true, norm = False, widths=[1, 2], scale=1e-3, head=None"
    assert named_values(text) == {
        "act": "relu",
        "bias": True,
        "norm": False,
        "widths": [1, 2],
        "scale": 1e-3,
        "head": None,
    }
    strange = ("**{}", "a=1)(b=2", "a=__import__('os')", "a=1j", "a=1;b")
    for text in ("32", "width", "width=", "width=x", "width=1)", *strange):
        with pytest.raises(argparse.ArgumentTypeError, match="texts in quotes"):
            named_values(text)


def test_the_settings_of_recipes_are_flags():
    parser = argparse.ArgumentParser()
    add_settings(parser)
    for text, settings in (
        ("--schedule step --step-epochs 30", {"schedule": "step", "step_epochs": 30}),
        ("--step-epochs 30,60 --step-factor 0.2", {"step_epochs": [30, 60], "step_factor": 0.2}),
        ("--mixup 0.2 --cutmix 1", {"mixup": 0.2, "cutmix": 1.0}),
        ("--accumulate 2 --warmup-epochs 1", {"accumulate": 2, "warmup_epochs": 1.0}),
        ("--select-by loss", {"select_by": "loss"}),
        ("--average ema --ema-decay 0.99 --average-every 5", {"average": "ema", "ema_decay": 0.99, "average_every": 5}),
    ):
        found = given_settings(parser.parse_args(text.split()))
        assert found == settings
        SwampConfig.of(None, {"schedule": "step", **found} if "step_epochs" in found else found)
    assert not {"groups", "layer_kept", "run_dir"} & {*SETTINGS}


def test_arguments_of_the_network_may_come_in_several_flags(capsys):
    parser = argparse.ArgumentParser()
    add_model(parser)
    given = parser.parse_args(["--model", "mlp", "--model-args", "width=3", "--model-args", "depth=2,act='x'"])
    assert given.model_args == {"width": 3, "depth": 2, "act": "x"}
    assert parser.parse_args(["--model", "mlp"]).model_args == {}
    for twice in (["width=3,width=4"], ["width=3", "--model-args", "width=4"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "mlp", "--model-args", *twice])
    assert "width is given twice" in capsys.readouterr().err
