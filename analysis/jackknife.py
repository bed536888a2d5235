"""Ratios of averages over probes, with standard errors from leaving out parts of the data.

Every statistic here is a smooth function of averages over probes: numerators and denominators are averaged *before*
they are divided (the average of noisy ratios is biased and may have no variance). Its error comes from the jackknife
that deletes one unit at a time (Busing, Meijer and van der Leeden, Statistics and Computing 9, 1999: delete-m_j, for
units of unequal size). A unit is

- for ``errors="probes"``, a batch of consecutive probes of one run, at most `MAX_UNITS` in all, so that probes that
  resemble their neighbours do not count as independent (batch means, Schmeiser, Operations Research 30, 1982). With no
  more probes than that, each is a unit of its own and probes are taken as independent: their samples are. A drift over
  training goes into the error, which makes it too wide rather than too narrow. The error is conditional on the networks
  at hand.
- for ``errors="runs"``, a whole run: the only error that speaks about other seeds. It needs two runs, better five.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from analysis.gramians import STEP
from analysis.moments import MOMENTS, labelled, moments_of, plain_arrays, probe_chunks, products_of
from lightning_modules.errors import UserInputError

Errors = Literal["probes", "runs"]
Statistic = Callable[[xr.Dataset], xr.DataArray]

MAX_UNITS = 32
"""Batches of probes in all: enough for Student's t to be near normal, long enough to outlast autocorrelation."""
MIN_UNITS = 8
"""Fewer probes give no error that a table may quote; figures draw Student's t-intervals, which widen instead."""
SIGNAL_ERRORS = 2.0
"""A squared norm counts as distinct from zero beyond this many standard errors (or Student's t of the same p)."""
_UNIT = "unit"


