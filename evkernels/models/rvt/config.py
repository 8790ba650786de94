"""RVT's and eTraM's Hydra configurations, read as arguments of `RVTDetector`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evkernels.models import configuration

# Keys that say nothing about the network: how it is compiled and run, and what no code reads.
_IGNORED = {"name", "compile", "T_max_chrono_init", "postprocess", "defaults", "partition_size", "in_res_hw"}
# Key of the configuration -> the only value that there is an implementation for.
_FIXED = {
    "downsample.type": "patch",
    "attention.use_torch_mha": False,
    "attention.mlp_activation": "gelu",
    "attention.mlp_gated": False,
    "fpn.depthwise": False,
    "fpn.act": "silu",
    "head.depthwise": False,
    "head.act": "silu",
}
_ATTENTION = (
    "dim_head",
    "attention_bias",
    "mlp_bias",
    "mlp_ratio",
    "drop_mlp",
    "drop_path",
    "ls_init_value",
    "norm_eps",
)
# Key of the configuration -> where the value goes: an argument, or an entry of one that is a dict.
_ARGUMENTS = {
    "backbone.input_channels": "input_channels",
    "backbone.enable_masking": "enable_masking",
    "backbone.partition_split_32": "partition_split_32",
    "backbone.embed_dim": "embed_dim",
    "backbone.dim_multiplier": "dim_multiplier",
    "backbone.num_blocks": "num_blocks",
    "backbone.use_plain_lstm": "use_plain_lstm",
    "backbone.use_enhanced_convlstm": "use_enhanced_convlstm",
    "stem.patch_size": "patch_size",
    "downsample.overlap": "overlap",
    "downsample.norm_affine": "norm_affine",
    "lstm.dws_conv": "lstm.dws_conv",
    "lstm.dws_conv_only_hidden": "lstm.dws_conv_only_hidden",
    "lstm.dws_conv_kernel_size": "lstm.dws_conv_kernel_size",
    "lstm.drop_cell_update": "lstm.cell_update_dropout",
    "fpn.in_stages": "in_stages",
    "fpn.depth": "fpn_depth",
    "head.num_classes": "num_classes",
    **{f"attention.{key}": f"attention.{key}" for key in _ATTENTION},
}


def arguments_of(config: str | Path | Mapping) -> dict[str, Any]:
    """Arguments of RVTDetector that the configuration gives; ValueError names a key that nothing here implements."""
    content = configuration.load(config)
    content = content.get("model", content)
    arguments: dict[str, Any] = {"lstm": {}, "attention": {}}
    for key, value in configuration.leaves(content):
        section, _, name = key.rpartition(".")
        short = f"{section.rpartition('.')[2]}.{name}"
        if value == "???" or not _IGNORED.isdisjoint(key.split(".")):
            continue
        if short in _FIXED:
            if value != _FIXED[short]:
                raise ValueError(f"configuration key {key} must be {_FIXED[short]!r}, got {value!r}")
        elif short in _ARGUMENTS:
            group, _, argument = _ARGUMENTS[short].rpartition(".")
            (arguments[group] if group else arguments)[argument] = value
        else:
            raise ValueError(f"configuration key {key} is not known, got {value!r}")
    return arguments
