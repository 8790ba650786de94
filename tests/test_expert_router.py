"""expert_router: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, requiring_grad, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "weight3", "bias3", "top")


def eager(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    """As the router is published."""
    hidden = F.linear(F.linear(x, weight1, bias1).relu(), weight2, bias2).relu()
    weights = F.linear(hidden, weight3, bias3).softmax(dim=1)
    largest, chosen = weights.topk(top, dim=1)
    return weights.T, torch.zeros_like(weights).scatter(1, chosen, largest).T


def eager_backwards(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    """The same with timestamps and hidden layers in reversed order: plain PyTorch's sums in another order."""
    first = (x.flip(0), weight1.flip(0), bias1.flip(0))
    second = (weight2.flip(0, 1), bias2.flip(0))
    return tuple(value.flip(1) for value in eager(*first, *second, weight3.flip(1), bias3, top))


def eager_by_columns(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    """The same with a column for each timestamp, so that sums over them are over contiguous memory."""
    hidden = (weight2 @ (weight1 @ x.T + bias1[:, None]).relu() + bias2[:, None]).relu()
    weights = (weight3 @ hidden + bias3[:, None]).softmax(dim=0)
    largest, chosen = weights.topk(top, dim=0)
    return weights, torch.zeros_like(weights).scatter(0, chosen, largest)


def sample(n, inputs, first, second, experts, top, dtype=torch.float32, layout="contiguous"):
    def make(*shape, seed, factor=1.0):
        return tensor(*shape, dtype=dtype, layout=layout, seed=seed) * factor

    return (
        make(n, inputs, seed=1),
        make(first, inputs, seed=2),
        make(first, seed=3, factor=0.5),
        make(second, first, seed=4, factor=first**-0.5),
        make(second, seed=5, factor=0.5),
        make(experts, second, seed=6, factor=2 * second**-0.5),
        make(experts, seed=7, factor=0.5),
        top,
    )


class TestExpertRouter(DifferentiableOpContract):
    layouts = ("contiguous", "transposed", "sliced")

    def op(self, *arguments):
        return ops.expert_router(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [eager_backwards, eager_by_columns]

    def samples(self, dtype, layout, large):
        sizes = [(67, 1, 17, 9, 4, 2), (33, 3, 8, 33, 7, 1), (1, 1, 1, 1, 1, 1), (34, 17, 16, 16, 17, 5)]
        made = [sample(*size, dtype, layout) for size in sizes]
        return made + [sample(2100, 1, 64, 32, 4, 2, dtype, layout)] * (large and dtype != torch.float64)

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[:1] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample(1024, 1, 64, 32, 4, 2, dtype, layout)]

    def tiny(self):
        return sample(4, 2, 3, 3, 3, 2, torch.float64)

    def empty_samples(self):
        return [sample(0, 2, 3, 4, 3, 2)]

    @pytest.mark.parametrize("top", [1, 2, 4, 5])
    def test_gates_are_the_largest_weights(self, backend, top):
        weights, gates = self.op(*self.on(backend, sample(100, 1, 16, 16, 5, top)))
        assert ((gates != 0).sum(0) == top).all()
        assert torch.equal(gates[gates != 0], weights[gates != 0])
        chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(0, weights.topk(top, dim=0).indices, True)
        assert torch.equal(gates != 0, chosen)

    @pytest.mark.parametrize("top", [1, 2, 3])
    def test_the_first_of_equal_ones_are_chosen(self, backend, top):
        x, *rest = sample(50, 1, 4, 4, 4, top)
        rest[4], rest[5] = torch.zeros(4, 4), torch.zeros(4)
        weights, gates = self.op(*self.on(backend, (x, *rest)))
        assert (weights == 0.25).all()
        assert (gates[:top] == 0.25).all()
        assert (gates[top:] == 0).all()

    def test_large_logits(self, backend):
        x, *rest = sample(64, 1, 16, 16, 4, 2)
        rest[4] = 1e3 * rest[4]
        assert_matches(self.op(*self.on(backend, (x, *rest))), eager(*widened((x, *rest))), eager(x, *rest))

    def test_nan_stays_at_its_timestamp(self, backend):
        x, *rest = sample(37, 2, 8, 8, 4, 2)
        expected = self.op(*self.on(backend, (x, *rest)))
        x[17, 1] = float("nan")
        actual = self.op(*self.on(backend, (x, *rest)))
        others = torch.arange(37, device=actual[0].device) != 17
        for one, other in zip(actual, expected, strict=True):
            assert one[:, 17].isnan().all()
            assert torch.equal(one[:, others], other[:, others])

    @pytest.mark.parametrize("which", [0, 1])
    def test_gradient_of_one_result_alone(self, backend, which):
        arguments = requiring_grad(self.on(backend, self.tiny()))
        leaves = arguments[:-1]
        actual = torch.autograd.grad(self.op(*arguments)[which].square().sum(), leaves)
        expected = torch.autograd.grad(eager(*arguments)[which].square().sum(), leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("x", torch.zeros(5), r"x must be \[N, I\] with I at least 1, got \(5,\)"),
            ("x", torch.zeros(5, 0), r"x must be \[N, I\] with I at least 1, got \(5, 0\)"),
            ("weight1", torch.zeros(3, 4), r"weight1 must be \[outputs, 2\], got \(3, 4\)"),
            ("bias2", torch.zeros(3), r"bias2 must be \[outputs\] = \(4,\), got \(3,\)"),
            ("weight3", torch.zeros(0, 4), r"weight3 must be \[outputs, 4\], got \(0, 4\)"),
            ("bias1", torch.zeros(3, device="meta"), "bias1 must be on the device of x, cpu, got meta"),
            ("top", 0, r"top must be in \[1, 5\], got 0"),
            ("top", 6, r"top must be in \[1, 5\], got 6"),
        ],
    )
    def test_rejects_values(self, name, value, message):
        arguments = dict(zip(NAMES, sample(5, 2, 3, 4, 5, 1), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.expert_router(**arguments | {name: value})

    def test_rejects_types(self):
        x, *rest = sample(5, 2, 3, 4, 5, 1)
        with pytest.raises(TypeError, match=r"x must be of dtype .* got torch.int64"):
            ops.expert_router(x.long(), *rest)
        with pytest.raises(TypeError, match=r"weight1 must be of dtype torch.float32, got torch.float64"):
            ops.expert_router(x, rest[0].double(), *rest[1:])

    def on(self, backend, arguments):
        return tuple(value.to(backend.device) if torch.is_tensor(value) else value for value in arguments)
