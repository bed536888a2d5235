from __future__ import annotations

import pytest

from analysis.runs import load_runs
from tests.analysis import synthetic


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """URI of a store that tests only read."""
    return synthetic.make_store(tmp_path_factory.mktemp("store"), seeds=3)


@pytest.fixture(scope="session")
def runs(store):
    return load_runs(store, experiment=synthetic.EXPERIMENT)
