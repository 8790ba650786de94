"""gru_gates, gru_reset and gru_update: the contract of every op, and what is special to these."""

import itertools

import pytest
import torch
from contract import DifferentiableOpContract, assert_shape_rule, to_device
from torch import Tensor
from torch.utils._pytree import tree_flatten

from evkernels import ops
from evkernels.testing import assert_matches, tensor

EXTREMES = [float("nan"), float("inf"), float("-inf"), 30.0, -30.0, 1e4, -1e4, 1e38, 1e-40]
NARROW = [torch.bfloat16, torch.float16]
# Sizes 1, odd, one more than a vector, without spatial dimensions, with one.
SHAPES = [(2, 3, 3, 5), (1, 1, 1, 1), (2, 17, 4, 4), (3, 5, 7, 9), (3, 16), (2, 4, 33)]
LARGE = (2, 64, 23, 41)
# The state of the one-element sample is far from its candidate: where n - h cancels, one rounding unit of n is the
# whole gradient, and a tolerance made from that one element says nothing.
STATE_SEED = 7
EMPTY = [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)]


def eager_gates(x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str = "zrn") -> Tensor:
    blocks = dict(zip(order, (x_gates + h_gates).chunk(3, dim=1), strict=True))
    z, r = blocks["z"].sigmoid(), blocks["r"].sigmoid()
    return ((1 - z) * h + z * (blocks["n"] + r * h).tanh()).to(h.dtype)


def eager_reset(zr: Tensor, h: Tensor, order: str = "zr"):
    blocks = dict(zip(order, zr.sigmoid().chunk(2, dim=1), strict=True))
    return blocks["z"], (blocks["r"] * h).to(zr.dtype)


def eager_update(z: Tensor, n: Tensor, h: Tensor) -> Tensor:
    return ((1 - z) * h + z * n.tanh()).to(h.dtype)


def blocks_of(count, n, c, *spatial, dtype, layout, seed):
    return tensor(n, count * c, *spatial, dtype=dtype, layout=layout, seed=seed) * 3


def sample_gates(*shape, dtype=torch.float32, state_dtype=None, layout="contiguous", order="zrn"):
    x_gates, h_gates = (blocks_of(3, *shape, dtype=dtype, layout=layout, seed=seed) for seed in (1, 2))
    return x_gates, h_gates, tensor(*shape, dtype=state_dtype or dtype, layout=layout, seed=STATE_SEED), order


def sample_reset(*shape, dtype=torch.float32, state_dtype=None, layout="contiguous", order="zr"):
    zr = blocks_of(2, *shape, dtype=dtype, layout=layout, seed=1)
    return zr, tensor(*shape, dtype=state_dtype or dtype, layout=layout, seed=STATE_SEED), order


def sample_update(*shape, dtype=torch.float32, state_dtype=None, layout="contiguous"):
    z = tensor(*shape, dtype=dtype, layout=layout, seed=1).sigmoid()
    n = blocks_of(1, *shape, dtype=dtype, layout=layout, seed=2)
    return z, n, tensor(*shape, dtype=state_dtype or dtype, layout=layout, seed=STATE_SEED)


