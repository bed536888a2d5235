"""One self-contained HTML page: what was compared, the verdict with its uncertainty, tables, figures with captions.

Everything is inline (MLflow shows the page in a sandboxed frame that can fetch nothing) and without scripts.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

from analysis.methods import method_name, ordered
from analysis.report.panels import DOTS_PER_INCH, DrawnFigure, ReportSection
from analysis.summary import Verdict, readable
from lightning_modules.tracking.records import RunManifest

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f1f1f; background: #fff;
  margin: 0 auto; padding: 1.2rem; max-width: 68rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
nav { margin: 1rem 0; } nav a { margin-right: 1rem; }
a { color: #0063a3; }
.lead { color: #555; margin: 0 0 1rem; }
.verdict { background: #eef4fa; border-left: 4px solid #0072b2; padding: .6rem 1rem; }
.warning { background: #fdf3e1; border-left: 4px solid #e69f00; padding: .6rem 1rem; margin-top: .8rem; }
.verdict ul, .warning ul { margin: .2rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; }
td { min-width: 3.5rem; }
figure { margin: 0 0 1rem; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .92rem; max-width: 52rem; }
@media screen and (max-width: 600px) { body { padding: .8rem; } figure .wide img { max-width: none; width: 46rem; }
  figure .wide img.narrow { width: 30rem; } }
@media print { body { font-size: 11px; max-width: none; padding: 0; } .wide { overflow: visible; }
  figure, tr, .verdict, .warning { break-inside: avoid; } h2, h3 { break-after: avoid; }
  figure img { max-width: 100% !important; } nav { display: none; } table { font-size: 8px; } }
"""

_MOST_INCHES = 13.0
_SHOWN_DPI = 100
"""At which a figure as wide as others fills the page."""

_NOTES = """
Losses are the mean unweighted error on held-out images at fixed noise and timesteps, so that runs are comparable point
by point; ± is the standard deviation over seeds. Low and high noise are the first and the last quarter of the
timesteps. Differences are paired by seed (same initialisation, data order, noise), with a Student t-interval below ten
seeds and one from resampling whole runs from then on. Steps to the baseline's final loss compare runs of one seed and
are interpolated between validations; a run that never arrives is censored at its end (Kaplan and Meier), shown as "not
reached", and bounds a speed-up instead of entering a mean; it is never left out. Bands around curves are the range of
the seeds while these are fewer than ten, and a bootstrap over whole runs from then on. Training time counts the steps
alone. Where all intervals are looked at, p-values are adjusted (false discovery rate 5 %). The conflict rate is the
share of interval pairs with a negative gradient cosine, over all parameters, with its standard error over the probes
within these runs (given these runs, not a spread over seeds); gradients that are pure noise give 0.5, so the rate
counts the noise of single probes as conflict. Which pairs conflict significantly is tested over all probes together, at
a false discovery rate of 5 %. Error bars of the figures about gradients are 95 % intervals from leaving out batches of
probes (jackknife): they speak about these runs.
"""


