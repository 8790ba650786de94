"""Watching a network's encodings for collapse, where nearly all of them become zero."""

import warnings

import torch
from torch import Tensor


class EncodingHealth:
    """Mean, deviation and share of zeros of encodings, one record per call, with a warning when they collapse.

    Equivalent to::

        record = encodings.mean(), encodings.std(correction=0), (encodings.abs() < 1e-6).float().mean()

    Args:
        every: Looks at one call in so many.
        zero_ratio: Warns (RuntimeWarning) above this share of zeros.

    Use it as `monitor` of EfficientConvLSTM or call it with any tensor. `records` holds the dicts "mean", "std" and
    "zero_ratio" so far. On a GPU a record waits for it once.
    """

    def __init__(self, every: int = 1, zero_ratio: float = 0.9) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.zero_ratio = zero_ratio
        self.records: list[dict[str, float]] = []
        self._calls = 0

    def __call__(self, encodings: Tensor) -> dict[str, float] | None:
        """The record of these encodings, None if it is not their turn or they are empty."""
        self._calls += 1
        if (self._calls - 1) % self.every or encodings.numel() == 0:
            return None
        values = encodings.detach().flatten().float()
        variance, mean = torch.var_mean(values, correction=0)
        zeros = (values.abs() < 1e-6).float().mean()
        mean, deviation, zero_ratio = torch.stack([mean, variance.sqrt(), zeros]).tolist()
        self.records.append({"mean": mean, "std": deviation, "zero_ratio": zero_ratio})
        if zero_ratio > self.zero_ratio:
            warnings.warn(f"{zero_ratio:.0%} of the encodings are zero: they collapse", RuntimeWarning, stacklevel=2)
        return self.records[-1]
