"""Reading the published projects' YAML configurations."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def load(config: str | Path | Mapping) -> Mapping:
    """The content of a YAML file with its references resolved; a mapping is returned as it is.

    Raises:
        ImportError: if a file is to be read and OmegaConf is not installed.
        OSError: if the file cannot be read.
    """
    if isinstance(config, Mapping):
        return config
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ImportError("reading a configuration needs OmegaConf: pip install 'evkernels[train]'") from error
    return OmegaConf.to_container(OmegaConf.load(config), resolve=True)


def leaves(content: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
