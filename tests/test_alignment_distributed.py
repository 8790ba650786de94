"""evkernels.alignment in two processes over gloo: losses, gradients and training equal to those of one process."""

import gc
import os
import socket
import sys
from pathlib import Path

import pytest
import several_processes
import torch
import torch.distributed as dist

from evkernels import ops
from evkernels.__main__ import main
from evkernels.alignment import (
    AlignmentDataset,
    ContrastiveAlignmentConfig,
    ContrastiveAlignmentModule,
    LightweightAlignmentConfig,
    LightweightAlignmentModule,
    distributed_contrastive_loss,
    load_checkpoint,
    save_features,
)
from evkernels.alignment.trainer import ContrastiveAlignmentTrainer, LightweightAlignmentTrainer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
PROCESSES = 2


def features(count=12, size=6):
    generator = torch.Generator().manual_seed(3)
    a, b, queue = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for rows in (count, count, 5))
    return a, a + b, queue


def losses(a, b, queue, loss):
    """The symmetric loss, that of one direction with a queue, and the gradients of their sum at inputs and scale."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scale = torch.tensor(5.0, dtype=a.dtype, requires_grad=True)
    both, one = loss(a, b, scale), loss(a, b, scale, queue, symmetric=False)
    return [both.detach(), one.detach(), *torch.autograd.grad(both + 2 * one, (a, b, scale))]


def trained(strategy):
    """Weights after a few epochs; without dropout, and for the contrastive strategy without hard negatives."""
    torch.manual_seed(0)
    event, mixing = torch.randn(64, 8), torch.randn(8, 6)
    data = AlignmentDataset(event, event @ mixing)
    sizes = {"event_dim": 8, "target_dim": 6, "hidden_dim": 16, "dropout": 0.0}
    torch.manual_seed(1)
    if strategy == "lightweight":
        module = LightweightAlignmentModule(LightweightAlignmentConfig(**sizes))
        trainer = LightweightAlignmentTrainer(module, data, data, batch_size=16)
    else:
        module = ContrastiveAlignmentModule(ContrastiveAlignmentConfig(**sizes, use_hard_negatives=False))
        trainer = ContrastiveAlignmentTrainer(module, data, data, batch_size=16, learning_rate=1e-3)
    history = trainer.train(3)
    return {"state": module.state_dict(), "val_loss": [row["val_loss"] for row in history]}


def work(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    a, b, queue = features()
    own = slice(rank * len(a) // PROCESSES, (rank + 1) * len(a) // PROCESSES)
    found = {"losses": losses(a[own], b[own], queue, distributed_contrastive_loss)}
    found |= {strategy: trained(strategy) for strategy in ("lightweight", "contrastive")}
    torch.save(found, Path(folder) / f"{rank}.pt")
    gc.collect()
    dist.destroy_process_group()
    # What torchrun sets.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    arguments = ["--out", f"{folder}/out", "--strategy", "contrastive", "--num_epochs", "2", "--set", "hidden_dim=16"]
    assert main(["align", "train", folder, *arguments]) == 0


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sys.path.insert(0, str(Path(__file__).parent))
    a, b, _ = features(40)
    save_features(folder, {"event_features": a.float(), "target_features": b.float()})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several_processes.run(work, (str(folder), port), PROCESSES)
    assert load_checkpoint(folder / "out" / "alignment" / "alignment.safetensors").config.hidden_dim == 16
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_losses_and_gradients_are_those_of_one_process(of_two):
    both, one, d_a, d_b, d_scale = losses(*features(), ops.contrastive_loss)
    parts = [found["losses"] for found in of_two]
    # As DistributedDataParallel does: the mean over processes.
    torch.testing.assert_close(sum(part[0] for part in parts) / PROCESSES, both)
    torch.testing.assert_close(sum(part[1] for part in parts) / PROCESSES, one)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]) / PROCESSES, d_a)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]) / PROCESSES, d_b)
    torch.testing.assert_close(sum(part[4] for part in parts) / PROCESSES, d_scale)


def test_training_is_that_of_one_process(of_two):
    alone = trained("lightweight")
    for found in of_two:
        # Normalisation makes the loss blind to the scale: its gradient is rounding, which Adam magnifies.
        assert abs(found["lightweight"]["state"].pop("scale") - 1) < 0.1
        alone["state"].pop("scale", None)
        torch.testing.assert_close(found["lightweight"], alone, rtol=1e-3, atol=1e-4)


def test_contrastive_training_is_that_of_one_process(of_two):
    alone = trained("contrastive")
    for found in of_two:
        torch.testing.assert_close(found["contrastive"]["val_loss"], alone["val_loss"], rtol=1e-3, atol=1e-3)
        for name, value in alone["state"].items():
            # Biases in front of a batch norm change nothing: their gradients are rounding, which Adam magnifies.
            tolerance = 1e-2 if name.endswith("projection.0.bias") else 2e-3
            torch.testing.assert_close(found["contrastive"]["state"][name], value, rtol=0, atol=tolerance, msg=name)


def test_alone_it_is_the_op():
    a, b, queue = features()
    assert torch.equal(distributed_contrastive_loss(a, b, 3.0, queue), ops.contrastive_loss(a, b, 3.0, queue))
