import numpy as np
import pytest

from analysis.grid_summary import grid_sentences, grid_warnings, significant_sentences
from tests.analysis.grids import OPTIMISATIONS, ROUTINGS, grid_of, noise_grid

NOISE = np.array([0.1, -0.2, 0.15, -0.1, 0.05, 0.0])


def true_grid(dtr, min_snr, both, seeds=6, noise=0.01):
    """Plain, DTR, Min-SNR and both, by what each changes; seeds differ in level."""
    level = 10.0 + np.arange(seeds)
    wobble = noise * NOISE[:seeds]
    values = {
        ("plain", "uniform"): level,
        ("dtr", "uniform"): level + dtr + wobble,
        ("plain", "min_snr"): level + min_snr - wobble,
        ("dtr", "min_snr"): level + both + 2 * wobble,
    }
    return grid_of(values, ["plain", "dtr"], ["uniform", "min_snr"])


def said(frame):
    return grid_sentences(frame)


def one(sentences, start):
    (found,) = [sentence for sentence in sentences if sentence.startswith(start)]
    return found


def test_effects_that_add_up_are_said_to_be_open_and_not_to_add_up():
    sentences = said(true_grid(-1.0, -2.0, -3.0))
    assert "false discovery rate of 5 % over 5 comparisons." in sentences[0]
    assert (
        one(sentences, "DTR against Plain")
        == "DTR against Plain: 2 (Uniform, Min-SNR) lower, none higher, 0 of 2 open."
    )
    assert "under Plain: 1 (Min-SNR) lower, none higher, 0 of 1 open." in one(
        sentences, "Optimisations against Uniform, under P"
    )
    together = one(sentences, "DTR together")
    assert together == "DTR together with an optimisation ends lower than either of the two alone in 1 (Min-SNR) of 1."
    interaction = one(sentences, "Do they add up? DTR minus Plain is -1 with Uniform")
    assert "lower than that in none, higher in none, and open in 1" in interaction
    assert "neither that they add up nor that one replaces the other is shown" in interaction
    assert "The lowest mean of 4 cells is that of DTR with Min-SNR" in sentences[-1]
    assert "looks better than it is" in sentences[-1]


def test_effects_that_replace_each_other_are_told_apart_from_those_that_strengthen_each_other():
    replaced = one(said(true_grid(-1.0, -2.0, -2.0)), "Do they add up?")
    assert "lower than that in none, higher in 1 (Min-SNR)." in replaced
    stronger = one(said(true_grid(-1.0, -2.0, -5.0)), "Do they add up?")
    assert "lower than that in 1 (Min-SNR), higher in none." in stronger
    together = one(said(true_grid(-1.0, -2.0, -1.5)), "DTR together")
    assert together.endswith("alone in none of 1.")


def test_sentences_name_what_is_significant_with_its_side():
    assert significant_sentences(true_grid(-1.0, 2.0, -4.0), "low_noise", "at low noise") == [
        "Significant at low noise, at a false discovery rate of 5 % over 5 comparisons; none is open:",
        "DTR against Plain: 2 (Uniform, Min-SNR) lower.",
        "Optimisations against Uniform, under DTR: 1 (Min-SNR) lower.",
        "Optimisations against Uniform, under Plain: 1 (Min-SNR) higher.",
        "DTR minus Plain, against the same with Uniform: 1 (Min-SNR) lower.",
    ]
    lead, *some = significant_sentences(true_grid(-1.0, 0.0, -1.0, seeds=3), "low_noise", "at low noise")
    assert lead.endswith("over 5 comparisons (3 seeds: a hint); all others are open:")
    assert some == ["DTR against Plain: 2 (Uniform, Min-SNR) lower."]
    (nothing,) = significant_sentences(true_grid(-1.0, -2.0, -3.0, seeds=2), "high_noise", "at high noise")
    assert nothing.startswith("No difference at high noise is significant at a false discovery rate of 5 % over 5 ")
    assert (
        "nothing can be said" in significant_sentences(true_grid(-1, -2, -3, seeds=1), "low_noise", "at low noise")[0]
    )


def test_three_seeds_are_a_hint_and_two_are_nothing():
    three = said(true_grid(-1.0, -2.0, -3.0, seeds=3))
    assert three[0].endswith("; with 3 seeds take it as a hint.")
    assert one(three, "Averaged").endswith("; 3 seeds make that a hint.")
    two = said(true_grid(-1.0, -2.0, -3.0, seeds=2))
    assert two[0].endswith("none is, with 2 seeds.")
    assert one(two, "DTR against Plain").endswith("none lower, none higher, 2 of 2 open.")
    assert "a hint from too few seeds" in one(two, "Averaged")
    assert grid_warnings(true_grid(-1, -2, -3, seeds=2))[0].startswith("2 seeds: an interval from so few")
    assert grid_warnings(true_grid(-1, -2, -3, seeds=3)) == []


def test_one_seed_claims_nothing():
    sentences = said(true_grid(-1.0, -2.0, -3.0, seeds=1))
    assert sentences[0].startswith("No two cells have two seeds in common")
    assert len(sentences) == 2
    assert "against" not in sentences[1]
    assert "One seed" in grid_warnings(true_grid(-1, -2, -3, seeds=1))[0]


def test_noise_is_called_noise():
    sentences = said(noise_grid(np.random.default_rng(3), 3))
    assert "none is, with 3 seeds" in sentences[0]
    assert not any(word in " ".join(sentences[1:-1]) for word in (") lower", ") higher", "hint"))


def test_gaps_and_divergence_are_named():
    values = {(r, o): [1.0, 2.0, 3.0] for r in ROUTINGS for o in OPTIMISATIONS}
    values["dtr", "pcgrad"] = [1.0, np.nan, 2.0]
    del values["random", "min_snr"]
    sentences = said(grid_of(values))
    assert one(sentences, "Diverged") == "Diverged, and without a mean or a difference: DTR with PCGrad (1 of 3 seeds)."
    assert one(sentences, "Random routing against").endswith("none lower, none higher, 2 of 2 open.")


def test_an_average_is_without_the_optimisation_under_which_a_run_diverged_and_says_so():
    rng = np.random.default_rng(1)
    frame = noise_grid(rng, 4, {("dtr", "pcgrad"): 1e6})
    one_diverged = frame["val_loss"].mask(
        (frame["routing"] == "dtr") & (frame["optimisation"] == "pcgrad") & (frame["seed"] == 2)
    )
    sentences = said(frame.assign(val_loss=one_diverged))
    two = said(frame[frame["optimisation"] != "pcgrad"])
    with_words = "Averaged over 2 optimisations (without PCGrad, where runs diverged), DTR minus Plain is "
    assert one(sentences, with_words).removeprefix(with_words) == one(
        two, "Averaged over 2 optimisations, DTR"
    ).removeprefix("Averaged over 2 optimisations, DTR minus Plain is ")
    assert one(sentences, "Averaged over 3 optimisations, Random routing minus Plain")
    assert "On average over" not in one(sentences, "Do they add up? DTR")


@pytest.mark.parametrize("quantity", ["val_loss", "frechet_pixels"])
def test_a_quantity_is_called_what_it_is(quantity):
    frame = true_grid(-1.0, -2.0, -3.0).assign(frechet_pixels=lambda table: table["val_loss"])
    sentences = grid_sentences(frame, quantity, "distance of samples")
    assert "about the distance of samples," in sentences[0]
