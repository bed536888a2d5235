import dataclasses
import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.frames import curves_frame
from analysis.grid import grid_frame
from analysis.report.grid_figures import curves_figure, effects_figure, grid_figures
from analysis.report.grid_page import GridFacts, cells_table, effect_section, markdown_table, render_results
from analysis.report.grid_words import decimals_for, signed_with_interval, with_interval
from tests.analysis.grids import cell_run, grid_of

FACTS = GridFacts(
    title="digits: grid",
    command="dtr-lab sweep --config x.yaml",
    experiment="digits",
    comparison="grid",
    commits=["0123456789abcdef"],
    training="A network of 9 parameters.",
    seeds=[0, 1, 2],
    gaps=["No finished run of DTR with P2."],
    samples="1000 samples.",
)


@pytest.fixture(scope="module")
def cells(runs):
    """Plain and DTR, uniform, Min-SNR and P2, three seeds; DTR with P2 is missing, DTR lowers the loss by a tenth."""
    plain = [run for run in runs if run.attrs["method"] == "baseline"]
    factors = {"plain": 1.0, "dtr": 0.9}
    return [
        cell_run(run, routing, optimisation, factors[routing] * (1 + 0.001 * run.attrs["seed"] * len(optimisation)))
        for routing, optimisation, run in itertools.product(factors, ("uniform", "min_snr", "p2"), plain)
        if (routing, optimisation) != ("dtr", "p2")
    ]


@pytest.fixture(scope="module")
def frame(cells):
    return grid_frame(cells, {"routing": ["plain", "dtr"], "optimisation": ["uniform", "min_snr", "p2"]})


