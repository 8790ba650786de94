"""window_attention: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, requiring_grad

from evkernels import ops, reference
from evkernels.testing import assert_matches, tensor

NAMES = ("qkv", "bias", "heads", "window", "partition")


def eager(qkv, bias, heads, window, partition, attention=F.scaled_dot_product_attention):
    """As RVT writes it."""
    n, height, width, channels = qkv.shape
    (rows, columns), grid = window, partition == "grid"
    down, across = (rows, columns) if grid else (height // rows, width // columns)
    x = qkv if bias is None else qkv + bias
    x = x.reshape(n, down, height // down, across, width // across, heads, channels // heads)
    q, k, v = x.permute((0, 2, 4, 5, 1, 3, 6) if grid else (0, 1, 3, 5, 2, 4, 6)).flatten(4, 5).chunk(3, dim=-1)
    y = attention(q, k, v).unflatten(4, (rows, columns))
    y = y.permute((0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6))
    return y.reshape(n, height, width, channels // 3)


def eager_by_products(*arguments):
    """The same with the softmax written out."""

    def attention(q, k, v):
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v

    return eager(*arguments, attention)


def sample(n, partitions, heads, dim, window, partition, biased=True, dtype=torch.float32, layout="contiguous"):
    height, width = (count * size for count, size in zip(partitions, window, strict=True))
    qkv = tensor(n, height, width, heads * 3 * dim, dtype=dtype, layout=layout, seed=1)
    bias = tensor(heads * 3 * dim, dtype=dtype, layout=layout, seed=2) if biased else None
    return qkv, bias, heads, window, partition


class TestWindowAttention(DifferentiableOpContract):
    layouts = ("contiguous", "channels_last", "transposed", "sliced")

    def op(self, *arguments):
        return ops.window_attention(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [eager_by_products]

    def samples(self, dtype, layout, large):
        sizes = [
            (2, (2, 3), 2, 5, (3, 1), "window", False),
            (1, (1, 1), 1, 17, (1, 1), "grid", True),
            (1, (2, 2), 1, 24, (3, 7), "grid", True),
            (1, (1, 2), 3, 16, (4, 4), "window", True),
        ]
        # More queries than the gradient takes at a time.
        sizes += [(1, (2, 1), 2, 32, (6, 11), "grid", True)] * large
        return [sample(*size, dtype, layout) for size in sizes]

    def samples_for(self, backend, dtype, layout):
        # The reference serves these backends too: one sample shows that it is reached.
        samples = super().samples_for(backend, dtype, layout)
        return samples[:1] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample(1, (2, 2), 2, 32, (6, 10), "window", True, dtype, layout)]

    def tiny(self):
        return sample(2, (2, 1), 2, 2, (1, 3), "grid", True, torch.float64)

    def empty_samples(self):
        return [sample(0, (2, 2), 2, 3, (2, 2), "window"), sample(2, (0, 1), 1, 4, (2, 3), "grid")]

    @pytest.mark.parametrize("partition", ["window", "grid"])
    @pytest.mark.parametrize("window", [(1, 8), (5, 13), (11, 12)], ids=str)
    def test_windows_of_all_sizes(self, backend, window, partition):
        """Fewer tokens than a vector, one more than a whole number of them, three blocks of queries."""
        arguments = sample(1, (2, 1), 2, 9, window, partition)
        exact = eager(*(v.double() if torch.is_tensor(v) else v for v in arguments))
        assert_matches(self.op(*arguments), exact, eager(*arguments), others=[eager_by_products(*arguments)])
        (qkv, bias), rest = requiring_grad(arguments[:2]), arguments[2:]
        g = tensor(*exact.shape, seed=3)
        actual = torch.autograd.grad(self.op(qkv, bias, *rest), (qkv, bias), g)
        expected = torch.autograd.grad(eager(qkv, bias, *rest), (qkv, bias), g)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("partition", ["window", "grid"])
    def test_partitions_do_not_see_each_other(self, backend, partition):
        """NaN in one pixel reaches the pixels of its partition, in the head where it is."""
        qkv, *rest = sample(2, (2, 3), 2, 4, (3, 5), partition)
        expected = self.op(qkv, *rest)
        qkv[1, 2, 7, 12 + 5] = float("nan")  # a key of the second head
        actual = self.op(qkv, *rest)
        reached = reference.to_tokens(actual.isnan(), (3, 5), partition).unflatten(-1, (2, 4))
        assert reached.all(dim=1).all(dim=-1).nonzero().tolist() == reached.any(dim=1).any(dim=-1).nonzero().tolist()
        assert reached.any(dim=1).any(dim=-1).sum() == 1
        assert reached[..., 0, :].sum() == 0
        assert torch.equal(actual[~actual.isnan()], expected[~actual.isnan()])

    def test_nan_in_a_query_stays_at_its_pixel(self, backend):
        qkv, *rest = sample(1, (2, 2), 2, 4, (3, 5), "window")
        qkv[0, 4, 3, 1] = float("nan")
        nan = self.op(qkv, *rest).isnan()
        # PyTorch's own attention, which serves GPUs, may answer zero here.
        assert nan[0, 4, 3, :4].all() or backend.is_slow
        assert nan.sum() == nan[0, 4, 3, :4].sum()

    def test_large_scores(self, backend):
        """Softmax of scores far beyond the range of the exponential function, both ways."""
        qkv, *rest = sample(1, (2, 2), 2, 16, (6, 10), "window")
        qkv = qkv * 100
        exact = eager(qkv.double(), rest[0].double(), *rest[1:])
        assert_matches(self.op(qkv, *rest), exact, eager(qkv, *rest), others=[eager_by_products(qkv, *rest)])

    def test_autocast(self, backend):
        qkv, bias, *rest = sample(1, (2, 2), 2, 16, (3, 5), "window")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = self.op(qkv, bias, *rest)
        assert torch.equal(result, self.op(qkv.bfloat16(), bias.bfloat16(), *rest))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("qkv", torch.zeros(2, 4, 24), r"qkv must be \[N, H, W, 2 \* 3 \* D\] with D at least 1, got \(2, 4, 24\)"),
            ("qkv", torch.zeros(1, 4, 6, 20), r"qkv must be \[N, H, W, 2 \* 3 \* D\].* got \(1, 4, 6, 20\)"),
            ("qkv", torch.zeros(1, 5, 6, 24), "H of qkv must be a multiple of the window's 2, got 5"),
            ("qkv", torch.zeros(1, 4, 7, 24), "W of qkv must be a multiple of the window's 3, got 7"),
            ("bias", torch.zeros(23), r"bias must be \[channels of qkv\] = \(24,\), got \(23,\)"),
            ("bias", torch.zeros(24, device="meta"), "bias must be on the device of qkv, cpu, got meta"),
            ("heads", 0, r"heads must be in \[1, .*\], got 0"),
            ("window", (2, 3, 1), r"window must be \(rows, columns\), got \(2, 3, 1\)"),
            ("window", (0, 3), r"window must be in \[1, .*\], got 0"),
            ("partition", "tiles", "partition must be one of window, grid, got 'tiles'"),
        ],
    )
    def test_rejects_values(self, name, value, message):
        arguments = dict(zip(NAMES, sample(1, (2, 2), 2, 4, (2, 3), "window"), strict=True))
        with pytest.raises(ValueError, match=message):
            ops.window_attention(**arguments | {name: value})

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("qkv", torch.zeros(1, 4, 6, 24, dtype=torch.int64), "qkv must be of dtype .* got torch.int64"),
            ("bias", torch.zeros(24, dtype=torch.float64), "bias must be of dtype torch.float32, got torch.float64"),
            ("heads", 2.0, "heads must be an int, got float"),
        ],
    )
    def test_rejects_types(self, name, value, message):
        arguments = dict(zip(NAMES, sample(1, (2, 2), 2, 4, (2, 3), "window"), strict=True))
        with pytest.raises(TypeError, match=message):
            ops.window_attention(**arguments | {name: value})
