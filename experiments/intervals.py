"""``dtr-lab intervals``: the timestep intervals that measured gradients suggest, as a configuration to train with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError

if TYPE_CHECKING:
    import xarray as xr

    from analysis.clustering import Units


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--experiment", help="name of the MLflow experiment")
    parser.add_argument(
        "--comparison", default="latest", help="its runs: a comparison's id, 'latest' (default) or 'all'"
    )
    parser.add_argument("--runs", nargs="+", metavar="ID", help="exactly these runs, by their MLflow run id")
    parser.add_argument("--method", help="of which method's runs, by its tag (default: the plainest there is)")
    parser.add_argument("--num-intervals", type=int, help="K (default: as many as separate best, by their silhouettes)")
    parser.add_argument(
        "--affinity", type=Path, metavar="FILE", help="instead of runs: affinity.nc of `dtr-lab probe --timesteps`"
    )
    parser.add_argument("--num-timesteps", type=int, help="T, for --affinity (default: the last one measured, plus 1)")
    parser.add_argument("--out", type=Path, help="file to write (default: print)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")


def run(args: argparse.Namespace) -> int:
    """Clusters, and writes or prints."""
    if args.num_intervals is not None and args.num_intervals < 2:
        raise UserInputError(f"--num-intervals must be at least 2, got {args.num_intervals}")
    if args.affinity is not None:
        if args.experiment is not None or args.runs is not None:
            raise UserInputError("--affinity names what was measured: leave out --experiment and --runs")
        units, source = _timestep_units(args.affinity, args.num_timesteps), str(args.affinity)
    else:
        units, source = _run_units(args)
    bounds = _bounds(units, args.num_intervals)
    text = _overlay(bounds, source)
    if args.out is None:
        print(text, end="")
        return 0
    try:
        args.out.write_text(text)
    except OSError as error:
        raise UserInputError(f"--out {args.out} cannot be written: {error.strerror}") from error
    print(f"{len(bounds) - 1} intervals: `dtr-lab train --config CONFIG --config {args.out}`", file=sys.stderr)
    return 0


def _run_units(args: argparse.Namespace) -> tuple[Units, str]:
    """The measured intervals of runs, as unlike as their noise-corrected cosines say, and whose they are."""
    from analysis.affinity import gradient_affinity
    from analysis.clustering import affinity_units
    from analysis.runs import load_runs

    runs = load_runs(
        args.tracking_uri,
        experiment=args.experiment,
        comparison=None if args.comparison == "all" else args.comparison,
        run_ids=args.runs,
    )
    method, own = _of_one_method(runs, args.method)
    units = affinity_units(gradient_affinity(own))
    return _known(units), f"{len(own)} run{'s' * (len(own) > 1)} of {method} ({own[0].attrs['experiment']})"


def _timestep_units(path: Path, num_timesteps: int | None) -> Units:
    """Single timesteps, as `dtr-lab probe --timesteps` measured them."""
    import xarray as xr

    from analysis.clustering import affinity_units

    try:
        cosine = xr.load_dataset(path)["cosine"]
        last = int(cosine["timestep"].values[-1])
    except (OSError, ValueError, KeyError) as error:
        raise UserInputError(f"--affinity {path} is no result of `dtr-lab probe --timesteps`: {error}") from error
    if num_timesteps is not None and num_timesteps <= last:
        raise UserInputError(f"--num-timesteps {num_timesteps}: timestep {last} was measured, so T is larger")
    return _known(affinity_units(cosine, num_timesteps=num_timesteps))


def _known(units: Units) -> Units:
    if not units.weights.any():
        raise UserInputError("no gradient can be told from noise there: measure longer, or more often")
    return units


def _of_one_method(runs: list[xr.Dataset], asked: str | None) -> tuple[str, list[xr.Dataset]]:
    """Runs that measured gradients, in halves, all of one method."""
    from analysis.methods import ordered, reference_method

    usable = [run for run in runs if "gramian" in run and run.sizes["half"] > 1]
    if not usable:
        raise UserInputError(
            "none of the runs has measured gradients in two halves or more, which a cosine free of noise needs: train "
            "with gradient_conflict.every_n_steps above 0 and halves of at least 2"
        )
    there = ordered(run.attrs["method"] for run in usable)
    method = reference_method(there) if asked is None else asked
    if method not in there:
        raise UserInputError(f"--method {method}: no such run has measured gradients; there are {', '.join(there)}")
    own = [run for run in usable if run.attrs["method"] == method]
    if len({tuple(run["t_low"].values.tolist()) for run in own}) > 1:
        raise UserInputError("the runs were measured on different timestep intervals: choose some by --runs")
    return method, own


def _bounds(units: Units, num_intervals: int | None) -> list[int]:
    """The bounds of the best K clusters of measured intervals."""
    from analysis.cluster_count import silhouette_count
    from analysis.clustering import cluster_intervals

    if num_intervals is None:
        count = silhouette_count(units)
        if not count.best:
            raise UserInputError(
                "what was measured forms no distinct clusters, by their silhouettes: say how many with --num-intervals"
            )
        return list(count.clusterings[count.best].bounds)
    if num_intervals > units.size:
        raise UserInputError(
            f"--num-intervals {num_intervals}: only {units.size} intervals were measured, and none of them is divided; "
            "measure finer ones, with a larger intervals.num_intervals or `dtr-lab probe --timesteps`"
        )
    return list(cluster_intervals(units, num_intervals).bounds)


def _overlay(bounds: list[int], source: str) -> str:
    """A configuration for `dtr-lab train` that sets the intervals alone."""
    return (
        f"# {len(bounds) - 1} intervals by the noise-corrected gradient cosine of {source}.\n"
        f"model:\n  init_args:\n    intervals:\n      bounds: {bounds}\n"
    )
