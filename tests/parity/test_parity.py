"""The recorded numbers are met, and the check can fail: on wrong numbers, missing files and empty directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.parity.__main__ import main
from tests.parity.cases import parse_loss_weight
from tests.parity.checks import TOLERANCE, check_directory, relative_error

DATA = Path(__file__).parent / "data"
CASE_QUANTITIES = {
    *("x_t", "model_output", "loss.mse", "loss.loss", "p_mean", "p_log_variance"),
    *("interval_gramian", "gradient_norm_of_mean_loss"),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "data"))


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(path, **arrays)


def redescribe(directory: Path, case: str, change: Callable[[dict], None]) -> None:
    path = directory / "cases.json"
    cases = json.loads(path.read_text())
    change(cases[case])
    path.write_text(json.dumps(cases))


def keep_only(directory: Path, *names: str) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink()


def test_shipped_data_agrees_in_every_quantity() -> None:
    findings = list(check_directory(DATA))
    assert not [finding for finding in findings if finding.problem]
    for case in json.loads((DATA / "cases.json").read_text()):
        assert {finding.quantity for finding in findings if finding.case == case} >= CASE_QUANTITIES
    tables = {finding.quantity for finding in findings}
    assert {"T50_C48_beta0.6_alpha0.5", "cosine.posterior_variance"} <= tables
    # Far below the tolerance: only the rounding of float32 coefficients may show.
    assert max(finding.error for finding in findings) < 1e-6


def test_command_prints_three_fields_per_quantity() -> None:
    command = [sys.executable, "-m", "tests.parity", str(DATA)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DATA.parents[2])
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(len(fields) == 3 and float(fields[2]) <= TOLERANCE for fields in lines)
    assert len(lines) == len(list(check_directory(DATA)))


@pytest.mark.parametrize(
    "quantity",
    ["x_t", "model_output", "loss.mse", "loss.vb", "loss.loss", "p_mean", "p_log_variance", "interval_gramian"],
)
def test_one_wrong_sample_is_found(copy: Path, quantity: str, capsys: pytest.CaptureFixture[str]) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        smallest = np.abs(arrays[quantity]).reshape(len(arrays[quantity]), -1).max(1).argmin()
        arrays[quantity][smallest] *= 1 + 1e-4

    rewrite(copy / "dit_dtr_cosine.npz", change)
    assert main([str(copy)]) == 1
    captured = capsys.readouterr()
    wrong = [line for line in captured.out.splitlines() if float(line.split()[2]) > TOLERANCE]
    assert [line.split()[:2] for line in wrong] == [["dit_dtr_cosine", quantity]]
    assert f"{quantity} is off by" in captured.err


def test_one_wrong_gradient_norm_is_found(copy: Path) -> None:
    def change(description: dict) -> None:
        description["gradient_norm_of_mean_loss"]["blocks.1.attn.qkv.bias"] *= 1 + 1e-4

    redescribe(copy, "dit_dtr_minsnr", change)
    assert main([str(copy)]) == 1


@pytest.mark.parametrize(
    ("file", "key", "index"),
    [
        ("dtr_windows_official", "T1000_C768_beta0.5_alpha1", (500, 0)),
        ("dtr_windows_official", "T50_C48_beta0.6_alpha0.5", (0, 1)),
        ("schedules_official", "linear.betas", 0),
        ("schedules_official", "cosine.alphas_cumprod", 999),
    ],
)
def test_one_wrong_table_entry_is_found(copy: Path, file: str, key: str, index: int | tuple[int, int]) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        entry = arrays[key][index]
        arrays[key][index] = entry + 1 if np.issubdtype(arrays[key].dtype, np.integer) else entry * (1 + 1e-4)

    rewrite(copy / f"{file}.npz", change)
    assert main([str(copy)]) == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("routed", False), ("alpha", 2), ("beta", 0.7), ("schedule", "linear"), ("num_heads", 2), ("depth", 2)],
)
def test_wrong_description_is_found(copy: Path, setting: str, value: object) -> None:
    redescribe(copy, "dit_dtr_cosine", lambda description: description.update({setting: value}))
    assert main([str(copy)]) == 1


def test_missing_case_file_is_an_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "dit_dtr_cosine.npz").unlink()
    assert main([str(copy)]) == 1
    assert "dit_dtr_cosine: file is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dit_dtr_cosine.npz", "schedules_official.npz", "cases.json"])
def test_unreadable_file_is_an_error(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    assert main([str(copy)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_undescribed_case_is_an_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_only(copy, "dit_dtr_cosine.npz")
    assert main([str(copy)]) == 1
    assert "not described in cases.json" in capsys.readouterr().err


def test_unknown_quantities_are_not_passed_over(copy: Path) -> None:
    rewrite(copy / "dit_dtr_cosine.npz", lambda arrays: arrays.update({"loss.huber": np.ones(16)}))
    rewrite(copy / "schedules_official.npz", lambda arrays: arrays.update({"linear.gammas": np.ones(1000)}))
    failed = {(finding.case, finding.quantity) for finding in check_directory(copy) if finding.problem}
    assert failed == {("dit_dtr_cosine", "loss.huber"), ("schedules_official", "linear.gammas")}


@pytest.mark.parametrize("content", [None, "{}"])
def test_nothing_to_check_is_an_error(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "cases.json").write_text(content)
    assert main([str(tmp_path)]) == 1
    assert "nothing to check" in capsys.readouterr().err


def test_absent_directory_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 1
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dtr_windows_official.npz", "schedules_official.npz"])
def test_a_part_of_the_files_will_do(copy: Path, name: str) -> None:
    keep_only(copy, name)
    assert main([str(copy)]) == 0


def test_settings_are_inferred_where_the_description_lacks_them(copy: Path) -> None:
    def reduce(description: dict) -> None:
        needed = {key: description[key] for key in ("num_heads", "schedule", "alpha", "beta")}
        description.clear()
        description.update(needed)

    redescribe(copy, "dit_dtr_cosine", reduce)
    assert main([str(copy)]) == 0


def test_loss_weight_names() -> None:
    assert parse_loss_weight("constant").name == "uniform"
    assert parse_loss_weight("min_snr_2.5").min_snr_gamma == 2.5
    assert parse_loss_weight("P2").name == "p2"
    with pytest.raises(ValueError, match="unknown loss weight 'max_snr_5'"):
        parse_loss_weight("max_snr_5")


def test_relative_error_is_per_slice_and_never_forgives_nan() -> None:
    reference = np.array([[1e6, 0.0], [1.0, 2.0]])
    assert relative_error(reference + np.array([[0, 0], [0.2, 0]]), reference) == pytest.approx(0.1)
    assert relative_error(np.array([1.0, np.nan]), np.array([1.0, np.nan])) == float("inf")
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.full(3, 0.5), np.zeros(3)) == 0.5
    with pytest.raises(ValueError, match="shape"):
        relative_error(np.zeros(3), np.zeros((3, 1)))
