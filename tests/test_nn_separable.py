"""SeparableConv2d and SeparableBlock against the plain modules that they stand for."""

import copy

import pytest
import torch
from torch import nn

from evkernels.nn.separable import SeparableBlock, SeparableConv2d, activated

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def plain_block(c, o, k=3, stride=1, activation=nn.GELU):
    return nn.Sequential(
        nn.Conv2d(c, c, k, stride, k // 2, groups=c), nn.BatchNorm2d(c), activation(),
        nn.Conv2d(c, o, 1), nn.BatchNorm2d(o), activation(),
    )  # fmt: skip


def pair_of_blocks(c=5, o=18, k=3, stride=2, **options):
    """The block and the plain Sequential with the same weights and with statistics that are not the initial ones."""
    block, plain = SeparableBlock(c, o, k, stride, **options), plain_block(c, o, k, stride)
    for name, value in plain.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value))
    block.load_state_dict(plain.state_dict())
    return block.double(), plain.double()


def results(module, x):
    """Output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in module.parameters())]


def close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_block_is_the_plain_sequential(training, k, stride, layout):
    block, plain = pair_of_blocks(k=k, stride=stride)
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
    block.train(training), plain.train(training)
    close(results(block, x), results(plain, x))
    close(block.state_dict().values(), plain.state_dict().values())
    assert block(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("layout", "groups", "stride"), [(LAYOUTS[0], 0, 1), (LAYOUTS[1], 1, 1), (LAYOUTS[0], 3, 2)])
def test_block_with_group_norms_and_residual(layout, groups, stride):
    block = SeparableBlock(6, 6, 3, stride, "silu", groups, residual=stride == 1).double()
    norm = (lambda: nn.GroupNorm(groups, 6)) if groups else (lambda: nn.BatchNorm2d(6))
    plain = nn.Sequential(
        nn.Conv2d(6, 6, 3, stride, 1, groups=6), norm(), nn.SiLU(), nn.Conv2d(6, 6, 1), norm(), nn.SiLU()
    ).double()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64).contiguous(memory_format=layout)
    with_residual = (lambda x: plain(x) + x) if stride == 1 else plain
    for training in (True, False):
        block.train(training), plain.train(training)
        torch.testing.assert_close(block(x), with_residual(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_batch_norm(momentum):
    block, plain = SeparableBlock(5, 7), plain_block(5, 7)
    plain.load_state_dict(block.state_dict())
    for index in (1, 4):
        block[index].momentum = plain[index].momentum = momentum
    for step in range(3):
        x = torch.randn(2, 5, 9, 8) + step
        block(x), plain(x)
    for actual, expected in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_block_keeps_less_than_the_sequential():
    """Of channels_last maps, the input and the pointwise result; the Sequential keeps the input of every layer."""
    kept = []
    x = torch.randn(1, 8, 20, 20).contiguous(memory_format=torch.channels_last)
    for block in (SeparableBlock(8, 16), plain_block(8, 16)):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.setdefault(t.data_ptr(), t), lambda t: t):
            y = block(x.detach().requires_grad_())
        kept.append(sum(t.numel() for t in saved.values() if t.dim() == 4 and t.shape[-1] == y.shape[-1]))
    assert kept[0] <= 0.6 * kept[1]


def test_block_has_the_keys_of_the_sequential():
    assert list(SeparableBlock(3, 4).state_dict()) == list(plain_block(3, 4).state_dict())


def test_block_with_one_frozen_norm():
    block, plain = pair_of_blocks()
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    for module in (block, plain):
        module.train()
        module[1].eval()
    close(results(block, x), results(plain, x))
    close(block.state_dict().values(), plain.state_dict().values())


def test_block_follows_changing_statistics():
    block, plain = pair_of_blocks()
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    block.eval()(x)
    for module in (block, plain):
        module[4].running_mean.add_(1.0)
        module[1].running_var.mul_(2.0)
        module.eval()
    close([block(x)], [plain(x)])


def test_block_calls_one_op_in_evaluation(monkeypatch):
    block = SeparableBlock(3, 4).eval()
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", None)
    assert block(torch.randn(1, 3, 5, 5)).shape == (1, 4, 5, 5)


def test_block_rejects_unknown_activations():
    with pytest.raises(ValueError, match=r"activation must be one of .*'tanh'"):
        SeparableBlock(3, 4, activation="tanh")


@pytest.mark.parametrize("bias", [True, False])
def test_separable_conv2d_is_two_convolutions(bias):
    module = SeparableConv2d(5, 18, 5, 2, bias=bias, activation="silu", output_activation="relu").double()
    plain = nn.Sequential(
        nn.Conv2d(5, 5, 5, 2, 2, groups=5, bias=bias), nn.SiLU(), nn.Conv2d(5, 18, 1, bias=bias), nn.ReLU()
    ).double()
    keys = [f"{layer}.{name}" for layer in ("depthwise", "pointwise") for name in ("weight", "bias")[: 1 + bias]]
    assert list(module.state_dict()) == keys
    module.load_state_dict(dict(zip(keys, plain.state_dict().values(), strict=True)))
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    close(results(module, x), results(plain, x))


@pytest.mark.parametrize("make", [lambda: SeparableConv2d(3, 4, activation="gelu"), lambda: SeparableBlock(3, 4)])
def test_copies_casts_and_compiles(make):
    module = make().eval()
    x = torch.randn(2, 3, 8, 9)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    module.float()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_activated_is_the_norm_and_the_activation(layout, momentum):
    """Values, gradients and what the norm does to its buffers, in training and in evaluation."""
    norms = [nn.BatchNorm2d(6, momentum=momentum) for _ in range(2)]
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout)
    for _ in range(2):
        ours = activated(x, norms[0], "gelu")
        expected = nn.functional.gelu(norms[1](x))
        torch.testing.assert_close(ours, expected)
        for y, norm in zip((ours, expected), norms, strict=True):
            norm.zero_grad()
            y.square().sum().backward()
        torch.testing.assert_close(norms[0].weight.grad, norms[1].weight.grad)
        torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())
    for norm in norms:
        norm.eval()
    torch.testing.assert_close(activated(x, norms[0], "gelu"), nn.functional.gelu(norms[1](x)))