class GruContract:
    """What the three ops share; `op`, `eager` and `sample` are functions."""

    sample = None

    def samples(self, dtype, layout, large):
        return [self.sample(*shape, dtype=dtype, layout=layout) for shape in [*SHAPES, *[LARGE] * large]]

    def typical(self, dtype, layout):
        return [self.sample(2, 64, 16, 32, dtype=dtype, layout=layout)]

    def empty_samples(self):
        return [self.sample(*shape) for shape in EMPTY]

    def tiny(self):
        return self.sample(2, 2, 1, 3, dtype=torch.float64)

    @pytest.mark.parametrize("narrow", NARROW)
    def test_wide_state_beside_narrow_gates(self, backend, narrow):
        """H in float32: the state that comes back is float32 too, everything else has the gates' dtype."""
        arguments = self.sample(2, 17, 3, 5, dtype=narrow, state_dtype=torch.float32)
        result = self.op(*(to(value, device=backend.device) for value in arguments))
        expected = self.eager(*arguments)
        assert_matches(result, self.eager(*(to(value, dtype=torch.float64) for value in arguments)), expected)
        first, *others = self.requiring_grad(to_device(arguments, backend.device))
        assert_shape_rule(self.op, (first.contiguous(memory_format=torch.channels_last), *others))

    def test_bits_do_not_depend_on_the_neighbours(self, backend):
        """Whole vectors and ends of rows compute the same: where threads divide the work does not show."""
        arguments = self.requiring_grad(to_device(self.sample(1, 1, 37), backend.device))
        inputs = [value for value in arguments if isinstance(value, Tensor)]

        def run(begin, stop):
            results, _ = tree_flatten(
                self.op(*(value[..., begin:stop] if isinstance(value, Tensor) else value for value in arguments))
            )
            gradients = torch.autograd.grad(results, inputs, [value.detach() for value in results])
            return [*results, *(value[..., begin:stop] for value in gradients)]

        parts = [run(*ends) for ends in ((0, 1), (1, 20), (20, 37))]
        for pieces, whole in zip(zip(*parts, strict=True), run(0, 37), strict=True):
            # Plain PyTorch promises only to be close.
            if backend.name == "reference":
                torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
            else:
                assert torch.equal(torch.cat(pieces, dim=-1), whole)

    @pytest.mark.parametrize("value", EXTREMES)
    def test_extreme_values(self, backend, value):
        """One extreme value in each gate and in the state, beside ordinary neighbours: the pattern of plain PyTorch."""
        tensors = [argument for argument in self.sample(1, 16, 2, 2) if isinstance(argument, Tensor)]
        for index, chosen in enumerate(tensors):
            for block in range(chosen.shape[1] // 16):
                arguments = [argument.clone() for argument in tensors]
                arguments[index][0, 16 * block + 3, 1, 0] = value
                result = self.op(*(argument.to(backend.device) for argument in arguments))
                exact = self.eager(*(argument.double() for argument in arguments))
                assert_matches(result, exact, self.eager(*arguments), what=f"argument {index}, block {block}")

    def test_autocast_keeps_the_state_in_float32(self):
        *gates, h = (value for value in self.sample(1, 2, 3, 3) if isinstance(value, Tensor))
        gates[-1] = gates[-1].bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = self.op(*gates, h.bfloat16())
        expected = self.op(*(value.bfloat16() for value in gates), h.bfloat16().float())
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def to(value, **target):
    return value.to(**target) if isinstance(value, Tensor) else value


class TestGruGates(GruContract, DifferentiableOpContract):
    op = staticmethod(ops.gru_gates)
    eager = staticmethod(eager_gates)
    sample = staticmethod(sample_gates)

    @pytest.mark.parametrize("order", ["".join(letters) for letters in itertools.permutations("zrn")])
    def test_every_order(self, backend, order):
        x_gates, h_gates, h, _ = (to(value, device=backend.device) for value in sample_gates(2, 5, 3, 3))
        permuted = [
            torch.cat([dict(zip("zrn", gates.chunk(3, 1), strict=True))[letter] for letter in order], dim=1)
            for gates in (x_gates, h_gates)
        ]
        assert torch.equal(ops.gru_gates(*permuted, h, order), ops.gru_gates(x_gates, h_gates, h))

    def test_reset_gate_matters(self, backend):
        """A published version of this cell computed r and did not use it."""
        x_gates, h_gates, h, _ = (to(value, device=backend.device) for value in sample_gates(1, 4, 3, 3))
        opened = x_gates.clone()
        opened[:, 4:8] = 20
        assert not torch.equal(ops.gru_gates(opened, h_gates, h), ops.gru_gates(x_gates, h_gates, h))

    def test_zero_gates_without_state_stay_zero(self, backend):
        zeros = torch.zeros(2, 9, 4, 4, device=backend.device)
        assert torch.equal(ops.gru_gates(zeros, zeros, zeros[:, :3]), zeros[:, :3])

    def test_long_unroll_drifts_no_more_than_eager(self, backend):
        steps = 40 if backend.is_slow else 400
        x_gates, h_gates = (tensor(steps, 1, 24, 3, 3, seed=seed) for seed in (1, 2))
        finals = []
        for function, dtype, device in (
            (ops.gru_gates, torch.float32, backend.device),
            (eager_gates, torch.float64, "cpu"),
            (eager_gates, torch.float32, "cpu"),
        ):
            h = torch.zeros(1, 8, 3, 3, dtype=dtype, device=device)
            for step in zip(x_gates.to(device, dtype), h_gates.to(device, dtype), strict=True):
                h = function(*step, h)
            finals.append(h.cpu())
        assert_matches(*finals)

    @pytest.mark.parametrize(
        ("x_gates", "h_gates", "h", "order", "message"),
        [
            ((2, 8, 5), (2, 9, 5), (2, 3, 5), "zrn", r"x_gates must be \[N, 3\*C, ...\].*C = h.shape\[1\].*8, 5"),
            ((2, 9, 5), (1, 9, 5), (2, 3, 5), "zrn", r"h_gates must be .*\(2, 9, 5\), got \(1, 9, 5\)"),
            ((3,), (3,), (1,), "zrn", "h must be .*at least 2 dimensions"),
            ((2, 9), (2, 9), (2, 3), "zrr", "order must hold"),
        ],
    )
    def test_rejects_shapes_and_orders(self, x_gates, h_gates, h, order, message):
        with pytest.raises(ValueError, match=message):
            ops.gru_gates(torch.zeros(x_gates), torch.zeros(h_gates), torch.zeros(h), order)

    @pytest.mark.parametrize(
        ("x_gates", "h_gates", "h", "message"),
        [
            (torch.int32, torch.float32, torch.float32, "x_gates must be of dtype .*int32"),
            (torch.float32, torch.float64, torch.float32, "h_gates must be of the dtype of x_gates, torch.float32"),
            (torch.float32, torch.float32, torch.float16, "h must be of dtype torch.float32 beside x_gates"),
        ],
    )
    def test_rejects_dtypes(self, x_gates, h_gates, h, message):
        with pytest.raises(TypeError, match=message):
            ops.gru_gates(
                torch.zeros(2, 9, dtype=x_gates), torch.zeros(2, 9, dtype=h_gates), torch.zeros(2, 3, dtype=h)
            )

    def test_rejects_other_types_and_devices(self):
        with pytest.raises(TypeError, match=r"h must be a torch.Tensor, got list"):
            ops.gru_gates(torch.zeros(2, 9), torch.zeros(2, 9), [1.0])
        with pytest.raises(ValueError, match="x_gates must be on the device of h, meta, got cpu"):
            ops.gru_gates(torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(2, 3, device="meta"))


class TestGruReset(GruContract, DifferentiableOpContract):
    op = staticmethod(ops.gru_reset)
    eager = staticmethod(eager_reset)
    sample = staticmethod(sample_reset)

    def test_both_orders(self, backend):
        zr, h, _ = (to(value, device=backend.device) for value in sample_reset(2, 5, 3, 3))
        swapped = torch.cat(zr.chunk(2, 1)[::-1], dim=1)
        expected = ops.gru_reset(zr, h)
        assert all(torch.equal(a, b) for a, b in zip(ops.gru_reset(swapped, h, "rz"), expected, strict=True))

    @pytest.mark.parametrize(
        ("zr", "order", "message"),
        [((2, 9), "zr", r"zr must be \[N, 2\*C, ...\].*\(2, 6\), got \(2, 9\)"), ((2, 6), "zrn", "order must hold")],
    )
    def test_rejects_shapes_and_orders(self, zr, order, message):
        with pytest.raises(ValueError, match=message):
            ops.gru_reset(torch.zeros(zr), torch.zeros(2, 3), order)

    def test_rejects_dtypes(self):
        with pytest.raises(TypeError, match=r"h must be of dtype torch.float64 beside zr"):
            ops.gru_reset(torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 3))


