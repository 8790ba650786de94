"""The event encoder and predictor: published keys and sizes, and equality with torch.nn in values and gradients."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from evkernels.demo.plain import plain_copy
from evkernels.models import EventEncoder, EventPredictor
from evkernels.testing import assert_matches

SMALL = (4, 6, 8, 9, 16)
TINY = (2, 3, 2, 3, 4)  # For backends that run thousands of times slower.
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def predictor(training: bool, channels=SMALL) -> EventPredictor:
    """A small network whose batch normalisations have statistics of their own."""
    torch.manual_seed(0)
    model = EventPredictor(4, hidden_channels=5, channels=channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.train(training)


def windows(count: int = 2, size: tuple[int, int] = (19, 34), dtype=torch.float32) -> torch.Tensor:
    """Sparse counts [T, N, C, H, W]."""
    generator = torch.Generator().manual_seed(1)
    return torch.poisson(torch.full((count, 2, 4, *size), 0.2), generator).to(dtype)


def outputs_and_gradients(model: nn.Module, inputs) -> list[torch.Tensor]:
    """Predictions of all windows, the last state, and the gradients of all parameters."""
    model.zero_grad()
    state, predictions = None, []
    for window in inputs:
        prediction, state = model(window, state)
        predictions.append(prediction)
    sum(((index + 1) * p.sin()).sum() for index, p in enumerate(predictions)).backward()
    return [*predictions, *state, *(parameter.grad for parameter in model.parameters())]


def test_published_size():
    assert sum(parameter.numel() for parameter in EventEncoder(5).parameters()) == 69_852


def test_published_keys():
    expected = set()
    for index in range(1, 6):
        for layer in (0, 1, 3, 4):
            names = ["weight", "bias"]
            if layer in (1, 4):
                names += ["running_mean", "running_var", "num_batches_tracked"]
            expected |= {f"conv{index}.{layer}.{name}" for name in names}
        expected |= {f"channel_attention.{index - 1}.fc.{layer}.weight" for layer in (0, 2)}
    assert set(EventEncoder(5).state_dict()) == expected


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 33), (260, 346)])
def test_sizes_halve_rounding_up(size):
    x5, maps = EventEncoder(3).eval()(torch.zeros(1, 3, *size))
    expected = [size]
    for _ in range(4):
        expected.append(tuple((extent + 1) // 2 for extent in expected[-1]))
    assert [tuple(value.shape[2:]) for value in (*maps, x5)] == expected
    assert [value.shape[1] for value in (*maps, x5)] == [16, 32, 64, 128, 256]


@pytest.mark.parametrize("training", [False, True])
def test_equals_plain_pytorch_in_float64(training):
    model = predictor(training).double()
    plain = plain_copy(model)
    assert not any(type(module).__module__.startswith("evkernels.nn.separable") for module in plain.modules())
    inputs = windows(dtype=torch.float64)
    torch.testing.assert_close(
        outputs_and_gradients(model, inputs), outputs_and_gradients(plain, inputs), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def model_and_inputs(training, layout, is_small, device):
    inputs = windows(1, (9, 10)) if is_small else windows(2, (35, 50))
    model = predictor(training, TINY if is_small else SMALL).to(device, memory_format=layout)
    return model, [window.to(device, memory_format=layout) for window in inputs]


@functools.cache
def in_plain_pytorch(training, layout, is_small, device) -> list[list[torch.Tensor]]:
    """Exactly, in this layout, and in the other: one layout's sums of so few numbers may be exact by luck."""
    model, inputs = model_and_inputs(training, layout, is_small, device)
    results = [outputs_and_gradients(plain_copy(model).double(), [window.double() for window in inputs])]
    for form in sorted(LAYOUTS, key=lambda form: form != layout):
        plain = plain_copy(model).to(memory_format=form)
        results.append(outputs_and_gradients(plain, [window.contiguous(memory_format=form) for window in inputs]))
    return results


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_plain_pytorch(backend, training, layout):
    model, inputs = model_and_inputs(training, layout, backend.is_slow, backend.device)
    exact, eager, *others = in_plain_pytorch(training, layout, backend.is_slow, backend.device)
    # The limit is one for all gradients: that of a bias before a normalisation is zero but for rounding.
    parts = len(inputs) + 2
    actual = outputs_and_gradients(model, inputs)
    for index in range(parts):
        more = [other[index] for other in others]
        assert_matches(actual[index], exact[index], eager[index], f"output {index}", more)
    flat = [torch.cat([grad.flatten() for grad in values[parts:]]) for values in (actual, exact, eager, *others)]
    assert_matches(*flat[:3], "gradient", flat[3:])


def test_equals_reference_backend_in_training_statistics():
    from evkernels import use_backend

    inputs = windows()
    fused, reference = predictor(True), predictor(True)
    outputs_and_gradients(fused, inputs)
    with use_backend("reference"):
        outputs_and_gradients(reference, inputs)
    for (name, value), expected in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_state_carries_the_past():
    model, inputs = predictor(False), windows(3)
    _, state = model(inputs[0])
    with_past, _ = model(inputs[1], state)
    without, _ = model(inputs[1])
    zeros = tuple(torch.zeros_like(value) for value in state)
    assert not torch.equal(with_past, without)
    assert torch.equal(model(inputs[1], zeros)[0], without)
    assert state[0].shape == (2, 5, 2, 3)


def test_detached_state_truncates_the_gradient():
    model, inputs = predictor(True), windows(2).requires_grad_()
    _, state = model(inputs[0])
    model(inputs[1], tuple(value.detach() for value in state))[0].sum().backward()
    assert torch.count_nonzero(inputs.grad[0]) == 0
    assert torch.count_nonzero(inputs.grad[1]) > 0


def test_counts_may_be_uint8_and_are_left_alone():
    model, counts = predictor(False), windows(1)[0]
    small = counts.to(torch.uint8)
    before = small.clone()
    assert torch.equal(model(small)[0], model(counts)[0])
    assert torch.equal(small, before)


def test_nothing_seen_gives_numbers():
    prediction, _ = predictor(False)(torch.zeros(1, 4, 20, 20))
    assert prediction.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 20, 20), (4, 20, 20), (1, 5, 20, 20)])
def test_rejects_other_histograms(shape):
    with pytest.raises(ValueError, match="histogram must be"):
        predictor(False)(torch.zeros(shape))


def test_rejects_other_numbers_of_blocks():
    with pytest.raises(ValueError, match="channels must be 5 numbers"):
        EventEncoder(4, channels=(16, 32))


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model, inputs = predictor(False), windows(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, state = model(inputs[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs[1], state), model(inputs[1], state))


def test_copies_and_pickles():
    model, inputs = predictor(False), windows(1)[0]
    expected = model(inputs)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs)[0], expected)
