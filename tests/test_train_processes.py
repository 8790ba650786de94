"""Training in two processes: the losses of one, resumed runs to the bit, batch norms over the whole batch, torchrun."""

import os
import socket
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("omegaconf", reason="omegaconf is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("rich", reason="rich is not installed")

import several_processes
from test_train import DETECTOR, rows, save_tree

from evkernels.train import processes
from evkernels.train.settings import load
from evkernels.train.trainer import Trainer

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
STEPS = 3
NETWORKS = {
    "rvt": DETECTOR,
    "efficient_conv_lstm": "model: {bottleneck_channels: 16, skip_lstm: false}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tree(tmp_path_factory.mktemp("shapes"), bins=5)
    for name, own in NETWORKS.items():
        (folder / f"{name}.yaml").write_text(
            f"""{own}
train: {folder}/train
validate: {folder}/val
steps: {STEPS}
batch_size: 2
length: 3
checkpoint_every: {STEPS}
validate_every: {STEPS}
learning_rate: 0.001
gradient_clip_val: 1.0e+9
workers: 0
"""
        )
    return folder


def taken(trainer, steps):
    return [trainer.train_step(batch) for batch in islice(trainer.batches(), steps)]


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def work(rank, folder, port):
    """In each of two processes: a whole run, one that is saved and goes on, and a batch norm; results into a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "torchrun sets it"
    torch.set_num_threads(1)
    with processes.group(torch.device("cpu")) as device:
        torch.save(results_of_one(rank, folder, device), folder / f"results{rank}.pt")


def results_of_one(rank, folder, device):
    results = {}
    for name in NETWORKS:
        settings = load(name, folder / f"{name}.yaml", [])
        whole, losses = Trainer(settings, device), []
        for batch in islice(whole.batches(), STEPS):
            losses.append(whole.train_step(batch))
            if whole.step == 1:
                gradient = gradient_of(whole.model)
                whole.save(folder / f"{name}.ckpt")
        resumed = Trainer(settings, device)
        resumed.load(folder / f"{name}.ckpt")
        assert taken(resumed, STEPS - 1) == losses[1:]
        other = resumed.model.state_dict()
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, other[key]), key
        results[name] = losses, gradient, whole.model.state_dict()
    norm = processes.SynchronizedBatchNorm2d.like(nn.BatchNorm2d(3).double())
    # Three samples here and none there.
    x = torch.load(folder / "x.pt")[: 3 - 3 * rank].requires_grad_()
    y = norm(x)
    (y * torch.load(folder / "gradient.pt")[: 3 - 3 * rank]).sum().backward()
    results["norm"] = y.detach(), x.grad, norm.state_dict(), processes.gathered(norm.weight.grad)
    return results


@pytest.fixture(scope="module")
def results(folder):
    torch.manual_seed(0)
    torch.save(torch.randn(3, 3, 4, 5, dtype=torch.float64) + 100, folder / "x.pt")
    torch.save(torch.randn(3, 3, 4, 5, dtype=torch.float64), folder / "gradient.pt")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several_processes.run(work, (folder, port))
    return [torch.load(folder / f"results{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_gradients_and_weights_of_one_process(folder, results, name):
    one = Trainer(load(name, folder / f"{name}.yaml", []), torch.device("cpu"))
    (losses, gradient, weights), other = results[0][name], results[1][name]
    batches = one.batches()
    assert losses[0] == pytest.approx(one.train_step(next(batches)), rel=1e-5)
    expected = gradient_of(one.model)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    # Adam's first steps are of one length however small a gradient is: roundings grow.
    for ours in losses[1:]:
        assert ours == pytest.approx(one.train_step(next(batches)), rel=1e-2)
    assert other[0] == losses
    single = one.model.state_dict()
    for key, value in weights.items():
        assert torch.equal(value, other[2][key]), key
        if "running" in key:
            torch.testing.assert_close(value, single[key], rtol=2e-2, atol=2e-3)


def test_one_process_goes_on_where_two_stopped(folder, results):
    name = "efficient_conv_lstm"
    one = Trainer(load(name, folder / f"{name}.yaml", []), torch.device("cpu"))
    one.load(folder / f"{name}.ckpt")
    assert taken(one, 1)[0] == pytest.approx(results[0][name][0][1], rel=1e-4)


def test_batch_norm_over_all_processes(folder, results):
    x, gradient = torch.load(folder / "x.pt").requires_grad_(), torch.load(folder / "gradient.pt")
    norm = nn.BatchNorm2d(3).double()
    y = norm(x)
    (y * gradient).sum().backward()
    ours, ours_gradient, state, weights = results[0]["norm"]
    torch.testing.assert_close(ours, y.detach())
    torch.testing.assert_close(ours_gradient, x.grad)
    torch.testing.assert_close(sum(weights), norm.weight.grad)
    for rank in range(2):
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(results[rank]["norm"][2][key], value)
    assert results[1]["norm"][0].shape == (0, 3, 4, 5)
    assert list(state) == list(norm.state_dict())


def test_torchrun(folder, results, tmp_path):
    """The command line: one folder of logs and checkpoints, with the numbers of the processes above."""
    # The machine's own name need not be one that it can look up.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", "2", "-m", "evkernels", "train", "rvt", str(folder / "rvt.yaml")]
    command += ["--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1
    losses = [float(row["loss"]) for row in rows(tmp_path / "run" / "losses.csv")]
    np.testing.assert_allclose(losses, [row["loss"] for row in results[0]["rvt"][0]], rtol=1e-6)
    assert len(rows(tmp_path / "run" / "validation.csv")) == 1
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["step"] == STEPS
