"""learnable_time_embedding: the contract of every op, and what is special to this one."""

import pytest
import torch
import torch.nn.functional as F
from contract import DifferentiableOpContract, gradients, widened

from evkernels import ops
from evkernels.testing import assert_matches, tensor

NAMES = [
    "t",
    "fourier_frequency",
    "fourier_phase",
    "fourier_weight",
    "fourier_bias",
    "spline_rate",
    "spline_shift",
    "base_weight",
    "spline_weight",
    "norm_weight",
    "norm_bias",
    "scale",
    "eps",
]


def bases_by_recursion(v, count):
    """Cubic B-spline bases [..., count] by the Cox-de Boor recursion, from the piecewise constant ones."""
    spacing = 2 / (count - 3)
    knots = (torch.arange(-3, count + 1, dtype=torch.float64) * spacing - 1).to(v.dtype).to(v.device)
    v = v[..., None]
    bases = ((v >= knots[:-1]) & (v < knots[1:])).to(v.dtype)
    for k in range(1, 4):
        rising = (v - knots[: -(k + 1)]) / (knots[k:-1] - knots[: -(k + 1)]) * bases[..., :-1]
        falling = (knots[k + 1 :] - v) / (knots[k + 1 :] - knots[1:-k]) * bases[..., 1:]
        bases = rising + falling
    return bases


def eager(
    t, frequency, phase, fourier_weight, fourier_bias, rate, shift, base_weight, spline_weight,
    norm_weight=None, norm_bias=None, scale=None, eps=1e-5,
):  # fmt: skip
    """As published: every harmonic by its own sine, products before sums, bases by recursion."""
    u = F.linear(t[:, None], frequency[:, None], phase)
    harmonics = torch.arange(1, fourier_weight.shape[-1] + 1, dtype=t.dtype, device=t.device)
    angles = (u[..., None] * harmonics)[:, None]
    fourier = (angles.cos() * fourier_weight[0]).sum((-1, -2)) + (angles.sin() * fourier_weight[1]).sum((-1, -2))
    v = F.linear(t[:, None], rate[:, None], shift)
    bases = bases_by_recursion(v, spline_weight.shape[-1])
    spline = F.linear(v.tanh(), base_weight) + F.linear(bases.flatten(1), spline_weight.flatten(1))
    embedding = torch.cat([fourier + fourier_bias, spline], dim=1)
    if norm_weight is not None:
        embedding = F.layer_norm(embedding, embedding.shape[1:], norm_weight, norm_bias, eps)
    return embedding if scale is None else embedding * scale


def eager_backwards(
    t, frequency, phase, fourier_weight, fourier_bias, rate, shift, base_weight, spline_weight, *rest
):  # fmt: skip
    """The same from the features and timestamps in reversed order: plain PyTorch's sums in another order."""
    features = (t.flip(0), frequency.flip(0), phase.flip(0), fourier_weight.flip(2), fourier_bias)
    return eager(*features, rate.flip(0), shift.flip(0), base_weight.flip(1), spline_weight.flip(1), *rest).flip(0)


def sample(n, f, s, harmonics=5, bases=8, norm=True, scale=True, dtype=torch.float32, layout="contiguous", eps=1e-5):
    def make(*shape, seed, factor=1.0, offset=0.0):
        return tensor(*shape, dtype=dtype, layout=layout, seed=seed) * factor + offset

    width = f + s
    return (
        make(n, seed=1),
        make(f, seed=2),
        make(f, seed=3),
        make(2, f, f, harmonics, seed=4, factor=(max(f, 1) * harmonics) ** -0.5),
        make(f, seed=5),
        make(s, seed=6),
        make(s, seed=7, factor=0.5),
        make(s, s, seed=8, factor=max(s, 1) ** -0.5),
        make(s, s, bases, seed=9, factor=max(s, 1) ** -0.5),
        make(width, seed=10, factor=0.2, offset=1.0) if norm else None,
        make(width, seed=11, factor=0.2) if norm else None,
        make(width, seed=12, factor=0.2, offset=1.0) if scale else None,
        eps,
    )


