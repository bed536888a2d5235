import pytest

from analysis.methods import OPTIMISATION_NAMES, method_name, ordered, reference_method, split_method


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("baseline", "Baseline"),
        ("dtr", "DTR"),
        ("dtr+pcgrad", "DTR + PCGrad"),
        ("baseline+min_snr", "Baseline + Min-SNR"),
        ("dtr+min_snr+upgrad", "DTR + Min-SNR + UPGrad"),
        ("dtr+per_block", "DTR per block"),
        ("dtr+uw+depth", "DTR by depth + UW"),
        ("cluster", "Cluster masks"),
        ("dtr-wide", "dtr-wide"),
        ("dtr+of_mine", "DTR + of_mine"),
        ("baseline+speed_sampling", "Baseline + SpeeD sampling"),
        # choices of a sweep
        ("plain", "Plain"),
        ("uniform", "Uniform"),
        ("min_snr+upgrad", "Min-SNR + UPGrad"),
        ("nash_mtl", "Nash-MTL"),
        ("dtr_per_block", "DTR per block"),
        ("disjoint", "disjoint"),
    ],
)
def test_names(tag, name):
    assert method_name(tag) == name


def test_variants_belong_to_the_routing_wherever_they_stand():
    assert split_method("dtr+pcgrad+per_block") == ("dtr+per_block", "pcgrad")
    assert split_method("baseline") == ("baseline", "")
    assert split_method("random+min_snr+unheard_of") == ("random", "min_snr+unheard_of")


def test_order_is_by_routing_then_by_optimisation():
    right = [
        "baseline",
        "baseline+min_snr",
        "baseline+min_snr+upgrad",
        "baseline+p2",
        "baseline+unheard_of",
        "random",
        "random+upgrad",
        "dtr",
        "dtr+pcgrad",
        "dtr+upgrad",
        "dtr+per_block",
        "dtr+per_block+uw",
        "dtr+depth",
        "cluster",
        "learned",
        "dtr-wide",
        "other",
    ]
    assert ordered(reversed([*right, *right])) == right
    optimised = [f"dtr+{part}" for part in OPTIMISATION_NAMES]
    assert ordered(sorted(optimised)) == optimised


def test_the_reference_is_the_plainest():
    assert reference_method(["dtr+uw", "baseline+uw", "baseline", "dtr"]) == "baseline"
    assert reference_method(["dtr", "random+uw"]) == "random+uw"
    assert reference_method(["dtr+uw", "dtr"]) == "dtr"
