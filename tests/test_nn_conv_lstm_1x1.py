"""ConvLSTMCell(kernel_size=1) over sequences: the op conv_lstm_1x1, the loop over steps, two processes."""

import gc

import several_processes
import torch
import torch.distributed as dist
from contract import weighted_sum

from evkernels import nn
from evkernels.testing import tensor


class TestCellTakesIt:
    """ConvLSTMCell(kernel_size=1).forward_sequence is this op and equals the loop over steps."""

    @staticmethod
    def cell_and_inputs(dtype=torch.float64):
        torch.manual_seed(0)
        cell = nn.ConvLSTMCell(3, 5, kernel_size=1, order="fiog", dtype=dtype)
        x = tensor(4, 2, 3, 3, 4, dtype=dtype).requires_grad_()
        state = tuple(tensor(2, 5, 3, 4, dtype=dtype, seed=k).requires_grad_() for k in (1, 2))
        return cell, x, state, tensor(4, 2, seed=3) > 0

    @staticmethod
    def loop(cell, x, state, reset):
        output = []
        for frame, restarts in zip(x, reset, strict=True):
            state = cell(frame, tuple(value.masked_fill(restarts[:, None, None, None], 0) for value in state))
            output.append(state[0])
        return torch.stack(output), state

    def test_values_and_gradients_equal_the_loop_of_steps(self):
        cell, x, state, reset = self.cell_and_inputs()
        results = []
        for function in (lambda *a: cell.forward_sequence(*a), lambda *a: self.loop(cell, *a)):
            output, (h, c) = function(x, state, reset)
            loss = weighted_sum([output, h, c])
            results.append([output, h, c, *torch.autograd.grad(loss, [x, *state, *cell.parameters()])])
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)

    def test_one_op_per_sequence_unless_the_convolution_is_replaced(self):
        cell, x, state, reset = self.cell_and_inputs(torch.float32)
        counts = []
        for _ in range(2):
            with torch.profiler.profile() as profile:
                cell.forward_sequence(x, state, reset)
            counts.append(sum(event.name == "evkernels::conv_lstm_1x1" for event in profile.events()))
            cell.conv = torch.nn.Sequential(cell.conv)
        assert counts == [1, 0]

    def test_state_of_an_autocast_run_goes_on_without(self):
        cell, x, _, _ = self.cell_and_inputs(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, (h, c) = cell.forward_sequence(x)
        assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
        output, _ = cell.forward_sequence(x, (h, c))
        assert output.dtype == torch.float32


def _train_on_a_share(rank, cell, x, path):
    """One process of two: half of the batch; rank 0 writes the averaged gradients."""
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    _backward_of_a_share(cell, x[:, rank : rank + 1])
    if rank == 0:
        torch.save([p.grad for p in cell.parameters()], f"{path}/gradients.pt")
    gc.collect()
    dist.destroy_process_group()


def _backward_of_a_share(cell, x):
    """In a function that ends: if a DistributedDataParallel outlives its group, gloo's threads may never end."""
    parallel = torch.nn.parallel.DistributedDataParallel(Sequence(cell))
    weighted_sum([parallel(x)]).backward()


class Sequence(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell.forward_sequence(x)[0]


def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(0)
    cell = nn.ConvLSTMCell(3, 20, kernel_size=1, dtype=torch.float64)
    x = tensor(3, 2, 3, 4, 5, dtype=torch.float64)
    halves = [weighted_sum([cell.forward_sequence(x[:, k : k + 1])[0]]) for k in range(2)]
    (sum(halves) / 2).backward()
    expected = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    several_processes.run(_train_on_a_share, (cell, x, str(tmp_path)))
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), expected, rtol=1e-12, atol=1e-12)
