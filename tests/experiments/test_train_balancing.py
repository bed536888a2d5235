"""`dtr-lab train` with multi-task methods, samplers and learned weights: configured, recorded, resumed, refused."""

from __future__ import annotations

import re

import pytest
import torch

from analysis.runs import load_runs
from experiments.__main__ import main
from lightning_modules.checkpoint import load_denoiser
from tests.experiments.test_train_routing import in_folder, last, runs, train  # noqa: F401  (a fixture)

MODEL = "--model.init_args"
QUIET = ["--trainer.max_steps=10", f"{MODEL}.intervals.num_intervals=4"]


@pytest.mark.parametrize(
    ("config", "settings", "method"),
    [
        ("dtr", [f"{MODEL}.balancing.method=upgrad"], "dtr+upgrad"),
        ("baseline", [f"{MODEL}.balancing.method=uw", f"{MODEL}.loss_weight.name=min_snr"], "baseline+min_snr+uw"),
        (
            "baseline",
            [f"{MODEL}.sampler.name=gradient_noise", f"{MODEL}.loss_weight.name=edm2"],
            "baseline+edm2+gradient_noise",
        ),
        ("unet_dtr", [f"{MODEL}.balancing={{method: mgda, gradients: second_pass, every_n_steps: 2}}"], "dtr+mgda"),
    ],
)
def test_a_run_is_named_by_its_method_and_keeps_the_tasks_weights(config, settings, method):
    assert train(config, *QUIET, *settings) == 0
    (run,) = load_runs(run_ids=[runs()[0].info.run_id])
    assert run.attrs["method"] == method
    balanced = "upgrad" in method or "uw" in method or "mgda" in method
    assert ("task_weight" in run) == balanced
    (stored,) = runs()
    weights = [value for key, value in stored.data.metrics.items() if key.startswith("balancing/weight_t")]
    assert len(weights) == 4 * balanced
    if balanced:
        assert run["task_weight"]["weight_step"].values.tolist() == [5, 10]
        assert run["task_weight"].isel(weight_step=-1).values == pytest.approx(sorted_by_label(stored))
    assert run["coverage"].values.tolist() == [1.0]
    module = load_denoiser(last(stored))
    assert module.method == method


def sorted_by_label(run):
    found = {key: value for key, value in run.data.metrics.items() if key.startswith("balancing/weight_t")}
    return [found[key] for key in sorted(found)]


def test_a_resumed_run_has_the_weights_of_an_unbroken_one(capfd):
    settings = [f"{MODEL}.balancing.method=famo", f"{MODEL}.intervals.num_intervals=4", "--checkpoint.every_n_steps=7"]
    assert train("baseline", "--trainer.max_steps=12", *settings) == 0
    (whole,) = runs()
    assert train("baseline", "--trainer.max_steps=7", *settings, "--seed_everything=0") == 0
    (part,) = (run for run in runs() if run.info.run_id != whole.info.run_id)
    assert train("baseline", "--trainer.max_steps=12", *settings, f"--resume={last(part)}") == 0
    states = [torch.load(last(run), weights_only=True)["state_dict"] for run in (whole, part)]
    assert all(torch.equal(p, q) for p, q in zip(*(state.values() for state in states), strict=True))
    loaded = [load_runs(run_ids=[run.info.run_id])[0]["task_weight"] for run in (whole, part)]
    assert loaded[1]["weight_step"].values.tolist() == [5, 7, 10, 12]  # a training that ends writes what it has
    assert loaded[0].sel(weight_step=[5, 12]).equals(loaded[1].sel(weight_step=[5, 12]))
    assert train("baseline", "--trainer.max_steps=20", f"--resume={last(part)}", settings[1]) == 2
    assert 'other settings: balancing.method was "famo", is "none". Undo' in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"{MODEL}.balancing.method=pc_grad"], "pc_grad.*pcgrad"),
        ([f"{MODEL}.balancing.every_n_steps=0"], "every_n_steps"),
        ([f"{MODEL}.balancing.gradients=free"], "gradients"),
        ([f"{MODEL}.balancing.methods=uw"], "methods"),
        ([f"{MODEL}.balancing=[pcgrad,uw]"], r"model.init_args.balancing must hold settings.*\['pcgrad', 'uw'\]"),
        ([f"{MODEL}.balancing=pcgrad"], "--model.init_args.balancing.method=uw"),
        ([f"{MODEL}.balancing.method=pcgrad", "--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches"),
        ([f"{MODEL}.balancing.method=uw", f"{MODEL}.intervals.only=1"], "nothing to balance"),
        ([f"{MODEL}.sampler.name=gradient_noise", "--gradient_conflict.every_n_steps=0"], "every_n_steps"),
        ([f"{MODEL}.sampler.name=gradient_noise", "--gradient_conflict.halves=1"], "halves"),
        ([f"{MODEL}.sampler.name=important"], "important"),
        ([f"{MODEL}.balancing.method=uw", f"{MODEL}.intervals.num_intervals=1"], "two tasks"),
        ([f"{MODEL}.balancing.method=uw", "--data.init_args.batch_size=4"], "batch of 4 .*0.50 of the rarest of 8"),
        ([f"{MODEL}.balancing.method=uw", f"{MODEL}.sampler.name=log_normal"], "'log_normal' has only .* rarest"),
        ([f"{MODEL}.sampler={{name: speed, speed_tau: 2000}}"], "speed_tau"),
        ([f"{MODEL}.loss_weight={{name: speed, speed_lambda: 2}}"], "speed_lambda"),
        ([f"{MODEL}.intervals.sampling=uniform"], "sampling"),
    ],
)
def test_bad_settings_are_refused_before_there_is_a_run(arguments, says, capfd):
    assert train("baseline", *arguments) == 2
    message = capfd.readouterr().err
    assert re.search(says, message[message.index("dtr-lab: error:") :]), message
    assert "Traceback" not in message
    assert runs() == []


def test_parameters_that_the_method_makes_no_use_of_are_named():
    settings = [f"{MODEL}.balancing={{method: dwa, dwa_temperature: 3, gradients: keep, stch_mu: 0.2}}"]
    with pytest.warns(UserWarning, match=r"balancing\.") as caught:
        assert train("baseline", "--trainer.max_steps=1", "--trainer.val_check_interval=1", *settings) == 0
    said = [str(each.message) for each in caught if "balancing." in str(each.message)]
    assert said == [
        f"balancing.{name} is set, but balancing.method dwa makes no use of it" for name in ("gradients", "stch_mu")
    ]


def test_a_specialist_of_a_balanced_model_is_trained_plainly(capfd):
    from tests.experiments.test_train_routing import CONFIGS, DIT, SMALL

    settings = [text.removeprefix("--") for text in (*SMALL, *DIT) if "progress" not in text]
    balanced = ["model.init_args.balancing.method=uw", "model.init_args.intervals.num_intervals=2"]
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    config = f"--config={CONFIGS / 'baseline.yaml'}"
    assert main(["specialists", config, "--workers=2", "--set", *settings, *balanced, *steps]) == 0
    assert {run.data.tags["dtr.method"] for run in runs()} == {"baseline"}
