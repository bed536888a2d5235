"""What a grid of trainings found: RESULTS.md with tables and figures beside it, also in MLflow."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.comparisons import create_comparison, find_comparison
from experiments.mlflow_links import artifact_url
from experiments.mlflow_notes import GRID, NOTE_TAG, with_first_paragraph
from experiments.sample_fidelity import BIAS, TAG_FIDELITY, measure_comparison
from lightning_modules.folders import writable_folder
from lightning_modules.tracking import records

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from mlflow.entities import Run

    from analysis.report.grid_page import GridFacts
    from analysis.report.panels import ReportFigure

RESULTS = "RESULTS.md"
FIGURES_DIR = "figures"
TABLES_DIR = "tables"
ARTIFACTS = "grid"
"""Folder of the parent run that holds all of it."""
_LISTED = 12


def write_results(
    uri: str,
    *,
    experiment: str,
    comparison: str,
    axes: Mapping[str, Sequence[str]],
    out: Path,
    command: str,
    run_dir: Path | None = None,
    samples: int = 0,
) -> None:
    """Writes ``RESULTS.md``, ``figures/*.png`` and ``tables/*.csv`` for the finished runs of a grid.

    All of it is logged to the parent run of the comparison, below ``grid/``. Cells without a finished run are gaps.

    Args:
        uri: MLflow store.
        experiment: Name of the MLflow experiment.
        comparison: Id of the comparison that the runs belong to.
        axes: Axis -> its choices, in the order of the tables. ``routing`` makes the columns, all others the rows.
        out: Folder to write to.
        command: The command line that made the runs.
        run_dir: Where the runs' checkpoints lie; with it and ``samples``, samples are measured that were not yet.
        samples: How many to draw from each checkpoint (`sample_fidelity.measure_comparison`); 0 for none.

    Raises:
        UserInputError: If no finished run of the comparison can be read, or ``out`` cannot be written to.
    """
    from analysis.frames import curves_frame
    from analysis.grid import grid_frame
    from analysis.report.grid_figures import grid_figures
    from analysis.report.grid_page import render_results
    from analysis.report.task_weight_figures import task_weights_figure

    for folder in (out, out / FIGURES_DIR, out / TABLES_DIR):
        writable_folder(folder, "the results")
    problems = []
    if run_dir is not None and samples:
        problems = measure_comparison(
            uri, experiment=experiment, comparison=comparison, run_dir=run_dir, samples=samples
        )
    runs, left_out = _load(uri, experiment, comparison)
    frame = grid_frame(runs, axes)
    facts = _facts(uri, runs, frame, command, [*left_out, *problems])
    figures = grid_figures(frame, curves_frame(runs))
    # By cell, not by method: two cells can be of one method with other parameters.
    weights = task_weights_figure(
        [
            run.assign_attrs(method="+".join(records.cell_choices(run.attrs["cell"]).values()) or run.attrs["method"])
            for run in runs
            if "task_weight" in run
        ]
    )
    figures += [] if weights is None else [weights]
    page = render_results(frame, facts, figures, FIGURES_DIR)
    _write(out, page, figures, _tables(frame))
    _log(uri, experiment, comparison, out, facts)


def _load(uri: str, experiment: str, comparison: str) -> tuple[list[xr.Dataset], list[str]]:
    """The finished runs with validation losses, and a sentence on each that is left out."""
    from analysis.runs import RunsLeftOutWarning, load_runs
    from lightning_modules.errors import UserInputError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RunsLeftOutWarning)
        runs = load_runs(uri, experiment=experiment, comparison=comparison)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, RunsLeftOutWarning)]
    said = [text for text in said if "unfinished" not in text]  # these are told cell by cell
    without = [run.attrs["name"] for run in runs if "val_loss" not in run]
    if without:
        said.append(f"left out for want of a validation (probe `timestep_loss`): {_listed(without)}")
    validated = [run for run in runs if "val_loss" in run]
    if not validated:
        raise UserInputError(
            f"no run of comparison {comparison!r} has a validation loss: train with the `timestep_loss` probe on"
        )
    return validated, [f"{text[0].upper()}{text[1:]}." for text in said]


def _facts(
    uri: str, runs: Sequence[xr.Dataset], frame: pd.DataFrame, command: str, problems: Sequence[str]
) -> GridFacts:
    from analysis.report.grid_page import GridFacts
    from analysis.summary import comparability

    experiment, comparison = runs[0].attrs["experiment"], runs[0].attrs["comparison"]
    logged = _trainings(uri, experiment, comparison)
    own = {run.attrs["run_id"] for run in runs}
    of_runs = [run for run in logged if run.info.run_id in own]
    commits = Counter(tag for run in of_runs if (tag := run.data.tags.get(records.TAG_GIT_COMMIT)))
    gaps = [*_missing(frame, logged), *problems]
    if len(commits) > 1:
        gaps.append(f"The runs were trained by {len(commits)} different commits of the code.")
    differing = [text for text in comparability(runs) if text.startswith(("Runs end", "Runs of"))]
    return GridFacts(
        title=": ".join(dict.fromkeys((experiment, comparison))),
        command=command,
        experiment=experiment,
        comparison=comparison,
        commits=list(commits),
        training=_training(runs),
        seeds=sorted(set(frame["seed"].tolist())),
        gaps=[*gaps, *differing],
        samples=_samples(of_runs),
        gradient_norms=_gradient_norms(uri, frame),
        clipped_at=_clipped_at(of_runs[0]),
    )


def _gradient_norms(uri: str, frame: pd.DataFrame) -> dict[tuple[str, str], list[float]]:
    from analysis.grid import OPTIMISATION, ROUTING
    from lightning_modules.tracking.store import mlflow_client

    client = mlflow_client(uri)
    found: dict[tuple[str, str], list[float]] = {}
    for run, *cell in frame[["run", ROUTING, OPTIMISATION]].itertuples(index=False):
        history = client.get_metric_history(run, "optim/grad_norm")
        found.setdefault((str(cell[0]), str(cell[1])), []).extend(point.value for point in history)
    return {cell: norms for cell, norms in found.items() if norms}


def _clipped_at(run: Run) -> float | None:
    """The bound on the gradient's norm in a run's configuration."""
    import mlflow
    import yaml

    try:
        config = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{records.CONFIG_PATH}"))
    except (mlflow.exceptions.MlflowException, OSError):  # not every run has one
        return None
    trainer = config.get("trainer", {})
    by_norm = trainer.get("gradient_clip_algorithm") in (None, "norm")
    return trainer.get("gradient_clip_val") if by_norm else None


def _trainings(uri: str, experiment: str, comparison: str) -> list[Run]:
    """All training runs of the comparison in MLflow, also those that did not finish."""
    from analysis.reading.store import logged_runs
    from lightning_modules.tracking.store import mlflow_client

    client = mlflow_client(uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None  # its runs have been loaded
    return logged_runs(client, known.experiment_id, kind=records.KIND_TRAINING, comparison=comparison)


def _missing(frame: pd.DataFrame, logged: Sequence[Run]) -> list[str]:
    """Which cells lack which seeds, and what became of them."""
    from analysis.grid import OPTIMISATION, ROUTING, grid_axes
    from analysis.methods import method_name

    routings, optimisations = grid_axes(frame)
    have = set(zip(frame[ROUTING], frame[OPTIMISATION], frame["seed"], strict=True))
    seeds = sorted(set(frame["seed"]))
    gaps: dict[tuple[str, str], list[int]] = {}
    for routing, optimisation, seed in itertools.product(routings, optimisations, seeds):
        if (routing, optimisation, seed) not in have:
            gaps.setdefault((routing, optimisation), []).append(seed)
    said = []
    if gaps:
        cells = [
            f"{method_name(routing)} with {method_name(optimisation)}"
            + ("" if missing == seeds else f" (seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))})")
            for (routing, optimisation), missing in gaps.items()
        ]
        said.append(f"No finished run of {_listed(cells)}: these are gaps, and the comparisons that need them as well.")
    ended = [f"{run.info.run_name} ({run.info.status})" for run in logged if run.info.status != "FINISHED"]
    return [*said, f"Did not finish: {_listed(sorted(ended))}."] if ended else said


def _training(runs: Sequence[xr.Dataset]) -> str:
    """What was trained, in a sentence."""
    from lightning_modules.tracking.records import RunManifest

    manifests = [RunManifest.from_json(run.attrs["manifest"]) for run in runs]
    first = manifests[0]
    steps = [int(run["val_step"][-1]) for run in runs]
    length = f"{min(steps):,}" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,}"
    sizes = [manifest.parameters for manifest in manifests]
    size = f"{min(sizes):,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    return (
        f"A network of {size} parameters, {length} steps of {first.batch_size} images of {first.dataset}, "
        f"T = {first.num_timesteps} in {len(first.interval_bounds) - 1} intervals ({first.interval_spacing})."
    )


def _samples(of_runs: Sequence[Run]) -> str:
    """How the samples were drawn and compared, in words; empty if none were."""
    drawn = Counter(tag for run in of_runs if (tag := run.data.tags.get(TAG_FIDELITY)))
    if not drawn:
        return ""
    ways = " / ".join(drawn)
    text = (
        f"{ways}; averaged weights, no guidance, labels drawn from the real ones, the same noise for every run. The "
        "features are the pixels themselves, not those of an Inception network. Lower distances are better, higher "
        "precision and recall (3 nearest neighbours) are."
    )
    if len(drawn) > 1:
        text += (
            " **The runs were not measured alike, and distances of different numbers of samples cannot be compared.**"
        )
    bias = [run.data.metrics[BIAS] for run in of_runs if BIAS in run.data.metrics]
    if bias and len(drawn) == 1:
        text += (
            f" A Fréchet distance is biased upwards: so many perfect samples would have about {bias[0]:.3g}, by the "
            "formula for Gaussian features. The kernel distance is unbiased, and theirs would be 0."
        )
    return text


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By file name: the runs, the cells, every difference, and the grid as one table, of each quantity."""
    import pandas as pd

    from analysis.grid import LOSSES, effect_intervals, fidelity_columns, grid_cells, grid_table, seed_effects

    quantities = [*LOSSES, *(name for name in fidelity_columns(frame) if frame[name].notna().any())]
    seeds = {quantity: seed_effects(frame, quantity) for quantity in quantities}
    cells = [grid_cells(frame, quantity).assign(quantity=quantity) for quantity in quantities]
    effects = [effect_intervals(found).assign(quantity=quantity) for quantity, found in seeds.items()]
    by_seed = [found.assign(quantity=quantity) for quantity, found in seeds.items()]
    tables = {"grid_runs": frame, "grid_cells": pd.concat(cells), "grid_effects": pd.concat(effects)}
    tables["grid_effects_by_seed"] = pd.concat(by_seed)
    return tables | {f"grid_{name}": grid_table(frame, quantity=name).reset_index() for name in quantities}


def _write(out: Path, page: str, figures: Sequence[ReportFigure], tables: Mapping[str, pd.DataFrame]) -> None:
    for figure in figures:
        (out / FIGURES_DIR / f"{figure.name}.png").write_bytes(figure.png)
    for name, table in tables.items():
        table.to_csv(out / TABLES_DIR / f"{name}.csv", index=False)
    (out / RESULTS).write_text(page, encoding="utf-8")


def _log(uri: str, experiment: str, comparison: str, out: Path, facts: GridFacts) -> None:
    """Logs the files to the parent run of the comparison, with a note that leads to them."""
    from lightning_modules.tracking.store import mlflow_client

    client = mlflow_client(uri)
    existing = find_comparison(uri, experiment=experiment, comparison=comparison)
    parent = existing or create_comparison(uri, experiment=experiment, comparison=comparison)
    client.log_artifact(parent, str(out / RESULTS), ARTIFACTS)
    for folder in (FIGURES_DIR, TABLES_DIR):
        client.log_artifacts(parent, str(out / folder), f"{ARTIFACTS}/{folder}")
    run = client.get_run(parent)
    link = artifact_url("", run.info.experiment_id, parent, f"{ARTIFACTS}/{RESULTS}")
    text = f"{GRID}: [results]({link}). {facts.training}"
    client.set_tag(parent, NOTE_TAG, with_first_paragraph(run.data.tags.get(NOTE_TAG, ""), GRID, text))
    if existing is None:
        client.set_terminated(parent)
