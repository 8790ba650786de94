"""Aligned modules as files: weights in safetensors, everything else in JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from evkernels import files
from evkernels.alignment.base import BaseAlignmentModule
from evkernels.alignment.config import AlignmentConfig, config_from_dict, strategy_of
from evkernels.alignment.contrastive import ContrastiveAlignmentModule
from evkernels.alignment.lightweight import LightweightAlignmentModule
from evkernels.alignment.triple_modal import TripleModalAlignmentModule
from evkernels.events.optional import require

MODULES: dict[str, type[BaseAlignmentModule]] = {
    "contrastive": ContrastiveAlignmentModule,
    "lightweight": LightweightAlignmentModule,
    "triple_modal": TripleModalAlignmentModule,
}


def build(config: AlignmentConfig) -> BaseAlignmentModule:
    """The module of a configuration; reconstruction bridging needs a network and is built by its class."""
    strategy = strategy_of(config)
    if strategy not in MODULES:
        raise ValueError(f"strategy must be one of {', '.join(MODULES)}, got {strategy}")
    return MODULES[strategy](config)


def save_checkpoint(path: str | Path, alignment: BaseAlignmentModule, info: dict[str, Any] | None = None) -> Path:
    """Writes PATH.safetensors and PATH.json, whatever PATH's own suffix; a kill leaves old files or new ones whole.

    Args:
        path: Where; of "alignment.pt" the stem counts.
        alignment: A module of one of the strategies.
        info: What else to keep, as JSON.

    Returns:
        The path of the weights.
    """
    library = require("safetensors.torch", "align", "saving alignment checkpoints")
    weights = Path(path).with_suffix(".safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in alignment.state_dict().items()}
    about = {
        "strategy": strategy_of(alignment.config),
        "config": dataclasses.asdict(alignment.config),
        "info": info or {},
    }
    files.write(weights, lambda file: file.write(library.save(state)))
    files.write_text(weights.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    return weights


def load_checkpoint(path: str | Path) -> BaseAlignmentModule:
    """The module that `save_checkpoint` wrote, in evaluation mode; every weight must be there and fit.

    Raises:
        ValueError: if the files are missing, damaged or not of each other.
    """
    library = require("safetensors.torch", "align", "loading alignment checkpoints")
    weights = Path(path).with_suffix(".safetensors")
    if not weights.is_file() and Path(path).is_file():
        raise ValueError(
            f"{path}: expected a .safetensors checkpoint; load_original_checkpoint reads EventGPT's pickled ones"
        )
    try:
        about = json.loads(weights.with_suffix(".json").read_text())
        alignment = build(config_from_dict(about["strategy"], about["config"]))
        alignment.load_state_dict(library.load_file(weights))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, library_errors()) as error:
        raise ValueError(f"{weights}: expected an alignment checkpoint, got: {_one_line(error)}") from error
    return alignment.eval()


def library_errors() -> type[Exception]:
    """What safetensors raises for damaged files."""
    import safetensors

    return safetensors.SafetensorError


def load_original_checkpoint(path: str | Path, strategy: str) -> BaseAlignmentModule:
    """The module of a checkpoint of EventGPT, which pickles a configuration object beside the weights.

    Args:
        path: The .pt file.
        strategy: "contrastive", "lightweight" or "triple_modal": whose configuration it must hold.

    No code of the file is run: tensors and plain values are unpickled, and of classes only the three configurations,
    by name and as plain fields.

    Raises:
        ValueError: if the file holds anything else, or weights that do not fit the configuration.
    """
    if strategy not in MODULES:
        raise ValueError(f"strategy must be one of {', '.join(MODULES)}, got {strategy!r}")
    stands_in = {}
    for module in (f"feature_alignment.{strategy}", f"feature_alignment.{strategy}_alignment", strategy):
        for prefix in ("", "feasible."):
            stands_in[f"{prefix}{module}.{_CLASS_NAMES[strategy]}"] = _Fields
    try:
        with torch.serialization.safe_globals([(_Fields, name) for name in stands_in]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        config = content["config"]
        values = dict(config) if isinstance(config, dict) else vars(config)
        alignment = build(config_from_dict(strategy, values))
        alignment.load_state_dict(content["model_state_dict"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: refused as a checkpoint of EventGPT: {_one_line(error)}") from error
    return alignment.eval()


class _Fields:
    """Stands in for a configuration class of the original: an object without methods that takes the fields."""


_CLASS_NAMES = {
    "contrastive": "ContrastiveAlignmentConfig",
    "lightweight": "LightweightAlignmentConfig",
    "triple_modal": "TripleModalAlignmentConfig",
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
