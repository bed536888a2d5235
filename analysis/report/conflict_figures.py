"""The figures about gradients: who conflicts with whom, where, how much of it is noise, and what an update does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from analysis import conflict, convergence, frames, gramians, jackknife, noise, significance, update
from analysis.methods import method_name, ordered, reference_method
from analysis.plots.attenuation import plot_raw_vs_corrected
from analysis.plots.blocks import plot_block_cosines, plot_block_rates
from analysis.plots.curves import plot_conflict_rate
from analysis.plots.matrices import plot_conflict_matrix
from analysis.plots.style import method_colour
from analysis.plots.tasks import plot_noise_scale, plot_task_values
from analysis.report.panels import ReportFigure, Runs, colour_limit, keep_outer_axes, keep_outer_labels, panels
from lightning_modules.tracking.records import RunManifest


def conflict_figure(runs: Runs) -> ReportFigure:
    """Gradient cosine between intervals for each method, plain above corrected."""
    methods = ordered(run.attrs["method"] for run in runs)
    figure, axes = panels(2, len(methods), height=3.7, square=True)
    matrices = {method: _cosines([run for run in runs if run.attrs["method"] == method]) for method in methods}
    limit = colour_limit([matrix for plain, corrected, _ in matrices.values() for matrix in (plain, corrected)])
    for column, method in enumerate(methods):
        plain, corrected, significant = matrices[method]
        for row, (matrix, words) in enumerate(((plain, "plain"), (corrected, "noise-corrected"))):
            plot_conflict_matrix(
                matrix,
                significant=significant,
                limit=limit,
                title=f"{method_name(method)}, {words}",
                colorbar=column == len(methods) - 1,
                ax=axes[row][column],
            )
    keep_outer_axes(axes)
    return ReportFigure(
        "conflict_matrix",
        "Which timesteps help and which fight each other",
        "Cosine between the gradients of the intervals' losses over all parameters, averaged over all probes and "
        "seeds (probes with large gradients, mostly early ones, weigh most). Blue pairs help each other, red pairs "
        "conflict; a dot marks pairs that differ from zero (false discovery rate 5 %). The plain cosine (top) is "
        "drawn towards zero by sampling noise; the corrected one (bottom) is not, and is hatched where a gradient "
        "cannot be told from noise: there, nothing can be said. Corrected cosines are estimates and may exceed 1.",
        figure,
    )


def _cosines(runs: Runs) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Plain cosine, corrected cosine (NaN everywhere without halves) and significance of runs of one method."""
    gramian, count = gramians.pool_runs(runs)
    plain = conflict.plain_cosine(gramian, count)["cosine"]
    corrected = conflict.corrected_cosine(gramian, count)["cosine"] if _halved(gramian) else plain * np.nan
    return plain, corrected, significance.significant_pairs(significance.z_scores(gramian, count))


def _halved(gramian: xr.DataArray | xr.Dataset) -> bool:
    return gramian.sizes["half"] > 1


def raw_vs_corrected_figure(runs: Runs) -> ReportFigure | None:
    """Plain against noise-corrected cosines of one run of each method; None if tasks were not measured in halves."""
    if not _halved(runs[0]):
        return None
    methods = ordered(run.attrs["method"] for run in runs)
    figure, axes = panels(1, len(methods), height=3.7, square=True)
    chosen = [_of(runs, method)[0] for method in methods]
    found = [_raw_and_corrected(run) for run in chosen]
    limits = _cosine_limits([data for pair in found for data in pair])
    for ax, run, (plain, corrected) in zip(axes[0], chosen, found, strict=True):
        plot_raw_vs_corrected(
            plain,
            corrected,
            attenuation=float(corrected["attenuation"].median()),
            limits=limits,
            title=f"{method_name(run.attrs['method'])}, seed {run.attrs['seed']}, {run.sizes[gramians.STEP]} probes",
            colour=method_colour(run.attrs["method"]),
            ax=ax,
        )
    keep_outer_labels(axes)
    return ReportFigure(
        "raw_vs_corrected",
        "What sampling noise does to the cosines",
        "Each point is a pair of intervals: the cosine of its measured gradients (upwards) against the cosine "
        "corrected for sampling noise (to the right), both from the same probes of the same run, with 95 % intervals "
        "over probes. Without noise all points would lie on the dashed diagonal. The line is the median attenuation: "
        "read the raw values alone and every agreement or conflict looks that much weaker. Pairs in the hatched "
        "margin have no corrected cosine, because one of their gradients cannot be told from noise.",
        figure,
    )