class TestLearnableTimeEmbedding(DifferentiableOpContract):
    layouts = ("contiguous", "transposed", "sliced")

    def op(self, *arguments):
        return ops.learnable_time_embedding(*arguments)

    def eager(self, *arguments):
        return eager(*arguments)

    def other_eagers(self):
        return [eager_backwards]

    def samples(self, dtype, layout, large):
        options = {"dtype": dtype, "layout": layout}
        return [
            # Many features: eager's own error on the gradients of one or two is too often small by luck.
            sample(33, 8, 9, scale=False, **options),
            sample(31, 17, 5, harmonics=1, bases=4, norm=False, **options),
            sample(40, 6, 9, harmonics=7, bases=11, norm=False, scale=False, **options),
            sample(5, 6, 7, harmonics=2, bases=5, **options),
            sample(21, 12, 11, **options),
            sample(34, 5, 17, **options),
            *[sample(2100, 16, 16, **options)] * (large and dtype != torch.float64),
        ]

    def samples_for(self, backend, dtype, layout):
        # Interpreted, the rest takes minutes: one sample in each dtype and layout, one of them of several tiles.
        samples = self.samples(dtype, layout, large=not backend.is_slow)
        is_first = dtype == self.dtypes[0] and layout == self.layouts[0]
        return samples[-1:] if backend.is_slow and is_first else samples[4:5] if backend.is_slow else samples

    def typical(self, dtype, layout):
        return [sample(1024, 16, 16, dtype=dtype, layout=layout)]

    def tiny(self):
        return sample(4, 2, 2, harmonics=2, bases=5, dtype=torch.float64)

    def empty_samples(self):
        return [
            sample(0, 3, 2),
            sample(3, 0, 4, norm=False, scale=False),
            sample(3, 5, 0, norm=False, scale=False),
            sample(0, 0, 1),
        ]

    @pytest.mark.parametrize(("f", "s"), [(0, 8), (0, 1), (8, 0), (1, 0), (0, 33), (33, 0)])
    @pytest.mark.parametrize("norm", [False, True])
    def test_one_part_alone(self, backend, f, s, norm):
        if backend.is_slow and norm == (f > s):
            pytest.skip("interpreted, each part is tried alone once")
        # Gradients of a single feature are short sums, which plain PyTorch may get exactly right by luck.
        self.assert_like_eager(backend, sample(35, f, s, norm=norm and f + s > 1), with_gradients=f + s > 1)

    @pytest.mark.parametrize("n", [1, 2, 31, 32, 33])
    def test_timestamps_do_not_influence_each_other(self, backend, n):
        if backend.is_slow and n in (2, 31, 32):
            pytest.skip("interpreted, one and several tiles are tried once")
        arguments = sample(n, 6, 7)
        self.assert_like_eager(backend, arguments, with_gradients=False)
        t, *rest = self.on(backend, arguments)
        together = gradients(self.op, (t, *rest))[0]
        alone = self.op(t[-1:].clone(), *rest)
        torch.testing.assert_close(alone, self.op(t, *rest)[-1:], rtol=1e-5, atol=1e-5)
        (single,) = torch.autograd.grad(self.op(t.requires_grad_(), *rest)[-1].sum(), t)
        assert (single[:-1] == 0).all()
        assert single[-1] != 0
        assert together.isfinite().all()

    @pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e6, 1e9, 1e12, 1e30])
    def test_large_angles(self, backend, magnitude):
        """Whole frequencies and timestamps: the angles are exact, so nothing hides an inaccurate sine."""
        t = (tensor(64, seed=1) * magnitude).round()
        rest = sample(64, 4, 2, norm=False, scale=False)[1:]
        rest = (torch.tensor([1.0, -1.0, 1.0, 2.0]), torch.zeros(4), *rest[2:])
        # Harmonics above the first round their angle in eager's multiplication by 3 and 5: one harmonic only.
        first = (*rest[:2], rest[2][..., :1], *rest[3:])
        self.assert_like_eager(backend, (t, *first), with_gradients=False)
        if not backend.name.startswith(("cpu", "triton")):
            return  # The reference, which serves here, multiplies the angle too.
        exact, actual = eager(*widened((t, *rest))), self.op(*self.on(backend, (t, *rest)))
        assert (actual.cpu() - exact).abs().max() < 2e-6

    def test_timestamps_of_many_seconds_in_microseconds(self, backend):
        t = torch.arange(100) * 1e4
        rest = sample(100, 16, 16)[1:]
        slow = torch.logspace(0, -9, 16)
        self.assert_like_eager(backend, (t, slow, *rest[1:4], slow, *rest[5:]))

    def test_sums_of_constant_features_lose_little(self, backend):
        """Rates down to 1e-9, as a new layer has them: most features, and what rounding takes from their sum, are the
        same at all times, and the gradients of norm and scale add it up. Rounding once loses 3.4e-8, rms, of values
        around 1; runs of 32 terms without a correction lost 6.5e-8.
        """
        if not backend.name.startswith("cpu"):
            pytest.skip("only the CPU's kernels correct their sums")
        slow, zeros = torch.logspace(0, -9, 48), torch.zeros(48)
        rest = sample(0, 48, 48)[1:9]
        arguments = (torch.linspace(0, 1, 64), slow, zeros, *rest[2:4], slow, zeros, *rest[6:])
        error = (self.op(*arguments) - eager(*widened(arguments))).mean(dim=0)
        assert error.square().mean().sqrt() < 4.5e-8

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nonfinite_timestamps(self, backend, value):
        """Only their own rows suffer."""
        t, *rest = sample(37, 3, 5)
        expected = self.op(*self.on(backend, (t, *rest)))
        t[17] = value
        actual = self.op(*self.on(backend, (t, *rest)))
        assert actual[17].isnan().all()
        others = torch.arange(37, device=actual.device) != 17
        assert torch.equal(actual[others], expected[others])

    def test_infinite_timestamps_saturate_the_spline(self, backend):
        arguments = sample(2, 0, 3, norm=False, scale=False)
        t, rate, base_weight = torch.tensor([float("inf"), float("-inf")]), torch.tensor([1.0, -2.0, 3.0]), arguments[7]
        arguments = self.on(backend, (t, *arguments[1:5], rate, *arguments[6:]))
        sides = torch.stack([rate.sign(), -rate.sign()])
        torch.testing.assert_close(self.op(*arguments).cpu(), sides @ base_weight.T)

    @pytest.mark.parametrize("bases", [4, 5, 8, 13])
    def test_bases_at_their_knots(self, backend, bases):
        """At each knot, right beside it, and outside the support; identity weights show each basis alone."""
        spacing = 2 / (bases - 3)
        knots = torch.arange(-4, bases + 2) * spacing - 1
        t = torch.cat([knots, knots.nextafter(knots - 1), knots.nextafter(knots + 1), knots * 100])
        for basis in range(bases):
            weight = torch.zeros(1, 1, bases)
            weight[0, 0, basis] = 1
            empty = torch.zeros(0), torch.zeros(0), torch.zeros(2, 0, 0, 5), torch.zeros(0)
            arguments = (t, *empty, torch.ones(1), torch.zeros(1), torch.zeros(1, 1), weight)
            actual = self.op(*self.on(backend, arguments)).cpu()[:, 0]
            exact = bases_by_recursion(t.double(), bases)[:, basis]
            assert (actual - exact).abs().max() < 3e-7 * bases
            assert (actual[t.abs() > 1 + 3.01 * spacing] == 0).all()

    def test_frozen_parameters(self, backend):
        """Only what requires a gradient gets one."""
        arguments = list(self.on(backend, sample(9, 3, 4)))
        arguments[0].requires_grad_()
        arguments[8].requires_grad_()
        self.op(*arguments).square().sum().backward()
        have = [name for name, v in zip(NAMES, arguments, strict=True) if torch.is_tensor(v) and v.grad is not None]
        assert have == ["t", "spline_weight"]

    def test_eps_counts(self, backend):
        arguments = sample(9, 3, 4, eps=0.5)
        self.assert_like_eager(backend, arguments)
        small, large = (self.op(*self.on(backend, (*arguments[:-1], eps))) for eps in (1e-5, 0.5))
        assert not torch.allclose(small, large)

    def test_autocast_computes_in_float32(self):
        arguments = sample(9, 3, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = self.op(arguments[0].bfloat16().float(), *arguments[1:])
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, self.op(arguments[0].bfloat16().float(), *arguments[1:]), rtol=0, atol=0)

    def test_needs_little_memory(self):
        """At most a tenth of the published form's [N, F, F, harmonics] product, in both directions."""
        arguments = tuple(v.requires_grad_() if torch.is_tensor(v) else v for v in sample(4800, 16, 16))
        with torch.profiler.profile(profile_memory=True) as profile:
            self.op(*arguments).sum().backward()
        allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
        assert allocated <= 0.1 * 4800 * 16 * 16 * 5 * 4

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("t", torch.zeros(2, 3), r"t must be \[N\], got \(2, 3\)"),
            ("fourier_frequency", torch.zeros(3, 1), r"fourier_frequency must have 1 dimensions, got \(3, 1\)"),
            ("fourier_phase", torch.zeros(4), r"fourier_phase must be \[F\] .* = \(3,\), got \(4,\)"),
            ("fourier_weight", torch.zeros(2, 3, 4, 5), r"fourier_weight must be \[2, F, F, G\] .*got \(2, 3, 4, 5\)"),
            ("fourier_weight", torch.zeros(2, 3, 3, 0), "fourier_weight .* with G at least 1"),
            ("spline_weight", torch.zeros(4, 4, 3), "spline_weight .* with B at least 4"),
            ("base_weight", torch.zeros(4, 3), r"base_weight must be \[S, S\] .*got \(4, 3\)"),
            ("scale", torch.zeros(4), r"scale must be \[F \+ S\] .* = \(7,\), got \(4,\)"),
            ("norm_bias", None, "norm_weight and norm_bias must both"),
            ("scale", torch.zeros(7, device="meta"), "scale must be on the device of t, cpu, got meta"),
        ],
    )
    def test_rejects_values(self, name, value, message):
        with pytest.raises(ValueError, match=message):
            ops.learnable_time_embedding(**dict(zip(NAMES, sample(2, 3, 4), strict=True)) | {name: value})

    def test_rejects_no_features(self):
        with pytest.raises(ValueError, match=r"F \+ S at least 1, got 0"):
            self.op(*sample(2, 0, 0, norm=False, scale=False))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("t", [0.0], "t must be a torch.Tensor, got list"),
            ("t", torch.zeros(2, dtype=torch.int64), "t must be of dtype .* got torch.int64"),
            ("base_weight", None, "base_weight must be a torch.Tensor, got NoneType"),
            ("scale", torch.zeros(7, dtype=torch.float64), "scale must be of dtype torch.float32, got torch.float64"),
        ],
    )
    def test_rejects_types(self, name, value, message):
        with pytest.raises(TypeError, match=message):
            ops.learnable_time_embedding(**dict(zip(NAMES, sample(2, 3, 4), strict=True)) | {name: value})

    def on(self, backend, arguments):
        return tuple(value.to(backend.device) if torch.is_tensor(value) else value for value in arguments)

    def assert_like_eager(self, backend, arguments, with_gradients=True):
        on_device = self.on(backend, arguments)
        others = [eager_backwards(*arguments)]
        assert_matches(self.op(*on_device), eager(*widened(arguments)), eager(*arguments), others=others)
        if with_gradients:
            exact, plain = (gradients(eager, same) for same in (widened(arguments), arguments))
            others = [gradients(eager_backwards, arguments)]
            assert_matches(gradients(self.op, on_device), exact, plain, "gradient", others)