@dataclasses.dataclass(frozen=True)
class PooledProbes:
    """Sums over units of probes.

    Attributes:
        sums: Of each quantity (unit, ...).
        numbers: Probes behind each of them (unit, ...).
        probes: (U,) probes of each unit.
        run: (U,) run of each unit.
    """

    sums: xr.Dataset
    numbers: xr.Dataset
    probes: npt.NDArray[np.int64]
    run: npt.NDArray[np.int64]

    @functools.cached_property
    def means(self) -> xr.Dataset:
        """The averages over all probes."""
        return _ratio(self.sums.sum(_UNIT), self.numbers.sum(_UNIT))

    @functools.cached_property
    def _plain(self) -> PooledProbes:
        """The same without coordinates: comparing them at each step of a statistic takes longer than computing it."""
        sums, numbers = (data.drop_vars(list(data.coords)) for data in (self.sums, self.numbers))
        return dataclasses.replace(self, sums=sums, numbers=numbers)

    @functools.cached_property
    def _without(self) -> xr.Dataset:
        """The averages (unit, ...) over the probes of all other units."""
        return _ratio(self.sums.sum(_UNIT) - self.sums, self.numbers.sum(_UNIT) - self.numbers)

    @property
    def runs(self) -> int:
        """Number of runs behind the probes."""
        return len(np.unique(self.run))

    def estimate(self, name: str, statistic: Statistic, errors: Errors = "probes") -> xr.Dataset:
        """A statistic of the averages over probes, with its standard error.

        Args:
            name: Of the statistic.
            statistic: From averages (a Dataset without coordinates, maybe with a further dimension ``unit``) to the
                statistic.
            errors: What the error allows to vary, see the module.

        Returns:
            ``name`` and ``standard_error``, with the attributes ``units`` (Student's t of the estimate has one degree
            of freedom fewer), ``runs`` and ``errors``. The error is NaN for a single unit.

        Raises:
            UserInputError: If errors over runs are asked for and there is one run.
        """
        pool = self._plain if errors == "probes" else self._plain._by_run()
        value = statistic(pool.means)
        error = pool._standard_error(value, statistic)
        attrs = {"units": len(pool.probes), "runs": self.runs, "errors": errors}
        found = xr.Dataset({name: value, "standard_error": error.transpose(*value.dims)}, attrs=attrs)
        return found.assign_coords({n: c for n, c in self.sums.coords.items() if set(c.dims) <= set(value.dims)})

    def is_positive(self, statistic: Statistic) -> xr.DataArray:
        """Whether a statistic is more than `SIGNAL_ERRORS` standard errors (over probes) above zero; False if unknown.

        The bound is Student's t at the same probability, so few probes do not pass by luck.
        """
        return self.stands_out(self.signal(statistic))

    def stands_out(self, signal: xr.DataArray) -> xr.DataArray:
        """`is_positive`, of a `signal` that is known."""
        return signal > signal_threshold(len(self.probes))

    def signal(self, statistic: Statistic) -> xr.DataArray:
        """A statistic in units of its standard error over probes."""
        found = self.estimate("value", statistic)
        return found["value"] / found["standard_error"].where(found["standard_error"] > 0)

    def _by_run(self) -> PooledProbes:
        names, place = np.unique(self.run, return_inverse=True)
        if len(names) < 2:
            raise UserInputError(
                "errors over runs need at least two runs, and these probes come from one: pool several seeds "
                "(`gramians.pool_runs`), or take errors over probes, which speak about this network only"
            )
        belongs = xr.DataArray(np.equal.outer(np.arange(len(names)), place).astype(float), dims=("run", _UNIT))
        sums, numbers = (
            data.map(lambda values: xr.dot(belongs, values, dim=_UNIT)).rename(run=_UNIT)
            for data in (self.sums, self.numbers)
        )
        return PooledProbes(sums, numbers, np.bincount(place, self.probes).astype(np.int64), names)

    def _standard_error(self, value: xr.DataArray, statistic: Statistic) -> xr.DataArray:
        units = len(self.probes)
        if units < 2:
            return xr.full_like(value, np.nan)
        without = statistic(self._without)
        inverse_share = xr.DataArray(self.probes.sum() / self.probes, dims=_UNIT)
        pseudo = inverse_share * value - (inverse_share - 1) * without
        centre = (pseudo / inverse_share).sum(_UNIT, skipna=False)
        return (((pseudo - centre) ** 2 / (inverse_share - 1)).sum(_UNIT, skipna=False) / units) ** 0.5


def half_width(estimate: xr.Dataset, level: float = 0.95) -> xr.DataArray:
    """Half the width of Student's t-interval around an estimate, from its standard error and number of units."""
    units = estimate.attrs["units"]
    return estimate["standard_error"] * (stats.t.ppf((1 + level) / 2, units - 1) if units > 1 else np.nan)


def quotable_error(estimate: xr.Dataset) -> xr.DataArray:
    """The standard error over probes of an estimate, NaN where it is not worth printing behind a ±.

    Fewer than `MIN_UNITS` probes happen to agree so often that their spread says little; and where they all agree, the
    spread of zero is no proof that the estimate is exact.
    """
    error = estimate["standard_error"]
    return error.where((error > 0) & (estimate.attrs["units"] >= MIN_UNITS))


def signal_threshold(units: int) -> float:
    """Quantile of Student's t for this many units that is as rare as `SIGNAL_ERRORS` normal standard errors."""
    return float(stats.t.ppf(stats.norm.cdf(SIGNAL_ERRORS), units - 1)) if units > 1 else np.inf


