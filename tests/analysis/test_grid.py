import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import grid
from analysis.grid import OPTIMISATION, ROUTING
from tests.analysis import synthetic
from tests.analysis.grids import OPTIMISATIONS, ROUTINGS, cell_run, grid_of, noise_grid


def random_values(seeds=4):
    rng = np.random.default_rng(0)
    return {cell: rng.normal(size=seeds) for cell in itertools.product(ROUTINGS, OPTIMISATIONS)}


def test_effects_are_differences_within_seeds_and_differences_of_these():
    values = random_values()
    found = grid.seed_effects(grid_of(values)).set_index(["effect", ROUTING, OPTIMISATION])["value"]
    own = {label: found.loc[label].to_numpy() for label in found.index.unique()}
    plain, usual = "plain", "uniform"
    expected = {("routing", r, o): values[r, o] - values[plain, o] for r in ROUTINGS[1:] for o in OPTIMISATIONS}
    expected |= {("optimisation", r, o): values[r, o] - values[r, usual] for r in ROUTINGS for o in OPTIMISATIONS[1:]}
    expected |= {
        ("interaction", r, o): (values[r, o] - values[plain, o]) - (values[r, usual] - values[plain, usual])
        for r in ROUTINGS[1:]
        for o in OPTIMISATIONS[1:]
    }
    assert set(own) == set(expected)
    for label, value in expected.items():
        np.testing.assert_allclose(own[label], value)


def test_intervals_are_students_and_q_values_are_over_all_comparisons_together():
    values = random_values()
    table = grid.effect_intervals(grid.seed_effects(grid_of(values)))
    assert len(table) == 6 + 6 + 4
    row = table.set_index(["effect", ROUTING, OPTIMISATION]).loc[("routing", "dtr", "pcgrad")]
    difference = values["dtr", "pcgrad"] - values["plain", "pcgrad"]
    test = stats.ttest_1samp(difference, 0)
    assert row["p_value"] == pytest.approx(test.pvalue)
    np.testing.assert_allclose(row[["low", "high"]].astype(float), test.confidence_interval())
    np.testing.assert_allclose(table["q_value"], stats.false_discovery_control(table["p_value"]))


def test_pairs_are_of_the_seeds_that_all_runs_of_an_effect_have():
    values = random_values()
    frame = grid_of(values)
    gone = (frame["run"] == "plain-min_snr-1") | (frame["run"] == "dtr-uniform-3")
    effects = grid.seed_effects(frame[~gone]).set_index(["effect", ROUTING, OPTIMISATION])
    assert effects.loc[("routing", "dtr", "min_snr"), "seed"].tolist() == [0, 2, 3]
    assert effects.loc[("interaction", "dtr", "min_snr"), "seed"].tolist() == [0, 2]
    cells = grid.grid_cells(frame[~gone]).set_index([ROUTING, OPTIMISATION])
    assert cells.loc[("plain", "min_snr"), "seeds"] == 3
    assert cells.loc[("plain", "min_snr"), "mean"] == pytest.approx(values["plain", "min_snr"][[0, 2, 3]].mean())


def test_a_diverged_run_is_not_left_out():
    frame = grid_of({("plain", "uniform"): [1.0, 2.0, 3.0], ("dtr", "uniform"): [0.5, np.nan, 2.0]})
    cells = grid.grid_cells(frame).set_index([ROUTING, OPTIMISATION])
    assert np.isnan(cells.loc[("dtr", "uniform"), "mean"])
    assert cells.loc[("dtr", "uniform"), "diverged"] == 1
    effects = grid.effect_intervals(grid.seed_effects(frame))
    assert np.isnan(effects["estimate"]).all()
    assert not effects["significant"].any()
    infinite = frame.assign(frechet_pixels=frame["val_loss"].fillna(np.inf))
    cells = grid.grid_cells(infinite, "frechet_pixels").set_index([ROUTING, OPTIMISATION])
    assert cells.loc[("dtr", "uniform"), "diverged"] == 1


def test_samples_that_were_not_measured_are_missing_not_diverged():
    frame = grid_of({("plain", "uniform"): [1.0, 2.0], ("dtr", "uniform"): [1.0, 2.0]})
    frame["frechet_pixels"] = [3.0, np.nan, np.nan, np.nan]
    cells = grid.grid_cells(frame, "frechet_pixels").set_index([ROUTING, OPTIMISATION])
    assert cells.loc[("plain", "uniform"), ["seeds", "mean", "diverged"]].tolist() == [1, 3.0, 0]
    assert cells.loc[("dtr", "uniform"), "seeds"] == 0


def test_the_table_has_a_row_per_optimisation_and_gaps_where_cells_are_missing():
    values = random_values()
    del values["dtr", "pcgrad"]
    table = grid.grid_table(grid_of(values))
    assert table.index.tolist() == list(OPTIMISATIONS)
    assert table.loc["min_snr", "dtr"] == pytest.approx(values["dtr", "min_snr"].mean())
    difference = values["dtr", "min_snr"] - values["plain", "min_snr"]
    assert table.loc["min_snr", "dtr_minus_plain"] == pytest.approx(difference.mean())
    assert table.loc["min_snr", "plain_minus_uniform"] == pytest.approx(
        (values["plain", "min_snr"] - values["plain", "uniform"]).mean()
    )
    assert np.isfinite(table.loc["min_snr", ["dtr_interaction", "dtr_interaction_q", "dtr_minus_plain_low"]]).all()
    missing = ["dtr", "dtr_minus_plain", "dtr_minus_plain_q", "dtr_minus_uniform", "dtr_interaction"]
    assert table.loc["pcgrad", missing].isna().all()
    assert table.loc["pcgrad", "dtr_seeds"] == 0
    assert table.loc["uniform", ["plain_minus_uniform", "dtr_interaction"]].isna().all()
    assert not [name for name in table if name.startswith(("plain_minus_plain", "plain_interaction"))]