def conflict_rate_figure(runs: Runs, curves: pd.DataFrame) -> ReportFigure:
    """Conflict rate over steps with its null band."""
    aligned = convergence.aligned_curves(curves, frames.CONFLICT_RATE)
    rate = significance.probe_rate(*gramians.pool_runs(runs[:1]))
    figure, axes = panels(1, 1, width=6.5, height=3.4)
    mean = convergence.mean_curves(aligned)
    plot_conflict_rate(aligned, mean=mean, null_error=float(rate["null_error"]), ax=axes[0][0])
    return ReportFigure(
        "conflict_rate",
        "Conflict over training",
        "Share of interval pairs whose gradients point against each other, probe by probe. Gradients that are pure "
        "noise give 0.5; inside the grey band a single probe says nothing. Look for a lasting departure from 0.5. The"
        " ± of the rate is its standard error over the probes within these runs, not a spread over seeds.",
        figure,
    )


def blocks_figure(runs: Runs) -> ReportFigure | None:
    """Conflict rate of each block with its null, and which intervals stand against the rest there.

    None if the runs have different blocks (`summary.comparability` says so): there is no row to put them in.
    """
    if not gramians.same_parts(runs, "block"):
        return None
    methods = ordered(run.attrs["method"] for run in runs)
    pooled = {method: gramians.pool_runs(_of(runs, method), "block") for method in methods}
    rates = {method: significance.conflict_rate(*pair) for method, pair in pooled.items()}
    reference = reference_method(methods)
    gramian, count = pooled[reference]
    halved = _halved(gramian)
    figure, axes = panels(1, 1 + halved, width=6.4, height=0.9 + max(3.4, 0.3 * gramian.sizes["block"]))
    steps = gramian.sizes[gramians.STEP]
    plot_block_rates(
        _by_method(rates, "rate").assign(
            conflicting=_joined({name: rate["conflicting"] for name, rate in rates.items()})
        ),
        null_error=float(rates[reference]["null_error"].mean()) / np.sqrt(steps),
        ax=axes[0][0],
    )
    if halved:
        rest = update.rest_cosine(gramian, count, weights=update.loss_weights(runs[0]))["cosine"]
        limit = float(np.clip(np.ceil(10 * np.nanmax(np.abs(rest.values), initial=0.0)) / 10, 0.2, 1.0))
        plot_block_cosines(
            rest, limit=limit, title=f"one interval against the rest, {method_name(reference)}", ax=axes[0][1]
        )
    return ReportFigure(
        "conflict_by_block",
        "Where in the network they conflict",
        "Left: share of interval pairs whose gradients point against each other within one block (dots, 95 % "
        "intervals over probes), the band in which pure noise would lie, and as bars the share of pairs whose "
        "conflict is significant (false discovery rate 5 % over all pairs and blocks). A dot near 0.5 over no bar is "
        "noise. Right: noise-corrected cosine between an interval's gradient and the weighted sum of all others', "
        "block by block; red ones are overruled there, hatched ones cannot be told from noise.",
        figure,
    )


def update_figure(runs: Runs) -> ReportFigure | None:
    """Share of the update and cosine with the rest, by interval; None if tasks were not measured in halves."""
    if not _halved(runs[0]):
        return None
    methods = ordered(run.attrs["method"] for run in runs)
    pooled = {method: gramians.pool_runs(_of(runs, method)) for method in methods}
    weights = update.loss_weights(runs[0])
    shares = {name: update.update_share(*pair, weights=weights) for name, pair in pooled.items()}
    rest = {name: update.rest_cosine(*pair, weights=weights) for name, pair in pooled.items()}
    raw = {name: update.rest_cosine(*pair, weights=weights, corrected=False)["cosine"] for name, pair in pooled.items()}
    figure, axes = panels(1, 2, width=5.6, height=4.0)
    plot_task_values(
        _by_method(shares, "share"),
        reference=1 / weights.size,
        reference_label="equal shares",
        ylabel="share of the update",
        ax=axes[0][0],
    )
    plot_task_values(
        _by_method(rest, "cosine"), raw=_joined(raw), ylabel="cosine with the sum of the others", ax=axes[0][1]
    )
    return ReportFigure(
        "update_shares",
        "Whose update is it?",
        "Left: the part of each update's length that an interval contributes, the weights of the training loss taken "
        "into account; shares sum to 1, and an interval below zero is made worse by the update. Right: cosine between"
        " an interval's gradient and the sum of all others' (filled: noise-corrected; hollow: raw). Bars are 95 % "
        "intervals over the probes of these runs. Updates are those of plain gradient descent; Adam rescales them. "
        f"Condition number of the intervals' gradients (Aligned-MTL's measure of stability; 1: orthogonal and equally "
        f"long): {_conditions(pooled)}.",
        figure,
    )


