"""RESULTS.md of a grid of routings and optimisations: tables in the form of the DTR paper's Table 2, figures, words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.grid import (
    LOSSES,
    OPTIMISATION,
    ROUTING,
    Effect,
    base_choice,
    best_cells,
    effect_intervals,
    fidelity_columns,
    grid_axes,
    grid_cells,
    seed_effects,
)
from analysis.grid_summary import grid_sentences, grid_warnings, significant_sentences
from analysis.methods import PLAIN, UNIFORM, method_name
from analysis.report.grid_figures import EFFECT_FIGURES
from analysis.report.grid_words import (
    FIDELITY_WORDS,
    GAP,
    HIGHER_IS_BETTER,
    LOSS_WORDS,
    decimals_for,
    signed_with_interval,
    with_interval,
)
from analysis.report.panels import ReportFigure
from analysis.uncertainty import FEW_SEEDS

_EFFECT_NOTES: dict[Effect, str] = {
    "routing": "Final validation loss of each routed network minus that of {plain} with the same optimisation and "
    "seed; mean over seeds with its 95 % interval, below zero is better.",
    "optimisation": "Final validation loss with each optimisation minus that with {uniform}, of the same routing and "
    "seed; mean over seeds with its 95 % interval, below zero is better.",
    "interaction": "Routed minus {plain} with an optimisation, minus the same difference with {uniform}, of the same "
    "seed: zero where what the two change adds up, below zero where they lower the loss more together than in sum.",
}
_COMMITS = 3


@dataclasses.dataclass(frozen=True)
class GridFacts:
    """What a reader of the results must know about the runs.

    Attributes:
        title: Headline.
        command: The command line that made them.
        experiment: MLflow experiment.
        comparison: Id of the comparison.
        commits: Git commits of the runs.
        training: What was trained, in a sentence.
        seeds: Every seed of the grid.
        gaps: Sentences about cells and runs that are missing, failed, or unlike the others.
        samples: What the measures of samples are, in sentences; empty where there are none.
        gradient_norms: Logged norms of the gradient before clipping, by routing and optimisation.
        clipped_at: The trainer's bound on that norm, if it has one.
    """

    title: str
    command: str
    experiment: str
    comparison: str
    commits: Sequence[str]
    training: str
    seeds: Sequence[int]
    gaps: Sequence[str]
    samples: str
    gradient_norms: Mapping[tuple[str, str], Sequence[float]] = dataclasses.field(default_factory=dict)
    clipped_at: float | None = None


def render_results(frame: pd.DataFrame, facts: GridFacts, figures: Sequence[ReportFigure], folder: str) -> str:
    """The page as Markdown.

    Args:
        frame: `grid.grid_frame` of the finished runs.
        facts: Of them.
        figures: `grid_figures.grid_figures`.
        folder: Where these lie, relative to the page.
    """
    shown = {figure.name: _figure(figure, folder) for figure in figures}
    measured = [name for name in FIDELITY_WORDS if name in fidelity_columns(frame) and frame[name].notna().any()]
    parts = [
        f"# {facts.title}",
        _lead(frame, facts),
        "## Final validation loss",
        cells_table(frame, "val_loss"),
        _cells_note(frame, facts.seeds),
        shown.get("grid_loss", ""),
        "## What this shows and what it does not",
        _bullets([*facts.gaps, *grid_warnings(frame), *grid_sentences(frame)]),
        *_fidelity_sentences(frame, measured),
        "What it does not show:",
        _bullets(_limits(frame, facts, measured)),
    ]
    for effect, (figure, _) in EFFECT_FIGURES.items():
        parts += [*effect_section(frame, effect), shown.get(figure, "")]
    parts += ["## Low and high noise"]
    for quantity in LOSSES[1:]:
        parts += [f"Final validation loss {LOSS_WORDS[quantity]}:", cells_table(frame, quantity)]
        lead, *found = significant_sentences(frame, quantity, LOSS_WORDS[quantity].split(" (")[0])
        parts += [lead, _bullets(found)]
    if measured:
        parts += ["## Samples", facts.samples]
        for quantity in measured:
            parts += [f"{FIDELITY_WORDS[quantity].capitalize()}:", cells_table(frame, quantity)]
        parts.append(shown.get("grid_fidelity", ""))
    parts += ["## Training", shown.get("grid_curves", ""), shown.get("task_weights", "")]
    parts += [*_gradient_section(frame, facts), *_cost_section(frame)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cells_table(frame: pd.DataFrame, quantity: str) -> str:
    """A row per optimisation, a column per routing: means with intervals, the best of a row in bold if resolved."""
    routings, optimisations = grid_axes(frame)
    cells = grid_cells(frame, quantity)
    decimals = decimals_for(cells["mean"])
    sign = -1 if quantity in HIGHER_IS_BETTER else 1
    best = best_cells(frame.assign(**{quantity: sign * frame[quantity]}), quantity)
    most = int(cells["seeds"].max())
    written = {}
    for _, row in cells.iterrows():
        seeds, routing, optimisation = int(row["seeds"]), str(row[ROUTING]), str(row[OPTIMISATION])
        text = with_interval(row["mean"], row["low"], row["high"], seeds, decimals)
        text = f"**{text}**" if best.get(optimisation) == routing else text
        written[optimisation, routing] = text + f" ({seeds} of {most} seeds)" * (0 < seeds < most)
    rows = [[method_name(each), *(written[each, routing] for routing in routings)] for each in optimisations]
    return markdown_table(["", *map(method_name, routings)], rows)


def effect_section(frame: pd.DataFrame, effect: Effect) -> list[str]:
    """Headline, words and table of one kind of difference; nothing where there is none."""
    routings, optimisations = grid_axes(frame)
    plain, usual = base_choice(routings, PLAIN), base_choice(optimisations, UNIFORM)
    effects = effect_intervals(seed_effects(frame))
    own = effects[effects["effect"] == effect]
    if own.empty:
        return []
    columns = [routing for routing in routings if effect == "optimisation" or routing != plain]
    lines = [each for each in optimisations if effect == "routing" or each != usual]
    found = {(str(row[OPTIMISATION]), str(row[ROUTING])): row for _, row in own.iterrows()}
    rows = [[method_name(each), *(_effect(found.get((each, routing))) for routing in columns)] for each in lines]
    suffix = {"routing": f" − {method_name(plain)}", "optimisation": f": row − {method_name(usual)}", "interaction": ""}
    words = _EFFECT_NOTES[effect].format(plain=method_name(plain), uniform=method_name(usual))
    note = (
        f"{words} A star: significant at a false discovery rate of 5 % over the "
        f"{effects['p_value'].notna().sum()} comparisons of this grid, with at least three seeds."
    )
    return [
        f"## {EFFECT_FIGURES[effect][1]}",
        note,
        markdown_table(["", *(method_name(c) + suffix[effect] for c in columns)], rows),
    ]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [headings, ["---", *(["---:"] * (len(headings) - 1))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _effect(row: pd.Series | None) -> str:
    if row is None:
        return GAP
    text = signed_with_interval(row["estimate"], row["low"], row["high"], int(row["seeds"]))
    return f"{text} \\*" if row["significant"] else text


def _lead(frame: pd.DataFrame, facts: GridFacts) -> str:
    routings, optimisations = grid_axes(frame)
    expected = len(routings) * len(optimisations) * len(facts.seeds)
    have = len(frame.drop_duplicates([ROUTING, OPTIMISATION, "seed"]))
    commits = ", ".join(commit[:12] for commit in facts.commits[:_COMMITS]) or "unknown"
    more = len(facts.commits) - _COMMITS
    commits += f" and {more} more" if more > 0 else ""
    return "\n\n".join(
        [
            f"{len(routings)} routings x {len(optimisations)} optimisations x {len(facts.seeds)} seeds "
            f"({', '.join(map(str, facts.seeds))}): {have} of {expected} runs finished. {facts.training} MLflow "
            f"experiment `{facts.experiment}`, comparison `{facts.comparison}`; code at commit {commits}. Made by",
            f"```\n{facts.command}\n```",
        ]
    )


def _cells_note(frame: pd.DataFrame, seeds: Sequence[int]) -> str:
    interval = "± is half the 95 % interval of the mean over seeds (Student's). "
    if len(seeds) >= FEW_SEEDS:
        interval = "In brackets: the 95 % interval of the mean over seeds, by resampling them. "
    several = interval if len(seeds) > 1 else ""
    if len(grid_axes(frame)[0]) < 2:
        return several.strip()
    return (
        f"{several}**Bold**: lower than every other routing of its row, paired by seed, at a false discovery rate of "
        f"5 % over the rows; where nothing is bold, that is open. {GAP}: no finished run."
    )


def _limits(frame: pd.DataFrame, facts: GridFacts, measured: Sequence[str]) -> list[str]:
    _, optimisations = grid_axes(frame)
    said = [
        f"{len(facts.seeds)} seed{'s' * (len(facts.seeds) != 1)}: what is not resolved is not shown to be equal, and "
        "what is resolved holds for other seeds of this very setting, not for other settings.",
        "One model, one data set, one length of training: whether the same holds for others, such as the DiT-L on "
        "ImageNet of the DTR paper's Table 2, cannot be read off here.",
        "Every method runs with the one set of hyperparameters in its configuration, the learning rate included: one "
        "that needs others is not shown at its best.",
    ]
    if len(optimisations) > 1:
        text = (
            "The yardstick is the unweighted error over all timesteps. That favours uniform weighting, which minimises "
            "just this: methods such as Min-SNR and P2 move effort to other noise levels, and may end higher here "
            "and still draw better samples. Therefore the losses at low and at high noise stand beside it"
        )
        said.append(f"{text}, and the measures of samples." if measured else f"{text}; samples were not measured.")
    if measured:
        said.append(
            "The measures of samples are of pixels, not of Inception features: they are no FID and cannot be compared "
            "with published ones. Distances to real images do not tell whether images were memorised."
        )
    return said


def _fidelity_sentences(frame: pd.DataFrame, measured: Sequence[str]) -> list[str]:
    if "frechet_pixels" not in measured:
        return []
    said = grid_sentences(frame, "frechet_pixels", "Fréchet distance of samples to real images (pixels)")
    return ["The same of the samples:", _bullets(said)]


def _gradient_section(frame: pd.DataFrame, facts: GridFacts) -> list[str]:
    """Median norm of the gradient in each cell, and how often it was clipped; nothing where it was not logged."""
    if not facts.gradient_norms:
        return []
    routings, optimisations = grid_axes(frame)
    rows = [[method_name(each), *(_norms(facts, routing, each) for routing in routings)] for each in optimisations]
    text = "Norm of the combined gradient, median over logged steps and seeds."
    if facts.clipped_at is not None:
        text = (
            f"Norm of the combined gradient before it is clipped at {facts.clipped_at:g}, median over logged steps and "
            "seeds, and the share of them that were clipped. A method whose gradients are large is clipped in most "
            "steps: it is then compared with gradients of one length, and that is part of what is compared here."
        )
    return [text, markdown_table(["", *map(method_name, routings)], rows)]


def _norms(facts: GridFacts, routing: str, optimisation: str) -> str:
    norms = np.asarray(facts.gradient_norms.get((routing, optimisation), ()), dtype=float)
    if not norms.size:
        return GAP
    text = f"{np.median(norms):.2g}"
    return text if facts.clipped_at is None else f"{text} ({(norms > facts.clipped_at).mean():.0%})"


def _cost_section(frame: pd.DataFrame) -> list[str]:
    """Seconds of a training step in each cell; nothing where they were not measured."""
    if frame["seconds_per_step"].isna().all():
        return []
    routings, optimisations = grid_axes(frame)
    median = frame.groupby([ROUTING, OPTIMISATION], observed=True)["seconds_per_step"].median() * 1e3
    cells = [[median.get((routing, each), np.nan) for routing in routings] for each in optimisations]
    rows = [
        [method_name(each), *(f"{value:.1f}" if np.isfinite(value) else GAP for value in line)]
        for each, line in zip(optimisations, cells, strict=True)
    ]
    return [
        "Milliseconds per training step, probes included, median over seeds. Runs side by side on one machine slow "
        "each other down, so small differences mean nothing.",
        markdown_table(["", *map(method_name, routings)], rows),
    ]


def _figure(figure: ReportFigure, folder: str) -> str:
    end = "" if figure.title.endswith("?") else "."
    return f"![{figure.title}]({folder}/{figure.name}.png)\n\n*{figure.title}{end} {figure.caption}*"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
