"""VisionCore's shared core: temporal filters, residual network and behaviour-modulated ConvGRU."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from evkernels.models import configuration
from evkernels.models.visioncore.resnet import ResNet
from evkernels.nn.cell_options import check_choice
from evkernels.nn.compat.visioncore import ConvGRUModulator

# What belongs to a recording session (adapter, readout) or to training, or says nothing about the network.
_IGNORED = {"model_type", "sampling_rate", "adapter", "readout", "regularization"}
# Sections that only say that there is nothing.
_NONE = {"recurrent": {"type": "none"}, "output_activation": "none"}


class VisionCore(nn.Module):
    """Frames and behaviour to a map of features, the core that all recording sessions share.

    Equivalent to::

        y = modulator(convnet(frontend(x)), behavior)

    Args:
        convnet: Configuration of `ResNet` without `initial_channels`.
        modulator: Configuration of `evkernels.nn.compat.visioncore.ConvGRUModulator`; None for none.
        frontend: Arguments of `LearnableTemporalConv`; None for none.
        initial_input_channels: Of the frames; a frontend takes one.

    Raises:
        ValueError: if a configuration is wrong, or the modulator's feature_dim is not the channels that it gets.

    Forward: x [N, initial_input_channels, T, H, W] and, with a modulator, behavior [N, behavior_dim] to
    [N, hidden_dim, 1, H', W'], without one to [N, C, T', H', W']. Adapter and readout, one of each per session, stay
    the caller's. State-dict keys: `frontend.temporal_conv.conv.weight`, `convnet.layers.*`, `modulator.*`.
    Source: VisionCore, learned_res_optimized_gru_v2.yaml and its two siblings.
    """

    def __init__(
        self,
        convnet: Mapping,
        modulator: Mapping | None = None,
        frontend: Mapping | None = None,
        initial_input_channels: int = 1,
    ) -> None:
        super().__init__()
        channels = initial_input_channels
        self.frontend = nn.Identity()
        if frontend is not None:
            if channels != 1:
                raise ValueError(f"initial_input_channels must be 1 for a frontend, got {channels}")
            self.frontend = LearnableTemporalConv(**frontend)
            channels = self.frontend.num_channels
        self.convnet = ResNet({"initial_channels": channels, **convnet})
        self.modulator = None
        if modulator is not None:
            if modulator["feature_dim"] != self.convnet.output_channels:
                raise ValueError(
                    f"modulator.feature_dim must be the convnet's {self.convnet.output_channels} channels, got "
                    f"{modulator['feature_dim']}"
                )
            self.modulator = ConvGRUModulator(modulator)

    @classmethod
    def from_config(cls, config: str | Path | Mapping) -> "VisionCore":
        """The network of a configuration of the original, a YAML file or its content.

        Raises:
            ValueError: if a section or type is not known.
        """
        content = configuration.load(config)
        arguments = {}
        for key, value in content.items():
            if key in _IGNORED:
                continue
            if key in _NONE:
                expected = _NONE[key]
                given = {"type": value.get("type")} if isinstance(value, Mapping) else value
                if given != expected:
                    raise ValueError(f"configuration section {key} must be {expected!r}, got {value!r}")
            elif key in ("frontend", "convnet", "modulator"):
                arguments[key] = _section(key, value)
            elif key == "initial_input_channels":
                arguments[key] = value
            else:
                raise ValueError(f"configuration section {key} is not known, got {value!r}")
        if arguments.get("convnet") is None:
            raise ValueError("configuration section convnet must be there")
        return cls(**arguments)

    def forward(self, x: Tensor, behavior: Tensor | None = None) -> Tensor:
        features = self.convnet(self.frontend(x))
        if self.modulator is None:
            return features
        if behavior is None:
            raise ValueError("behavior must be given, [N, behavior_dim]: there is a modulator")
        return self.modulator(features, behavior)


def _section(key: str, section: Mapping) -> Mapping | None:
    """The parameters of a section, None for type "none"."""
    kinds = {"frontend": "learnable_temporal", "convnet": "resnet", "modulator": "convgru"}
    kind = section.get("type", "none")
    check_choice(f"{key}.type", kind, (kinds[key], "none"))
    return None if kind == "none" else dict(section.get("params") or {})


class LearnableTemporalConv(nn.Module):
    """Filters along time, the same at every pixel, over the frames before each frame.

    Equivalent to::

        y = F.conv3d(x, temporal_conv.conv.weight, temporal_conv.conv.bias)

    Args:
        kernel_size: Frames that a filter sees.
        num_channels: Filters.
        init_type: "gaussian_derivatives": a Gaussian, its first and second derivative, and noise under it, each of norm
            1; "identity": filter i is one at frame i of its window; "random": torch.nn's.
        causal: True is the only choice.
        bias: Whether there is one.
        anti_aliasing: False is the only choice.

    Raises:
        ValueError: if a choice is unknown, or the input is not [N, 1, T, H, W] with T at least `kernel_size`.

    Output [N, num_channels, T - kernel_size + 1, H, W]. Source: VisionCore, LearnableTemporalConv.
    """

    def __init__(
        self,
        kernel_size: int = 16,
        num_channels: int = 6,
        init_type: str = "gaussian_derivatives",
        causal: bool = True,
        bias: bool = False,
        anti_aliasing: bool = False,
    ) -> None:
        super().__init__()
        check_choice("init_type", init_type, ("gaussian_derivatives", "identity", "random"))
        check_choice("causal", causal, (True,))
        check_choice("anti_aliasing", anti_aliasing, (False,))
        self.kernel_size, self.num_channels = kernel_size, num_channels
        self.temporal_conv = nn.Module()
        self.temporal_conv.conv = nn.Conv3d(1, num_channels, (kernel_size, 1, 1), bias=bias)
        if init_type != "random":
            filters = _gaussian_derivatives if init_type == "gaussian_derivatives" else torch.eye
            with torch.no_grad():
                self.temporal_conv.conv.weight.copy_(filters(num_channels, kernel_size)[:, None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[1] != 1 or x.shape[2] < self.kernel_size:
            expected = f"[N, 1, T, H, W] with T at least kernel_size = {self.kernel_size}"
            raise ValueError(f"x must be {expected}, got {tuple(x.shape)}")
        return self.temporal_conv.conv(x)


def _gaussian_derivatives(count: int, size: int) -> Tensor:
    t = torch.arange(size) - (size - 1) / 2
    variance = (size / 6) ** 2
    gaussian = torch.exp(-t.square() / (2 * variance))
    factors = [torch.ones(size), -t / variance, (t.square() / variance - 1) / variance]
    factors += [torch.randn(size) for _ in range(count - 3)]
    filters = torch.stack(factors[:count]) * gaussian
    return filters / filters.norm(dim=1, keepdim=True)
