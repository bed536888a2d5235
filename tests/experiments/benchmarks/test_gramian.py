"""Tests for `experiments/benchmarks/gramian`: that it measures what it says, not how fast anything is."""

import json
import math
import subprocess
import sys

import pytest
import torch

from experiments.benchmarks.gramian import comparison, measure, report, workloads
from experiments.benchmarks.gramian.__main__ import main
from experiments.benchmarks.gramian.comparison import METHODS, Comparison
from experiments.benchmarks.gramian.measure import Case, UnusableMethodError
from experiments.benchmarks.gramian.methods import Ours, Plain, Retained, Setting, Subbatches
from experiments.benchmarks.gramian.peers import AutogramSamples, AutoJac, AutoJacLoop, Opacus, OpacusFunctorch

CPU = Setting()


@pytest.fixture(scope="module")
def toy() -> workloads.Workload:
    return workloads.dit(width=16, depth=1, batch_size=8, input_size=4)


def checked(method, batch, available=math.inf) -> Case:
    return measure.check(method, batch, measure.truth_of(method.workload, CPU, batch.num_groups), available)


def test_a_run_prints_one_row_per_method_and_model():
    command = [sys.executable, "-m", "experiments.benchmarks.gramian", "--json", "--quick", "--K", "4", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["rows"]
    rows = {(row["model"], row["method"]): row for row in result["rows"]}
    assert set(rows) == {(model, method) for model in ("DiT", "U-Net") for method in ("plain", *METHODS)}
    for (_, method), row in rows.items():
        assert row["ratio_to_plain"] > 0, row["note"]
        assert row["peak_memory_ratio"] > 0
        assert row["gradient_error"] < 1e-5
        assert row["K"] == (1 if method == "plain" else 4)
        assert row["width"] > 0
        if method != "plain":
            assert row["gramian_error"] < 1e-5
    assert all(rows[model, "ours"]["coverage"] == 1 for model in ("DiT", "U-Net"))


def test_a_wrong_gramian_or_gradient_is_found(toy):
    class WrongGramian(Subbatches):
        def backward(self, batch):
            return super().backward(batch) * 1.001

    class WrongGradient(Subbatches):
        def backward(self, batch):
            gramian = super().backward(batch)
            self.parameters[0].grad *= 1.5
            return gramian

    batch = toy.batch(4)
    assert checked(Subbatches(toy, CPU), batch).gramian_error < 1e-5
    with pytest.raises(UnusableMethodError, match="wrong: relative error of the Gramian"):
        checked(WrongGramian(toy, CPU), batch)
    with pytest.raises(UnusableMethodError, match="wrong: relative error of the gradient"):
        checked(WrongGradient(toy, CPU), batch)


def test_opacus_is_only_right_on_the_unet_without_its_own_convolution_formula():
    """The reason given in `OpacusFunctorch`; should Opacus mend it, its hooks will be what is measured."""
    unet = workloads.quick_workloads()[1]
    with pytest.raises(UnusableMethodError, match="wrong"):
        checked(Opacus(unet, CPU), unet.batch(4))
    assert checked(OpacusFunctorch(unet, CPU), unet.batch(4)).gramian_error < 1e-5


def test_peak_memory_counts_every_byte_of_the_step_and_what_rests(toy):
    class Hungry(Plain):
        def update(self, batch):
            held = torch.empty(2**20)
            super().update(batch)
            del held

    batch = toy.batch(4)
    plain, hungry = checked(Plain(toy, CPU), batch), checked(Hungry(toy, CPU), batch)
    assert hungry.peak_bytes - plain.peak_bytes == 4 * 2**20
    weights = sum(parameter.nbytes for parameter in plain.method.model.parameters())
    trained = sum(parameter.nbytes for parameter in plain.method.parameters)
    assert plain.peak_bytes > weights + 3 * trained  # gradients and AdamW's two moments


def test_k_gradients_of_the_model_show_in_the_peak(toy):
    trained = sum(parameter.nbytes for parameter in Plain(toy, CPU).parameters)
    peaks = [checked(Retained(toy, CPU), toy.batch(number)).peak_bytes for number in (2, 8)]
    assert peaks[1] - peaks[0] > 5 * trained


def test_drift_of_the_machine_cancels(toy, monkeypatch):
    """On a machine that slows down steadily, with time measured in visits, ratios are those of the costs."""
    visits = 0

    def seconds(method, batch, repeats):
        nonlocal visits
        visits += 1
        return (1 + visits) * (3 if isinstance(method, Subbatches) else 1)

    monkeypatch.setattr(measure, "seconds_per_step", seconds)
    plain, other = Plain(toy, CPU), Subbatches(toy, CPU)
    cases = [Case(method, toy.batch(2), 0.0, 0.0, 1, 1.0, "") for method in (plain, other, other, plain)]
    for number in range(3):
        measure.run_round(plain, cases, number, repeats=1)
    assert [case.ratios for case in cases] == [pytest.approx([cost] * 3) for cost in (1, 3, 3, 1)]


def test_the_fastest_right_variant_is_measured_and_the_others_are_accounted_for(toy, monkeypatch):
    class Wrong(AutoJac):
        variant = "wrong one"

        def backward(self, batch):
            return 2 * super().backward(batch)

    trials = {"vmapped": 5.0, "one at a time": 2.0}
    check = measure.check

    def check_with_trial(method, *args):
        case = check(method, *args)
        case.trial = trials.get(method.variant, case.trial)
        return case

    monkeypatch.setattr(measure, "check", check_with_trial)
    monkeypatch.setitem(METHODS, "autojac", (Wrong, AutoJac, AutoJacLoop))
    compared = Comparison(toy, CPU, ["autojac"], lambda text: None)
    compared.check_all([2, 4], [])
    assert [case.method.variant for case in compared.cases[1:]] == ["one at a time"] * 2
    assert "(one at a time)" in compared.cases[1].note
    assert "vmapped: 2.5 times slower at K = 2" in compared.cases[2].note
    assert "wrong one: wrong: relative error of the Gramian" in compared.cases[2].note


def test_a_peer_that_is_missing_or_too_large_gets_a_row_with_the_reason(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.autogram", None)
    compared = Comparison(toy, CPU, ["autogram", "opacus", "subbatches"], lambda text: None)
    per_model = sum(parameter.nbytes for parameter in compared.plain.parameters)
    monkeypatch.setattr(measure, "free_bytes", lambda setting: 6.5 * per_model)
    compared.check_all([2], [])
    compared.run(rounds=1, seconds=0, repeats=1)
    rows = {row["method"]: row for row in report.rows_of(compared)}
    assert rows["autogram"]["ratio_to_plain"] is rows["autogram"]["peak_memory_ratio"] is None
    assert "not installed" in rows["autogram"]["note"]
    assert "memory: its gradients alone take" in rows["opacus"]["note"]
    assert rows["subbatches"]["ratio_to_plain"] > 0
    assert "not installed" in report.table(list(rows.values()))


def test_slow_methods_take_part_in_fewer_rounds(toy):
    compared = Comparison(toy, CPU, [], lambda text: None)
    compared.plain_seconds = 1.0
    rounds = {}
    for kind in (Ours, Subbatches, AutogramSamples, Retained):
        for trial in (1.2, 3.0, 20.0):
            case = Case(kind(toy, CPU), toy.batch(2), 0.0, 0.0, 1, trial, "")
            rounds[kind.name, trial] = compared._rounds_of(case, 20)
    assert {rounds[name, trial] for name in ("ours", "subbatches") for trial in (1.2, 3.0, 20.0)} == {20}
    assert [rounds["retained", trial] for trial in (1.2, 3.0, 20.0)] == [20, 10, comparison.FEWEST_ROUNDS_SLOW]


def test_verdicts_follow_the_numbers():
    common = {"model": "DiT", "width": 128, "K": 8}
    rows = [
        {**common, "method": "ours", "ratio_to_plain": 1.05, "peak_memory_ratio": 1.2},
        {**common, "method": "retained", "ratio_to_plain": 5.0, "peak_memory_ratio": 1.5},
        {**common, "method": "ours", "K": 4, "ratio_to_plain": 9.0, "peak_memory_ratio": 9.0},
    ]
    slowdown, speedup, memory = report.verdicts(rows)
    assert "1.050" in slowdown
    assert slowdown.endswith(": met")
    assert "4.76" in speedup
    assert speedup.endswith(": missed")
    assert "1.200" in memory
    assert memory.endswith(": missed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--K", "3"], "K = 3 does not divide the batch of 8 of DiT-32"),
        (["--models", "DiT-33"], "unknown model 'DiT-33'"),
    ],
)
def test_bad_options_are_refused_before_work_starts(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--quick", *options])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_published_sizes_can_be_asked_for():
    (found,) = workloads.find_workloads(["DiT-B/2"], "default", 16)
    assert (found.name, found.width, found.batch_size, found.sample_shape) == ("DiT-B/2", 768, 16, (4, 32, 32))
    assert workloads.preset_dit("DiT-S/8", 16).network().config.depth == 12
