"""The loop over windows, the files it writes, and what is said about them.

Every picture appears whole or not at all: it is written under another name and renamed. Frames are written as they
come, so a run that is stopped leaves a video of what it saw; an animation is one file, kept in memory until the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from evkernels import backends
from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.events import Events, event_frame, save_png
from evkernels.nn import ConvGRUCell
from evkernels.reconstruct.stream import IntensityRescaling, stream_images

_PREVIEW_SECONDS = 0.5
# Viewers play shorter ones slowly.
_SHORTEST_GIF_MS = 20
_FRAMES, _TIMES, _ANIMATION, _PREVIEW = "frame_*.png", "timestamps.txt", "video.gif", "preview.png"


class Video:
    """The files of one run: `frame_00000.png` and so on or `video.gif`, `timestamps.txt`, `preview.png`.

    Args:
        folder: Made if it does not exist.
        kind: "png" or "gif".
        overwrite: Delete the files of an earlier run instead of refusing.

    Raises:
        InputError: if the folder cannot be written to, or holds an earlier run's video.
    """

    def __init__(self, folder: Path, kind: str, overwrite: bool):
        self.folder, self.kind = folder, kind
        self._images, self._times, self._shown = [], [], 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = [path for name in (_FRAMES, _TIMES, _ANIMATION, _PREVIEW) for path in sorted(folder.glob(name))]
            if earlier and not overwrite:
                raise InputError(f"--out {folder}: holds {earlier[0].name} of an earlier run; --overwrite deletes it")
            for path in earlier:
                path.unlink()
            (folder / _TIMES).write_text("")
        except OSError as error:
            raise InputError(f"--out {folder}: cannot be written to: {error.strerror}") from error

    def add(self, grey: np.ndarray, window: Events, microseconds: int) -> None:
        """The next frame, uint8 [H, W], the events it came from and the time of its end."""
        if self.kind == "gif":
            self._images.append(Image.fromarray(grey))
        else:
            name = f"frame_{len(self._times):05d}.png"
            _replace(self.folder / name, lambda path: save_png(path, grey))
        self._times.append(microseconds)
        with open(self.folder / _TIMES, "a", encoding="ascii") as file:
            file.write(f"{microseconds / 1e6:.6f}\n")
        if time.monotonic() - self._shown >= _PREVIEW_SECONDS:
            self._preview(grey, window)
            self._shown = time.monotonic()
        self._last = grey, window

    def close(self) -> list[str]:
        """Writes what is written at the end; the names of all files."""
        if not self._times:
            return [_TIMES]
        self._preview(*self._last)
        if self.kind == "png":
            last = len(self._times) - 1
            return ["frame_00000.png" + (f" to frame_{last:05d}.png" if last else ""), _TIMES, _PREVIEW]
        lengths = np.diff(self._times) / 1000
        lengths = [max(_SHORTEST_GIF_MS, int(round(length, -1))) for length in (*lengths[:1], *lengths)] or 1000
        first, *rest = self._images
        _replace(
            self.folder / _ANIMATION,
            lambda path: first.save(path, "GIF", save_all=True, append_images=rest, duration=lengths, loop=0),
        )
        return [_ANIMATION, _TIMES, _PREVIEW]

    def _preview(self, grey: np.ndarray, window: Events) -> None:
        image = np.concatenate([event_frame(window), np.repeat(grey[..., None], 3, axis=2)], axis=1)
        _replace(self.folder / _PREVIEW, lambda path: save_png(path, image))


def reconstruct(
    model: nn.Module,
    name: str,
    events: Events,
    facts: list[str],
    window_us: int,
    events_per_frame: int | None,
    device: torch.device,
    video: Video,
) -> int:
    """Runs the job; 0, or 130 if the user stopped it."""
    if events_per_frame is None:
        windows, length = list(events.windows(window_us)), f"{window_us / 1e3:g} ms"
    else:
        windows, length = list(events.windows(count=events_per_frame)), f"{events_per_frame:,} events"
    terminal = Terminal()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = [*facts, f"{name} with {parameters:,} parameters on {device}, {_gates(model, device)}"]
    for fact in (*facts, f"{len(windows):,} frames of {length}, the latest in {video.folder / 'preview.png'}"):
        terminal.line(fact)
    rescale, done, seconds, stopped = IntensityRescaling(), 0, 0.0, False
    with terminal.step("reconstruction", len(windows)) as advance:
        images = stream_images(model, windows, device)
        try:
            for window in windows:
                begin = time.perf_counter()
                # Bringing the image to the CPU waits for the device.
                image = next(images).cpu()
                seconds += time.perf_counter() - begin
                done += 1
                end = int(events.t[0]) + done * window_us if events_per_frame is None else int(window.t[-1])
                video.add(rescale(image), window, end)
                advance()
        except KeyboardInterrupt:
            stopped = True
    names = video.close()
    seen = sum(len(window) for window in windows[:done])
    seconds = max(seconds, 1e-9)
    terminal.line(
        f"{'stopped: ' if stopped else ''}{done:,} frames from {seen:,} events: {seen / seconds:,.0f} events/s, "
        f"{done / seconds:,.1f} frames/s in the voxel grids and the network, {seconds:.2f} s of the time above"
    )
    terminal.line(f"written to {video.folder}/: {', '.join(names)}")
    return 130 if stopped else 0


def _gates(model: nn.Module, device: torch.device) -> str:
    op = "gru_reset" if any(isinstance(module, ConvGRUCell) for module in model.modules()) else "lstm_gates"
    return f"{op} by {backends.serving(op, device.type)[0]}"


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file whole: under another name beside it first."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