def render_report(
    runs: Sequence[xr.Dataset],
    summary: pd.DataFrame,
    said: Verdict,
    table: pd.DataFrame,
    sections: Sequence[ReportSection[DrawnFigure]],
    *,
    title: str,
) -> str:
    """The page as a string.

    Args:
        runs: What was compared.
        summary: `summary.summary_frame` of it.
        said: `summary.verdict` of it, of `figures.drawn_report`.
        table: `frames.runs_frame` of it.
        sections: of `figures.drawn_report`.
        title: Headline.
    """
    names = ["Summary", *(section.title for section in sections), "Runs", "Settings", "How to read this"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_what_was_compared(runs))}</p>',
        f'<div class="verdict"><strong>Verdict</strong>{_list(said.findings)}</div>',
        f'<div class="warning"><strong>Before you believe it</strong>{_list(said.warnings)}</div>'
        * bool(said.warnings),
        "<nav>" + " ".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in names) + "</nav>",
        _headline("Summary"),
        _table(readable(summary)),
        *(_section(section) for section in sections),
        _headline("Runs"),
        _table(_readable_runs(table)),
        _headline("Settings"),
        _table(_settings(runs)),
        f'{_headline("How to read this")}<p class="note">{escape(_NOTES.strip())}</p>',
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _what_was_compared(runs: Sequence[xr.Dataset]) -> str:
    first = RunManifest.from_json(runs[0].attrs["manifest"])
    by_method: dict[str, list[int]] = {method: [] for method in ordered(run.attrs["method"] for run in runs)}
    for run in runs:
        by_method[run.attrs["method"]].append(run.attrs["seed"])
    methods = "; ".join(
        f"{method_name(method)} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))})"
        for method, seeds in by_method.items()
    )
    last = max(int(run["val_step"][-1]) for run in runs)
    return (
        f"{len(runs)} runs on {first.dataset}: {methods}. {first.parameters:,} parameters, {last:,} steps of "
        f"{first.batch_size} images, T = {first.num_timesteps} in {len(first.interval_bounds) - 1} intervals "
        f"({first.interval_spacing})."
    )


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in table.columns)
    rows = (
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _headline(title: str) -> str:
    return f'<h2 id="{_anchor(title)}">{escape(title)}</h2>'


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _section(section: ReportSection[DrawnFigure]) -> str:
    return "\n".join([_headline(section.title), *(_figure(figure) for figure in section.figures)])


def _figure(figure: DrawnFigure) -> str:
    data = base64.b64encode(figure.png).decode()
    title, caption = escape(figure.title), escape(figure.caption)
    size = ' class="narrow"' if figure.narrow else _own_width(figure.png)
    image = f'<img{size} src="data:image/png;base64,{data}" alt="{title}">'
    return f'<h3>{title}</h3>\n<figure><div class="wide">{image}</div><figcaption>{caption}</figcaption></figure>'


def _own_width(png: bytes) -> str:
    """Lets a picture that is much wider than the page keep its size, so that one scrolls instead of guessing."""
    width = Image.open(io.BytesIO(png)).width / DOTS_PER_INCH
    return f' style="max-width: none; width: {_SHOWN_DPI * width:.0f}px"' if width > _MOST_INCHES else ""


def _readable_runs(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["name", "method", "seed", "status", "step", "val_loss", "low_noise", "high_noise", "conflict_rate"]]
    shown = shown.assign(method=shown["method"].map(method_name), run=table["run"].str[:8])
    # The words of `summary.readable`: all runs here were validated, so a loss that is no number diverged.
    unknown = dict.fromkeys(("val_loss", "low_noise", "high_noise"), "diverged") | {"conflict_rate": "not measured"}
    for column, word in unknown.items():
        shown[column] = [f"{value:.4g}" if np.isfinite(value) else word for value in shown[column]]
    return shown.rename(columns=lambda name: name.replace("_", " "))


def _settings(runs: Sequence[xr.Dataset]) -> pd.DataFrame:
    """What each method was trained with, as far as it is in the manifest; values that differ are listed together."""
    left_out = {"method", "seed", "log_snr", "schema_version", "block_channels", "interval_bounds"}
    by_method: dict[str, dict[str, list[str]]] = {
        method_name(method): {} for method in ordered(run.attrs["method"] for run in runs)
    }
    for run in runs:
        manifest = dataclasses.asdict(RunManifest.from_json(run.attrs["manifest"]))
        own = by_method[method_name(manifest["method"])]
        for name, value in manifest.items():
            if name not in left_out:
                text = value if isinstance(value, str) else json.dumps(value) if value is not None else "none"
                own.setdefault(name, []).append(text)
    names = list(next(iter(by_method.values())))
    return pd.DataFrame(
        {"Setting": [name.replace("_", " ") for name in names]}
        | {method: [" / ".join(dict.fromkeys(own[name])) for name in names] for method, own in by_method.items()}
    )
