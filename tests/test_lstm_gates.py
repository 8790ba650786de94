"""lstm_gates: the contract of every op, and what is special to this one."""

import itertools

import pytest
import torch
from contract import DifferentiableOpContract, assert_shape_rule, to_device
from torch import Tensor

from evkernels import ops
from evkernels.testing import assert_matches, tensor


def eager(gates: Tensor, c: Tensor, order: str = "ifgo"):
    blocks = dict(zip(order, gates.chunk(4, dim=1), strict=True))
    c_next = blocks["f"].sigmoid() * c + blocks["i"].sigmoid() * blocks["g"].tanh()
    return (blocks["o"].sigmoid() * c_next.tanh()).to(gates.dtype), c_next.to(c.dtype)


def sample(n, c, *spatial, dtype=torch.float32, state_dtype=None, layout="contiguous", scale=3.0, order="ifgo"):
    gates = tensor(n, 4 * c, *spatial, dtype=dtype, layout=layout, seed=1) * scale
    return gates, tensor(n, c, *spatial, dtype=state_dtype or dtype, layout=layout, seed=2), order


class TestLstmGates(DifferentiableOpContract):
    def op(self, *arguments):
        return ops.lstm_gates(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def samples(self, dtype, layout, large):
        shapes = [
            (2, 3, 3, 5),
            (1, 1, 1, 1),
            (2, 17, 4, 4),
            (3, 5, 7, 9),
            (3, 16),
            (2, 4, 33),
            *[(2, 64, 23, 41)] * large,
        ]
        return [sample(*shape, dtype=dtype, layout=layout) for shape in shapes]

    def typical(self, dtype, layout):
        narrow = dtype in (torch.bfloat16, torch.float16)
        return [sample(2, 64, 16, 32, dtype=dtype, state_dtype=torch.float32 if narrow else None, layout=layout)]

    def empty_samples(self):
        return [sample(0, 3, 4, 5), sample(2, 0, 4, 5), sample(2, 3, 0, 5)]

    @pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
    def test_wide_state_beside_narrow_gates(self, backend, narrow):
        arguments = sample(2, 17, 3, 5, dtype=narrow, state_dtype=torch.float32)
        on_device = tuple(value.to(backend.device) for value in arguments[:2])
        h, c_next = ops.lstm_gates(*on_device)
        assert (h.dtype, c_next.dtype) == (narrow, torch.float32)
        assert_matches((h, c_next), eager(*(value.double() for value in arguments[:2])), eager(*arguments))
        gates, c, order = self.requiring_grad(to_device(arguments, backend.device))
        assert_shape_rule(self.op, (gates.contiguous(memory_format=torch.channels_last), c, order))

    @pytest.mark.parametrize("order", ["".join(letters) for letters in itertools.permutations("ifgo")])
    def test_every_order(self, backend, order):
        gates, c, _ = sample(2, 5, 3, 3, dtype=torch.float64)
        by_name = dict(zip("ifgo", gates.chunk(4, 1), strict=True))
        permuted = torch.cat([by_name[letter] for letter in order], dim=1)
        expected = ops.lstm_gates(gates.to(backend.device), c.to(backend.device))
        actual = ops.lstm_gates(permuted.to(backend.device), c.to(backend.device), order)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 30.0, -30.0, 1e4, -1e4, 1e38, 1e-40])
    @pytest.mark.parametrize("position", range(5))
    def test_extreme_values(self, backend, value, position):
        """One extreme value in each gate and in the state, beside ordinary neighbours: the pattern of plain PyTorch."""
        gates, c, _ = sample(1, 16, 2, 2)
        (c if position == 4 else gates[:, 16 * position : 16 * position + 16])[0, 3, 1, 0] = value
        result = ops.lstm_gates(gates.to(backend.device), c.to(backend.device))
        assert_matches(result, eager(gates.double(), c.double()), eager(gates, c))

    def test_zero_gates_halve_the_state_exactly(self, backend):
        c = tensor(2, 3, 4, 4).to(backend.device)
        _, c_next = ops.lstm_gates(torch.zeros(2, 12, 4, 4, device=backend.device), c)
        assert torch.equal(c_next, c / 2)

    def test_long_unroll_drifts_no_more_than_eager(self, backend):
        steps = 40 if backend.is_slow else 400
        gates = tensor(steps, 1, 4 * 8, 3, 3)
        state = torch.zeros(1, 8, 3, 3)
        runs = [
            (ops.lstm_gates, torch.float32, backend.device),
            (eager, torch.float64, "cpu"),
            (eager, torch.float32, "cpu"),
        ]
        finals = []
        for function, dtype, device in runs:
            c = state.to(device, dtype)
            for step in gates.to(device, dtype):
                h, c = function(step, c)
            finals.append((h.cpu(), c.cpu()))
        assert_matches(*finals)

    def test_autocast_keeps_the_state_in_float32(self):
        gates, c, _ = sample(1, 2, 3, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h, c_next = ops.lstm_gates(gates, c.bfloat16())
        assert (h.dtype, c_next.dtype) == (torch.bfloat16, torch.float32)

    @pytest.mark.parametrize(
        ("gates", "c", "order", "message"),
        [
            ((2, 8, 5, 7), (2, 3, 5, 7), "ifgo", r"gates must be .*C = c.shape\[1\].*\(2, 8, 5, 7\)"),
            ((2, 12, 5, 7), (2, 3, 5, 8), "ifgo", r"gates must be .*\(2, 12, 5, 8\)"),
            ((4,), (1,), "ifgo", "c must be .*at least 2 dimensions"),
            ((2, 12), (2, 3), "ifgg", "order must hold"),
        ],
    )
    def test_rejects_shapes_and_orders(self, gates, c, order, message):
        with pytest.raises(ValueError, match=message):
            ops.lstm_gates(torch.zeros(gates), torch.zeros(c), order)

    @pytest.mark.parametrize(
        ("gates", "c", "message"),
        [
            (torch.int32, torch.float32, "gates must be of dtype .*int32"),
            (torch.float32, torch.float16, "c must be of dtype torch.float32 beside gates"),
            (torch.float16, torch.float64, "torch.float16 or torch.float32"),
        ],
    )
    def test_rejects_dtypes(self, gates, c, message):
        with pytest.raises(TypeError, match=message):
            ops.lstm_gates(torch.zeros(2, 12, dtype=gates), torch.zeros(2, 3, dtype=c))

    def test_rejects_other_types_and_devices(self):
        with pytest.raises(TypeError, match=r"c must be a torch.Tensor, got list"):
            ops.lstm_gates(torch.zeros(2, 12), [1.0])
        with pytest.raises(ValueError, match="c must be on the device of gates, cpu, got meta"):
            ops.lstm_gates(torch.zeros(2, 12), torch.zeros(2, 3, device="meta"))
