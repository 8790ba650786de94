"""The loop over windows, the files it writes, and what is said about them.

Every picture appears whole or not at all: it is written under another name and renamed. Frames are written as they
come, so a run that is stopped leaves a video of what it saw, and every few seconds the network's state, from which the
next run goes on; an animation is one file, kept in memory until the end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map_only

from evkernels import arguments, backends, files
from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.events import Events, event_frame, save_png
from evkernels.nn import ConvGRUCell
from evkernels.reconstruct import progress
from evkernels.reconstruct.progress import Progress
from evkernels.reconstruct.stream import IntensityRescaling, stream_states

_PREVIEW_SECONDS = 0.5
_PROGRESS_SECONDS = 5.0
# Viewers play shorter ones slowly.
_SHORTEST_GIF_MS = 20
_FRAMES, _TIMES, _ANIMATION, _PREVIEW = "frame_*.png", "timestamps.txt", "video.gif", "preview.png"


class Video:
    """The files of one run: `frame_00000.png` and so on or `video.gif`, `timestamps.txt`, `preview.png`.

    Args:
        folder: Made if it does not exist.
        kind: "png" or "gif".
        overwrite: Delete the files of an earlier run instead of refusing.
        begun: Go on after the frames of an earlier run instead.

    Raises:
        InputError: if the folder cannot be written to, or holds an earlier run's video.
    """

    def __init__(self, folder: Path, kind: str, overwrite: bool, begun: Progress | None = None):
        self.folder, self.kind = folder, kind
        self._images, self._times, self._shown, self._last = [], [], 0.0, None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = [path for name in (_FRAMES, _TIMES, _ANIMATION, _PREVIEW) for path in sorted(folder.glob(name))]
            if earlier and not overwrite and begun is None:
                held = f"holds {earlier[0].name} of an earlier run"
                raise InputError(f"--out {folder}: {held}; --overwrite deletes it, --resume goes on")
            if begun is not None:
                self._times = self._kept(begun.frames)
                earlier = sorted(folder.glob(_FRAMES))[begun.frames :]
            else:
                progress.forget(folder)
            for path in earlier:
                path.unlink()
            (folder / _TIMES).write_text("".join(map(_line, self._times)))
        except OSError as error:
            raise InputError(arguments.cannot_write(folder, error)) from error

    def _kept(self, frames: int) -> list[int]:
        """Times of the frames that stay, in microseconds."""
        times = self.folder / _TIMES
        lines = times.read_text().splitlines()[:frames] if times.is_file() else []
        if len(lines) != frames or not all((self.folder / _name(index)).is_file() for index in range(frames)):
            raise InputError(f"--out {self.folder}: expected {frames} frames of an earlier run, got fewer")
        return [round(float(line) * 1e6) for line in lines]

    def add(self, grey: np.ndarray, window: Events, microseconds: int) -> None:
        """The next frame, uint8 [H, W], the events it came from and the time of its end."""
        if self.kind == "gif":
            self._images.append(Image.fromarray(grey))
        else:
            save_png(self.folder / _name(len(self._times)), grey)
        self._times.append(microseconds)
        with open(self.folder / _TIMES, "a", encoding="ascii") as file:
            file.write(_line(microseconds))
        if time.monotonic() - self._shown >= _PREVIEW_SECONDS:
            self._preview(grey, window)
            self._shown = time.monotonic()
        self._last = grey, window

    def close(self) -> list[str]:
        """Writes what is written at the end; the names of all files."""
        if not self._times:
            return [_TIMES]
        if self._last is not None:
            self._preview(*self._last)
        if self.kind == "png":
            last = len(self._times) - 1
            return ["frame_00000.png" + (f" to frame_{last:05d}.png" if last else ""), _TIMES, _PREVIEW]
        lengths = np.diff(self._times) / 1000
        lengths = [max(_SHORTEST_GIF_MS, int(round(length, -1))) for length in (*lengths[:1], *lengths)] or 1000
        first, *rest = self._images
        files.write(
            self.folder / _ANIMATION,
            lambda file: first.save(file, "GIF", save_all=True, append_images=rest, duration=lengths, loop=0),
        )
        return [_ANIMATION, _TIMES, _PREVIEW]

    def _preview(self, grey: np.ndarray, window: Events) -> None:
        image = np.concatenate([event_frame(window), np.repeat(grey[..., None], 3, axis=2)], axis=1)
        save_png(self.folder / _PREVIEW, image)


def reconstruct(
    model: nn.Module,
    name: str,
    events: Events,
    facts: list[str],
    window_us: int,
    events_per_frame: int | None,
    device: torch.device,
    video: Video,
    begun: Progress,
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
    if begun.frames:
        terminal.line(f"going on after {begun.frames:,} frames of an earlier run")
    elif video.kind == "png":
        begun.save(video.folder)
    rescale, seconds, stopped = IntensityRescaling(bounds=begun.bounds), 0.0, False
    done, saved, state = begun.frames, time.monotonic(), to_device(begun.state, device)
    with terminal.step("reconstruction", len(windows) - done) as advance:
        images = stream_states(model, windows[done:], device, state)
        try:
            for window in windows[done:]:
                begin = time.perf_counter()
                image, state = next(images)
                # Bringing the image to the CPU waits for the device.
                image = image.cpu()
                seconds += time.perf_counter() - begin
                end = int(events.t[0]) + (done + 1) * window_us if events_per_frame is None else int(window.t[-1])
                video.add(rescale(image), window, end)
                done += 1
                if video.kind == "png" and time.monotonic() - saved >= _PROGRESS_SECONDS:
                    Progress(begun.record, done, to_device(state, "cpu"), rescale.bounds).save(video.folder)
                    saved = time.monotonic()
                advance()
        except KeyboardInterrupt:
            stopped = True
    names = video.close()
    if not stopped and video.kind == "png":
        Progress(begun.record, done, bounds=rescale.bounds).save(video.folder)
    done -= begun.frames
    seen = sum(len(window) for window in windows[begun.frames : begun.frames + done])
    seconds = max(seconds, 1e-9)
    terminal.line(
        f"{'stopped: ' if stopped else ''}{done:,} frames from {seen:,} events: {seen / seconds:,.0f} events/s, "
        f"{done / seconds:,.1f} frames/s in the voxel grids and the network, {seconds:.2f} s of the time above"
    )
    terminal.line(f"written to {video.folder}/: {', '.join(names)}")
    return 130 if stopped else 0


def to_device(state: Any, device: str | torch.device) -> Any:
    """A network's state, of whatever tuples, lists and dictionaries it is, on a device."""
    return tree_map_only(torch.Tensor, lambda value: value.to(device), state)


def _name(index: int) -> str:
    return f"frame_{index:05d}.png"


def _line(microseconds: int) -> str:
    return f"{microseconds / 1e6:.6f}\n"


def _gates(model: nn.Module, device: torch.device) -> str:
    op = "gru_reset" if any(isinstance(module, ConvGRUCell) for module in model.modules()) else "lstm_gates"
    return f"{op} by {backends.serving(op, device.type)[0]}"
