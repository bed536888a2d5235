import json
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from rich.console import Console

from analysis.axes import CURVE_COLUMNS
from analysis.report import figures as drawing
from analysis.runs import load_runs
from analysis.summary import verdict
from experiments.__main__ import main
from experiments.compare import compare, print_summary
from experiments.comparisons import create_comparison
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a finished comparison, and a newer one with a killed run."""
    folder = tmp_path_factory.mktemp("compare")
    uri = synthetic.make_store(folder, seeds=2, methods=("baseline", "dtr"))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    for method in ("baseline", "dtr"):
        synthetic.add_run(client, experiment, method, 0, comparison="c-two")
    synthetic.add_run(client, experiment, "dtr", 1, comparison="c-two", status="KILLED")
    return uri


def artifacts(client, run_id, path=None):
    return {Path(item.path).name for item in client.list_artifacts(run_id, path)}


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Draws one figure only, where a test is about other things."""
    if request.node.name == "test_compare_writes_and_logs":
        return
    report = drawing.drawn_report

    def few(runs, summary, curves, *, specialists, pdf):
        kept = ["val_loss", "val_quarter_loss", "train_loss", "quarter_timesteps"]
        bare = [run[[name for name in kept if name in run]].assign_attrs(run.attrs) for run in runs]
        return verdict(runs, summary, curves), report(bare, summary, curves, pdf=pdf)[1]

    monkeypatch.setattr(drawing, "drawn_report", few)


def test_compare_writes_and_logs(store, tmp_path):
    summary = compare(store, experiment=synthetic.EXPERIMENT, comparison="c-one", out=tmp_path, pdf=True)
    assert list(summary.index) == ["baseline", "dtr"]
    assert summary.attrs["out"] == str(tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "summary.csv", index_col="method")
    assert table.loc["dtr", "val_loss"] == pytest.approx(summary.loc["dtr", "val_loss"])
    curves = pd.read_csv(tmp_path / "tables" / "curves.csv")
    assert list(curves.columns) == CURVE_COLUMNS
    figures = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"conflict_matrix.png", "raw_vs_corrected.png", "noise_scale.png", "update_shares.png"} <= figures
    client = MlflowClient(tracking_uri=store)
    parent = client.get_run(summary.attrs["run_id"])
    assert parent.data.tags[records.TAG_KIND] == "comparison"
    assert parent.data.tags[records.TAG_COMPARISON] == "c-one"
    assert parent.info.status == "FINISHED"
    assert "DTR ends lower" in parent.data.tags["mlflow.note.content"]
    assert artifacts(client, parent.info.run_id) == {"report.html", "tables", "figures"}
    papers = {path.name for path in (tmp_path / "figures").glob("*.pdf")}
    assert {name.removesuffix(".pdf") for name in papers} == {name.removesuffix(".png") for name in figures}
    assert all(path.read_bytes().startswith(b"%PDF") for path in (tmp_path / "figures").glob("*.pdf"))
    assert artifacts(client, parent.info.run_id, "figures") == figures | papers
    for run in client.search_runs(
        [parent.info.experiment_id], filter_string="tags.`dtr.kind` = 'training' and tags.`dtr.comparison` = 'c-one'"
    ):
        assert f"/runs/{parent.info.run_id}/artifacts/report.html" in run.data.tags["mlflow.note.content"]


def test_comparing_again_reuses_the_parent_and_does_not_compare_it(store, tmp_path):
    first = compare(store, experiment=synthetic.EXPERIMENT, comparison="c-one", out=tmp_path)
    again = compare(store, experiment=synthetic.EXPERIMENT, comparison="c-one", out=tmp_path)
    assert first.attrs["run_id"] == again.attrs["run_id"]
    assert len(load_runs(store, experiment=synthetic.EXPERIMENT, comparison="c-one")) == 4


def test_a_parent_made_before_training_is_filled_and_finished(store, tmp_path):
    """The latest comparison is compared, without its killed run, which the report mentions."""
    parent = create_comparison(store, experiment=synthetic.EXPERIMENT, comparison="c-two")
    assert parent == create_comparison(store, experiment=synthetic.EXPERIMENT, comparison="c-two")
    assert parent != create_comparison(store, experiment=synthetic.EXPERIMENT, comparison="it's new")
    client = MlflowClient(tracking_uri=store)
    assert client.get_run(parent).info.status == "RUNNING"
    summary = compare(store, experiment=synthetic.EXPERIMENT, out=tmp_path)
    assert summary.attrs["run_id"] == parent
    assert client.get_run(parent).info.status == "FINISHED"
    assert summary.loc["dtr", "seeds"] == 1
    assert any("dtr-1 (KILLED)" in text for text in summary.attrs["warnings"])
    assert any("One seed" in text for text in summary.attrs["warnings"])


def test_create_comparison_sets_up_a_new_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = create_comparison(uri, experiment="new", comparison="first")
    assert MlflowClient(tracking_uri=uri).get_run(parent).data.tags[records.TAG_COMPARISON] == "first"


