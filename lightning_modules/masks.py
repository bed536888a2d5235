"""Which channels each timestep uses: the masks of every kind that are fixed before training, as arrays.

DTR and random masks: Park et al., "Denoising Task Routing for Diffusion Models", ICLR 2024 (arXiv 2310.07138). Cluster
masks are the plain multi-task split into common channels and channels of a cluster's own; DTR's reviewers asked for it,
as for masks that differ from block to block. Masks that training finds are in `lightning_modules.learned_masks`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, get_args

import numpy as np

from lightning_modules.errors import UserInputError
from lightning_modules.timesteps import TimestepIntervals

MaskKind = Literal["dtr", "random", "cluster", "learned"]


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which channels each timestep uses.

    Attributes:
        kind: ``"dtr"``, a window that slides over the channels as t grows; ``"random"``, the paper's control R-TR: for
            each timestep a random subset of as many channels; ``"cluster"``: for each cluster of timesteps the common
            channels and some of its own; ``"learned"``: for each cluster a subset that training finds.
        alpha: Exponent of the window's shift (DTR only). 1: linear; above 1: slow at low t, fast at high t.
        beta: Share of the channels in use, in (0, 1]; 1 is the plain model.
        variant: ``"paper"`` (window edges at (t - 1)/T and t/T, each rounded) or ``"official"`` (fixed width,
            start at t/(T - 1), as in the released code). They differ in one channel of few rows at T = 1000, and
            visibly at small T.
        seed: Seed of the random masks, of the order of channels per block, and of the learned masks' beginning.
        per_block: Each block has an order of channels of its own instead of one that all share: random masks are drawn
            anew (as in the released code), windows and clusters lie over shuffled channels, learned masks are apart.
        clusters: Number of clusters of timesteps, consecutive intervals of equal width (cluster and learned masks).
        cluster_bounds: Their explicit bounds instead, increasing integers from 0 to T.
        beta_last: Share of the last block: beta then changes linearly over the blocks in network order. None: the same
            in all. (The released code had this commented out, as ``sharing_ratio_indepth``.)
        temperature: Learned masks only: their gradient is that of sigmoid(logit / temperature).

    Raises:
        UserInputError: If a setting is out of range, or cannot be combined with the kind.
    """

    kind: MaskKind = "dtr"
    alpha: float = 4.0
    beta: float = 0.8
    variant: Literal["paper", "official"] = "paper"
    seed: int = 0
    per_block: bool = False
    clusters: int = 8
    cluster_bounds: list[int] | None = None
    beta_last: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(MaskKind):
            raise UserInputError(f"routing kind must be 'dtr', 'random', 'cluster' or 'learned', got {self.kind!r}")
        if self.variant not in ("paper", "official"):
            raise UserInputError(f"routing variant must be 'paper' or 'official', got {self.variant!r}")
        shares = {"beta": self.beta} | ({} if self.beta_last is None else {"beta_last": self.beta_last})
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise UserInputError(
                    f"routing {name} is the share of channels in use: it must lie in (0, 1], got {share}"
                )
        for name in ("alpha", "temperature"):
            if not getattr(self, name) > 0:
                raise UserInputError(f"routing {name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise UserInputError(f"routing seed must not be negative, got {self.seed}")
        self._check_clusters(shares)

    def _check_clusters(self, shares: dict[str, float]) -> None:
        if self.cluster_bounds is not None:
            self._check_bounds(self.cluster_bounds)
        fewest = 2 if self.kind == "cluster" else 1
        if self.has_clusters and self.num_clusters < fewest:
            raise UserInputError(
                f"routing clusters: {self.kind} masks need at least {fewest} clusters of timesteps, got "
                f"{self.num_clusters}"
            )
        for name, share in shares.items():
            if self.kind == "cluster" and share < 1 / self.num_clusters:
                raise UserInputError(
                    f"routing {name} = {share} is too low for {self.num_clusters} clusters: even masks that share no "
                    f"channel use 1/{self.num_clusters} = {1 / self.num_clusters:.6g} of them each; raise {name} to "
                    "that, or have more clusters"
                )

    def _check_bounds(self, bounds: list[int]) -> None:
        if not self.has_clusters:
            raise UserInputError(
                f"routing cluster_bounds are for cluster and learned masks, but kind is {self.kind!r}: leave them out"
            )
        if len(bounds) < 2 or bounds[0] != 0 or any(low >= high for low, high in itertools.pairwise(bounds)):
            raise UserInputError(
                f"routing cluster_bounds must start at 0 and increase strictly up to T, got {list(bounds)}"
            )

    @property
    def has_clusters(self) -> bool:
        """Whether timesteps of a cluster share one mask."""
        return self.kind in ("cluster", "learned")

    @property
    def num_clusters(self) -> int:
        """Number of clusters of timesteps."""
        return self.clusters if self.cluster_bounds is None else len(self.cluster_bounds) - 1

    def cluster_intervals(self, num_timesteps: int) -> TimestepIntervals:
        """The clusters as intervals of the T timesteps.

        Raises:
            UserInputError: If the bounds do not end at T, or there are more clusters than timesteps.
        """
        if self.cluster_bounds is not None:
            if self.cluster_bounds[-1] != num_timesteps:
                raise UserInputError(
                    f"routing cluster_bounds must end at T = {num_timesteps}, got {list(self.cluster_bounds)}"
                )
            return TimestepIntervals.explicit(self.cluster_bounds)
        if self.clusters > num_timesteps:
            raise UserInputError(
                f"routing clusters must not exceed the number of timesteps, {num_timesteps}, got {self.clusters}"
            )
        return TimestepIntervals.uniform(num_timesteps, self.clusters)

    def block_beta(self, block: int, num_blocks: int) -> float:
        """The share of channels that one of a network's blocks uses.

        Args:
            block: Its place in network order, from 0.
            num_blocks: How many blocks there are.

        Raises:
            ValueError: If there is no such block.
        """
        if self.beta_last is None:
            return self.beta
        if not 0 <= block < num_blocks:
            raise ValueError(f"beta depends on the block's place among num_blocks: {num_blocks} blocks have no {block}")
        # The share is multiplied by C and truncated: the last bit of 0.79999999999999 would cost a channel.
        return round(float(np.linspace(self.beta, self.beta_last, num_blocks)[block]), 12)


def active_channels(channels: int, beta: float) -> int:
    """C_b, the number of channels in a window: beta C, truncated as in the released code (the paper is silent)."""
    count = int(channels * beta)
    if count < 1:
        raise UserInputError(f"beta = {beta} leaves none of {channels} channels: raise beta or widen the model")
    return count


def dtr_windows(
    num_timesteps: int, channels: int, *, alpha: float, beta: float, variant: Literal["paper", "official"]
) -> np.ndarray:
    """The channel window of every timestep, shape (T, 2): first channel and width, int64.

    ``paper`` (section 4): channel c = 1..C is used at t = 1..T if
    round((C - C_b)((t - 1)/T)^alpha) < c <= round((C - C_b)(t/T)^alpha) + C_b.
    ``official``: fixed width C_b from round((C - C_b) (t0/(T - 1))^alpha), t0 = 0..T - 1.
    Rounding is to the nearest integer, halves to even.
    """
    width = active_channels(channels, beta)
    spare = channels - width
    if variant == "official":
        start = np.rint(np.linspace(0.0, 1.0, num_timesteps) ** alpha * spare)
        end = start + width
    else:
        edges = np.rint((np.arange(num_timesteps + 1) / num_timesteps) ** alpha * spare)
        start, end = edges[:-1], edges[1:] + width
    return np.stack([start, end - start], axis=1).astype(np.int64)


def cluster_shares(channels: int, *, beta: float, clusters: int) -> tuple[int, int]:
    """How many channels all K clusters have in common, and how many each has of its own: common + K own = C.

    A cluster uses common + own = C - (K - 1) own of them, with ``own`` the integer that brings this closest to C_b: it
    misses C_b by at most (K - 1)/2 channels, as long as K divides C or they share any.

    Raises:
        UserInputError: If that leaves no channel of its own to a cluster, though beta is below 1.
    """
    width = active_channels(channels, beta)
    own = min(round((channels - width) / (clusters - 1)), channels // clusters)
    if own < 1 and beta < 1:
        raise UserInputError(
            f"beta = {beta} leaves none of {channels} channels to each of {clusters} clusters as its own: lower beta, "
            "have fewer clusters, or widen the model"
        )
    return channels - clusters * own, own


def channel_masks(
    config: MaskConfig, num_timesteps: int, channels: int, block: int = 0, num_blocks: int = 1
) -> np.ndarray:
    """The masks m of one block, shape (T, C), bool: row t tells which channels timestep t uses.

    Args:
        config: What kind of masks.
        num_timesteps: T.
        channels: C.
        block: The block's place in network order, which matters with ``per_block`` and ``beta_last``.
        num_blocks: Number of blocks, which matters with ``beta_last``.

    Raises:
        UserInputError: If the channels or timesteps are too few for the settings.
        ValueError: For learned masks, which do not follow from the settings.
    """
    beta = config.block_beta(block, num_blocks)
    if config.kind == "random":
        return _random_masks(config, num_timesteps, channels, block, active_channels(channels, beta))
    if config.kind == "dtr":
        windows = dtr_windows(num_timesteps, channels, alpha=config.alpha, beta=beta, variant=config.variant)
        start, width = windows[:, :1], windows[:, 1:]
        place = np.arange(channels)
        masks = (place >= start) & (place < start + width)
    elif config.kind == "cluster":
        masks = _cluster_masks(config.cluster_intervals(num_timesteps), channels, beta)
    else:
        raise ValueError("learned masks change as training goes on: ask ChannelRouting.block_masks for them")
    if config.per_block:
        masks = masks[:, np.random.default_rng([config.seed, block]).permutation(channels)]
    return masks


def _random_masks(config: MaskConfig, num_timesteps: int, channels: int, block: int, count: int) -> np.ndarray:
    entropy = [config.seed, block] if config.per_block else [config.seed]
    order = np.random.default_rng(entropy).random((num_timesteps, channels)).argsort(axis=1)
    masks = np.zeros((num_timesteps, channels), dtype=bool)
    np.put_along_axis(masks, order[:, :count], True, axis=1)
    return masks


def _cluster_masks(intervals: TimestepIntervals, channels: int, beta: float) -> np.ndarray:
    """First the common channels, then those of each cluster in turn."""
    common, own = cluster_shares(channels, beta=beta, clusters=intervals.num_intervals)
    start = (common + own * np.arange(intervals.num_intervals)).repeat(intervals.widths)[:, None]
    channel = np.arange(channels)
    return (channel < common) | ((channel >= start) & (channel < start + own))
