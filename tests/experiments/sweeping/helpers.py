"""Sweep files and settings small enough to be trained in tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[3] / "experiments" / "digits"
ROUTED = {"model.class_path": "DTRModule", "model.init_args.routing": {"kind": "random", "beta": 0.5}}
TINY = {
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.accelerator": "cpu",
    "model.init_args.backbone": {"hidden_size": 16, "depth": 1, "num_heads": 2},
    "data.init_args.batch_size": 16,
    "gradient_conflict.every_n_steps": 0,
    "channel_activation.every_n_steps": 0,
    "samples.every_n_steps": 0,
}
GRID = {
    "name": "tiny",
    "experiment": "digits",
    "config": str(CONFIGS / "baseline.yaml"),
    "settings": TINY,
    "seeds": [0],
    "seeded": ["model.init_args.routing.seed"],
    "axes": {
        "routing": {"plain": {}, "random": ROUTED},
        "weight": {"uniform": {}, "p2": {"model.init_args.loss_weight.name": "p2"}},
    },
}
SEARCH = {
    "name": "search",
    "experiment": "digits",
    "config": str(CONFIGS / "baseline.yaml"),
    "settings": TINY,
    "search": {
        "metric": "loss/val",
        "trials": 3,
        "parameters": {
            "model.init_args.optimization.learning_rate": {"low": 1.0e-4, "high": 1.0e-2, "log": True},
            "model.init_args.loss_weight.name": {"choices": ["uniform", "p2"]},
        },
    },
}


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with top-level keys replaced; None takes one away."""
    copied = copy.deepcopy(content) | changes
    return {key: value for key, value in copied.items() if value is not None}


def written(content: dict[str, Any] | str, path: Path | str = "sweep.yaml") -> Path:
    """The sweep file."""
    Path(path).write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return Path(path)
