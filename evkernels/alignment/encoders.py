"""Image encoders of other packages behind one call; weights are the user's files, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from evkernels.events.optional import require


class _Encoder(nn.Module):
    def __init__(self, network: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._encode = network, encode

    def forward(self, images: Tensor) -> Tensor:
        return self._encode(images)


def load_image_encoder(name: str, weights: str | Path) -> nn.Module:
    """A frozen encoder of images [B, 3, H, W], normalised as its package says, to features [B, D].

    Args:
        name: "timm:MODEL" or "open_clip:MODEL", as the package spells the model; the package must be installed.
        weights: File with the weights.

    Raises:
        ValueError: if the name begins otherwise or the file is missing: weights are never downloaded.
        ImportError: if the package is missing.
    """
    package, _, model = name.partition(":")
    if package not in ("timm", "open_clip") or not model:
        raise ValueError(f"encoder must be timm:MODEL or open_clip:MODEL, got {name!r}")
    if not Path(weights).is_file():
        raise ValueError(f"{weights}: expected the encoder's weights, got no such file")
    library = require(package, "align", f"the image encoder {name} (pip install {package})")
    if package == "timm":
        network = library.create_model(model, pretrained=False, num_classes=0, checkpoint_path=str(weights))
        encode = network
    else:
        network = library.create_model(model, pretrained=str(weights))
        encode = network.encode_image
    return _Encoder(network, encode).requires_grad_(False).eval()
