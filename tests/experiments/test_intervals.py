"""`dtr-lab intervals`: the bounds of known clusters, as a configuration that training accepts."""

import numpy as np
import pytest
import xarray as xr
import yaml

from experiments.__main__ import main
from tests.analysis import synthetic
from tests.experiments.test_train import CONFIGS, SMALL


@pytest.fixture
def store(tmp_path, monkeypatch):
    uri = synthetic.make_store(tmp_path, seeds=2, methods=("baseline", "dtr"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def two_groups(path, border=300):
    """Timesteps 0, 50, ... of which those before and those from ``border`` on agree among themselves alone."""
    t = np.arange(0, 1000, 50)
    cosine = np.where((t < border)[:, None] == (t < border), 0.9, 0.0)
    np.fill_diagonal(cosine, 1.0)
    data = xr.Dataset(
        {"cosine": (("timestep", "other_timestep"), cosine.astype(np.float32))},
        coords={"timestep": t.astype(np.int32), "other_timestep": t.astype(np.int32)},
    )
    path.write_bytes(bytes(data.to_netcdf(engine="scipy")))
    return path


def test_timesteps_that_agree_become_an_interval(tmp_path, capsys):
    assert main(["intervals", f"--affinity={two_groups(tmp_path / 'affinity.nc')}", "--num-timesteps=1000"]) == 0
    bounds = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["intervals"]["bounds"]
    assert bounds == [0, 275, 1000]  # half-way between the last of one group and the first of the other


def test_measured_intervals_are_joined(store, capsys):
    command = ["intervals", f"--experiment={synthetic.EXPERIMENT}", "--num-intervals=3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 runs of baseline" in printed
    bounds = yaml.safe_load(printed)["model"]["init_args"]["intervals"]["bounds"]
    edges = np.linspace(0, synthetic.T, synthetic.K + 1).astype(int).tolist()
    assert len(bounds) == 4
    assert set(bounds) <= set(edges)
    assert main([*command, "--method=dtr"]) == 0
    assert "2 runs of dtr" in capsys.readouterr().out


def test_training_takes_the_file_over_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    two_groups(tmp_path / "affinity.nc", border=500)
    assert main(["intervals", "--affinity=affinity.nc", "--num-timesteps=1000", "--out=found.yaml"]) == 0
    assert "2 intervals" in capsys.readouterr().err
    config = [f"--config={CONFIGS / 'dtr.yaml'}", "--config=found.yaml", *SMALL, "--print_config"]
    with pytest.raises(SystemExit) as done:
        main(["train", *config])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["intervals"]["bounds"] == [0, 475, 1000]
    assert printed["model"]["init_args"]["routing"]["kind"] == "dtr"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-intervals=1"], "at least 2"),
        (["--experiment=nothing"], "no experiment 'nothing'"),
        ([f"--experiment={synthetic.EXPERIMENT}", "--num-intervals=99"], "only 8 intervals were measured"),
        ([f"--experiment={synthetic.EXPERIMENT}", "--method=mean"], "there are baseline, dtr"),
        (["--affinity=missing.nc"], "no result of `dtr-lab probe --timesteps`"),
        (["--affinity=affinity.nc", "--num-timesteps=900"], "timestep 950 was measured"),
        (["--affinity=affinity.nc", "--experiment=x"], "leave out"),
        (["--affinity=affinity.nc", "--out=no/such/folder.yaml"], "cannot be written"),
    ],
)
def test_refusals_name_the_culprit(store, capsys, arguments, said):
    two_groups(store / "affinity.nc")
    assert main(["intervals", *arguments]) == 2
    assert said in capsys.readouterr().err
