"""Features of event windows and of what is to be seen in them, for alignment without any encoder of one's own.

An event window's features are its events per pixel and polarity, brought to a small size; a picture's are its grey
levels, likewise, or those of a given encoder. They are modest, and enough to tell scenes and digits apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.arguments import InputError
from evkernels.events import Events, read
from evkernels.reconstruct.stream import stream_images

Encoder = Callable[[Tensor], Tensor]


def event_features(window: Events, size: int = 16) -> Tensor:
    """Square roots of the mean counts of a window by polarity and cell of a size x size grid, float32 [2 * size^2]."""
    counts = ops.event_histogram(
        *window.tensors("cpu"), bins=1, height=window.height, width=window.width, dtype=torch.float32
    )
    return F.adaptive_avg_pool2d(counts, size).sqrt().flatten()


def picture_features(picture: Tensor, size: int = 16, encoder: Encoder | None = None) -> Tensor:
    """Grey levels [H, W] less their mean on a size x size grid, float32 [size^2]; or `encoder` of [1, 3, H, W]."""
    if encoder is not None:
        with torch.no_grad():
            return encoder(picture[None, None].expand(1, 3, -1, -1))[0].float()
    small = F.adaptive_avg_pool2d(picture[None], size).flatten()
    return small - small.mean()


def recording_pairs(
    recordings: Sequence[Events], network: nn.Module, window_us: int, size: int = 16, encoder: Encoder | None = None
) -> dict[str, Tensor]:
    """Windows of recordings, and the frames that a network reconstructs from them.

    Args:
        recordings: One after the other, each from a zero state.
        network: `FireNet` or another network of `evkernels.models`, in evaluation mode.
        window_us: Length of the windows in microseconds; those without an event are left out.
        size, encoder: Of the features; see above.

    Returns:
        "event_features" [N, 2 * size^2], "target_features" [N, ...] and "recording", int64 [N], the index of each.
    """
    found: dict[str, list] = {"event_features": [], "target_features": [], "recording": []}
    for index, events in enumerate(recordings):
        windows = [window for window in events.windows(window_us) if len(window)]
        for window, image in zip(windows, stream_images(network, windows), strict=True):
            found["event_features"].append(event_features(window, size))
            found["target_features"].append(picture_features(image.clone(), size, encoder))
            found["recording"].append(torch.tensor(index))
    if not found["recording"]:
        raise InputError("expected recordings with events, got none")
    return {name: torch.stack(values) for name, values in found.items()}


def held_out_blocks(recording: Tensor, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out: of every recording the last share, and a window between is left out.

    Neighbouring windows are alike, so rows held out at random would be known already.
    """
    train, held = [], []
    for index in recording.unique():
        rows = (recording == index).nonzero()[:, 0]
        cut = len(rows) - math.ceil(len(rows) * share)
        train.append(rows[: max(cut - 1, 0)])
        held.append(rows[cut:])
    return torch.cat(train), torch.cat(held)


def find_recordings(source: Path) -> list[Path]:
    """The recordings of a folder in order of their names, or the one that `source` is."""
    if source.is_file():
        return [source]
    endings = (".npz", ".txt", ".zip", ".raw", ".dat", ".aedat4", ".h5", ".hdf5", ".mat")
    found = sorted(path for path in source.iterdir() if path.suffix in endings) if source.is_dir() else []
    if not found:
        raise InputError(f"{source}: expected features or recordings ({', '.join(endings)}), got none")
    return found


def read_recordings(source: Path) -> list[Events]:
    """Recordings of a file or folder."""
    return [read(path) for path in find_recordings(source)]


def rendered_digits(labels: Sequence[int], seed: int = 0, size: int = 28) -> Tensor:
    """Digits drawn in Pillow's own font, each turned, scaled and moved a little, float32 [N, size, size] in 0..1."""
    from evkernels.events.optional import require

    require("PIL", "align", "drawing digits")
    from PIL import Image, ImageDraw, ImageFont

    random, pictures = np.random.default_rng(seed), []
    for label in labels:
        picture = Image.new("L", (4 * size, 4 * size))
        font = ImageFont.load_default(size=int(3.4 * size * random.uniform(0.85, 1.1)))
        middle = tuple(2 * size + random.uniform(-0.25, 0.25, 2) * size)
        ImageDraw.Draw(picture).text(middle, str(int(label)), fill=255, font=font, anchor="mm")
        picture = picture.rotate(random.uniform(-12, 12), resample=Image.Resampling.BILINEAR)
        picture = picture.resize((size, size), Image.Resampling.BOX)
        pictures.append(torch.from_numpy(np.array(picture, dtype=np.float32) / 255))
    return torch.stack(pictures)


def digit_pairs(folder: Path, seed: int = 0, size: int = 16) -> dict[str, Tensor]:
    """Recordings of N-MNIST and digits drawn for their labels.

    Args:
        folder: 0/*.bin to 9/*.bin, or zips or a folder with labels.csv.
        seed, size: Of the drawing, and of the features.

    Returns:
        "event_features" [N, 2 * size^2], "target_features" [N, size^2] and "label", int64 [N].
    """
    from evkernels.compare_time_embeddings.data import recordings_of

    recordings, labels = recordings_of(folder)
    if not recordings:
        raise InputError(f"{folder}: expected recordings of N-MNIST, got none")
    windows = []
    for x, y, t, p in (events.T for events in recordings):
        x, y, p = x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8)
        windows.append(event_features(Events(x=x, y=y, t=t.copy(), p=p, width=34, height=34), size))
    pictures = rendered_digits(labels, seed)
    return {
        "event_features": torch.stack(windows),
        "target_features": torch.stack([picture_features(picture, size) for picture in pictures]),
        "label": torch.from_numpy(labels),
    }