def pool_probes(
    gramian: xr.DataArray,
    count: xr.DataArray,
    *,
    halved: bool = True,
    series: Mapping[str, xr.DataArray] | None = None,
) -> PooledProbes:
    """Sums the moments of all probes over units, without holding those of every probe at once.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half), with the coordinate ``run`` if pooled.
        count: (gradient_step, task, half).
        halved: Whether the squared norms are needed, hence two halves.
        series: Further quantities (gradient_step, ...) to average over the same probes.

    Returns:
        Sums of `moments.probe_moments`, of ``product`` alone if not halved, and of ``series``.

    Raises:
        ValueError: If halves are needed and there is one per task.
    """
    if halved and gramian.sizes["half"] < 2:
        raise ValueError("the Gramian has one half per task: noise correction needs probes with at least two halves")
    values, counts, lead = plain_arrays(gramian, count)
    unit, run = _units(gramian)
    sums: dict[str, npt.NDArray] = {}
    numbers: dict[str, npt.NDArray] = {}
    for rows in probe_chunks(values):
        found = moments_of(values[rows], counts[rows]) if halved else (products_of(values[rows], counts[rows]),)
        for name, array in zip(MOMENTS, found, strict=False):
            for into, own in zip((sums, numbers), _unit_sums(array, np.isfinite(array), unit[rows]), strict=True):
                into.setdefault(name, np.zeros((unit[-1] + 1, *array.shape[1:])))
                into[name][unit[rows][0] : unit[rows][-1] + 1] += own
    shape = [int(unit[-1]) + 1, *(gramian.sizes[dim] for dim in lead)]
    total, number = (
        xr.Dataset(
            {name: labelled(a.reshape(*shape, *a.shape[2:]), (_UNIT, *lead), gramian) for name, a in arrays.items()}
        )
        for arrays in (sums, numbers)
    )
    if series is not None:
        more = pool_series(xr.Dataset(series), gramian)
        total, number = total.assign(more.sums.data_vars), number.assign(more.numbers.data_vars)
    return PooledProbes(total, number, np.bincount(unit), run)


def pool_series(values: xr.Dataset, probes: xr.DataArray) -> PooledProbes:
    """Sums of quantities (gradient_step, ...) over units; ``probes`` has the coordinate ``run`` if they are pooled."""
    unit, run = _units(probes)
    sums: dict[str, xr.DataArray] = {}
    numbers: dict[str, xr.DataArray] = {}
    for name, array in values.drop_vars([name for name, c in values.coords.items() if STEP in c.dims]).items():
        ordered = array.transpose(STEP, ...)
        parts = _unit_sums(ordered.values, ordered.notnull().values, unit)
        for found, own in zip((sums, numbers), parts, strict=True):
            found[str(name)] = xr.DataArray(own, dims=(_UNIT, *ordered.dims[1:]), coords=ordered.coords)
    return PooledProbes(xr.Dataset(sums), xr.Dataset(numbers), np.bincount(unit), run)


def _unit_sums(
    values: npt.NDArray, known: npt.NDArray[np.bool_], unit: npt.NDArray[np.int64]
) -> tuple[npt.NDArray, npt.NDArray]:
    """Sums (U, ...) of the known values (S, ...) of the probes of each unit, and how many those are."""
    starts = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])
    if known.all():
        sizes = np.diff(np.r_[starts, len(unit)]).reshape(-1, *[1] * (values.ndim - 1))
        sums = np.add.reduceat(values, starts, axis=0, dtype=float)
        return sums, np.broadcast_to(sizes, sums.shape).astype(float)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=0, dtype=float)
    return sums, np.add.reduceat(known, starts, axis=0, dtype=float)


def _units(probes: xr.DataArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Unit of each probe, counted up along the probes, and the run of each unit."""
    run = probes["run"].values if "run" in probes.coords else np.zeros(probes.sizes[STEP], dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
    most = max(1, MAX_UNITS // len(starts))
    unit, of_run, used = [], [], 0
    for length, start in zip(np.diff(np.r_[starts, len(run)]), starts, strict=True):
        batches = min(most, length)
        unit.append(used + np.arange(length) * batches // length)
        of_run += [run[start]] * batches
        used += batches
    return np.concatenate(unit), np.asarray(of_run)


def _ratio(sums: xr.Dataset, numbers: xr.Dataset) -> xr.Dataset:
    return sums / numbers.where(numbers > 0)
