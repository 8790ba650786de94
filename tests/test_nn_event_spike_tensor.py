"""The learnable event spike tensor against its formula: the network run for every event and bin."""

import pytest
import torch
from event_histograms import events

from evkernels.nn import EventSpikeTensor
from evkernels.nn.event_spike_tensor import ValueLayer

HEIGHT, WIDTH = 4, 5
SIZES = ((30, 30), (100, 100), (8,), (6, 2, 3))


def network(value_layer, distance):
    """As published: linear layers with leaky ReLUs between them, for a column of distances."""
    value = distance.reshape(-1, 1)
    for linear in value_layer.mlp[:-1]:
        value = torch.nn.functional.leaky_relu(linear(value), 0.1)
    return value_layer.mlp[-1](value).reshape(distance.shape)


def eager(module, x, y, t, p):
    x, y, t, p = x.long(), y.long(), t.long(), p.long()
    dtype = module.value_layer.mlp[0].weight.dtype
    span = (t.max() - t.min()).clamp(min=1)
    time = ((t - t.min()).double() / span).to(dtype)
    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT) & (p.abs() <= 1)
    x, y, time, p = x[inside], y[inside], time[inside], p[inside]
    grid = torch.zeros(2 * module.bins * HEIGHT * WIDTH, dtype=dtype)
    for b in range(module.bins):
        share = network(module.value_layer, time - b / (module.bins - 1))
        cell = (((p > 0) * module.bins + b) * HEIGHT + y) * WIDTH + x
        grid = grid.index_add(0, cell, time * share)
    return grid.view(2 * module.bins, HEIGHT, WIDTH)


def random_module(hidden, bins=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    module = EventSpikeTensor(bins, HEIGHT, WIDTH, hidden).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5))
    return module


def many(hidden):
    """More than the pieces, so that lines are used."""
    pieces = ValueLayer(hidden, 4).pieces()
    x, y, t, p = events(pieces + 100, HEIGHT + 1, WIDTH + 1, duration=10**9, start=1_600_000_000_000_000)
    p = p.to(torch.int8)
    p[::50] = 2
    return x, y, t, p


@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(hidden, dtype):
    module = random_module(hidden, dtype=dtype)
    x, y, t, p = many(hidden)
    actual = module(x, y, p, t)
    expected = eager(module, x, y, t, p)
    # The lines are made in float64: what remains is the rounding of times, distances and sums.
    exact = {torch.float64: 1e-9, torch.float32: 3e-4}[dtype]
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=exact * scale)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((grid * weight).sum(), list(module.parameters())) for grid in (actual, expected)]
    for own, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=10 * exact * theirs.abs().max().item())


@pytest.mark.parametrize("hidden", [(6, 2), (8,)])
def test_gradcheck(hidden):
    module = random_module(hidden, bins=3)
    names = [name for name, _ in module.named_parameters()]
    x, y, t, p = many(hidden)
    offsets = torch.tensor([0, 0, 40, len(t)])

    def call(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, y, p, t, offsets))

    assert torch.autograd.gradcheck(call, tuple(module.parameters()), fast_mode=True)


@pytest.mark.parametrize("bins", [2, 9])
@pytest.mark.parametrize("hidden", SIZES)
def test_begins_as_a_triangle(hidden, bins):
    layer = ValueLayer(hidden, bins)
    distance = torch.linspace(-1, 1, 401, dtype=torch.float64)
    expected = (1 - (bins - 1) * distance.abs()).clamp(min=0)
    torch.testing.assert_close(layer(distance), expected, rtol=0, atol=1e-5)


def test_units_of_no_use_learn():
    module = EventSpikeTensor(3, HEIGHT, WIDTH, (12, 7))
    x, y, t, p = events(4000, HEIGHT, WIDTH)
    (module(x, y, p, t) * torch.randn(6, HEIGHT, WIDTH)).sum().backward()
    assert all(linear.weight.grad[0].abs().min() > 0 for linear in module.value_layer.mlp[1:])


def test_state_dict_is_the_published_one():
    module = EventSpikeTensor(9, HEIGHT, WIDTH)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "value_layer.mlp.0.weight": (30, 1),
        "value_layer.mlp.0.bias": (30,),
        "value_layer.mlp.1.weight": (30, 30),
        "value_layer.mlp.1.bias": (30,),
        "value_layer.mlp.2.weight": (1, 30),
        "value_layer.mlp.2.bias": (1,),
    }


def test_units_without_slope_and_equal_knots():
    """Weights of 0 and units that bend at the same place: pieces without length, lines that never cross 0."""
    module = random_module((8, 4))
    with torch.no_grad():
        module.value_layer.mlp[0].weight[:2] = 0
        module.value_layer.mlp[0].weight[2:6] = 1
        module.value_layer.mlp[0].bias[2:6] = -0.25
        module.value_layer.mlp[1].weight[0] = 0
    x, y, t, p = many((8, 4))
    actual = module(x, y, p, t)
    torch.testing.assert_close(actual, eager(module, x, y, t, p))
    actual.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_batch_is_its_windows_and_order_does_not_matter():
    module = random_module((8,))
    x, y, t, p = many((8,))
    order = torch.randperm(len(t))
    torch.testing.assert_close(module(x[order], y[order], p[order], t[order]), module(x, y, p, t))
    offsets = torch.tensor([0, 30, 30, 31, len(t)])
    batch = module(x, y, p, t, offsets)
    for window, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if begin < end:
            alone = module(x[begin:end], y[begin:end], p[begin:end], t[begin:end])
            torch.testing.assert_close(batch[window], alone)
    assert not batch[1].any()
    assert not module(x[:0], y[:0], p[:0], t[:0]).any()


def test_compiles():
    module = random_module((8,), dtype=torch.float32)
    x, y, t, p = many((8,))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, p, t), module(x, y, p, t))


@pytest.mark.parametrize(("hidden", "bins"), [((5, 30), 9), ((30, 1), 9), ((), 9), ((30, 30), 1)])
def test_rejects(hidden, bins):
    with pytest.raises(ValueError, match="must"):
        EventSpikeTensor(bins, HEIGHT, WIDTH, hidden)
