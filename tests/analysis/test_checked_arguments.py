"""Arguments of results, analyses, reports and studies: whatever is wrong is refused in words that name the argument."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swamp_fast.analysis
from swamp_fast import SwampConfig, SwampResult, compare, fast_swamp, sweep, write_report
from swamp_fast.analysis import (
    Analysis,
    analyze,
    averages,
    barrier_matrix,
    channels,
    densities,
    ensemble,
    hessian_trace,
    hull,
    inference_cost,
    loss_barrier,
    loss_plane,
    mask_overlap,
    particles,
    predictions,
    table,
    ticket_stability,
)
from swamp_fast.common.checked import checked

SETTINGS = {"particles": 3, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "batch_size": 20, "progress": False}
NOTHING = [None, True, object(), b"x", {1}, 1j, torch.ones(2), np.ones(2), int, lambda: 1]


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def pictures(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def analysis(**changes: object) -> Analysis:
    return Analysis(network(), pictures(), batch_size=20, **changes)


class Finished:
    """One tiny run, what the analyses make of it, and valid arguments by name."""

    def __init__(self, folder: File) -> None:
        self.folder, self.model, data = folder, network(), pictures()
        self.result = fast_swamp(self.model, data, data, keep_particles=True, engine="eager", **SETTINGS)
        self.result.save(folder / "run")
        self.on = Analysis(self.model, data, data, config=self.result.config)
        self.states = particles(self.result)
        self.path = loss_barrier(self.on, *self.states[:2], points=3)
        self.plane = loss_plane(self.on, *self.states, size=2)
        self.swept = sweep(network, data, data, engine="eager", **SETTINGS | {"cycles": 0})
        a, b, c = self.states
        self.valid = {
            "on": self.on,
            "result": self.result,
            "state": a,
            "a": a,
            "b": b,
            "c": c,
            "states": [a, b],
            "masks": self.result.masks,
            "plane": self.plane,
            "points": 3,
            "probes": 2,
            "mixtures": 2,
            "size": 2,
            "what": "train_loss",
            "over": "max",
            "repeats": 0,
            "directory": folder / "run",
            "cycle": 0,
            "path": folder / "figure.svg",
            "model": self.model,
            "train": data,
            "test": data,
            "val": pictures(30),
            "candidates": [0],
            "config": SwampConfig(engine="eager", **SETTINGS),
            "rows": [0],
            "lanes": 1,
            "methods": ["imp"],
            "seeds": [0],
            "content": {},
            "solutions": [self.on.solution(a)],
            "shares": torch.ones(1, 1, dtype=torch.float64),
            "measure": lambda run, channels_last: None,
            "probabilities": torch.full((2, 2), 0.5),
            "targets": torch.tensor([0, 1]),
        }

    def bad(self, kind: str) -> list[Any]:
        """Wrong values for an argument of a kind."""
        numbers = [math.nan, math.inf, -math.inf, -1, "1", "", [], {}]
        converted = [{name: to(tensor) for name, tensor in self.states[0].items()} for to in CONVERSIONS]
        renamed = {f"x{name}": tensor for name, tensor in self.states[0].items()}
        masks = self.result.masks
        other = [{name: mask.float() for name, mask in masks.items()}, {"x": masks}, {"x": torch.ones(0).bool()}]
        other += [{name: to(mask) for name, mask in masks.items()} for to in CONVERSIONS[3:6]]
        return {
            "count": [*NOTHING, *numbers, 1.5, 2**63, 10**5000],
            "number": [*NOTHING, *numbers, 10**400],
            "index": [*NOTHING, 1.5, math.nan, "1", -1, 2, 2**63],
            "seed": [*NOTHING, 1.5, math.nan, "1", 2**63, -(2**63) - 1],
            "flag": [*(value for value in NOTHING if value is not True), 0, 1, "x", [], {}],
            "object": [*NOTHING, 1, "x", [], {}, 1.5],
            "dict": [*NOTHING, 1, "x", [], {}, {"x": 1}],
            "path": [*NOTHING, 1, "", "a\0b", "~no_such_user/x", [], {}, 1.5],
            "text": [*NOTHING, 1, "x", "", [], {}, 1.5],
            "name": [*NOTHING[1:], 1, [], {}, 1.5],
            "list": [
                *(value for value in NOTHING if not isinstance(value, set)),
                1,
                "x",
                "",
                {},
                [],
                [None],
                ["x", 1],
                1.5,
            ],
            "state": [*NOTHING, 1, "x", [], {}, {"x": 1}, renamed, *converted],
            "states": [
                *NOTHING,
                1,
                "x",
                [],
                {},
                self.states[0],
                [None],
                [renamed, renamed],
                *([c, c] for c in converted),
            ],
            "masks": [*NOTHING, 1, "x", [], {1: 2}, *other],
            "tensor": [*NOTHING, 1, "x", [], torch.ones(2, 2, dtype=torch.int64), torch.ones(3) * 1j],
        }[kind]


CONVERSIONS = [
    *(lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in (torch.complex64, torch.int64, torch.bool)),
    *(lambda tensor: tensor.tolist(), lambda tensor: tensor.to("meta"), lambda tensor: tensor.to_sparse()),
    lambda tensor: tensor[None],
]

# Function -> its parameters in order, with their kinds; "-" is left out here, as other tests have it.
OF_ANALYSIS = {
    "averages": "result:object",
    "barrier_matrix": "on:object states:states points:count reestimate:flag",
    "channels": "masks:masks on:-",
    "consecutive": "on:object result:object points:count reestimate:flag",
    "contour": "plane:object path:path what:text",
    "densities": "masks:masks",
    "differing": "on:object result:object",
    "ensemble": "on:object states:states reestimate:flag",
    "hessian_trace": "on:object state:state masks:masks probes:count samples:- seed:seed",
    "hull": "on:object states:states mixtures:count seed:seed reestimate:flag",
    "inference_cost": "on:object state:state masks:masks batch_size:- repeats:count",
    "loss_barrier": "on:object a:state b:state points:count reestimate:flag",
    "loss_plane": "on:object a:state b:state c:state size:count margin:number names:list",
    "mask_overlap": "a:masks b:masks",
    "particles": "result:object",
    "predictions": "probabilities:tensor targets:-",
    "table": "content:dict",
    "ticket_stability": (
        "model:- train:- val:- candidates:list forward:- loss:- transform:- prunable:- config:- epsilon:number "
        "points:count samples:- settings:-"
    ),
    "analyze": "on:object result:object points:count probes:count mixtures:count size:count repeats:count against:-",
}
OTHERS: dict[str, tuple[Callable[[Finished], Callable[..., object]], str]] = {
    "SwampResult.load": (lambda run: SwampResult.load, "directory:path model:-"),
    "SwampResult.save": (lambda run: run.result.save, "directory:path"),
    "SwampResult.at": (lambda run: run.result.at, "cycle:index"),
    "SwampResult.write_final": (lambda run: run.result.write_final, "folder:object"),
    "Analysis.evaluate": (lambda run: run.on.evaluate, "states:states reestimate:flag"),
    "Analysis.mixed": (lambda run: run.on.mixed, "solutions:list shares:tensor reestimate:flag"),
    "Analysis.measured": (lambda run: run.on.measured, "solutions:list shares:tensor measure:- reestimate:flag"),
    "Analysis.solution": (lambda run: run.on.solution, "state:state"),
    "Analysis.mask": (lambda run: run.on.mask, "masks:masks"),
    "Analysis.keys": (lambda run: run.on.keys, "lanes:count"),
    "Path.of": (lambda run: run.path.of, "what:text"),
    "Path.part": (lambda run: run.path.part, "rows:-"),
    "Path.barrier": (lambda run: run.path.barrier, "what:text over:text"),
    "write_report": (lambda run: write_report, "directory:path model:name model_args:-"),
    "SweepResult.write_csv": (lambda run: run.swept.write_csv, "path:path rows:-"),
    "SweepResult.figure": (lambda run: run.swept.figure, "path:path"),
}
FUNCTIONS = {
    name: (lambda _, name=name: getattr(swamp_fast.analysis, name), text) for name, text in OF_ANALYSIS.items()
}
FUNCTIONS |= OTHERS
CASES = [
    (name, *parameter.split(":"))
    for name, (_, text) in FUNCTIONS.items()
    for parameter in text.split()
    if not parameter.endswith(":-")
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    return Finished(tmp_path_factory.mktemp("arguments"))


def test_the_table_is_complete(finished):
    public = {name for name in swamp_fast.analysis.__all__ if inspect.isfunction(getattr(swamp_fast.analysis, name))}
    assert public == set(OF_ANALYSIS)
    for name, (function, text) in FUNCTIONS.items():
        named = [parameter.partition(":")[0] for parameter in text.split()]
        assert named == list(inspect.signature(function(finished)).parameters), name


@pytest.mark.parametrize(("name", "parameter", "kind"), CASES)
def test_a_wrong_argument_is_refused_by_its_name(name, parameter, kind, finished):
    function = FUNCTIONS[name][0](finished)
    parameters = inspect.signature(function).parameters
    valid = {each: finished.valid[each] for each in parameters if each in finished.valid}
    if name == "mask_overlap":
        valid = dict.fromkeys("ab", finished.result.masks)
    for value in finished.bad(kind):
        if value is None and parameters[parameter].default is None:
            continue
        with pytest.raises((TypeError, ValueError, IndexError)) as caught:
            function(**valid | {parameter: value})
        assert str(caught.value).startswith(f"`{parameter}"), (value, caught.value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda run: SwampResult.load(run.folder / "run", nn.Linear), "`model` must be a Module"),
        (lambda run: SwampResult.load(run.folder / "nowhere"), "holds no run"),
        (lambda run: analysis(standardise=True), "`standardise` must be a dict with the lists"),
        (lambda run: analysis(standardise={"mean": [0], "std": [math.nan]}), "`standardise`"),
        (
            lambda run: analysis(standardise={"mean": [0], "std": [-1]}),
            "`standardise` must be",
        ),
        (lambda run: analysis(standardise={"mean": [0], "std": [1, 1]}), "per channel"),
        (lambda run: analysis(standardise={"mean": [0], "std": [1]}), "is for uint8 pictures"),
        (lambda run: analysis(samples=0), r"`samples` must lie in \[1, 40\]"),
        (lambda run: analysis(samples=True), "`samples` must be an int, got True"),
        (lambda run: analysis(prunable=True), "`prunable` must be None, the name of a parameter"),
        (lambda run: analysis(samples=21).evaluate(run.states), "`samples` = 21"),
        (
            lambda run: inference_cost(run.on, run.states[0], {}, 0),
            "`batch_size` must be at least 1",
        ),
        (lambda run: hessian_trace(run.on, run.states[0], {}, samples=41), "`samples` must lie in"),
        (lambda run: analyze(run.on, run.result, against=1), "`against` must be a SwampResult"),
        (lambda run: channels(run.result, 1), "`on` must be an Analysis"),
        (lambda run: ensemble(run.on, []), "`states` must have at least 1 entry, got 0"),
        (lambda run: barrier_matrix(run.on, run.states[:1]), "`states` must have at least 2 entries, got 1"),
        (lambda run: loss_plane(run.on, *run.states, size=2, names=["a", "b"]), "`names` must be three"),
        (lambda run: loss_plane(run.on, *run.states, size=2, names="abc"), "`names` must be a list, each entry a text"),
        (lambda run: loss_plane(run.on, *run.states[:2], run.states[0]), "`a`, `b` and `c` lie on one line"),
        (lambda run: run.path.part([3]), r"`rows` must lie in \[0, 2\]"),
        (lambda run: run.path.part(["x"]), r"`rows\[0\]` must be an int"),
        (lambda run: run.on.measured(run.valid["solutions"], run.valid["shares"], 1), "`measure` must be a function"),
        (lambda run: run.on.mixed(run.valid["solutions"], torch.ones(1, 2)), r"`shares` must have shape \[M, 1\]"),
        (lambda run: run.on.mixed(run.valid["solutions"], torch.full((1, 1), math.nan)), "`shares` must be finite"),
        (lambda run: run.swept.write_csv(run.folder / "x.csv", [1]), r"`rows\[0\]` must be a dict"),
        (lambda run: sweep(network, pictures(), out=True), "`out` must be a path"),
        (lambda run: sweep(network, pictures(), grid={"seed": torch.tensor(1)}), "`grid` must have a list of values"),
        (lambda run: compare(network, pictures(), None, None, [0]), "`methods` must be a list"),
        (lambda run: compare(network, pictures(), None, ["imp"], torch.tensor(0)), "`seeds` must be a list"),
        (lambda run: compare(network, pictures(), None, ["imp"], [0], baseline=[]), "`baseline` must be one of"),
        (lambda run: ticket_stability(network(), pictures(), pictures(30), [-1]), "`candidates` must be at least 0"),
        (
            lambda run: ticket_stability(network(), pictures(), pictures(30), [0], epsilon=2),
            r"`epsilon` must lie in \[0",
        ),
        (lambda run: predictions(torch.randn(3, 4), torch.zeros(3).long()), "of logits take softmax"),
        (lambda run: predictions(torch.full((3, 2), 0.5), torch.zeros(3)), "`targets` must be a tensor of integers"),
        (lambda run: predictions(torch.full((3, 2), 0.5), torch.tensor([0, 1])), r"one label per row, \[3\]"),
        (lambda run: predictions(torch.full((3, 2), 0.5), torch.tensor([0, 1, 2])), r"`targets` must lie in \[0, 1\]"),
        (lambda run: run.swept.figure(run.folder / "figure"), "`path` must end in the name of a format, one of .*svg"),
        (lambda run: run.swept.figure(run.folder / "figure.txt"), "`path` must end in the name of a format"),
        (lambda run: table({"consecutive": 5}), "`content` must be what `analyze` returns"),
    ],
)
def test_what_is_refused(call, text, finished):
    with pytest.raises((TypeError, ValueError, OSError), match=text):
        call(finished)


def test_pictures_of_other_channels_are_refused():
    data = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    with pytest.raises(ValueError, match="`standardise` has 3 channels, but the pictures of .* have 1"):
        Analysis(network(), data, batch_size=20, standardise={"mean": [0.5] * 3, "std": [0.1] * 3})
    given = {"mean": torch.tensor([0.5]), "std": np.array([0.25])}
    on = Analysis(network(), data, batch_size=20, standardise=given)
    assert on.problem.standardise.to_dict() == {"mean": [0.5], "std": [0.25]}


def test_what_is_understood(finished, monkeypatch, tmp_path):
    """Values of other types that mean one thing only give the numbers of the plain ones."""
    run, (a, b, _) = finished, finished.states
    assert loss_barrier(run.on, a, b, np.int64(3)).train_loss == run.path.train_loss
    assert barrier_matrix(run.on, (state for state in (a, b)), 3).paths[0, 1].train_loss == run.path.train_loss
    doubled = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in a.items()}
    assert run.on.evaluate((doubled,)).train_loss == pytest.approx(run.on.evaluate([a]).train_loss)
    assert hull(run.on, [a, b], 2, seed=-1).mixtures != hull(run.on, [a, b], 2, seed=1).mixtures
    assert loss_plane(run.on, *run.states, size=2, margin=np.float32(0)).x[0] == 0
    labels = torch.tensor([0, 1])
    probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert predictions(probabilities, labels.to(torch.uint8)) == predictions(probabilities, labels)
    assert len(averages(run.result)) == 2
    assert densities({"scalar": torch.tensor(True)}) == {"scalar": 1.0}
    assert channels({"scalar": torch.tensor(False)})["scalar"].dead_in == 1
    assert mask_overlap(run.result.masks, copy.deepcopy(run.result.masks)).iou == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run.swept.write_csv("~/rows.csv") == tmp_path / "rows.csv"
    run.result.save("~/run")
    assert SwampResult.load("~/run") == run.result


@pytest.mark.parametrize(
    ("value", "kind", "limits", "text"),
    [
        (1, bool, {}, "`n` must be True or False, got 1."),
        ("3", int, {"low": 1}, "`n` must be an int, got '3'."),
        (0, int, {"low": 1}, "`n` must be at least 1, got 0."),
        (9, int, {"low": 1, "high": 8}, "`n` must lie in [1, 8], got 9."),
        (math.nan, float, {}, "`n` must be finite, got nan."),
        (-(10**400), float, {}, "`n` must be finite, got an object of type int."),
        (math.inf, float, {"low": 0}, "`n` must be at least 0 and finite, got inf."),
        ([0] * 99, float, {"advice": "Pass one."}, "`n` must be a number, got an object of type list. Pass one."),
    ],
)
def test_the_messages_of_a_check(value, kind, limits, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        checked("n", value, kind, **limits)
    assert str(caught.value) == text
