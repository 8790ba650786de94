"""Training of alignment modules: epochs with early stopping, a log, and checkpoints that go on to the bit.

In a process group, as torchrun makes one, every process takes its share of each batch; contrastive losses are those of
the whole batch, batch norms see the whole batch, and process 0 alone writes. Hard negatives are those of a process's
own share, and so are the entries of its queue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evkernels import files
from evkernels.alignment.base import BaseAlignmentModule
from evkernels.alignment.checkpoints import save_checkpoint
from evkernels.alignment.data import AlignmentDataset
from evkernels.alignment.metrics import evaluate_alignment_comprehensive
from evkernels.train import processes

_EVALUATION_BATCH = 1024


class _Loss(nn.Module):
    """What DistributedDataParallel wraps: a batch to its losses."""

    def __init__(self, alignment: BaseAlignmentModule) -> None:
        super().__init__()
        self.alignment = alignment

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.alignment.loss_of(batch)


class AlignmentTrainer:
    """Trains a module on pairs.

    Args:
        alignment: The module, trained in place.
        train_dataset, val_dataset: Pairs; without the latter the training loss decides which epoch is best.
        learning_rate, batch_size: None for the strategy's own. The batch is that of all processes together.
        patience: Epochs without a better loss before it stops; 0 never stops.
        device: Where to compute.
        seed: Of the order of the batches. Weights are initialised before, dropout is PyTorch's.
    """

    default_learning_rate = 1e-4
    default_batch_size = 32
    betas = (0.9, 0.999)

    def __init__(
        self,
        alignment: BaseAlignmentModule,
        train_dataset: AlignmentDataset,
        val_dataset: AlignmentDataset | None = None,
        *,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        batch_size: int | None = None,
        patience: int = 5,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.alignment, self.device = processes.synchronized(alignment.to(device)), torch.device(device)
        self.train_dataset, self.val_dataset = train_dataset, val_dataset
        self.batch_size = min(batch_size or self.default_batch_size, len(train_dataset))
        self.processes, self.rank = processes.count(), processes.rank()
        if self.batch_size < 2 * self.processes:
            raise ValueError(f"a batch must hold 2 pairs for each of {self.processes} processes, got {self.batch_size}")
        self.patience, self.seed = patience, seed
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in alignment.parameters() if parameter.requires_grad],
            lr=learning_rate or self.default_learning_rate,
            betas=self.betas,
            weight_decay=weight_decay,
        )
        self.loss: nn.Module = _Loss(alignment)
        if self.processes > 1:
            self.loss = nn.parallel.DistributedDataParallel(
                self.loss, find_unused_parameters=alignment.has_unused_parameters
            )
        self.history: list[dict[str, float]] = []
        self.best, self.best_epoch = math.inf, -1

    def make_scheduler(self, num_epochs: int) -> Any:
        """The learning rate's course over the epochs."""
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_epochs)

    def train(
        self,
        num_epochs: int = 20,
        save_path: str | Path | None = None,
        resume: bool = False,
        on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> list[dict[str, float]]:
        """Trains to the last epoch, or until early stopping.

        Args:
            num_epochs: Epochs in all.
            save_path: Where the best module goes as by `save_checkpoint`; beside it come PATH.csv, a row per epoch, and
                PATH.state, from which `resume` goes on. None writes nothing.
            resume: Goes on from PATH.state, if there is one, to the same numbers as without a stop.
            on_epoch: Called with each row.

        Returns:
            One dictionary per epoch: "epoch", the mean losses, "learning_rate", "seconds", and with validation pairs
            "val_loss", "mse", "cosine_similarity" and "R@k".
        """
        self.scheduler = self.make_scheduler(num_epochs)
        path = None if save_path is None else Path(save_path)
        if path is not None and resume and path.with_suffix(".state").is_file():
            self._load_state(path.with_suffix(".state"), num_epochs)
        while len(self.history) < num_epochs and not self._is_stale():
            begin = time.perf_counter()
            row = {"epoch": len(self.history) + 1, **self._train_epoch(), **self._validate()}
            row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            watched = row.get("val_loss", row["total_loss"])
            if not math.isfinite(row["total_loss"]):
                raise FloatingPointError(f"the loss of epoch {row['epoch']} is {row['total_loss']}")
            self._step_scheduler(watched)
            is_best = watched < self.best
            if is_best:
                self.best, self.best_epoch = watched, len(self.history)
            row["seconds"] = time.perf_counter() - begin
            self.history.append(row)
            if path is not None and self.rank == 0:
                if is_best:
                    save_checkpoint(path, self.alignment, {"epoch": row["epoch"], "loss": watched})
                self._write(path, num_epochs)
            on_epoch(row)
        return self.history

    def _is_stale(self) -> bool:
        return self.patience > 0 and len(self.history) - 1 - self.best_epoch >= self.patience

    def _step_scheduler(self, watched: float) -> None:
        self.scheduler.step()

    def _train_epoch(self) -> dict[str, float]:
        self.alignment.train()
        # Of the seed and the epoch alone, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(self.seed * 100_003 + len(self.history))
        order = torch.randperm(len(self.train_dataset), generator=generator)
        sums: dict[str, float] = {}
        # What is left of the last batch waits for another epoch's order: small batches make losses incomparable.
        steps = len(order) // self.batch_size
        for indices in order[: steps * self.batch_size].split(self.batch_size):
            share = indices[: len(indices) // self.processes * self.processes].chunk(self.processes)[self.rank]
            batch = {name: x.to(self.device).float() for name, x in self.train_dataset.batch(share).items()}
            losses = self.loss(batch)
            self.optimizer.zero_grad()
            losses["total_loss"].backward()
            nn.utils.clip_grad_norm_(self.alignment.parameters(), 1.0)
            self.optimizer.step()
            self.alignment.after_step(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / steps
        return self._mean_over_processes(sums)

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if self.processes == 1:
            return values
        together = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        for buffer in self.alignment.buffers():
            dist.broadcast(buffer, 0)
        return dict(zip(values, (together / self.processes).tolist(), strict=True))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.val_dataset is None:
            return {}
        self.alignment.eval()
        loss, parts = 0.0, []
        for indices in torch.arange(len(self.val_dataset)).split(_EVALUATION_BATCH):
            batch = {name: x.to(self.device).float() for name, x in self.val_dataset.batch(indices).items()}
            loss += float(self.alignment.loss_of(batch)["total_loss"]) * len(indices) / len(self.val_dataset)
            pair = (batch["event_features"], batch["target_features"])
            parts.append((*self.alignment.align_features(*pair), *self.alignment.embed(*pair)))
        return {"val_loss": loss, **evaluate_alignment_comprehensive(*map(torch.cat, zip(*parts, strict=True)))}

    def _write(self, path: Path, num_epochs: int) -> None:
        state = {
            "num_epochs": num_epochs,
            "alignment": self.alignment.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "best": (self.best, self.best_epoch),
            "random": torch.get_rng_state(),
        }
        files.write(path.with_suffix(".state"), partial(torch.save, state))
        files.write_rows(path.with_suffix(".csv"), self.history)

    def _load_state(self, path: Path, num_epochs: int) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.alignment.load_state_dict(state["alignment"])
        # A file that is something else makes torch raise anything.
        except Exception as error:
            raise ValueError(f"{path}: expected the state of such a training, got: {str(error)[:300]}") from error
        if state["num_epochs"] != num_epochs:
            raise ValueError(f"{path}: was begun for {state['num_epochs']} epochs, on which its rates depend")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history, (self.best, self.best_epoch) = state["history"], state["best"]
        torch.set_rng_state(state["random"])


class ContrastiveAlignmentTrainer(AlignmentTrainer):
    """AdamW at 1e-4 in batches of 32; the rate rises over config.warmup_epochs and falls as a cosine."""

    def make_scheduler(self, num_epochs: int) -> Any:
        warmup = self.alignment.config.warmup_epochs

        def factor(epoch: int) -> float:
            if epoch < warmup:
                return (epoch + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, num_epochs - warmup)))

        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)


