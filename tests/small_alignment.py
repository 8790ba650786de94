"""Pairs of features that belong together, and strategies small enough to train in a test."""

import pytest
import torch

from evkernels import alignment
from evkernels.alignment import AlignmentDataset
from evkernels.alignment.config import config_from_dict

pytest.importorskip("safetensors")
SMALL = {"event_dim": 12, "target_dim": 10, "hidden_dim": 16}


def pairs(count=80, text=False):
    generator = torch.Generator().manual_seed(5)
    event, mixing = torch.randn(count, 12, generator=generator), torch.randn(12, 10, generator=generator)
    return AlignmentDataset(event, event @ mixing, torch.randn(count, 7, generator=generator) if text else None)


def small(strategy, **fields):
    torch.manual_seed(1)
    return alignment.checkpoints.build(config_from_dict(strategy, {**SMALL, **fields}))