def test_a_grid_without_the_usual_names_is_compared_with_its_first_choices():
    frame = grid_of({("a", "x"): [1.0, 2.0], ("b", "x"): [2.0, 4.0]}, ["a", "b"], ["x"])
    table = grid.grid_table(frame)
    assert table.loc["x", "b_minus_a"] == pytest.approx(1.5)


def test_the_best_of_a_row_is_named_only_if_it_beats_every_other_in_it():
    seeds = np.arange(5) * 3.0
    noise = np.array([0.01, -0.02, 0.015, -0.01, 0.005])
    row = {("plain", "uniform"): seeds, ("random", "uniform"): seeds + 1 + noise, ("dtr", "uniform"): seeds - 1 - noise}
    assert grid.best_cells(grid_of(row, optimisations=["uniform"])).to_dict() == {"uniform": "dtr"}
    tie = row | {("random", "uniform"): seeds - 1 + noise}  # as low as dtr on average
    assert grid.best_cells(grid_of(tie, optimisations=["uniform"])).empty
    for few in ({cell: own[:2] for cell, own in row.items()}, dict(list(row.items())[1:])):
        assert grid.best_cells(grid_of(few, optimisations=["uniform"])).empty  # two seeds; a missing cell
    diverged = row | {("random", "uniform"): [np.nan, *seeds[1:]]}
    assert grid.best_cells(grid_of(diverged, optimisations=["uniform"])).empty


def test_grids_of_noise_alone_show_nothing_and_true_effects_are_found():
    rng = np.random.default_rng(1)
    grids, seeds = 80, 4
    found = [
        grid.effect_intervals(grid.seed_effects(noise_grid(rng, seeds)))["significant"].any() for _ in range(grids)
    ]
    # With nothing to find, the share of grids with a finding is the false discovery rate.
    assert np.mean(found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / grids)
    effect = {("dtr", each): -40.0 for each in OPTIMISATIONS}
    table = grid.effect_intervals(grid.seed_effects(noise_grid(rng, seeds, effect)))
    own = table[(table[ROUTING] == "dtr") & (table["effect"] == "routing")]
    assert own["significant"].all()
    assert (own["low"] < -38).all()


def test_cells_come_from_the_tag_or_from_the_method(runs):
    first = runs[0]  # baseline, seed 0
    made = [
        cell_run(first, "dtr", "min_snr", 0.5),
        first.assign_attrs(cell="routing=plain,weight=p2,aggregation=upgrad"),
        first.assign_attrs(method="dtr+per_block+pcgrad"),
        first.assign_attrs(fidelity={"frechet_pixels": 2.5}),
    ]
    frame = grid.grid_frame(made)
    assert list(zip(frame[ROUTING], frame[OPTIMISATION], strict=True)) == [
        ("plain", "uniform"),
        ("plain", "p2+upgrad"),
        ("dtr", "min_snr"),
        ("dtr+per_block", "pcgrad"),
    ]
    assert frame[OPTIMISATION].cat.categories.tolist() == ["uniform", "min_snr", "p2+upgrad", "pcgrad"]
    truth = synthetic.val_loss("baseline", 0, 1000).mean()
    np.testing.assert_allclose(frame["val_loss"], truth * np.array([1, 1, 0.5, 1]))
    assert grid.fidelity_columns(frame) == ["frechet_pixels"]
    assert frame["frechet_pixels"].tolist()[0] == 2.5
    assert frame["seconds_per_step"].isna().all()  # no clock in these runs


def test_axes_give_the_order_and_the_cells_without_runs(runs):
    axes = {"routing": ["dtr", "plain", "random"], "weight": ["uniform", "p2"], "aggregation": ["sum", "upgrad"]}
    run = runs[0].assign_attrs(cell="routing=plain,weight=p2,aggregation=upgrad")
    routings, optimisations = grid.grid_axes(grid.grid_frame([run], axes))
    assert routings == ["dtr", "plain", "random"]
    assert optimisations == ["uniform+sum", "uniform+upgrad", "p2+sum", "p2+upgrad"]
    assert len(grid.grid_cells(grid.grid_frame([run], axes))) == 12


def test_training_time_is_the_clocks(runs):
    clocked = runs[0].assign(training_seconds=("clock_step", [1.0, 4.0])).assign_coords(clock_step=[50, 200])
    frame = grid.grid_frame([clocked])
    assert frame.loc[0, ["seconds", "seconds_per_step"]].tolist() == [4.0, 0.02]


def test_two_runs_of_one_cell_and_seed_count_as_their_mean():
    frame = grid_of({("plain", "uniform"): [1.0, 2.0], ("dtr", "uniform"): [3.0, 3.0]})
    again = frame[frame["run"] == "plain-uniform-0"].assign(val_loss=5.0)
    cells = grid.grid_cells(pd.concat([frame, again], ignore_index=True)).set_index([ROUTING, OPTIMISATION])
    assert cells.loc[("plain", "uniform"), ["seeds", "mean"]].tolist() == [2, 2.5]
