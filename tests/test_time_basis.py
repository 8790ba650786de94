"""time_basis: the contract of every op, and what is special to this one."""

import pytest
import torch
from contract import DifferentiableOpContract, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

KINDS = ("cosine", "gaussian", "mexican_hat", "morlet", "stepped_cubic")


def eager(t, gate, rate, shift, weight, kind):
    """As the experts are published: the argument, the function, a weighted sum, the gate."""
    z = t[:, None, None] * rate + shift
    bell = torch.exp(-(z**2) / 2)
    if kind == "cosine":
        basis = z.cos()
    elif kind == "stepped_cubic":
        u, count = z.clamp(0, 1), rate.shape[1]
        basis = (1 - u) ** 3 / 6 * ((u * (count - 1)).ceil() == torch.arange(count))
    else:
        basis = {"gaussian": 1, "mexican_hat": 1 - z**2, "morlet": (5 * z).cos()}[kind] * bell
    return gate[:, None] * (basis * weight).sum(-1)


def eager_backwards(t, gate, rate, shift, weight, kind):
    """The same with timestamps and functions in reversed order: plain PyTorch's sums in another order."""
    if kind == "stepped_cubic":
        return eager(t.flip(0), gate.flip(0), rate, shift, weight, kind).flip(0)
    return eager(t.flip(0), gate.flip(0), rate.flip(1), shift.flip(1), weight.flip(1), kind).flip(0)


def sample(n, features, functions, kind, dtype=torch.float32, layout="contiguous"):
    def make(*shape, seed, factor=1.0, offset=0.0):
        return tensor(*shape, dtype=dtype, layout=layout, seed=seed) * factor + offset

    return (
        make(n, seed=1),
        make(n, seed=2, factor=0.1, offset=0.5),
        make(features, functions, seed=3),
        make(features, functions, seed=4, factor=0.5),
        make(features, functions, seed=5, factor=max(functions, 1) ** -0.5),
        kind,
    )


class TestTimeBasis(DifferentiableOpContract):
    layouts = ("contiguous", "transposed", "sliced")

    def op(self, *arguments):
        return ops.time_basis(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [eager_backwards]

    def samples(self, dtype, layout, large):
        sizes = [(67, 9, 17), (33, 8, 5), (41, 5, 8), (34, 17, 6), (35, 7, 10)]
        made = [sample(*size, kind, dtype, layout) for size, kind in zip(sizes, KINDS, strict=True)]
        return made + [sample(2100, 8, 16, "cosine", dtype, layout)] * (large and dtype != torch.float64)

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[:1] if backend.is_slow else samples

    def typical(self, dtype, layout):
        # The kinds that take the most registers.
        return [sample(1024, 8, 16, "cosine", dtype, layout), sample(1024, 8, 8, "morlet", dtype, layout)]

    def tiny(self):
        return sample(4, 2, 2, "cosine", torch.float64)

    def empty_samples(self):
        return [sample(*size, "gaussian") for size in ((0, 3, 2), (3, 0, 2), (3, 2, 0))]

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_of_every_kind(self, kind):
        arguments = sample(5, 2, 3, kind, torch.float64)
        arguments = tuple(v.requires_grad_() if torch.is_tensor(v) else v for v in arguments)
        assert torch.autograd.gradcheck(self.op, arguments)
        assert torch.autograd.gradgradcheck(self.op, arguments)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("n", [1, 31, 64, 100])
    def test_closed_gates(self, backend, kind, n):
        """Rows of closed gates are zero whatever their times, and nothing flows back to them."""
        t, gate, *rest = sample(n, 4, 3, kind)
        gate[::3], t[::3] = 0, float("nan")
        arguments = self.on(backend, (t, gate, *rest))
        result = self.op(*arguments)
        assert (result[::3] == 0).all()
        open_gates = torch.arange(n) % 3 != 0
        opened = (t[open_gates], gate[open_gates], *rest)
        assert_matches(result.cpu()[open_gates], eager(*widened(opened)), eager(*opened))
        d_t, d_gate, *others = self.gradients_of_squares(arguments)
        assert (d_t[::3] == 0).all()
        assert (d_gate[::3] == 0).all()
        expected = self.gradients_of_squares(self.on(backend, opened))
        for actual, alone in zip((d_t[open_gates], d_gate[open_gates], *others), expected, strict=True):
            torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-5)

    def gradients_of_squares(self, arguments):
        leaves = [value.clone().requires_grad_() for value in arguments[:-1]]
        return torch.autograd.grad(self.op(*leaves, arguments[-1]).square().sum(), leaves)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [1e1, 3e1, 1e3, 1e6, 1e30])
    def test_large_arguments(self, backend, kind, size):
        t = (tensor(64, seed=1) * size).round()
        ones = torch.ones(1, 1)
        arguments = (t, torch.ones(64), ones, 0 * ones, ones, kind)
        if kind == "morlet" and size > 1e10:
            pytest.skip("5 z rounds in plain PyTorch")
        result = self.op(*self.on(backend, arguments))
        assert_matches(result, eager(*widened(arguments)), eager(*arguments))

    @pytest.mark.parametrize("kind", KINDS)
    def test_nan_stays_in_its_row(self, backend, kind):
        t, *rest = sample(37, 3, 5, kind)
        expected = self.op(*self.on(backend, (t, *rest)))
        t[17] = float("nan")
        actual = self.op(*self.on(backend, (t, *rest)))
        assert actual[17].isnan().all()
        others = torch.arange(37, device=actual.device) != 17
        assert torch.equal(actual[others], expected[others])

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("t", torch.zeros(2, 3), r"t must be \[N\], got \(2, 3\)"),
            ("gate", torch.zeros(3), r"gate must be \[N\] = \(2,\), got \(3,\)"),
            ("rate", torch.zeros(3), r"rate must be \[D, J\], got \(3,\)"),
            ("shift", torch.zeros(4, 3), r"shift must be \[D, J\] = \(3, 4\), got \(4, 3\)"),
            ("weight", torch.zeros(3, 4, device="meta"), "weight must be on the device of t, cpu, got meta"),
            ("kind", "sine", "kind must be one of cosine, gaussian, mexican_hat, morlet, stepped_cubic, got 'sine'"),
        ],
    )
    def test_rejects_values(self, name, value, message):
        names = ["t", "gate", "rate", "shift", "weight", "kind"]
        arguments = dict(zip(names, sample(2, 3, 4, "cosine"), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.time_basis(**arguments | {name: value})

    def test_rejects_types(self):
        t, *rest = sample(2, 3, 4, "cosine")
        with pytest.raises(TypeError, match=r"t must be of dtype .* got torch.int64"):
            ops.time_basis(t.long(), *rest)
        with pytest.raises(TypeError, match=r"gate must be of dtype torch.float32, got torch.float64"):
            ops.time_basis(t, rest[0].double(), *rest[1:])

    def on(self, backend, arguments):
        return tuple(value.to(backend.device) if torch.is_tensor(value) else value for value in arguments)
