"""contrastive_loss: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, peak_memory, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor


def eager(a, b, logit_scale, queue=None, symmetric=True):
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    every = q if queue is None else torch.cat([q, F.normalize(queue, dim=1)])
    logits, own = logit_scale * (p @ every.T), torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits[:, : len(b)].T, own)) / 2 if symmetric else loss


def eager_by_sums(a, b, logit_scale, queue=None, symmetric=True):
    """The same from sums of exponentials, features in reversed order: plain PyTorch with other roundings."""
    p, q = F.normalize(a.flip(0, 1), dim=1), F.normalize(b.flip(0, 1), dim=1)
    every = q if queue is None else torch.cat([q, F.normalize(queue.flip(1), dim=1)])
    logits = logit_scale * (p @ every.T)
    loss = (logits.logsumexp(1) - logits.diagonal()).mean()
    columns = logits[:, : len(b)]
    return (loss + (columns.logsumexp(0) - columns.diagonal()).mean()) / 2 if symmetric else loss


def rolled(function, rows, features):
    """The same with pairs and features in another order: one sum may be exact by luck, several are not."""

    def call(a, b, logit_scale, queue=None, symmetric=True):
        a, b = (value.roll((rows, features), (0, 1)) for value in (a, b))
        return function(a, b, logit_scale, None if queue is None else queue.roll(features, 1), symmetric)

    return call


OTHERS = [eager_by_sums, *(rolled(f, *by) for f in (eager, eager_by_sums) for by in ((3, 5), (7, 2)))]


def sample(count, size, queue=0, scale=14.0, symmetric=True, dtype=torch.float32, layout="contiguous"):
    a, noise, rest = (
        tensor(rows, size, dtype=dtype, layout=layout, seed=k) for k, rows in enumerate((count, count, queue))
    )
    # So little alike that the loss is not much smaller than the logits, in whose rounding its error lies.
    return a, (a * 0.2 + noise).to(dtype), torch.tensor(scale, dtype=dtype), rest if queue else None, symmetric


class TestContrastiveLoss(DifferentiableOpContract):
    # Expanded rows would all be alike, and gradients nothing but rounding.
    layouts = ("contiguous", "sliced")

    def op(self, *arguments):
        return ops.contrastive_loss(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return OTHERS

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        return [
            sample(17, 24, **options),
            sample(31, 33, queue=5, **options),
            sample(40, 16, queue=33, symmetric=False, scale=60.0, **options),
            sample(9, 40, scale=100.0, **options),
            sample(33, 7, symmetric=False, **options),
            *[sample(1030, 24, queue=1030, **options)] * (large and dtype == torch.float32 and layout == "contiguous"),
        ]

    def samples_for(self, backend, dtype, layout):
        # The reference serves the emulated device too: one sample shows that it is reached.
        samples = self.samples(dtype, layout, large=backend.name.startswith("cpu-"))
        return samples[-1:] if backend.name == "cuda-emulated" else samples

    def typical(self, dtype, layout):
        return [sample(256, 256, dtype=dtype, layout=layout)]

    def tiny(self):
        return sample(4, 3, queue=2, scale=3.0, dtype=torch.float64)

    def empty_samples(self):
        # Without a queue that could hold nothing, and features of no length, whose logits are 0.
        a, b, scale, _, _ = sample(3, 4)
        return [(a, b, scale, tensor(0, 4), True), (*sample(3, 0)[:3], None, True)]

    def test_vmap(self):
        """Of two batches of features under one scale."""
        arguments = self.tiny()
        batched = [torch.stack([value, value.flip(0)]) for value in (*arguments[:2], arguments[3])]
        a, b, queue = batched
        scale = arguments[2]
        actual = torch.func.vmap(lambda a, b, q: self.op(a, b, scale, q, True))(a, b, queue)
        expected = torch.stack([eager(a[k], b[k], scale, queue[k]) for k in range(2)])
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3, 39.9, 40.1, 100.0, 1000.0])
    def test_any_scale(self, backend, scale):
        for arguments in (sample(50, 24, queue=9, scale=scale), sample(33, 24, scale=scale, symmetric=False)):
            arguments = tuple(value.to(backend.device) if torch.is_tensor(value) else value for value in arguments)
            exact = eager(*widened(arguments))
            assert_matches(self.op(*arguments), exact, eager(*arguments), others=[f(*arguments) for f in OTHERS])
            actual, wide = gradients(self.op, arguments), gradients(eager, widened(arguments))
            others = [gradients(function, arguments) for function in OTHERS]
            assert_matches(actual, wide, gradients(eager, arguments), "gradient", others)

    def test_several_tiles_at_a_large_scale(self, backend):
        if not backend.name.startswith("cpu-"):
            pytest.skip("no tiles")
        arguments = sample(1040, 16, queue=1030, scale=60.0)
        others = [gradients(function, arguments) for function in OTHERS[:2]]
        actual, wide = gradients(self.op, arguments), gradients(eager, widened(arguments))
        assert_matches(actual, wide, gradients(eager, arguments), "gradient", others)

    def test_same_bits_for_any_number_of_threads(self):
        """Not promised, as the products are a library's: the same bits from call to call are."""
        arguments = self.samples(torch.float32, "contiguous", large=True)[-1]
        threads = torch.get_num_threads()
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            first, second = (gradients(self.op, arguments) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            results.append(first)
        torch.set_num_threads(threads)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-7)

    def test_opposite_pairs_at_a_large_scale_keep_their_gradients(self, backend):
        """Every own logit is 200 below the largest of its row: relative to a fixed bound all would underflow."""
        a = torch.eye(4, 8, device=backend.device)
        arguments = (a, -a, torch.tensor(100.0, device=backend.device), None, True)
        assert_matches(self.op(*arguments), eager(*widened(arguments)), eager(*arguments))
        assert_matches(gradients(self.op, arguments), gradients(eager, widened(arguments)), gradients(eager, arguments))

    def test_one_pair_has_no_loss(self, backend):
        a, b, scale, *_ = (value.to(backend.device) for value in sample(1, 5)[:3])
        assert self.op(a, b, scale).item() == pytest.approx(0, abs=1e-6)

    def test_rows_of_zeros(self, backend):
        a, b, scale = (value.to(backend.device) for value in sample(6, 5)[:3])
        a[2] = 0
        assert_matches(self.op(a, b, scale), eager(*widened((a, b, scale))), eager(a, b, scale))
        actual, exact = gradients(self.op, (a, b, scale)), gradients(eager, widened((a, b, scale)))
        assert_matches(actual[1:], exact[1:], gradients(eager, (a, b, scale))[1:])
        assert actual[0].isfinite().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_no_number_shows(self, backend, value):
        a, b, scale = (given.to(backend.device) for given in sample(40, 5)[:3])
        b[7, 3] = value
        assert self.op(a, b, scale).isnan()

    def test_the_scale_may_be_a_number_or_wider(self, backend):
        a, b, *_ = (value.to(backend.device) for value in sample(6, 5, dtype=torch.bfloat16)[:2])
        wide = torch.tensor([1 / 0.07], device=backend.device, requires_grad=True)
        loss = self.op(a, b, wide)
        loss.backward()
        assert wide.grad.shape == (1,)
        assert torch.equal(self.op(a, b, 1 / 0.07), loss)

    def test_autocast_computes_in_float32(self):
        a, b, scale = (value.bfloat16() for value in sample(20, 16)[:3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.op(a, b, scale)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, self.op(a.float(), b.float(), scale.float()))


def test_memory_is_a_tile_and_not_the_logits():
    """Peak of what is allocated, forward and backward, against plain PyTorch's."""
    arguments = [value.requires_grad_() for value in sample(4096, 16)[:3]]
    ours, plain = (peak_memory(lambda f=f: f(*arguments).backward()) for f in (ops.contrastive_loss, eager))
    assert 0 < ours <= 0.1 * plain


def test_rejects_what_it_cannot_take():
    a, b, scale, queue, _ = sample(4, 3, queue=2)
    for arguments, error, words in (
        ((a[0], b, scale), ValueError, "a must be .B, D."),
        ((a[:0], b[:0], scale), ValueError, "at least 1"),
        ((a, b[:3], scale), ValueError, "b must be"),
        ((a, b.double(), scale), TypeError, "b must be of dtype"),
        ((a, b, torch.ones(2)), ValueError, "logit_scale must hold one number"),
        ((a, b, scale.double()), TypeError, "logit_scale must be of dtype"),
        ((a, b, scale, queue[:, :2]), ValueError, "queue must be"),
        ((a.int(), b, scale), TypeError, "a must be of dtype"),
        ((a, b.to("meta"), scale), ValueError, "device"),
    ):
        with pytest.raises(error, match=words):
            ops.contrastive_loss(*arguments)
