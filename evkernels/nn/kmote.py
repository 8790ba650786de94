"""K-MOTE: a mixture of time experts, of which only the chosen ones are computed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.time_experts import (
    CosineBasis,
    Expert,
    GaussianBasis,
    SplineBasis,
    SplineExpert,
    WaveletBasis,
)

_KINDS = ("fourier", "spline", "rkhs_gaussian", "wavelet")
# Timestamps that generation B's router sees at a time where no gradient is needed: what is in between stays in the
# second-level cache.
_CHUNK = 2048


class KMOTE(nn.Module):
    """Kernel mixture of time experts: a router picks experts for every timestamp, and only those are computed.

    The experts, in their order: sums of cosines, splines, Gaussian kernels (RKHS), wavelets; then again from the start.

    Generation "A": each expert writes its share of the embedding, times the router's weight; the shares of the
    others are zero. State-dict keys are those of the published checkpoint. Generation "B": each expert writes the whole
    embedding, the weights of the chosen ones are normalised by another softmax (unless all are chosen), their sum
    by a layer norm; in training, noise of 0.01 is added to the router's logits. The layer norm that the last published
    version has between the affine map and the basis removes the magnitude of time and is left out.

    Args:
        dim: Size of the embedding; a multiple of `experts` in generation "A".
        top: Number of experts chosen per timestamp, 1 to `experts`.
        aux_features: Size of the features that the router sees beside the time; 0 for time alone.
        wavelet: "mexican_hat" or "morlet".
        generation: "A" or "B".
        experts: Number of experts E, at least 1; 4 as published.

    Raises:
        ValueError: if `dim`, `top`, `wavelet`, `generation` or `experts` is not among those above.

    The router of generation "A" is `ops.expert_router`, that of "B" plain PyTorch; the experts are `ops.time_basis`,
    but "B"'s spline plain PyTorch. How many timestamps that gets depends on the data: torch.compile splits the graph.
    Source: K_MOTE of kan-mammote.
    """

    def __init__(
        self,
        dim: int = 128,
        top: int = 2,
        aux_features: int = 0,
        wavelet: str = "mexican_hat",
        generation: str = "A",
        experts: int = 4,
    ):
        super().__init__()
        if generation not in ("A", "B"):
            raise ValueError(f"generation must be A or B, got {generation!r}")
        if experts < 1:
            raise ValueError(f"experts must be at least 1, got {experts}")
        if dim < 1 or (generation == "A" and dim % experts):
            least = f"a multiple of {experts}, at least {experts}" if generation == "A" else "at least 1"
            raise ValueError(f"dim must be {least}, got {dim}")
        if not 1 <= top <= experts:
            raise ValueError(f"top must be in [1, {experts}], got {top}")
        if wavelet not in ("mexican_hat", "morlet"):
            raise ValueError(f"wavelet must be mexican_hat or morlet, got {wavelet!r}")
        self.dim, self.top, self.generation = dim, top, generation
        if generation == "A":
            self.router = _Router(1 + aux_features, experts)
            self.experts = _named(experts, lambda kind: _expert_a(kind, dim // experts, wavelet))
        else:
            self.router = _NoisyRouter(1 + aux_features, experts)
            self.experts = _named(experts, lambda kind: _expert_b(kind, dim, wavelet), rkhs_gaussian="gaussian")
            self.layer_norm = nn.LayerNorm(dim)

    def forward(self, t: Tensor, aux: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds timestamps.

        Args:
            t: Timestamps of any shape.
            aux: What the router sees besides [*t.shape, aux_features], or None.

        Returns:
            embedding, weights: [*t.shape, dim], and the router's weights of all experts [*t.shape, E], which
            `load_balance` takes.
        """
        times = t.reshape(-1)
        seen = times[:, None] if aux is None else torch.cat([times[:, None], aux.reshape(len(times), -1)], dim=1)
        weights, gates = self.router(seen, self.top)
        outputs = [expert(times, gate) for expert, gate in zip(self.experts.values(), gates, strict=True)]
        # Stacked instead of concatenated, which takes a third longer.
        embedding = torch.stack(outputs, dim=1) if self.generation == "A" else self.layer_norm(sum(outputs))
        return embedding.reshape(*t.shape, self.dim), weights.T.reshape(*t.shape, len(weights))


def _ranks(weights: Tensor) -> Tensor:
    """How many are larger, or equal and before, along the first axis. For few, which topk takes ten times as long."""
    ranks = torch.zeros_like(weights, dtype=torch.uint8)
    for k, weight in enumerate(weights):
        ranks[:k] += weight > weights[:k]
        ranks[k + 1 :] += weight >= weights[k + 1 :]
    return ranks


def load_balance(weights: Tensor) -> Tensor:
    """0.01 * KL(mean weight of each expert || uniform): what K-MOTE's training adds to the loss.

    Args:
        weights: Of a router, [..., E].

    Returns:
        A scalar, 0 where all experts have equal shares.
    """
    mean = weights.flatten(0, -2).mean(dim=0)
    return 0.01 * (torch.xlogy(mean, mean) + mean * math.log(len(mean))).sum()


def _named(count: int, make: Callable[[str], nn.Module], **renamed: str) -> nn.ModuleDict:
    """Experts of all kinds in turn, by name; from the second round on with its number."""
    experts = nn.ModuleDict()
    for k in range(count):
        kind, again = _KINDS[k % len(_KINDS)], k // len(_KINDS)
        experts[renamed.get(kind, kind) + (f"_{again + 1}" if again else "")] = make(kind)
    return experts


def _expert_a(kind: str, dim: int, wavelet: str) -> nn.Module:
    if kind == "spline":
        return Expert(dim, SplineBasis(dim))
    return Expert(dim, _basis(kind, dim, wavelet, {"fourier": 16, "rkhs_gaussian": 5, "wavelet": 8}[kind]))


def _expert_b(kind: str, dim: int, wavelet: str) -> nn.Module:
    return SplineExpert(dim) if kind == "spline" else Expert(dim, _basis(kind, dim, wavelet, 10))


def _basis(kind: str, dim: int, wavelet: str, count: int) -> nn.Module:
    if kind == "fourier":
        return CosineBasis(dim, count)
    return GaussianBasis(dim, count) if kind == "rkhs_gaussian" else WaveletBasis(dim, wavelet, count)


def _network(inputs: int, experts: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, experts))


class _Router(nn.Module):
    """The experts' weights and gates [E, N], from what is seen of N timestamps and how many are chosen."""

    def __init__(self, inputs: int, experts: int):
        super().__init__()
        self.mlp = _network(inputs, experts)

    def forward(self, seen: Tensor, top: int) -> tuple[Tensor, Tensor]:
        return ops.expert_router(seen, *self.mlp.parameters(), top)


class _NoisyRouter(nn.Module):
    """The same with noise on the logits in training; another softmax normalises gates unless all are chosen."""

    def __init__(self, inputs: int, experts: int):
        super().__init__()
        self.router_network = _network(inputs, experts)

    def forward(self, seen: Tensor, top: int) -> tuple[Tensor, Tensor]:
        parts = (seen,) if torch.is_grad_enabled() else seen.split(_CHUNK)
        # Experts along the first axis: a softmax over a last axis so short takes three times as long.
        logits = torch.cat([self.router_network(part) for part in parts]).T.contiguous()
        weights = (logits + 0.01 * torch.randn_like(logits) if self.training else logits).softmax(dim=0)
        if top == len(weights):
            return weights, weights
        return weights, torch.where(_ranks(weights.detach()) < top, weights, -math.inf).softmax(dim=0)
