"""The models: an embedding of time, an LSTM over the sequence, a linear classifier of its last state.

To add a model, write a function from (config, dataset) to an embedding, a module from a `Batch` to [B, L, D], and
register it; everything else, from training to the report, follows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from evkernels.compare_time_embeddings.config import Config
from evkernels.compare_time_embeddings.data import CLASSES, Batch, Dataset
from evkernels.nn import CombinedLeTE, KANMammote, LearnablePositionEmbedding, SinCosPositionEncoding

MODELS: dict[str, Callable[[Config, Dataset], nn.Module]] = {}


def model(name: str):
    """Registers a function that makes a model's embedding under the model's name."""

    def register(function: Callable[[Config, Dataset], nn.Module]):
        MODELS[name] = function
        return function

    return register


class Embedding(nn.Module):
    """Applies `layer` to the positions or to the times of a batch."""

    def __init__(self, layer: nn.Module, of: str):
        super().__init__()
        self.layer, self.of = layer, of

    def forward(self, batch: Batch) -> Tensor:
        embedding = self.layer(getattr(batch, self.of))
        # K-MOTE's router weights come along.
        return embedding[0] if isinstance(embedding, tuple) else embedding


@model("Baseline_LSTM")
def _baseline(config: Config, dataset: Dataset) -> nn.Module:
    return Embedding(LearnablePositionEmbedding(config.time_embedding_dim, dataset.positions), "positions")


@model("SinCos_LSTM")
def _sincos(config: Config, dataset: Dataset) -> nn.Module:
    return Embedding(SinCosPositionEncoding(config.time_embedding_dim, length=1), "times")


@model("LETE_LSTM")
def _lete(config: Config, dataset: Dataset) -> nn.Module:
    return Embedding(CombinedLeTE(config.time_embedding_dim, config.p, config.layer_norm, config.scale), "times")


@model("KAN_MAMMOTE_LSTM")
def _kan_mammote(config: Config, dataset: Dataset) -> nn.Module:
    layer = KANMammote(
        config.time_embedding_dim,
        config.state_dim_mamba,
        config.num_mamba_layers,
        config.kan_grid_size,
        config.K_top,
        experts=config.num_experts,
    )
    return Embedding(layer, "times")


class Classifier(nn.Module):
    """The embedding, beside it a linear map of the events' features where they have any, LSTM and classifier."""

    def __init__(self, embedding: nn.Module, config: Config, features: int):
        super().__init__()
        dim = config.time_embedding_dim
        self.embedding = embedding
        self.features = nn.Linear(features, dim) if features else None
        layers = config.lstm_num_layers
        self.lstm = nn.LSTM(
            dim * (2 if features else 1),
            config.lstm_hidden_dim,
            layers,
            batch_first=True,
            dropout=config.dropout_rate if layers > 1 else 0.0,
        )
        self.classifier = nn.Linear(config.lstm_hidden_dim, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, 10]."""
        x = self.embedding(batch)
        if self.features is not None:
            x = torch.cat([x, self.features(batch.features)], dim=-1)
        # The state after the last event, as from a packed sequence: the LSTM does not look ahead, so what follows, the
        # padding, changes nothing before. On CPUs training on packed sequences takes six times as long.
        states, _ = self.lstm(x)
        return self.classifier(states[torch.arange(len(states), device=x.device), batch.lengths.to(x.device) - 1])


def build(name: str, config: Config, dataset: Dataset) -> Classifier:
    """A new model with random weights from torch's generator."""
    return Classifier(MODELS[name](config, dataset), config, dataset.features)
