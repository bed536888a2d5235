"""Tests for `experiments/sweeping/spec.py`, `parameters.py` and `files.py`: what a sweep file may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.sweeping.parameters import Parameter
from experiments.sweeping.spec import read_sweep
from lightning_modules.errors import UserInputError
from tests.experiments.sweeping.helpers import CONFIGS, GRID, SEARCH, changed, written

MTL = Path(__file__).parents[3] / "experiments" / "mtl"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(content, **options) -> str:
    with pytest.raises(UserInputError) as caught:
        read_sweep(written(content), **options)
    return str(caught.value)


def test_a_grid_is_read():
    sweep = read_sweep(written(GRID), seeds=[3, 4], overrides=["trainer.max_steps=9", "a.b=[1, 2]"], experiment="other")
    assert (sweep.name, sweep.experiment, sweep.seeds) == ("tiny", "other", (3, 4))
    assert sweep.configs == (CONFIGS / "baseline.yaml",)
    assert sweep.settings["model.init_args.backbone.hidden_size"] == 16
    assert {axis: list(choices) for axis, choices in sweep.axes.items()} == {
        "routing": ["plain", "random"],
        "weight": ["uniform", "p2"],
    }
    assert sweep.axes["routing"]["random"] == {
        "model.class_path": "DTRModule",
        "model.init_args.routing.kind": "random",
        "model.init_args.routing.beta": 0.5,
    }
    assert sweep.overrides == {"trainer.max_steps": 9, "a.b": [1, 2]}
    assert sweep.search is None


def test_paths_start_at_the_sweep_file_and_a_choice_may_be_a_configuration():
    Path("below").mkdir()
    written("model: {init_args: {loss_weight: {name: p2, p2_gamma: 0.5}}}", "p2.yaml")
    written("trainer: {max_steps: 3}", "base.yaml")
    axes = {"weight": {"p2": {"config": "../p2.yaml", "model.init_args.loss_weight.p2_gamma": 2.0}, "none": None}}
    path = written(changed(GRID, config=["../base.yaml", "../p2.yaml"], axes=axes), "below/sweep.yaml")
    sweep = read_sweep(path)
    assert [config.name for config in sweep.configs] == ["base.yaml", "p2.yaml"]
    assert sweep.axes["weight"] == {
        "p2": {"model.init_args.loss_weight.name": "p2", "model.init_args.loss_weight.p2_gamma": 2.0},
        "none": {},
    }


def test_a_search_is_read():
    search = read_sweep(written(SEARCH)).search
    assert (search.metric, search.direction, search.trials, search.sampler, search.seed) == (
        *("loss/val", "minimize", 3, "tpe", 0),
    )
    assert search.parameters["model.init_args.optimization.learning_rate"] == Parameter(1e-4, 1e-2, log=True)
    assert search.parameters["model.init_args.loss_weight.name"].ends == ("uniform", "p2")
    depth = {"depth": {"low": 2, "high": 6, "step": 2, "int": True}, "rate": {"low": "1e-4", "high": 1}}
    parameters = read_sweep(
        written(changed(SEARCH, search={**SEARCH["search"], "parameters": depth}))
    ).search.parameters
    assert parameters["depth"] == Parameter(2, 6, step=2, whole=True)
    assert parameters["rate"].low == 1e-4, "YAML reads 1e-4 as a text"


@pytest.mark.parametrize("name", ["digits", "routings", "search"])
def test_the_files_that_come_along_are_read(name):
    sweep = read_sweep(MTL / f"{name}.yaml")
    assert sweep.configs == (MTL / "base.yaml",)
    counts = {axis: len(choices) for axis, choices in sweep.axes.items()}
    assert counts == {
        "digits": {"routing": 3, "optimisation": 7},
        "routings": {"routing": 8, "optimisation": 2},
        "search": {},
    }.get(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "sweep.yaml: unknown key 'axis'; do you mean axes?"),
        ({"name": None}, "sweep.yaml: name is missing"),
        ({"name": "a/b"}, "name 'a/b' cannot be used in file names"),
        ({"name": 3}, "name 3 cannot be used in file names: use letters"),
        ({"experiment": None}, "experiment must name the MLflow experiment"),
        ({"config": None}, "config is missing"),
        ({"config": "nowhere.yaml"}, "there is no configuration"),
        ({"config": []}, "config must name a configuration file"),
        ({"axes": None}, "give either `axes` (a grid) or `search`"),
        ({"search": SEARCH["search"]}, "give either `axes` (a grid) or `search`"),
        ({"axes": {}}, "axes must hold at least one axis"),
        ({"axes": {"routing": {}}}, "axis routing is empty"),
        ({"axes": {"routng": {"a": {}}}}, "axis 'routng': do you mean routing?"),
        ({"axes": {"routing": {"a b": {}}}}, "a choice of axis routing 'a b' cannot be used"),
        ({"axes": {"routing": {False: {}}}}, "a choice of axis routing False cannot be used"),
        ({"axes": {"a,b": {"x": {}}}}, "axis 'a,b' cannot be used"),
        ({"axes": {"routing": {"a": "dtr"}}}, "routing.a: a choice holds settings"),
        ({"axes": {"routing": {"a": {"config": "nowhere.yaml"}}}}, "routing.a: there is no configuration"),
        ({"axes": {"a": {"x": {"k": 1}}, "b": {"y": {"k": 2}}}}, "axes a and b both set k, to different values"),
        ({"axes": {"a": {"x": {"seed_everything": 1}}}}, "a.x: seed_everything is set by the sweep itself: list the"),
        ({"settings": {"tracking.experiment": "e"}}, "settings: tracking.experiment is set by the sweep itself"),
        ({"settings": {"tracking": {"tags": {"a": "b"}}}}, "tracking.tags.a is set by the sweep itself"),
        ({"settings": {"k": 1, "k.l": 2}}, "k.l is set, and so is a part of its name"),
        ({"settings": [1]}, "settings must hold settings"),
        ({"settings": {1: 2}}, "settings: the key 1 is no text"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, 1, 0]}, "seeds must differ from one another"),
        ({"seeded": "routing.seed"}, "seeded must be a list of settings"),
        ({"samples": -1}, "samples must be 0, for none, or how many"),
        ({"samples": "many"}, "samples must be 0, for none, or how many"),
    ],
)
def test_a_wrong_grid_is_refused(changes, message):
    assert message in refusal(changed(GRID, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "loss/val"}, "search: unknown key 'metrics'; do you mean metric?"),
        ({"metric": 3}, "metric must name a metric of the runs"),
        ({"direction": "down"}, "direction must be minimize or maximize"),
        ({"sampler": "grid"}, "a grid is written as `axes`"),
        ({"sampler": "cma"}, "sampler must be tpe or random"),
        ({"trials": 0}, "trials must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"parameters": {}}, "parameters must hold at least one setting"),
        ({"parameters": {"k": 3}}, "search: k must be {low: ..., high: ...} or {choices: [...]}"),
        ({"parameters": {"k": {"low": 1}}}, "k must have low and high, or choices"),
        ({"parameters": {"k": {"low": 1, "hihg": 2}}}, "k: unknown key 'hihg'; do you mean high?"),
        ({"parameters": {"k": {"low": "x", "high": 2}}}, "k: low must be a number, got 'x'"),
        ({"parameters": {"k": {"low": 2, "high": 2}}}, "k: low must be less than high"),
        ({"parameters": {"k": {"low": 0, "high": 2, "log": True}}}, "k: log needs a positive low"),
        ({"parameters": {"k": {"low": 1, "high": 2, "step": 3}}}, "k: step must be positive and at most"),
        ({"parameters": {"k": {"low": 1.5, "high": 2, "int": True}}}, "with int, low, high and step must be whole"),
        ({"parameters": {"k": {"low": 1, "high": 2, "int": "yes"}}}, "log and int must be true or false"),
        ({"parameters": {"k": {"choices": []}}}, "k: choices must be a list of values"),
        ({"parameters": {"k": {"choices": [1], "low": 2}}}, "k: choices stand alone, without low"),
        ({"parameters": {"k": {"choices": [[1], [2]]}}}, "k: choices must be plain values"),
        ({"parameters": {"k": {"choices": [1, True]}}}, "k: choices must differ"),
    ],
)
def test_a_wrong_search_is_refused(changes, message):
    assert message in refusal(changed(SEARCH, search={**SEARCH["search"], **changes}))


def test_broken_files_are_named():
    assert "sweep.yaml is no valid YAML: " in refusal("name: [")
    assert "the key 'plain' stands twice" in refusal("axes:\n  routing:\n    plain: {}\n    plain: {a: 1}\n")
    assert "sweep.yaml must hold settings, KEY: VALUE, but holds a list" in refusal("- a")
    assert "sweep.yaml must hold settings, KEY: VALUE, but holds nothing" in refusal("# empty")
    with pytest.raises(UserInputError, match=r"cannot read nowhere\.yaml: No such file"):
        read_sweep(Path("nowhere.yaml"))
    written("model: {", "base.yaml")
    assert "base.yaml is no valid YAML: " in refusal(changed(GRID, config="base.yaml"))


def test_anchors_may_be_shared_and_overridden():
    text = """
        name: n
        experiment: e
        config: BASE
        axes:
          routing:
            dtr: &dtr {model.class_path: DTRModule, model.init_args.routing.beta: 0.8}
            less: &less {<<: *dtr, model.init_args.routing.beta: 0.5}
            least: {<<: *less, model.init_args.routing.beta: 0.2}
    """.replace("BASE", str(CONFIGS / "baseline.yaml"))
    routing = read_sweep(written(text)).axes["routing"]
    assert [choice["model.init_args.routing.beta"] for choice in routing.values()] == [0.8, 0.5, 0.2]
    assert {choice["model.class_path"] for choice in routing.values()} == {"DTRModule"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["steps"]}, "--set steps: settings are KEY=VALUE"),
        ({"overrides": ["=3"]}, "--set =3: settings are KEY=VALUE"),
        ({"overrides": ["a=["]}, "--set a=[: the value is no valid YAML"),
        ({"overrides": ["tracking.run_dir=x"]}, "--set: tracking.run_dir is set by the sweep itself"),
        ({"overrides": ["model.init_args.loss_weight.name=p2"]}, "the search chooses this setting"),
        ({"seeds": [1, 1]}, "--seeds: seeds must differ"),
    ],
)
def test_wrong_options_are_refused(options, message):
    assert message in refusal(SEARCH, **options)
