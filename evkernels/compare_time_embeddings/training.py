"""Training of one model with one seed. Every epoch ends with a checkpoint from which the next one starts to the bit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from evkernels import files
from evkernels.arguments import InputError
from evkernels.compare_time_embeddings.config import Config
from evkernels.compare_time_embeddings.data import Dataset, Sequences
from evkernels.compare_time_embeddings.models import build

_EVALUATION_BATCH = 256


@dataclass
class Run:
    """What is kept of one training run."""

    model: str
    seed: int
    parameters: int
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training, per epoch
    predictions: list[int] = field(default_factory=list)  # of the test set, after the last epoch

    @property
    def name(self) -> str:
        return f"{self.model}_seed{self.seed}"

    @property
    def epochs(self) -> int:
        return len(self.train_loss)


def train(
    model: str,
    seed: int,
    config: Config,
    dataset: Dataset,
    device: torch.device,
    out: Path,
    advance: Callable[[], None],
) -> Run:
    """Trains one model, from its last checkpoint under `out` if there is one.

    Writes `out`/checkpoints/MODEL_seedN_last.pth after every epoch, ..._best.pth when the test accuracy is the best so
    far, and `out`/logs/MODEL_seedN.log. Calls `advance` after each epoch.
    """
    torch.manual_seed(seed)
    network = build(model, config, dataset).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(model, seed, sum(p.numel() for p in network.parameters() if p.requires_grad))
    last = out / "checkpoints" / f"{run.name}_last.pth"
    if last.is_file():
        try:
            state = torch.load(last, map_location=device, weights_only=True)
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            _set_random_state(state["random"], device)
            run = Run(**state["run"])
        # A file that is something else makes torch raise anything.
        except Exception as error:
            raise InputError(f"{last}: expected a checkpoint of {run.name}, got: {str(error)[:300]}") from error
    for _ in range(min(run.epochs, config.num_epochs)):
        advance()
    while run.epochs < config.num_epochs:
        _epoch(network, optimizer, run, config, dataset, device)
        if run.test_accuracy[-1] == max(run.test_accuracy):
            save(network.state_dict(), last.with_name(f"{run.name}_best.pth"))
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "run": vars(run)}
        save(state | {"random": _random_state(device)}, last)
        files.write_text(out / "logs" / f"{run.name}.log", _log(run))
        advance()
    return run


def _epoch(network, optimizer, run: Run, config: Config, dataset: Dataset, device: torch.device) -> None:
    network.train()
    begin, loss_sum, correct = time.perf_counter(), 0.0, 0
    # Of the seed and the epoch alone: all models see the same batches.
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(run.seed * 100_003 + run.epochs))
    for indices in order.split(config.batch_size):
        batch = dataset.train.batch(indices).to(device)
        logits = network(batch)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(indices)
        correct += int((logits.argmax(1) == batch.labels).sum())
    seconds = time.perf_counter() - begin
    test_loss, predictions = evaluate(network, dataset.test, device)
    run.train_loss.append(loss_sum / len(order))
    run.train_accuracy.append(correct / len(order))
    run.test_loss.append(test_loss)
    run.test_accuracy.append((predictions == dataset.test.labels).double().mean().item())
    run.seconds.append(seconds)
    run.predictions = predictions.tolist()


@torch.inference_mode()
def evaluate(network: nn.Module, data: Sequences, device: torch.device) -> tuple[float, Tensor]:
    """Mean loss, and predicted classes in the order of the data."""
    network.eval()
    loss, predicted = 0.0, []
    for indices in torch.arange(len(data)).split(_EVALUATION_BATCH):
        batch = data.batch(indices).to(device)
        logits = network(batch)
        loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        predicted.append(logits.argmax(1).cpu())
    return loss / len(data), torch.cat(predicted)


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint so that a kill at any moment leaves the old one or the new one."""
    files.write(path, partial(torch.save, state))


def _log(run: Run) -> str:
    head = f"{run.model}, seed {run.seed}, {run.parameters} parameters\n"
    columns = zip(run.train_loss, run.train_accuracy, run.test_loss, run.test_accuracy, run.seconds, strict=True)
    return head + "".join(
        f"epoch {epoch}: train loss {a:.4f} accuracy {b:.4f}, test loss {c:.4f} accuracy {d:.4f}, {seconds:.1f} s\n"
        for epoch, (a, b, c, d, seconds) in enumerate(columns, 1)
    )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
