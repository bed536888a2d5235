"""Published DiT checkpoints: files with the official state-dict keys, made elsewhere.

Two formats occur: the released files (DiT-XL/2 at 256 and 512 pixels), which are a plain state dict, and what DiT's
training script saves: ``{"model", "ema", "opt", "args"}``, the first two state dicts, the last an `argparse.Namespace`.
The network's shape is read from the weights. What they do not tell is taken from the official code, which all of these
files come from: T = 1000, the linear schedule, noise as the target, a learned variance where there are channels for it.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbones.dit import DIT_PRESETS, DiTConfig
from lightning_modules.denoiser import BaselineModule
from lightning_modules.diffusion import DiffusionConfig, VarianceKind
from lightning_modules.errors import UserInputError

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_SHAPES: dict[str, int] = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
"""The keys that the shape is read from, and how many dimensions they have."""
_NAMED = 4


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file of whatever origin, on the CPU; weights stay on the disk until they are used.

    Unpickles tensors, plain values and `argparse.Namespace` only, so a file from elsewhere cannot run code.

    Raises:
        UserInputError: If there is no such file, or it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        raise UserInputError(f"{path.absolute()} is a folder: name the checkpoint file in it")
    if not path.is_file():
        raise UserInputError(f"no checkpoint at {path.absolute()}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = _load(path)
    except Exception as error:  # bytes that are no pickle make the reader raise whatever they happen to mean
        said = str(error).strip().splitlines()
        raise UserInputError(
            f"cannot read checkpoint {path}: it is damaged, or holds more than weights and plain values "
            f"({': '.join([type(error).__name__, *said[:1]])})"
        ) from error
    if not isinstance(contents, dict):
        raise UserInputError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    return contents


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # a file of torch before 1.6


def load_published(
    path: str | Path, *, contents: Mapping[str, Any] | None = None, num_heads: int | None = None, raw: bool = False
) -> BaselineModule:
    """A published DiT as a denoiser, in evaluation mode, on the CPU.

    Its backbone and its averaged weights are one and the same network.

    Args:
        path: The file.
        contents: What `read_weights_file` read from it, if that was done.
        num_heads: Attention heads, which the weights do not tell; needed where width and depth are of no preset.
        raw: Of a training checkpoint, take the trained weights instead of their average.

    Raises:
        UserInputError: If this is no DiT with the official keys, naming what is missing or does not fit.
    """
    contents = read_weights_file(path) if contents is None else contents
    weights, settings = _weights_in(contents, path, raw)
    config = infer_config(weights, path, num_heads=num_heads, settings=settings)
    variance: VarianceKind = "learned_range" if config.learn_sigma else "fixed_large"
    module = BaselineModule(backbone=config, diffusion=DiffusionConfig(schedule="linear", variance=variance))
    # Before the weights are read: two networks of this size may not fit.
    module.ema.module = module.backbone
    _load_weights(module.backbone, weights, path)
    return module.eval()


def infer_config(
    weights: Mapping[str, Tensor],
    path: str | Path,
    *,
    num_heads: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> DiTConfig:
    """The shape of the DiT that a state dict with the official keys belongs to.

    Args:
        weights: The state dict.
        path: Where it comes from, for errors.
        num_heads: Attention heads, see `load_published`.
        settings: The training script's arguments, if the file has them. Their ``num_classes`` tells whether the label
            table has a row for the null class; without it, it is taken to have one, as in all released files.

    Raises:
        UserInputError: If keys are missing, shapes contradict each other, or the number of heads is unknown.
    """
    settings = settings or {}
    for key, dimensions in _SHAPES.items():
        if key not in weights:
            raise UserInputError(f"{path} is no DiT with the official keys: it has no {key!r} ({_some(weights)})")
        if weights[key].ndim != dimensions:
            raise UserInputError(
                f"{path}: {key!r} has shape {tuple(weights[key].shape)}, expected {dimensions} dimensions"
            )
    hidden, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    tokens = weights["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserInputError(f"{path}: 'pos_embed' has {tokens} tokens, which is no square: images must be square")
    outputs, remainder = divmod(weights["final_layer.linear.weight"].shape[0], patch * patch)
    if remainder or outputs not in (channels, 2 * channels):
        raise UserInputError(
            f"{path}: 'final_layer.linear.weight' puts out {weights['final_layer.linear.weight'].shape[0]} values a "
            f"patch, which is neither {channels} nor {2 * channels} channels of {patch} x {patch} pixels"
        )
    depth = 1 + max(int(found.group(1)) for key in weights if (found := _BLOCK.match(key)))
    rows = weights["y_embedder.embedding_table.weight"].shape[0] if _conditional(weights) else 0
    has_null = rows > 0 and settings.get("num_classes") != rows
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_known_heads(hidden, depth, path) if num_heads is None else num_heads,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        num_classes=rows - has_null,
        label_dropout=0.1 if has_null else 0.0,
        learn_sigma=outputs == 2 * channels,
    )


def _weights_in(contents: Mapping[str, Any], path: str | Path, raw: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in either format, and the training script's arguments."""
    settings: dict[str, Any] = {}
    weights: Any = contents
    if isinstance(contents.get("model"), Mapping) or isinstance(contents.get("ema"), Mapping):
        part = "model" if raw else "ema"
        if not isinstance(contents.get(part), Mapping):
            other = "without --raw-weights" if raw else "with --raw-weights"
            raise UserInputError(f"{path} has no weights under {part!r}: take the others, {other}")
        weights = contents[part]
        if isinstance(contents.get("args"), argparse.Namespace):
            settings = vars(contents["args"])
    tensors = {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserInputError(f"{path} holds no weights: neither a state dict nor a training checkpoint of DiT")
    return tensors, settings


def _conditional(weights: Mapping[str, Tensor]) -> bool:
    return "y_embedder.embedding_table.weight" in weights


def _known_heads(hidden: int, depth: int, path: str | Path) -> int:
    """Heads of the presets of this width and depth; they do not depend on the patch size."""
    for preset in DIT_PRESETS.values():
        if (preset["hidden_size"], preset["depth"]) == (hidden, depth):
            return preset["num_heads"]
    raise UserInputError(
        f"{path}: a DiT of width {hidden} and depth {depth} is none of the published sizes, and weights do not tell "
        "the number of attention heads: give it (--num-heads)"
    )


def _load_weights(backbone: torch.nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    expected = backbone.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        said = [f"lacks {_some(missing)}"] if missing else []
        said += [f"has the unknown {_some(unknown)}"] if unknown else []
        raise UserInputError(f"{path} is no DiT with the official keys: it {' and '.join(said)}")
    for key, value in expected.items():
        if value.shape != weights[key].shape:
            raise UserInputError(
                f"{path}: {key!r} has shape {tuple(weights[key].shape)}, but the rest of the weights belong to a DiT "
                f"in which it has {tuple(value.shape)}"
            )
    backbone.load_state_dict(dict(weights))


def _some(keys: Mapping[str, Any] | list[str]) -> str:
    """The first few of many keys, for a message."""
    names = sorted(keys)
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