def lines(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_is_that_of_the_paper_with_gaps_and_only_resolved_cells_in_bold(frame):
    head, _, uniform, min_snr, p2 = lines(cells_table(frame, "val_loss"))
    assert head == ["", "Plain", "DTR"]
    assert (uniform[0], min_snr[0], p2[0]) == ("Uniform", "Min-SNR", "P2")
    assert p2[2] == "–"
    for row in (uniform, min_snr):  # every seed is lower by a tenth
        assert re.fullmatch(r"\*\*0\.\d+ ± 0\.\d+\*\*", row[2])
        assert re.fullmatch(r"0\.\d+ ± 0\.\d+", row[1])
    assert "**" not in p2[1]


def test_higher_is_better_for_precision_and_recall():
    values = {("plain", "uniform"): [0.1, 0.2, 0.3, 0.4], ("dtr", "uniform"): [0.51, 0.6, 0.71, 0.8]}
    frame = grid_of(values, ["plain", "dtr"], ["uniform"])
    frame["recall_pixels"] = frame["val_loss"]
    assert cells_table(frame, "recall_pixels").count("**") == 2
    assert lines(cells_table(frame, "recall_pixels"))[2][2].startswith("**0.65")
    assert lines(cells_table(frame, "val_loss"))[2][1].startswith("**0.25")


def test_cells_with_fewer_seeds_say_so():
    frame = grid_of(
        {("plain", "uniform"): [1.0, 2.0, 3.0], ("dtr", "uniform"): [1.0, 2.0]}, ["plain", "dtr"], ["uniform"]
    )
    assert lines(cells_table(frame, "val_loss"))[2][2].endswith("(2 of 3 seeds)")


def test_differences_have_intervals_and_stars(frame):
    title, note, table = effect_section(frame, "routing")
    assert title == "## What routing changes"
    assert "over the 6 comparisons of this grid" in note  # 2 routing, 3 optimisation (DTR with P2 missing), 1 both
    head, _, *rows = lines(table)
    assert head == ["", "DTR − Plain"]
    assert re.fullmatch(r"-0\.0\d+ \[-0\.\d+, -0\.\d+\] \\\*", rows[0][1])
    assert rows[2][1] == "–"
    head, _, *rows = lines(effect_section(frame, "optimisation")[2])
    assert head == ["", "Plain: row − Uniform", "DTR: row − Uniform"]
    assert [row[0] for row in rows] == ["Min-SNR", "P2"]
    (interaction,) = [row for row in lines(effect_section(frame, "interaction")[2])[2:] if row[0] == "P2"]
    assert interaction[1] == "–"


def test_a_grid_of_one_routing_has_no_section_on_routing():
    frame = grid_of({("plain", "uniform"): [1.0, 2.0], ("plain", "p2"): [1.0, 2.0]}, ["plain"], ["uniform", "p2"])
    assert effect_section(frame, "routing") == []
    page = render_results(frame, FACTS, [], "figures")
    assert "## What routing changes" not in page
    assert "Bold" not in page


def test_the_page_has_everything_once_and_only_figures_that_exist(frame, cells):
    figures = grid_figures(frame, curves_frame(cells))
    page = render_results(frame, FACTS, figures, "figures")
    drawn = re.findall(r"!\[[^\]]*\]\(figures/(\w+)\.png\)", page)
    assert sorted(drawn) == sorted(figure.name for figure in figures)
    assert {"grid_loss", "grid_routing_effects", "grid_interactions", "grid_curves"} <= set(drawn)
    headlines = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    assert len(headlines) == len(set(headlines))
    assert headlines[0] == "digits: grid"
    assert "## What this shows and what it does not" in page
    for text in (
        FACTS.command,
        "15 of 18 runs finished",
        "commit 0123456789ab",
        *FACTS.gaps,
        "favours uniform weighting",
    ):
        assert page.count(text) == 1, text
    assert "samples were not measured" in page
    assert "## Samples" not in page
    assert "DTR against Plain: 2 (Uniform, Min-SNR) lower" in page


def test_each_part_of_the_noise_says_what_is_significant_in_it(frame):
    level = np.random.default_rng(0).normal(size=len(frame))
    page = render_results(frame.assign(high_noise=level), FACTS, [], "figures")
    section = page.split("## Low and high noise")[1].split("\n## ")[0]
    low, high = section.split("Final validation loss at high noise")
    assert "\nSignificant at low noise, at a false discovery rate of 5 % over 6 " in low
    assert "\n- DTR against Plain: 2 (Uniform, Min-SNR) lower" in low
    assert "No difference at high noise is significant" in high


def test_differences_say_what_their_per_cent_are_of(frame, cells):
    figures = {figure.name: figure.figure for figure in grid_figures(frame, curves_frame(cells))}
    labels = [ax.get_xlabel() for ax in figures["grid_routing_effects"].axes]
    assert labels == ["difference, in % of the final loss\nof Plain with Uniform"] * 3
    diverged = (frame["routing"] == "plain") & (frame["optimisation"] == "uniform")
    without = effects_figure(frame.assign(val_loss=frame["val_loss"].mask(diverged)), "optimisation")
    assert without.figure.axes[0].get_xlabel() == "difference"  # there is nothing to divide by


def test_curves_leave_the_panel_only_far_above_the_others_and_that_is_said(frame, cells):
    curves = curves_frame(cells)
    whole = curves_figure(frame, curves)
    assert "leave the panel" not in whole.caption
    shown = curves[curves["metric"] == "loss/val"]["value"]
    assert all(ax.get_ylim()[1] > shown.max() for ax in whole.figure.axes if ax.axison)
    exploded = curves.assign(value=curves["value"].where(curves.index != shown.index[0], 1000.0))
    assert len(shown) > 100
    cut = curves_figure(frame, exploded)
    (top,) = {round(ax.get_ylim()[1], 9) for ax in cut.figure.axes if ax.axison}
    assert top < 10
    assert f"Curves above {top:.3g} leave the panel." in cut.caption
    assert len({ax.get_yscale() for ax in cut.figure.axes if ax.axison}) == 1


def test_measures_of_samples_come_with_their_limits(frame, cells):
    measured = frame.assign(frechet_pixels=frame["val_loss"] * 10, recall_pixels=0.5)
    page = render_results(measured, FACTS, grid_figures(measured, curves_frame(cells)), "figures")
    assert "## Samples\n\n1000 samples." in page
    assert "they are no FID" in page
    assert "figures/grid_fidelity.png" in page
    assert "about the Fréchet distance of samples to real images (pixels)" in page


def test_figures_are_as_wide_as_the_others_and_taller_with_more_cells(frame, cells):
    (figure,) = [figure for figure in grid_figures(frame, curves_frame(cells)) if figure.name == "grid_loss"]
    width, height = Image.open(io.BytesIO(figure.png)).size
    assert 1300 < width < 1500
    assert 250 < height < 500


def test_numbers():
    assert with_interval(0.15951, 0.1545, 0.1645, 3, 4) == "0.1595 ± 0.0050"
    assert with_interval(0.15951, 0.1545, 0.1655, 12, 4) == "0.1595 [0.1545, 0.1655]"
    assert with_interval(0.15951, np.nan, np.nan, 1, 4) == "0.1595"
    assert with_interval(np.nan, np.nan, np.nan, 3, 4) == "diverged"
    assert with_interval(np.nan, np.nan, np.nan, 0, 4) == "–"
    assert signed_with_interval(-0.00241, -0.01, 0.005, 3) == "-0.00241 [-0.01, +0.005]"
    assert decimals_for(pd.Series([0.1595, np.nan, 0.01])) == 4
    assert decimals_for(pd.Series([12345.0])) == 0
    assert markdown_table(["", "a|b"], [["x", "1"]]) == "|  | a\\|b |\n| --- | ---: |\n| x | 1 |"


def test_how_often_gradients_were_clipped_is_told_by_cell(frame):
    norms = {("plain", "uniform"): [0.5, 2.0, 0.4, 0.6], ("dtr", "min_snr"): [3.0, 5.0]}
    page = render_results(frame, dataclasses.replace(FACTS, gradient_norms=norms, clipped_at=1.0), [], "figures")
    assert "before it is clipped at 1," in page
    assert "| Uniform | 0.55 (25%) | – |" in page
    assert "| Min-SNR | – | 4 (100%) |" in page
    unclipped = render_results(frame, dataclasses.replace(FACTS, gradient_norms=norms), [], "figures")
    assert "| Uniform | 0.55 | – |" in unclipped
    assert "Norm of the combined gradient" not in render_results(frame, FACTS, [], "figures")
