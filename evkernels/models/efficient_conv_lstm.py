"""EfficientConvLSTM: events to a dense map, a depthwise-separable encoder with a recurrent bottleneck and skips.

The published network fails on its first call (its decoder is given one map too few); this one passes all four skip
maps, in all combinations of model and skips. There are no published weights. Encoder and decoder run frame by frame,
because their batch norms see a frame at a time in training and a frame's maps fit in a cache; the recurrent layers run
whole sequences. All of it is channels_last, for which the ops are made.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.models.efficient_decoder import EfficientDecoder, Head
from evkernels.models.event_encoder import EventEncoder
from evkernels.nn import EventNormalization
from evkernels.nn.compat import eseg

CHANNELS = (16, 32, 64, 128, 256)
# Rows and columns of the bottleneck, whatever the sensor.
MAP = (9, 11)
BINS = 5


class EfficientConvLSTM(nn.Module):
    """Sequences of events to a map between 0 and 1 per window.

    Equivalent to::

        maps = [encoder(normalization(voxels(window))) for window in events]
        h = convlstm(torch.stack([F.interpolate(x5, (9, 11), mode="bilinear") for x5, _ in maps], dim=1))
        skips = [lstm(torch.stack([skip[i] for _, skip in maps], dim=1)) for i, lstm in enumerate(skip_convlstms)]
        outputs = [final_conv(decoder(h[:, t], [skip[:, t] for skip in skips])) for t in range(T)]

    Args:
        model_type: "CONVLSTM": two ConvLSTM layers on the bottleneck's 9 x 11 map. "DENSELSTM": two torch.nn.LSTM
            layers on the flattened map, 6 million weights more.
        width, height: Of the sensor.
        skip_lstm: Whether a ConvLSTM of half the channels runs on each of the four skip maps.
        method: How the decoder joins a skip map: "add" or "concat".
        bottleneck_channels: Hidden channels of both bottleneck layers. Setting the attribute later makes the bottleneck
            and the decoder's first level anew, with new weights.
        gradient_clip_val: Largest norm of the gradients that `clip_gradients` leaves.
        monitor: Called with the encodings of every call in training mode, such as `EncodingHealth`; None for nothing.

    Raises:
        ValueError: if `model_type` or `method` is unknown.

    Forward: `model(events, training=True)`. events is a list of T windows, each raw events [B, N, 4] with columns
    (t, x, y, p), p in {-1, 1} (an event with p = 0 adds nothing), or voxel grids [B, 5, H, W]. Returned are outputs
    [B, T, H, W], encodings [B, T, bottleneck_channels, 9, 11], detached, and the list of the voxel grids made of raw
    events. Raw times are scaled to 0..1 per sample, coordinates cut to the sensor and rounded toward zero; no input is
    modified. `training` is there for the published call, whose augmentation is commented out: `train()` and `eval()`
    decide.

    The state lives in the module and goes on from call to call: `reset_states()` before another recording,
    `detach_states()` after each optimiser step. It is no part of the state dict. Keys: `encoder`, `skip_convlstms`,
    `convlstm` or `dense_lstm` and `fc_to_map`, `decoder.decoder_layers`, `final_conv`; with the defaults 1,769,805
    parameters (1,380,349 without skip_lstm; 7,687,181 for "DENSELSTM"). Source: SurrealEvent.
    """

    def __init__(
        self,
        model_type: str = "CONVLSTM",
        width: int = 346,
        height: int = 260,
        skip_lstm: bool = True,
        *,
        method: str = "add",
        bottleneck_channels: int = 64,
        gradient_clip_val: float = 1.0,
        monitor: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        if model_type not in ("CONVLSTM", "DENSELSTM"):
            raise ValueError(f"model_type must be 'CONVLSTM' or 'DENSELSTM', got {model_type!r}")
        self.model_type = model_type
        self.width, self.height = width, height
        self.skip_lstm = skip_lstm
        self.method = method
        self.gradient_clip_val = gradient_clip_val
        self.monitor = monitor
        self.normalization = EventNormalization()
        self.encoder = EventEncoder(BINS, CHANNELS)
        self.skip_channels = tuple(channels // 2 if skip_lstm else channels for channels in CHANNELS[:4])
        self.skip_convlstms = nn.ModuleList()
        if skip_lstm:
            self.skip_convlstms.extend(
                eseg.ConvLSTM(channels, hidden, 3, 1)
                for channels, hidden in zip(CHANNELS, self.skip_channels, strict=False)
            )
        self._make_bottleneck(bottleneck_channels)
        self.final_conv = Head(self.skip_channels[0])
        for module in (self.skip_convlstms, self.final_conv):
            module.apply(_initialize)
        # Mostly dark to begin with.
        nn.init.normal_(self.final_conv[3].weight, std=0.01)
        nn.init.constant_(self.final_conv[3].bias, -1)

    @property
    def bottleneck_channels(self) -> int:
        """Hidden channels of the bottleneck; setting them makes it and the decoder anew, on the same device."""
        return self._bottleneck_channels

    @bottleneck_channels.setter
    def bottleneck_channels(self, channels: int) -> None:
        like = self.final_conv[0].weight
        self._make_bottleneck(channels)
        self.to(device=like.device, dtype=like.dtype).train(self.training)

    def _make_bottleneck(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"bottleneck_channels must be at least 1, got {channels}")
        self._bottleneck_channels = channels
        if self.model_type == "CONVLSTM":
            self.dense_state = None
            self.convlstm = eseg.ConvLSTM(CHANNELS[-1], channels, 3, 2)
            self.convlstm.apply(_initialize)
        else:
            self.dense_lstm = nn.LSTM(CHANNELS[-1] * MAP[0] * MAP[1], channels, 2, batch_first=True, dropout=0.1)
            self.fc_to_map = nn.Linear(channels, channels * MAP[0] * MAP[1])
            self.fc_to_map.apply(_initialize)
            self.dense_state = None
        self.decoder = EfficientDecoder((*self.skip_channels, channels), self.method)
        self.decoder.apply(_initialize)

    def forward(
        self, event_sequence: Sequence[Tensor], training: bool | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        del training
        if len(event_sequence) == 0:
            raise ValueError("event_sequence must hold at least one window")
        grids = [grid_of(window, self.height, self.width) for window in event_sequence]
        seq_events = [grid for grid, window in zip(grids, event_sequence, strict=True) if window.dim() == 3]
        x5, skips = self._encoded(grids)
        encodings = self._recurrent(x5)
        if self.skip_lstm:
            skips = [layer(maps) for layer, maps in zip(self.skip_convlstms, skips, strict=True)]
        outputs = [
            self.final_conv(self.decoder(*_channels_last(encoding, frame)))
            for encoding, *frame in zip(_frames(encodings), *(_frames(maps) for maps in skips), strict=True)
        ]
        encodings = encodings.detach()
        if self.monitor is not None and self.training:
            self.monitor(encodings)
        return torch.cat(outputs, dim=1), encodings, seq_events

    def _encoded(self, grids: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The bottleneck's input and the skip maps [B, T, C, H, W], T first in memory and frames channels_last: so the
        recurrent ops read them in place.
        """
        dtype, device = self.final_conv[0].weight.dtype, grids[0].device.type
        inputs = (self.normalization(grid).to(dtype).contiguous(memory_format=torch.channels_last) for grid in grids)
        # Without gradients the encoder writes the sequence's maps where they belong.
        in_place = not torch.is_grad_enabled() and not torch.is_autocast_enabled(device)
        skips = self.encoder.empty_maps(grids[0].to(dtype), len(grids)) if in_place else []
        x5, frames = [], []
        for step, x in enumerate(inputs):
            last, maps = self.encoder(x, [sequence[step] for sequence in skips])
            x5.append(F.interpolate(last, MAP, mode="bilinear", align_corners=False))
            frames.append(maps)
        skips = skips or [_sequence(maps) for maps in zip(*frames, strict=True)]
        return _sequence(x5).transpose(0, 1), [maps.transpose(0, 1) for maps in skips]

    def reset_states(self, samples: Tensor | None = None) -> None:
        """Forgets the states: the next call starts from zeros, and may have another batch size.

        Args:
            samples: bool [B]; if given, only the states of these samples become zero.
        """
        if samples is not None:
            if self.states is not None:
                self.states = [
                    value.masked_fill(samples.view(-1, *[1] * (value.dim() - 1)), 0) for value in self.states
                ]
            return
        for layer in self._stateful():
            layer.reset_hidden()
        self.dense_state = None

    @property
    def states(self) -> list[Tensor] | None:
        """All states, [B, ...] each, None before the first call; may be set to what they were."""
        if all(layer.h[0] is None for layer in self._stateful()) and self.dense_state is None:
            return None
        states = [value for layer in self._stateful() for value in (*layer.h, *layer.c)]
        # torch.nn.LSTM has the layers first.
        return states + [value.transpose(0, 1) for value in self.dense_state or ()]

    @states.setter
    def states(self, states: list[Tensor] | None) -> None:
        if states is None:
            self.reset_states()
            return
        left = iter(states)
        for layer in self._stateful():
            layer.h, layer.c = ([next(left) for _ in layer.cells] for _ in range(2))
        self.dense_state = tuple(value.transpose(0, 1).contiguous() for value in left) or None

    def detach_states(self) -> None:
        """Cuts the states off from the graph of the calls before."""
        for layer in self._stateful():
            layer.detach_hidden()
        if self.model_type == "DENSELSTM" and self.dense_state is not None:
            self.dense_state = tuple(value.detach() for value in self.dense_state)

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to a norm of `gradient_clip_val`; returns their norm before. Call before a step."""
        return nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip_val)

    def _stateful(self) -> list[eseg.ConvLSTM]:
        bottleneck = [self.convlstm] if self.model_type == "CONVLSTM" else []
        return [*self.skip_convlstms, *bottleneck]

    def _recurrent(self, x: Tensor) -> Tensor:
        if self.model_type == "CONVLSTM":
            return self.convlstm(x)
        hidden, self.dense_state = self.dense_lstm(x.flatten(2), self.dense_state)
        return self.fc_to_map(hidden).unflatten(2, (self.bottleneck_channels, *MAP))


def _sequence(frames: Sequence[Tensor]) -> Tensor:
    """[T, B, C, H, W], of which every frame keeps its layout."""
    return torch.cat(frames).unflatten(0, (len(frames), -1))


def _frames(maps: Tensor) -> tuple[Tensor, ...]:
    """The frames [B, C, H, W] of [B, T, C, H, W]. Their gradient keeps their layout, which that of unbind does not."""
    return maps.transpose(0, 1).flatten(0, 1).split(len(maps))


def _channels_last(encoding: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    encoding, *maps = (value.contiguous(memory_format=torch.channels_last) for value in (encoding, *maps))
    return encoding, maps


def grid_of(window: Tensor, height: int, width: int) -> Tensor:
    """The voxel grids [B, 5, height, width] of a window as EfficientConvLSTM takes it."""
    if window.dim() == 4:
        if tuple(window.shape[1:]) != (BINS, height, width):
            raise ValueError(f"voxel grids must be [B, {BINS}, {height}, {width}], got {tuple(window.shape)}")
        return window
    if window.dim() != 3 or window.shape[2] != 4:
        raise ValueError(f"a window must be [B, N, 4] or [B, {BINS}, H, W], got {tuple(window.shape)}")
    with torch.no_grad():
        batch, events = window.shape[:2]
        t, x, y, p = window.reshape(-1, 4).unbind(1)
        x, y = (value.clamp(0, size - 1).long() for value, size in ((x, width), (y, height)))
        t = t.contiguous() if t.is_floating_point() else t.long()
        offsets = torch.arange(batch + 1, device=window.device) * events
        return ops.voxel_grid(
            x, y, t, p.long(), bins=BINS, height=height, width=width, convention="eseg", offsets=offsets
        )


def _initialize(module: nn.Module) -> None:
    """The published initialisation: He's normal one by fan-out, biases zero; transposed convolutions as in torch."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
