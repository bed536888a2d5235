from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from lightning_modules.tracking.records import FINE_TUNING
from tests.analysis import synthetic
from tests.analysis.measured import representation_rows, run_with, transfer_rows
from tests.analysis.synthetic import K


@pytest.fixture(scope="package")
def measured_runs(runs, tmp_path_factory):
    """The runs of the store; the plain ones also measured look-aheads, fine-tunings and representations."""
    found = []
    for index, run in enumerate(runs):
        if run.attrs["method"] != "baseline":
            found.append(run)
            continue
        rng = np.random.default_rng(index)
        saved = rng.uniform(-0.2, 0.4, (K, K)) + 0.4 * np.eye(K)
        steps = [transfer_rows(saved * share, step=at, predicted=1.1 * saved) for at, share in ((40, 1.0), (100, 0.8))]
        tunings = [transfer_rows(saved / 2, measure=FINE_TUNING, updates=20, repeat=r) for r in range(2)]
        times = [12 + 25 * task for task in range(K)]
        hsic = {block: np.exp(-np.abs(np.subtract.outer(times, times)) / 80) for block in synthetic.CHANNELS}
        extra = run_with(
            tmp_path_factory.mktemp("measured"),
            transfers=[*steps, *tunings],
            representations=[representation_rows(hsic, times)],
        )
        merged = xr.merge([run, extra], compat="override", join="outer", combine_attrs="override")
        found.append(merged.assign_attrs(run.attrs))
    return found
