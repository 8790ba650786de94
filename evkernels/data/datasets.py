"""Two torch Datasets: sequences that begin anywhere, and streams in which a sequence goes on where the last one ended.

Both are map-style, streams too: which recording a sample of a batch is in follows from the batch's number. So workers
may read any batch, torch hands them over in order, and a network needs one state for the loader and not one for each
worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .batch import SequenceBatch
from .recording import PreprocessedRecording, find


@dataclass(frozen=True)
class _Piece:
    """Frames of a recording from `begin` on; None is padding alone."""

    recording: PreprocessedRecording | None
    begin: int = 0
    is_first: bool = True


class RandomSequences(Dataset):
    """Sequences of T consecutive frames with their boxes, in any order: each begins with a state of zeros.

    Equivalent to RVT's `SequenceForRandomAccess` over a folder::

        DataLoader(RandomSequences("train", length=5), batch_size=8, shuffle=True, collate_fn=collate, num_workers=4)

    Args:
        root: Folder of preprocessed recordings.
        length: Frames per sequence, T.
        every: Begin a sequence every so many frames. None: end one at each labelled frame, where so many are before it.
        representation, downsample, targets: Which frames and maps, see `PreprocessedRecording`.

    Items are `SequenceBatch` of one sequence.

    Raises:
        ValueError: if a number is smaller than 1, there are no recordings, or none gives a sequence.
    """

    def __init__(
        self,
        root: str | Path,
        length: int,
        every: int | None = None,
        representation: str | None = None,
        downsample: int = 1,
        targets: str | None = None,
    ):
        _check_positive(length=length, every=1 if every is None else every)
        self.length = length
        self.recordings = find(root, representation, downsample, targets)
        self._begins = [_begins(recording, length, every) for recording in self.recordings]
        self._first = np.cumsum([0, *map(len, self._begins)])
        if len(self) == 0:
            labels = "none with boxes at the end of so many; every=N begins sequences without looking at boxes"
            reason = labels if every is None else "shorter ones"
            raise ValueError(f"{root}: expected recordings of {length} frames or more, got {reason}")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> SequenceBatch:
        index = range(len(self))[index]
        owner = int(np.searchsorted(self._first, index, side="right")) - 1
        begin = int(self._begins[owner][index - self._first[owner]])
        return _read([_Piece(self.recordings[owner], begin)], self.length, self.recordings[0])


class StreamingSequences(Dataset):
    """Batches of N streams: each sample goes on where it ended in the batch before, until its recording ends.

    Equivalent to RVT's streaming loaders, with one state for all workers::

        loader = DataLoader(StreamingSequences("train", length=5, batch_size=8), batch_size=None, num_workers=4)
        for batch in loader:
            output, state = layer(batch.frames.float(), state, reset=batch.reset)

    Args:
        root: Folder of preprocessed recordings.
        length: Frames per sequence, T.
        batch_size: Streams, N. A recording goes to the stream that is shortest so far; what it lacks to a multiple of
            T, and what a stream lacks to the longest one, is padding.
        shuffle: Take the recordings in another order in every epoch, see `set_epoch`.
        seed: Of the orders.
        shard: (k, n): the k-th of n equal parts of n * batch_size streams, for n processes that train together; all
            parts have as many batches.
        representation, downsample, targets: Which frames and maps, see `PreprocessedRecording`.

    Items are `SequenceBatch`, to be taken in order.

    Raises:
        ValueError: if a number is out of its range, or there are no recordings.
    """

    def __init__(
        self,
        root: str | Path,
        length: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        representation: str | None = None,
        downsample: int = 1,
        targets: str | None = None,
    ):
        _check_positive(length=length, batch_size=batch_size)
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard must be (k, n) with 0 <= k < n, got {shard}")
        self.length, self.batch_size, self.shard = length, batch_size, shard
        self.shuffle, self.seed = shuffle, seed
        self.recordings = find(root, representation, downsample, targets)
        # Shared, so that workers that live on see another epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._planned: tuple[int, list[list[_Piece]]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, before its first batch is taken; every process must choose the same."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._plan())

    def __getitem__(self, index: int) -> SequenceBatch:
        return _read(self._plan()[index], self.length, self.recordings[0])

    def _plan(self) -> list[list[_Piece]]:
        """The pieces of each batch of the epoch, [batches][batch_size]."""
        epoch = int(self._epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._batches(epoch))
        return self._planned[1]

    def _batches(self, epoch: int) -> list[list[_Piece]]:
        order = np.arange(len(self.recordings))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        streams: list[list[_Piece]] = [[] for _ in range(self.batch_size * self.shard[1])]
        for recording in (self.recordings[index] for index in order):
            begins = range(0, len(recording), self.length)
            min(streams, key=len).extend(_Piece(recording, begin, begin == 0) for begin in begins)
        batches = max(map(len, streams))
        mine = streams[self.shard[0] * self.batch_size : (self.shard[0] + 1) * self.batch_size]
        rows = [stream + [_Piece(None)] * (batches - len(stream)) for stream in mine]
        return [list(pieces) for pieces in zip(*rows, strict=True)]


def _read(pieces: list[_Piece], length: int, like: PreprocessedRecording) -> SequenceBatch:
    steps = (length, len(pieces))
    frames = np.zeros((*steps, *like.shape), like.dtype)
    reset, padding, labelled = np.zeros(steps, bool), np.ones(steps, bool), np.zeros(steps, bool)
    times = np.zeros(steps, np.int64)
    targets = None if like.targets is None else np.full((*steps, *like.shape[1:]), np.nan, np.float32)
    boxes, owners = [np.zeros((0, 6), np.float32)], [np.zeros((0, 2), np.int64)]
    for sample, piece in enumerate(pieces):
        reset[0, sample] = piece.is_first
        if piece.recording is None:
            continue
        recording, begin = piece.recording, piece.begin
        count = min(length, len(recording) - begin)
        recording.read(begin, frames[:count, sample])
        if targets is not None:
            targets[:count, sample] = recording.read_targets(begin, count)
        padding[:count, sample] = False
        times[:count, sample] = recording.times[begin : begin + count]
        labelled[:count, sample] = recording.labelled[begin : begin + count]
        first = recording.first_box[begin : begin + count + 1]
        boxes.append(recording.boxes[first[0] : first[-1]])
        step = np.repeat(np.arange(count), np.diff(first))
        owners.append(np.stack([step, np.full_like(step, sample)], axis=1))
    box, owner = np.concatenate(boxes), np.concatenate(owners)
    by_step = np.argsort(owner[:, 0], kind="stable")
    arrays = (frames, reset, padding, times, labelled, box[by_step], owner[by_step])
    maps = None if targets is None else torch.from_numpy(targets)
    return SequenceBatch(*map(torch.from_numpy, arrays), maps)


def _begins(recording: PreprocessedRecording, length: int, every: int | None) -> np.ndarray:
    if every is not None:
        return np.arange(0, len(recording) - length + 1, every)
    begins = np.flatnonzero(recording.labelled) + 1 - length
    return begins[begins >= 0]


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
