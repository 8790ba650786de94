"""A recording, networks and checkpoints small enough to reconstruct videos in a test, and the command that does."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="reconstruct needs rich (extra demo)")
pytest.importorskip("PIL", reason="reconstruct needs Pillow (extra demo)")


from evkernels.__main__ import main
from evkernels.events import Events, simulate
from evkernels.models import CistaTC, E2VIDRecurrent, FireNet

NETWORKS = {
    "firenet": lambda: FireNet(5, 4),
    "e2vid": lambda: E2VIDRecurrent(5, 3, 4, 1, norm="BN", use_upsample_conv=False),
    "cista-tc": lambda: CistaTC(4, depth=2),
}


def run(*arguments) -> int:
    """The exit code of `python -m evkernels reconstruct ARGUMENTS`."""
    try:
        return main(["reconstruct", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code


def one_line(capsys) -> str:
    """What was written to standard error, which must be one line and all there is."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("evkernels reconstruct: ")
    return captured.err


def simulated() -> Events:
    """A simulated recording on a sensor whose sides are odd."""
    image = np.random.default_rng(0).random((60, 70)).repeat(2, 0).repeat(2, 1)
    return simulate(image, width=41, height=35, duration_us=60_000)


def save_recording(folder: Path) -> Path:
    events, path = simulated(), folder / "small.npz"
    np.savez(path, x=events.x, y=events.y, t=events.t, p=events.p, width=41, height=35)
    return path


def save_checkpoints(folder: Path) -> Path:
    """Fills the folder with a checkpoint of every network."""
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        torch.save({"state_dict": build().state_dict(), "epoch": 3}, folder / f"{name}.pth")
    return folder
