"""VisionCore's residual network from its configuration, with the initialisation that its documentation promises."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from evkernels.models.visioncore.blocks import ConvBlock, ResBlock, activation_layer, norm_layer

# Zero at zero but not flat there: behind a norm that gives zeros such an activation gives zeros and passes gradients.
_STARTS_AS_IDENTITY = (None, "leakyrelu", "gelu", "silu", "swish", "mish")
_KEYS = {
    "dim",
    "initial_channels",
    "channels",
    "block_config",
    "block_configs",
    "stem_config",
    "final_activation",
    "checkpointing",
    "resnet_post_add_activation",
    "resnet_shortcut_norm_type",
    "resnet_shortcut_norm_params",
}


class ResNet(nn.Module):
    """Residual blocks one behind the other.

    Equivalent to::

        for layer in layers:
            x = layer(x)
        y = final_activation(x)

    Args:
        config: `dim`, `initial_channels` of the input and `channels` of each block; `block_configs`, the arguments of
            each ConvBlock, or one `block_config` for all. Optionally `stem_config` (of a ConvBlock in front of them),
            `final_activation`, `checkpointing` (blocks are computed again in the backward pass),
            `resnet_post_add_activation`, `resnet_shortcut_norm_type` and `resnet_shortcut_norm_params`.

    Raises:
        ValueError: if a key is unknown or missing, or there are not as many `block_configs` as `channels`.

    A shortcut is a 1x1 convolution without bias where channels or size change, else the identity. Its stride is the
    product of the convolution's and the pool's, so an int acts on time as well although pooling does not: as in the
    original the block's last frames then meet frames of the shortcut that are further apart.

    Initialised so that each block starts as its shortcut: the scale of its last norm is zero (`gamma` of RMSNorm,
    `weight` of others), unless the activation behind it is flat or not zero at zero, as ReLU is, which would never
    learn. Convolutions have He's normal initialisation by fan-out for a slope of 0.01, also behind weight norm. In the
    original the zeros hold for RMSNorm alone, and after ReLU.

    State-dict keys: `layers.<i>.main_block.components.*`, `layers.<i>.shortcut.0.weight`. Source: VisionCore, ResNet.
    """

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        unknown = set(config) - _KEYS
        if unknown:
            raise ValueError(
                f"config has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KEYS))}"
            )
        for key in ("dim", "initial_channels", "channels"):
            if key not in config:
                raise ValueError(f"config must have the key {key}")
        self.dim, self.checkpointing = config["dim"], config.get("checkpointing", False)
        channels = config["initial_channels"]
        self.layers = nn.ModuleList()
        if config.get("stem_config"):
            stem = dict(config["stem_config"])
            self.layers.append(ConvBlock(self.dim, channels, stem.pop("out_channels"), **stem))
            channels = self.layers[0].output_channels
        for width, block_config in zip(config["channels"], _block_configs(config), strict=True):
            block = ConvBlock(self.dim, channels, width, **block_config)
            shortcut = _shortcut(self.dim, channels, block.output_channels, _total_stride(block_config), config)
            self.layers.append(ResBlock(block, shortcut, activation_layer(config.get("resnet_post_add_activation"))))
            channels = block.output_channels
        self.output_channels = channels
        self.final_activation = activation_layer(config.get("final_activation"))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, initial_channels, T, H, W], for dim = 2 without T, to output of `output_channels`."""
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing and self.training else layer(x)
        return self.final_activation(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation that the class describes; biases and what is no convolution are left as they are."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                weight = torch.empty_like(module.weight)
                nn.init.kaiming_normal_(weight, a=0.01, mode="fan_out", nonlinearity="leaky_relu")
                if is_parametrized(module, "weight"):
                    # The attribute is computed from g and v: assigning to it sets these, writing into it does nothing.
                    module.weight = weight
                else:
                    module.weight.copy_(weight)
        for layer in self.layers:
            if isinstance(layer, ResBlock) and layer.main_block.act_type in _STARTS_AS_IDENTITY:
                norm = layer.main_block.components["norm"]
                scale = getattr(norm, "gamma", getattr(norm, "weight", None))
                if scale is not None:
                    scale.zero_()


def _block_configs(config: Mapping) -> list[Mapping]:
    if ("block_config" in config) == ("block_configs" in config):
        raise ValueError("config must have one of the keys block_config and block_configs")
    if "block_config" in config:
        return [config["block_config"]] * len(config["channels"])
    if len(config["block_configs"]) != len(config["channels"]):
        raise ValueError(
            f"config must have as many block_configs as channels, got {len(config['block_configs'])} and "
            f"{len(config['channels'])}"
        )
    return config["block_configs"]


def _total_stride(block_config: Mapping) -> int | tuple[int, ...]:
    conv = block_config["conv_params"].get("stride", 1)
    pool = (block_config.get("pool_params") or {}).get("stride", 1)
    if isinstance(conv, int) and isinstance(pool, int):
        return conv * pool
    count = len(pool if isinstance(conv, int) else conv)
    conv, pool = ((value,) * count if isinstance(value, int) else value for value in (conv, pool))
    return tuple(a * b for a, b in zip(conv, pool, strict=True))


def _shortcut(dim: int, channels: int, width: int, stride: int | tuple[int, ...], config: Mapping) -> nn.Module:
    if channels == width and max((stride,) if isinstance(stride, int) else stride) == 1:
        return nn.Identity()
    conv = (nn.Conv2d if dim == 2 else nn.Conv3d)(channels, width, 1, stride=stride, bias=False)
    norm = norm_layer(
        config.get("resnet_shortcut_norm_type"), width, dim, **(config.get("resnet_shortcut_norm_params") or {})
    )
    return nn.Sequential(conv, norm)