class TestGruUpdate(GruContract, DifferentiableOpContract):
    op = staticmethod(ops.gru_update)
    eager = staticmethod(eager_update)
    sample = staticmethod(sample_update)

    def test_ends_of_the_blend_are_exact(self, backend):
        _, n, h = (value.to(backend.device) for value in sample_update(2, 5, 3, 3))
        assert torch.equal(ops.gru_update(torch.zeros_like(h), n, h), h)
        assert torch.equal(ops.gru_update(torch.full_like(h, 0.5), torch.zeros_like(h), h), h / 2)

    @pytest.mark.parametrize(
        ("z", "n", "message"),
        [
            ((2, 4), (2, 3), r"z must be \[N, C, ...\].*\(2, 3\)"),
            ((2, 3), (2, 1), r"n must be .*\(2, 3\), got \(2, 1\)"),
        ],
    )
    def test_rejects_shapes(self, z, n, message):
        with pytest.raises(ValueError, match=message):
            ops.gru_update(torch.zeros(z), torch.zeros(n), torch.zeros(2, 3))

    def test_rejects_dtypes(self):
        with pytest.raises(TypeError, match=r"n must be of the dtype of z, torch.float32, got torch.bfloat16"):
            ops.gru_update(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3))


def test_classic_cell_through_both_ops(backend):
    """gru_reset and gru_update around a convolution: values and gradients of the whole classic cell."""
    zr, h, _ = sample_reset(2, 5, 4, 3, dtype=torch.float64)
    weight = tensor(5, 5, 3, 3, dtype=torch.float64, seed=4)

    def cell(reset, update, zr, h, weight):
        z, rh = reset(zr, h)
        return update(z, torch.nn.functional.conv2d(rh, weight, padding=1), h)

    results = []
    for functions, device in (((ops.gru_reset, ops.gru_update), backend.device), ((eager_reset, eager_update), "cpu")):
        inputs = [value.to(device).requires_grad_() for value in (zr, h, weight)]
        h_next = cell(*functions, *inputs)
        results.append([h_next, *torch.autograd.grad(h_next.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-11, atol=1e-11)
