"""What the quantities of a grid are called, and how its numbers are written."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.uncertainty import FEW_SEEDS

LOSS_WORDS = {
    "val_loss": "final validation loss",
    "low_noise": "at low noise (first quarter of T)",
    "high_noise": "at high noise (last quarter of T)",
}
FIDELITY_WORDS = {
    "frechet_pixels": "Fréchet distance (pixels)",
    "kernel_pixels": "kernel distance (pixels)",
    "precision_pixels": "precision (pixels)",
    "recall_pixels": "recall (pixels)",
}
HIGHER_IS_BETTER = ("precision_pixels", "recall_pixels")
GAP = "–"
_DIGITS = 4


def with_interval(mean: float, low: float, high: float, seeds: int, decimals: int) -> str:
    """A mean with its 95 % interval: ± half its width while that is Student's, its ends from resampling on."""
    if seeds == 0:
        return GAP
    if not np.isfinite(mean):
        return "diverged"
    text = f"{mean:.{decimals}f}"
    if not np.isfinite(low):
        return text
    if seeds >= FEW_SEEDS:
        return f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"
    return f"{text} ± {(high - low) / 2:.{decimals}f}"


def signed_with_interval(estimate: float, low: float, high: float, seeds: int) -> str:
    """A difference with the ends of its 95 % interval."""
    if seeds == 0:
        return GAP
    if not np.isfinite(estimate):
        return "diverged"
    text = f"{estimate:+.3g}"
    return f"{text} [{low:+.3g}, {high:+.3g}]" if np.isfinite(low) else text


def decimals_for(values: pd.Series) -> int:
    """Decimal places that show four significant digits of the largest value."""
    largest = float(values[np.isfinite(values)].abs().max())
    return max(0, _DIGITS - 1 - int(np.floor(np.log10(largest)))) if largest > 0 else 0
