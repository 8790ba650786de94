"""Pairs of features from memory or from files that stay on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KINDS = ("event_features", "target_features", "text_features")
_SUFFIXES = (".npy", ".safetensors", ".pt")


class AlignmentDataset(torch.utils.data.Dataset):
    """Matching rows of event features, target features and perhaps text features.

    Args:
        event_features: [N, ...] a tensor, or the path of a .npy, .safetensors (one tensor) or .pt file (tensors alone
            are unpickled), which is mapped into memory and read as rows are asked for.
        target_features, text_features: Likewise, with as many rows.

    Raises:
        ValueError: if the numbers of rows differ or a file holds no tensor.
    """

    def __init__(
        self,
        event_features: Tensor | str | Path,
        target_features: Tensor | str | Path,
        text_features: Tensor | str | Path | None = None,
    ) -> None:
        given = dict(zip(KINDS, (event_features, target_features, text_features), strict=True))
        self.features = {name: _opened(value) for name, value in given.items() if value is not None}
        counts = {name: len(value) for name, value in self.features.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"features must have the same number of rows, got {counts}")
        self._rows: Tensor | None = None

    @classmethod
    def from_directory(cls, folder: str | Path) -> AlignmentDataset:
        """The files event_features, target_features and perhaps text_features of a folder, in any of the formats."""
        found = {}
        for name in KINDS:
            paths = [path for suffix in _SUFFIXES if (path := Path(folder) / f"{name}{suffix}").is_file()]
            if paths:
                found[name] = paths[0]
            elif name != "text_features":
                raise ValueError(f"{folder}: expected {name} as {', '.join(_SUFFIXES)}, got no such file")
        return cls(**found)

    def __len__(self) -> int:
        return len(self.features["event_features"]) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        return {name: value[0] for name, value in self.batch(torch.tensor([index % len(self)])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Rows `indices`, int64 [B], of every kind, copied out of the files; 16-bit floats stay what they are."""
        rows = indices if self._rows is None else self._rows[indices]
        return {name: value[rows] for name, value in self.features.items()}

    def dims(self) -> dict[str, tuple[int, ...]]:
        """The shape of a row of every kind."""
        return {name: tuple(value.shape[1:]) for name, value in self.features.items()}

    def subset(self, indices: Tensor) -> AlignmentDataset:
        """A view of some rows."""
        view = object.__new__(type(self))
        view.features, view._rows = self.features, indices if self._rows is None else self._rows[indices]
        return view

    def split(self, train_ratio: float = 0.8, seed: int = 42) -> tuple[AlignmentDataset, AlignmentDataset]:
        """Two disjoint views at random, the first with that share of the rows; neither is empty.

        Neighbouring windows of one recording are alike: split recordings, not windows, where that flatters.
        """
        first = round(len(self) * train_ratio)
        if not 0 < first < len(self):
            raise ValueError(f"train_ratio must leave rows on both sides of {len(self)}, got {train_ratio}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:first].sort().values), self.subset(order[first:].sort().values)


def save_features(folder: str | Path, features: Mapping[str, Tensor]) -> None:
    """Writes features by kind as .npy files, which `AlignmentDataset.from_directory` reads without loading them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, value in features.items():
        np.save(Path(folder) / f"{name}.npy", value.cpu().numpy())


def _opened(value: Tensor | str | Path) -> Tensor:
    if isinstance(value, Tensor):
        return value
    path = Path(value)
    try:
        if path.suffix == ".npy":
            # Copy on write: PyTorch takes no read-only memory, and nobody writes.
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            (tensor,) = load_file(path).values()
            return tensor
        tensor = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: expected a tensor, got: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: expected a tensor, got {type(tensor).__name__}")
    return tensor
