"""Tests for `experiments/benchmarks/balancing.py`: that it measures what it says, not how fast anything is."""

import json

import pytest
import torch

from experiments.benchmarks import balancing
from experiments.benchmarks.gramian.workloads import dit
from lightning_modules.balancing.config import GRADIENT_METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
TOY = ["--width=16", "--depth=1", "--batch=8", "--input-size=4", "--K", "4", "--rounds=1"]


def test_every_method_has_a_row_for_each_way_beside_the_reference(capsys):
    balancing.main([*TOY, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["gradients"]) for row in result["rows"]] == [
        (method, way) for method in GRADIENT_METHODS for way in balancing.WAYS
    ]
    for row in result["rows"]:
        assert row["K"] == 4
        assert row["ratio_to_plain"] > 0
        assert row["reference_ratio_to_plain"] > 0
        assert row["gradient_error"] < 1e-4
    assert result["plain_ratio"] > 0


def test_a_wrong_gradient_is_seen(monkeypatch):
    trainee = balancing.Trainee(dit(width=16, depth=1, batch_size=8, input_size=4), 4)
    right = balancing.prepared(trainee, "mgda").errors
    monkeypatch.setattr(balancing, "reference_aggregators", lambda K: {"mgda": lambda jacobian: 1.5 * jacobian.mean(0)})
    wrong = balancing.prepared(trainee, "mgda").errors
    assert max(right.values()) < 1e-4
    assert min(wrong.values()) > 1e-2


def test_the_reference_takes_k_backward_passes_and_ours_one_or_two():
    trainee, seen = balancing.Trainee(dit(width=16, depth=1, batch_size=8, input_size=4), 4), []
    trainee.model.final_layer.register_full_backward_hook(lambda *_: seen.append(1))
    steps = balancing.prepared(trainee, "mgda")
    for way, passes in (("keep", 1), ("second_pass", 2), ("reference", 4)):
        seen.clear()
        before = [p.clone() for p in trainee.parameters]
        steps.take[way]()
        assert len(seen) == passes
        assert all(torch.equal(p, q) for p, q in zip(before, trainee.parameters, strict=True))
        assert all(p.grad is None for p in trainee.parameters)


def test_the_table_names_what_misses_the_target():
    row = {"method": "mgda", "K": 8, "gradients": "keep", "range": [1.0, 2.0], "reference_ratio_to_plain": 7.0}
    assert balancing.table([{**row, "ratio_to_plain": 1.7}]).endswith("K = 8: all")
    assert balancing.table([{**row, "ratio_to_plain": 1.9}]).endswith("all but mgda (keep)")


def test_tasks_must_divide_the_batch(capsys):
    with pytest.raises(SystemExit):
        balancing.main(["--batch=10", "--K", "8"])
    assert "divide" in capsys.readouterr().err
