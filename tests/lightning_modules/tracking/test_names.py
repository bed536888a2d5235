"""Tests for ``lightning_modules/tracking/names.py``, against MLflow's own validation."""

import dataclasses
import pathlib

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from lightning_modules.tracking.names import check_artifact_path, check_image_name, check_metric_name, flat_params

GOOD = ["loss/val_t000-124", "a b", "x.y:z", "t1", "a" * 250]
BAD = ["t=1", "t(1)", "", "/loss", "a//b", "a/../b", "..", "./a", "loss/", "ü", "a\n", "a,b"]


@pytest.mark.parametrize("name", GOOD)
def test_accepts_what_mlflow_accepts(name):
    check_metric_name(name)
    _validate_metric_name(name)


@pytest.mark.parametrize("name", [*BAD, "a" * 251])
def test_refuses_and_names_the_culprit(name):
    with pytest.raises(ValueError, match=r"MLflow (does not accept|accepts)"):
        check_metric_name(name)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("ü", "a\n")])
def test_mlflow_would_refuse_too(name):
    with pytest.raises(MlflowException):
        _validate_metric_name(name)


def test_image_keys_have_no_colon():
    check_image_name("conflict_cosine")
    with pytest.raises(ValueError, match="a:b"):
        check_image_name("a:b")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "images/x.png", "a//b"])
def test_artifact_paths_stay_inside_and_out_of_images(path):
    with pytest.raises(ValueError, match="artifact path"):
        check_artifact_path(path)


@dataclasses.dataclass
class Schedule:
    kind: str = "cosine"
    bounds: tuple = (0, 500, 1000)


def test_nested_configuration_becomes_dotted_scalars():
    config = {
        "model": {"class_path": "DTR", "init_args": {"alpha": 4, "schedule": Schedule(), "net": object()}},
        "folder": pathlib.Path("a/b"),
        "none": None,
        "many": list(range(1000)),
        "text": "x" * 9000,
    }
    flat = flat_params(config)
    assert flat.pop("text") == "x" * 6000
    assert flat == {
        "model.class_path": "DTR",
        "model.alpha": "4",
        "model.schedule.kind": "cosine",
        "model.schedule.bounds": "[0, 500, 1000]",
        "folder": "a/b",
        "none": "None",
    }