@pytest.mark.filterwarnings("ignore:left out")
def test_selected_runs_get_a_parent_of_their_own(store, tmp_path):
    runs = load_runs(store, experiment=synthetic.EXPERIMENT)
    ids = [run.attrs["run_id"] for run in runs if run.attrs["method"] == "dtr"]
    summary = compare(store, run_ids=ids, out=tmp_path)
    parent = MlflowClient(tracking_uri=store).get_run(summary.attrs["run_id"])
    assert parent.data.tags[records.TAG_COMPARISON].startswith("selection-")
    assert "nothing to compare" in summary.attrs["findings"][0]


def test_command_line(store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--experiment", synthetic.EXPERIMENT, "--tracking-uri", store]
    assert main([*arguments, "--comparison", "c-one", "--no-log"]) == 0
    out = capsys.readouterr().out
    assert "not reached" not in out
    assert "Final validation loss" in out
    assert "DTR ends lower than Baseline" in out
    assert Path("runs/comparisons/c-one/report.html").is_file()
    assert main([*arguments, "--comparison", "c-nine"]) == 2
    assert "'c-two', 'c-one'" in capsys.readouterr().err
    assert main(["compare", "--experiment", "x", "--tracking-uri", f"sqlite:///{tmp_path}/none.db"]) == 2


def test_summary_fits_a_terminal(store, tmp_path):
    summary = compare(store, experiment=synthetic.EXPERIMENT, comparison="all", out=tmp_path, log=False)
    assert summary.attrs["run_id"] == ""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(summary, console)
    text = console.export_text()
    assert "…" not in text
    assert f"Report: {tmp_path / 'report.html'}" in text


def test_many_methods_fit_a_narrow_terminal_with_every_number_whole(store, tmp_path):
    few = compare(store, experiment=synthetic.EXPERIMENT, comparison="all", out=tmp_path, log=False)
    methods = ["baseline", *(f"random+{each}" for each in ("min_snr", "nash_mtl", "pcgrad", "upgrad", "uw", "p2"))]
    many = few.loc[few.index[1:2].repeat(len(methods))].set_index([methods])
    many["difference"], many["difference_low"], many["difference_high"] = 0.00885, -0.00679, 0.0245
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(many, console)
    lines = console.export_text().splitlines()
    assert len({len(line.rstrip()) for line in lines if line.startswith("│")}) == 1, "nothing is cut at the right"
    words = " ".join(lines).replace("│", " ").split()
    for number in ("+0.00885", "[-0.00679,", "+0.0245]", "Nash-MTL"):
        assert number in words


def test_runs_that_cannot_be_compared(store, tmp_path):
    client = MlflowClient(tracking_uri=store)
    experiment = client.create_experiment("odd", artifact_location=str(tmp_path / "odd"))
    run = client.get_run(synthetic.add_run(client, experiment, "baseline", 0))
    path = Path(run.info.artifact_uri) / records.MANIFEST_PATH
    manifest = json.loads(path.read_text())
    other = client.get_run(synthetic.add_run(client, experiment, "dtr", 0))
    manifest["interval_bounds"] = [0, 10, *manifest["interval_bounds"][2:]]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserInputError, match="different timestep intervals"):
        compare(store, experiment="odd", out=tmp_path)
    for shard in (Path(other.info.artifact_uri) / "telemetry" / records.TIMESTEP_LOSS).iterdir():
        shard.unlink()
    with pytest.raises(UserInputError, match="no validation losses in dtr-0"):
        compare(store, experiment="odd", out=tmp_path)


def test_unwritable_output_is_refused_before_any_figure(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.report.figures.drawn_report", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "tables").touch()
    for out in ("file", "file/below", "held"):
        arguments = ["--experiment", synthetic.EXPERIMENT, "--tracking-uri", store, "--comparison", "c-one", "--no-log"]
        assert main(["compare", *arguments, "--out", str(tmp_path / out)]) == 2
        assert "--out" in capsys.readouterr().err


def test_unfinished_runs_without_validation_are_left_out_aloud(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=1, methods=("baseline", "dtr"))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id

    def add_unvalidated(comparison):
        run = synthetic.add_run(client, experiment, "dtr", 1, comparison=comparison, status="KILLED")
        for shard in (Path(client.get_run(run).info.artifact_uri) / "telemetry" / records.TIMESTEP_LOSS).iterdir():
            shard.unlink()
        return run

    early = add_unvalidated(synthetic.COMPARISON)
    chosen = {"experiment": synthetic.EXPERIMENT, "include_unfinished": True, "out": tmp_path / "out", "log": False}
    summary = compare(uri, comparison=synthetic.COMPARISON, **chosen)
    assert summary.loc["dtr", "seeds"] == 1
    said = " ".join(summary.attrs["warnings"])
    assert f"Left out run dtr-1 ({early[:8]}, KILLED): no validation" in said
    alone = add_unvalidated("c-early")
    with pytest.raises(UserInputError, match=rf"no validation losses in dtr-1 \({alone[:8]}\)"):
        compare(uri, comparison="c-early", **chosen)
