"""Tests for `lightning_modules/masks.py`: every kind against its definition, written out channel by channel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.errors import UserInputError
from lightning_modules.masks import MaskConfig, active_channels, channel_masks, cluster_shares, dtr_windows


def paper_mask(T: int, C: int, alpha: float, beta: float) -> np.ndarray:
    """The definition of the paper, term by term."""
    C_b = int(beta * C)
    mask = np.zeros((T, C), dtype=bool)
    for t in range(1, T + 1):
        for c in range(1, C + 1):
            low = round((C - C_b) * ((t - 1) / T) ** alpha)
            high = round((C - C_b) * (t / T) ** alpha) + C_b
            mask[t - 1, c - 1] = low < c <= high
    return mask


@given(
    st.integers(1, 60), st.integers(2, 40), st.sampled_from([0.25, 0.5, 1, 4, 8]), st.sampled_from([0.3, 0.5, 0.8, 1])
)
def test_the_paper_variant_is_the_papers_formula(T, C, alpha, beta):
    if int(beta * C) == 0:
        return
    config = MaskConfig(alpha=alpha, beta=beta, variant="paper")
    assert (channel_masks(config, T, C) == paper_mask(T, C, alpha, beta)).all()


def test_distinct_windows_are_as_many_as_the_fact_sheet_counts():
    """Numbers of distinct mask rows at T = 1000, alpha 4, beta 0.8, found independently of this code."""
    for C, official, paper in [(384, 78, 155), (768, 155, 301), (1024, 206, 365), (1152, 232, 389)]:
        for variant, expected in (("official", official), ("paper", paper)):
            assert len(np.unique(channel_masks(MaskConfig(variant=variant), 1000, C), axis=0)) == expected


def test_the_variants_differ_in_one_channel_per_unit_of_shift():
    paper, official = (channel_masks(MaskConfig(variant=v), 1000, 384) for v in ("paper", "official"))
    assert (paper ^ official).sum() == 384 - 307
    assert (paper ^ official).sum(1).max() == 1


def test_official_windows_have_a_fixed_width_and_end_at_the_last_channel():
    windows = dtr_windows(50, 48, alpha=0.5, beta=0.6, variant="official")
    assert set(windows[:, 1]) == {28}
    assert windows[0, 0] == 0
    assert windows[-1].sum() == 48


def test_random_masks_are_seeded_and_have_beta_c_channels_each():
    config = MaskConfig(kind="random", beta=0.8, seed=3)
    masks = channel_masks(config, 100, 50)
    assert (masks.sum(1) == 40).all()
    assert (masks == channel_masks(config, 100, 50, block=5)).all(), "shared by all blocks"
    assert (masks != channel_masks(MaskConfig(kind="random", seed=4), 100, 50)).any()
    per_block = MaskConfig(kind="random", seed=3, per_block=True)
    assert (channel_masks(per_block, 100, 50, 0) != channel_masks(per_block, 100, 50, 1)).any()
    # Two random masks share 0.8 * 40 channels on average; DTR's neighbours share nearly all.
    assert (masks[:-1] & masks[1:]).sum(1).mean() == pytest.approx(32, abs=0.5)


def test_random_masks_are_what_they_were_before_other_kinds_came():
    for per_block in (False, True):
        config = MaskConfig(kind="random", beta=0.7, seed=5, per_block=per_block)
        for block in (0, 3):
            draws = np.random.default_rng([5, block] if per_block else [5]).random((30, 17))
            smallest = draws.argsort(axis=1)[:, :11]
            masks = channel_masks(config, 30, 17, block)
            assert [set(np.flatnonzero(row)) for row in masks] == [set(row) for row in smallest]


def closest_split(C: int, C_b: int, K: int) -> tuple[int, int]:
    """Common and own channels by trying them all: the width nearest to C_b, of two as near the narrower one."""
    widths = {own: C - (K - 1) * own for own in range(C // K + 1)}
    nearest = min(abs(width - C_b) for width in widths.values())
    own = max(own for own, width in widths.items() if abs(width - C_b) == nearest)
    return C - K * own, own


@given(st.integers(2, 12), st.integers(2, 200), st.floats(0.01, 0.999))
def test_clusters_get_as_many_channels_as_beta_says_or_the_nearest_number(K, C, beta):
    if beta < 1 / K or int(beta * C) == 0:
        return
    _, own = closest_split(C, int(beta * C), K)
    ties = abs((C - int(beta * C)) / (K - 1) % 1 - 0.5) < 1e-12  # halves are rounded to even
    if own == 0 or (ties and own == 1):
        return
    found = cluster_shares(C, beta=beta, clusters=K)
    assert found[0] + K * found[1] == C
    assert found[0] >= 0
    assert abs(found[1] - own) <= ties
    assert abs(sum(found) - int(beta * C)) == abs(C - (K - 1) * own - int(beta * C))
    if found[1] < C // K or C % K == 0:  # else there are no more channels to give to each
        assert abs(sum(found) - int(beta * C)) <= (K - 1) / 2


@pytest.mark.parametrize("bounds", [None, [0, 1, 30, 97]])
def test_timesteps_of_a_cluster_share_the_common_channels_and_its_own(bounds):
    config = MaskConfig(kind="cluster", beta=0.6, clusters=4, cluster_bounds=bounds)
    masks = channel_masks(config, 97, 40)
    edges = bounds or [0, 24, 48, 72, 97]
    K = len(edges) - 1
    common, own = closest_split(40, 24, K)
    assert (common, own) == ((20, 5) if K == 4 else (16, 8))
    for k in range(K):
        expected = {*range(common), *range(common + k * own, common + (k + 1) * own)}
        for t in range(edges[k], edges[k + 1]):
            assert set(np.flatnonzero(masks[t])) == expected
    assert masks.any(0).all(), "every channel is somebody's"


@pytest.mark.parametrize("channels", [16, 64, 384])
def test_at_one_over_the_number_of_clusters_they_share_no_channel(channels):
    masks = channel_masks(MaskConfig(kind="cluster", beta=1 / 8, clusters=8), 80, channels)[::10].astype(int)
    assert (masks @ masks.T == np.eye(8) * channels // 8).all()
    assert (masks.sum(0) == 1).all()


def test_what_clusters_cannot_share_out_is_common():
    assert cluster_shares(10, beta=1 / 3, clusters=3) == (1, 3)
    masks = channel_masks(MaskConfig(kind="cluster", beta=1.0), 80, 64)
    assert masks.all(), "the plain model"


@pytest.mark.parametrize("kind", ["dtr", "cluster"])
def test_blocks_have_orders_of_their_own_on_request(kind):
    shared, own = (MaskConfig(kind=kind, beta=0.5, seed=4, per_block=flag) for flag in (False, True))
    plain = channel_masks(shared, 60, 24)
    assert (channel_masks(shared, 60, 24, block=2) == plain).all()
    orders = []
    for block in (0, 1):
        masks = channel_masks(own, 60, 24, block)
        assert (masks == channel_masks(own, 60, 24, block)).all(), "seeded"
        order = np.random.default_rng([4, block]).permutation(24)
        assert (masks == np.stack([plain[:, place] for place in order], axis=1)).all()
        # Timesteps share as many channels as ever; which ones is all that differs.
        assert (masks.astype(int) @ masks.T.astype(int) == plain.astype(int) @ plain.T.astype(int)).all()
        orders.append(masks)
    assert (orders[0] != orders[1]).any()
    other = channel_masks(MaskConfig(kind=kind, beta=0.5, seed=5, per_block=True), 60, 24)
    assert (other != orders[0]).any()


@pytest.mark.parametrize("kind", ["dtr", "random", "cluster"])
def test_beta_changes_linearly_from_the_first_block_to_the_last(kind):
    config = MaskConfig(kind=kind, beta=0.9, beta_last=0.5, variant="official", clusters=3)
    widths = [channel_masks(config, 30, 100, block, 5).sum(1) for block in range(5)]
    assert all(len(set(width)) == 1 for width in widths)
    expected = [90, 80, 70, 60, 50]
    for width, target in zip(widths, expected, strict=True):
        assert abs(int(width[0]) - target) <= (1 if kind == "cluster" else 0)
    for block, target in enumerate(expected):
        constant = MaskConfig(kind=kind, beta=target / 100, variant="official", clusters=3)
        assert (channel_masks(config, 30, 100, block, 5) == channel_masks(constant, 30, 100)).all()


def test_a_share_on_the_way_is_the_number_one_would_write():
    """Shares of hundredths over 100 channels: none is lost to the last bit of an interpolated number."""
    for first, last in ((1.0, 0.01), (0.01, 1.0), (0.29, 0.83)):
        config = MaskConfig(beta=first, beta_last=last)
        hundredths = np.arange(
            round(100 * first), round(100 * last) + (1 if last > first else -1), np.sign(last - first)
        )
        for block, share in enumerate(hundredths / 100):
            beta = config.block_beta(block, len(hundredths))
            assert active_channels(100, beta) == active_channels(100, float(share)), share
    assert MaskConfig(beta=0.3, beta_last=0.7).block_beta(0, 1) == 0.3
    assert MaskConfig(beta=1 / 3).block_beta(7, 3) == 1 / 3
    with pytest.raises(ValueError, match="num_blocks"):
        channel_masks(MaskConfig(beta_last=0.5), 10, 20, block=1)


def test_learned_masks_do_not_follow_from_settings():
    with pytest.raises(ValueError, match="block_masks"):
        channel_masks(MaskConfig(kind="learned"), 10, 20)


def test_settings_of_the_time_before_there_were_clusters_still_mean_the_same():
    old = {"kind": "dtr", "alpha": 4.0, "beta": 0.8, "variant": "paper", "seed": 0, "per_block": False}
    assert MaskConfig(**old) == MaskConfig()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0.0}, "beta is the share"),
        ({"beta": 1.5}, "beta is the share"),
        ({"beta": float("nan")}, "beta is the share"),
        ({"beta_last": 0}, "beta_last is the share"),
        ({"beta_last": 1.01}, "beta_last is the share"),
        ({"alpha": 0}, "alpha"),
        ({"kind": "learned", "temperature": 0.0}, "temperature"),
        ({"kind": "dtr2"}, "kind"),
        ({"variant": "code"}, "variant"),
        ({"kind": "cluster", "clusters": 1}, "at least 2 clusters"),
        ({"kind": "learned", "clusters": 0}, "at least 1 cluster"),
        ({"kind": "cluster", "cluster_bounds": [0, 1000]}, "at least 2 clusters"),
        ({"kind": "cluster", "beta": 0.12}, r"beta = 0.12 is too low for 8 clusters.* 0.125"),
        ({"kind": "cluster", "beta_last": 0.1}, "beta_last = 0.1 is too low"),
        ({"kind": "cluster", "beta": 0.3, "cluster_bounds": [0, 10, 100, 1000]}, "too low for 3 clusters"),
        ({"kind": "dtr", "cluster_bounds": [0, 500, 1000]}, "cluster_bounds are for cluster and learned"),
        ({"kind": "cluster", "cluster_bounds": [1, 500, 1000]}, "cluster_bounds must start at 0"),
        ({"kind": "cluster", "cluster_bounds": [0, 500, 500, 1000]}, "increase strictly"),
        ({"kind": "learned", "cluster_bounds": []}, "cluster_bounds must start at 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, says):
    with pytest.raises(UserInputError, match=says):
        MaskConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "channels", "says"),
    [
        ({"beta": 0.2}, 3, "leaves none of 3 channels"),
        ({"kind": "cluster", "cluster_bounds": [0, 50, 99]}, 64, "cluster_bounds must end at T = 100"),
        ({"kind": "cluster", "clusters": 101}, 256, "clusters must not exceed the number of timesteps, 100"),
        ({"kind": "cluster", "clusters": 8, "beta": 0.5}, 7, "none of 7 channels to each of 8 clusters as its own"),
        ({"kind": "cluster", "clusters": 8, "beta": 0.99}, 64, "none of 64 channels to each of 8 clusters"),
        ({"kind": "cluster", "clusters": 8, "beta": 0.2}, 4, "leaves none of 4 channels"),
    ],
)
def test_settings_that_do_not_fit_the_network_or_t_are_refused(settings, channels, says):
    with pytest.raises(UserInputError, match=says):
        channel_masks(MaskConfig(**settings), 100, channels)
