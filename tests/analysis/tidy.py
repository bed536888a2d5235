"""Tidy frames of curves, written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

STEPS = (100, 200, 300, 400)
METRIC = "loss/val"


def tidy(steps: Sequence[float] = STEPS, metric: str = METRIC, **values: Sequence[float]) -> pd.DataFrame:
    """Curves from ``method_seed=[...]``, each as far along ``steps`` as it has values."""
    rows = []
    for name, series in values.items():
        method, seed = name.split("_")
        rows += [(name, method, int(seed), s, metric, v) for s, v in zip(steps, series, strict=False)]
    return pd.DataFrame(rows, columns=["run", "method", "seed", "step", "metric", "value"])
