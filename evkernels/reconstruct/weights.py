"""Networks from checkpoint files: tensors only, whatever else a file holds, and the network told by its keys."""

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from evkernels.arguments import InputError
from evkernels.models import CistaTC, E2VIDRecurrent, FireNet

# By name for the command line: the class, and how one of its keys begins.
NETWORKS: dict[str, tuple[type[nn.Module], str]] = {
    "firenet": (FireNet, "net.head.recurrent_block."),
    "e2vid": (E2VIDRecurrent, "unetrecurrent.head."),
    "cista-tc": (CistaTC, "lista_blocks."),
}
_TRUSTED = (
    "where you trust the file, keep its tensors only: "
    "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, 'tensors.pth')"
)


def load_network(path: Path, expected: str | None = None) -> tuple[str, nn.Module]:
    """The name and the network, in evaluation mode, of a checkpoint.

    Args:
        path: What torch.save wrote: a state dict, or a dictionary that has one as `state_dict`.
        expected: Name of the network, or None for whichever the keys tell.

    Raises:
        InputError: if the file is missing, damaged, would run code when loaded, or holds no network known here.
    """
    state_dict = _state_dict(path)
    found = [name for name, (_, begin) in NETWORKS.items() if any(key.startswith(begin) for key in state_dict)]
    if not found:
        keys = ", ".join(list(state_dict)[:3])
        raise InputError(f"{path}: expected weights of {', '.join(NETWORKS)}, got the keys {keys or '(none)'}")
    name = found[0]
    if expected not in (None, name):
        raise InputError(f"{path}: expected weights of {expected}, got those of {name}")
    bad = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if bad:
        raise InputError(f"{path}: expected finite weights, got NaN or infinities in {', '.join(bad[:3])}")
    network = NETWORKS[name][0]
    try:
        return name, network.from_state_dict(state_dict).eval()
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected weights of {network.__name__}, got: {reason[:400]}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: expected weights, got {'a folder' if path.is_dir() else 'no such file'}")
    try:
        # What torch warns of is refused or read all the same.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes torch.load raise anything, AssertionError included.
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in reason:
            raise InputError(f"{path}: refused, because loading it would run code of its own; {_TRUSTED}") from error
        cause = f"{type(error).__name__}: {reason}"[:200]
        raise InputError(f"{path}: expected a file of torch.save, got a damaged or another one ({cause})") from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        raise InputError(f"{path}: expected a state dict of tensors, alone or as 'state_dict', got neither")
    return state_dict
