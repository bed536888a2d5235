"""What sampling noise does to a cosine: the plain one against the noise-corrected one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from analysis.plots.style import axes_or_new

_MARGIN = 0.1


def plot_raw_vs_corrected(
    plain: xr.Dataset,
    corrected: xr.Dataset,
    *,
    attenuation: float,
    limits: tuple[float, float] = (-1.0, 1.0),
    title: str = "",
    colour: str = "#0072b2",
    ax: Axes | None = None,
) -> Axes:
    """Draws every pair of tasks: its noise-corrected cosine to the right, the plain one of the same probes upwards.

    Without noise all pairs would lie on the dashed diagonal. Pairs whose corrected cosine is undefined have no place on
    the horizontal axis: they stand in the hatched margin, which says how many, at the height of their plain cosine.

    Args:
        plain: ``cosine`` and ``half_width`` (task, other_task) of `conflict.plain_cosine`; bars are drawn that long.
        corrected: Likewise of `conflict.corrected_cosine`, NaN where undefined.
        attenuation: Typical ratio of plain to corrected, drawn as a line; NaN draws none.
        limits: Of both axes; use one for all panels of a figure.
        title: Of the panel.
        colour: Of the points.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    above = np.triu_indices(plain.sizes["task"], 1)
    raw, raw_error, true, true_error = (
        data[name].transpose("task", "other_task").values[above]
        for data in (plain, corrected)
        for name in ("cosine", "half_width")
    )
    defined = np.isfinite(true)
    low, high = limits
    span = np.array([low, high])
    ax.axhline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    ax.axvline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    ax.plot(span, span, color="#4d4d4d", linewidth=1, linestyle="--", label="no noise")
    if np.isfinite(attenuation):
        ax.plot(
            span, attenuation * span, color="#d55e00", linewidth=1.4, label=f"median attenuation: {attenuation:.2f}"
        )
    ax.errorbar(
        true[defined],
        raw[defined],
        xerr=true_error[defined],
        yerr=raw_error[defined],
        fmt="o",
        markersize=4,
        color=colour,
        ecolor=colour,
        elinewidth=0.8,
        alpha=0.75,
        label=f"{defined.sum()} pairs, 95 %",
    )
    edge = high + _MARGIN * (high - low)
    _draw_margin(raw[~defined], len(true), (high, edge), colour, ax)
    ax.set(xlim=(low, edge), ylim=(low, high), title=title, xlabel="noise-corrected cosine", ylabel="raw cosine")
    ax.set_aspect("equal")
    ax.set_xticks([tick for tick in ax.get_xticks() if low <= tick <= high])
    ax.legend(fontsize=7, loc="upper left", facecolor="white", edgecolor="none", framealpha=0.85)
    sns.despine(ax=ax)
    return ax


def _draw_margin(raw: npt.NDArray[np.float64], pairs: int, margin: tuple[float, float], colour: str, ax: Axes) -> None:
    """Hatches the margin for the pairs without a corrected cosine, and writes beside it how many they are."""
    low, high = margin
    ax.axvspan(low, high, facecolor="#f2f2f2", edgecolor="#a6a6a6", hatch="////", linewidth=0, zorder=0)
    if raw.size:
        at = np.full(raw.size, (low + high) / 2)
        ax.scatter(at, raw, marker="D", s=16, facecolor="white", edgecolor=colour, zorder=3)
    # Beside the margin, not in it: a pair may stand at any height.
    text = f"undefined: {raw.size} of {pairs}"
    ax.text(1.01, 0.0, text, transform=ax.transAxes, fontsize=7, rotation=90, ha="left", va="bottom")