class LightweightAlignmentTrainer(AlignmentTrainer):
    """AdamW at 1e-3 in batches of 64; the rate halves after three epochs without a better loss."""

    default_learning_rate = 1e-3
    default_batch_size = 64

    def make_scheduler(self, num_epochs: int) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=3)

    def _step_scheduler(self, watched: float) -> None:
        self.scheduler.step(watched)

    def finetune(
        self, decoder: nn.Module, num_epochs: int = 1, learning_rate: float = 1e-4, temperature: float = 0.8
    ) -> list[float]:
        """Fine-tunes the adapter so that a decoder says the same of aligned features as of the target's.

        Equivalent to::

            teacher = decoder(target_features).detach()
            loss = KL(softmax(teacher / temperature) from softmax(decoder(alignment(event_features)) / temperature))

        Args:
            decoder: From features [B, target_dim] to logits [B, ..., vocabulary]; fixed, gradients pass through it.
            num_epochs, learning_rate: Of an AdamW of its own.
            temperature: Of both softmaxes.

        Returns:
            The mean loss of each epoch, in nats.

        Raises:
            ValueError: if config.finetune_on_downstream is False.
        """
        if not self.alignment.config.finetune_on_downstream:
            raise ValueError("finetune needs finetune_on_downstream=True")
        optimizer = torch.optim.AdamW(self.alignment.parameters(), lr=learning_rate, weight_decay=0.0)
        wanted = [parameter.requires_grad for parameter in decoder.parameters()]
        decoder.requires_grad_(False)
        self.alignment.train()
        losses = []
        try:
            for epoch in range(num_epochs):
                generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
                order = torch.randperm(len(self.train_dataset), generator=generator)
                total = 0.0
                for indices in order.split(self.batch_size):
                    batch = {name: x.to(self.device).float() for name, x in self.train_dataset.batch(indices).items()}
                    with torch.no_grad():
                        teacher = decoder(batch["target_features"])
                    loss = downstream_loss(decoder(self.alignment(batch["event_features"])), teacher, temperature)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item() * len(indices)
                losses.append(total / len(order))
        finally:
            for parameter, was in zip(decoder.parameters(), wanted, strict=True):
                parameter.requires_grad_(was)
        return losses


class TripleModalAlignmentTrainer(AlignmentTrainer):
    """AdamW at 1e-4, betas 0.9 and 0.98, in batches of 32; the rate falls as a cosine that starts anew."""

    betas = (0.9, 0.98)

    def make_scheduler(self, num_epochs: int) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, T_0=10, T_mult=2)


def downstream_loss(draft_logits: Tensor, target_logits: Tensor, temperature: float = 0.8) -> Tensor:
    """KL divergence of the draft's distribution over the last dimension from the target's, mean over the others."""
    draft, target = ((logits / temperature).log_softmax(-1).flatten(0, -2) for logits in (draft_logits, target_logits))
    return nn.functional.kl_div(draft, target, log_target=True, reduction="batchmean")


TRAINERS: dict[str, type[AlignmentTrainer]] = {
    "contrastive": ContrastiveAlignmentTrainer,
    "lightweight": LightweightAlignmentTrainer,
    "triple_modal": TripleModalAlignmentTrainer,
}