def _conditions(pooled: Mapping[str, tuple[xr.DataArray, xr.DataArray]]) -> str:
    found = {method_name(method): update.condition_number(*pair) for method, pair in pooled.items()}
    return ", ".join(
        f"{name} {float(each['condition_number']):.3g} ± {float(jackknife.quotable_error(each)):.2g}"
        if np.isfinite(each["condition_number"])
        else f"{name} not told from infinite"
        for name, each in found.items()
    )


def noise_figure(runs: Runs) -> ReportFigure | None:
    """Noise scale by interval and of the whole batch; None if tasks were not measured in halves."""
    if not _halved(runs[0]):
        return None
    methods = ordered(run.attrs["method"] for run in runs)
    pooled = {method: gramians.pool_runs(_of(runs, method)) for method in methods}
    weights, batch = update.loss_weights(runs[0]), RunManifest.from_json(runs[0].attrs["manifest"]).batch_size
    shares = noise.sample_shares(runs[0]["group_count"])
    by_task = {name: noise.noise_scale(*pair) for name, pair in pooled.items()}
    whole = {
        name: noise.batch_noise_scale(*pair, shares=shares, weights=weights).expand_dims("task")
        for name, pair in pooled.items()
    }
    figure, axes = panels(1, 2, width=4.6, height=4.0, width_ratios=(3.2, 1))
    plot_noise_scale(
        _by_method(by_task, "noise_scale"),
        batch * shares,
        samples_label="its samples in a training batch",
        ax=axes[0][0],
    )
    plot_noise_scale(
        _by_method(whole, "noise_scale").assign_coords(task=[0]),
        xr.DataArray([float(batch)], dims="task"),
        samples_label="training batch",
        ax=axes[0][1],
    )
    axes[0][1].set_ylabel("")
    axes[0][1].legend([axes[0][1].patches[0]], ["training batch"], loc="upper center", fontsize=8, frameon=False)
    return ReportFigure(
        "noise_scale",
        "How many samples does an interval need?",
        "Gradient noise scale (McCandlish et al., 2018): the number of samples at which the noise of a mean gradient "
        "equals its signal. Left: for each interval, in samples of that interval, with the samples it has in a "
        "training batch as a line; above the line its gradient is mostly noise. Right: for the whole batch. A batch "
        "of that size is what the rule suggests: much smaller ones waste few samples but take many steps, much larger"
        " ones the reverse. Bars are 95 % intervals over the probes of these runs; one that reaches the foot "
        "includes zero or nearly so; a cross is too noisy to be measured.",
        figure,
    )


def _of(runs: Runs, method: str) -> list[xr.Dataset]:
    return [run for run in runs if run.attrs["method"] == method]


def _raw_and_corrected(run: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    gramian, count = gramians.pool_runs([run])
    both = conflict.plain_cosine(gramian, count), conflict.corrected_cosine(gramian, count)
    plain, corrected = (found.assign(half_width=jackknife.half_width(found)) for found in both)
    return plain, corrected


def _cosine_limits(found: list[xr.Dataset]) -> tuple[float, float]:
    """From the lowest to the highest end of a bar, at least -0.3 to 1 and at most -1.5 to 1.5."""
    ends = np.concatenate([(data["cosine"] + s * data["half_width"]).values.ravel() for data in found for s in (-1, 1)])
    ends = ends[np.isfinite(ends)]
    low, high = np.clip([ends.min(initial=-0.3), ends.max(initial=1.0)], -1.5, 1.5)
    return float(low) - 0.03, float(high) + 0.03


def _by_method(found: dict[str, xr.Dataset], name: str) -> xr.Dataset:
    """``value`` and ``half_width`` (method, ...) of one statistic of several methods."""
    return xr.Dataset(
        {
            "value": _joined({method: data[name] for method, data in found.items()}),
            "half_width": _joined({method: jackknife.half_width(data) for method, data in found.items()}),
        }
    )


def _joined(found: dict[str, xr.DataArray]) -> xr.DataArray:
    return xr.concat(list(found.values()), pd.Index(list(found), name="method"))
