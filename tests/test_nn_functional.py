"""Functions of event representations: equal to their docstrings' formulas and to their modules, in any form of events.

What they compute is tested event by event through the modules, beside those.
"""

import ast
import inspect
import math
import re

import numpy as np
import pytest
import torch
from event_histograms import events

from evkernels import nn, ops
from evkernels.events import EventBatch
from evkernels.nn import functional

HEIGHT, WIDTH = 7, 9
SIZES = {"height": HEIGHT, "width": WIDTH}
COLOURS = ((1, 2, 3), (4, 5, 6), (7, 8, 9))


def triangle(distance):
    return (1 - 3 * distance.abs()).clamp(min=0)


def network():
    torch.manual_seed(0)
    return nn.EventSpikeTensor(4, HEIGHT, WIDTH, (8,)).requires_grad_(False)


# Function -> every argument but the events, and the module with the same ones.
CASES = {
    "event_image": ({"palette": COLOURS}, nn.EventImage(HEIGHT, WIDTH, COLOURS[2], COLOURS[1], COLOURS[0])),
    "event_count_image": ({}, nn.EventCountImage(HEIGHT, WIDTH)),
    "bina_rep": ({"bits": 3, "frames": 2}, nn.BinaRep(3, HEIGHT, WIDTH, frames=2)),
    "mixed_density_event_stack": ({"bins": 5, "count_cutoff": 2}, nn.MixedDensityEventStack(5, HEIGHT, WIDTH, 2)),
    "time_ordered_recent_events": (
        {"events": 3, "min_time": 2.0, "max_time": 4000.0}, nn.TimeOrderedRecentEvents(HEIGHT, WIDTH, 3, 2.0, 4000.0)
    ),
    "averaged_time_surface": (
        {"cell_size": 4, "surface_size": 3, "time_window": 900, "tau": 700.0},
        nn.AveragedTimeSurface(HEIGHT, WIDTH, 4, 3, 900, 700.0),
    ),
    "event_spike_tensor": ({"bins": 4, "share": network().value_layer.share}, network()),
}  # fmt: skip
each = pytest.mark.parametrize("name", functional.__all__)


def call(name, *events, **more):
    return getattr(functional, name)(*events, **{**SIZES, **CASES[name][0], **more})


def defaults(name):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def sections(name):
    text = inspect.getdoc(getattr(functional, name))
    heads = ["Equivalent to::", "Args:", "Returns:", "Raises:", "eterministic", "ifferentiable"]
    positions = [text.find(head) for head in heads]
    assert -1 not in positions
    assert positions == sorted(positions)
    return [text[begin:end] for begin, end in zip(positions, [*positions[1:], None], strict=True)]


@each
@pytest.mark.parametrize("given", ["defaults", "options"])
def test_equals_the_formula_of_its_docstring(name, given):
    x, y, t, p = (column.to(torch.int64) for column in events(300, HEIGHT, WIDTH, start=1_600_000_000_000_000))
    options = {**SIZES, **CASES[name][0]} if given == "options" else {**SIZES, "bits": 5, "bins": 4, "share": triangle}
    options = {
        key: value for key, value in options.items() if key in inspect.signature(getattr(functional, name)).parameters
    }
    if given == "options" and "at" in defaults(name):
        options["at"] = int(t[150])
    lines = [line[4:] for line in sections(name)[0].splitlines() if line.startswith("    ")]
    scope = {"torch": torch, "math": math, "ops": ops, **defaults(name), **options, "x": x, "y": y, "t": t, "p": p}
    exec("\n".join(lines), scope)
    target = ast.parse(lines[-1]).body[0].targets[0].id
    actual = getattr(functional, name)(x, y, t, p, **options)
    torch.testing.assert_close(actual, scope[target], rtol=1e-5, atol=1e-5)


@each
def test_docstring_describes_every_argument(name):
    described = re.findall(r"^    (\w[\w, ]*):", sections(name)[1], re.MULTILINE)
    words = [word for names in described for word in names.split(", ")]
    assert sorted(words) == sorted(inspect.signature(getattr(functional, name)).parameters)


@each
def test_equals_its_module(name):
    """Also events out of range, of no polarity, in no order, and windows without events."""
    module = CASES[name][1]
    x, y, t, p = events(400, HEIGHT + 1, WIDTH + 1, start=1_600_000_000_000_000, ordered=False)
    p[::31] = 7
    assert torch.equal(call(name, x, y, t, p), module(x, y, p, t))
    offsets = torch.tensor([0, 0, 150, 151, 400])
    batch = call(name, x, y, t, p, offsets=offsets)
    assert torch.equal(batch, module(x, y, p, t, offsets))
    torch.testing.assert_close(batch[1], call(name, *(column[:150] for column in (x, y, t, p))))
    assert call(name, *(column[:0] for column in (x, y, t, p))).shape == batch.shape[1:]


@each
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_takes_events_in_any_form(name, dtype):
    x, y, t, p = events(200, HEIGHT, WIDTH)
    expected = call(name, x, y, t, p)
    wide = torch.stack([torch.arange(200), t], dim=1).to(torch.int32)
    assert torch.equal(call(name, x.to(dtype), y.to(dtype), wide[:, 1], p.bool()), expected)
    assert torch.equal(call(name, EventBatch(x, y, t, p, torch.tensor([0, 200]))), expected[None])
    table = np.zeros(200, dtype=[("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])
    for column, values in zip("xytp", (x, y, t, p), strict=True):
        table[column] = values.numpy()
    assert torch.equal(call(name, table), expected)


@pytest.mark.parametrize("name", sorted({*functional.__all__} - {"averaged_time_surface"}))
def test_compiles_to_one_graph(name):
    """But averaged surfaces, where the number of events decides how often a loop runs."""
    columns = events(200, HEIGHT, WIDTH)
    compiled = torch.compile(lambda *columns: call(name, *columns), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*columns), call(name, *columns))


@each
def test_rejects_events(name):
    x, y, t, p = events(10, HEIGHT, WIDTH)
    with pytest.raises(TypeError, match="got no p"):
        call(name, x, y, t)
    with pytest.raises(TypeError, match="EventBatch holds all columns, but got offsets beside it"):
        call(name, EventBatch(x, y, t, p, torch.tensor([0, 10])), offsets=torch.tensor([0, 10]))
    with pytest.raises(TypeError, match="x must be of dtype"):
        call(name, x.float(), y, t, p)
    with pytest.raises(ValueError, match=r"t must be \[E\] like x = \(10,\), got \(9,\)"):
        call(name, x, y, t[1:], p)
    with pytest.raises(ValueError, match="offsets must start at 0 and end at E = 10, got 0 and 9"):
        call(name, x, y, t, p, offsets=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"height must be in \[1, 2147483647\], got 0"):
        call(name, x, y, t, p, height=0)
    with pytest.raises(TypeError, match="width must be an int, got float"):
        call(name, x, y, t, p, width=9.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("event_image", {"palette": COLOURS[:2]}, "red, green and blue in"),
        ("event_image", {"palette": ((0, 0, 256), *COLOURS[:2])}, r"in \[0, 255\], three times, got \(\(0, 0, 256\)"),
        ("event_image", {"palette": torch.zeros(2, 3, dtype=torch.uint8)}, r"palette must be .* got \(2, 3\)"),
        ("bina_rep", {"bits": 0}, r"bits must be in \[1, 24\], got 0"),
        ("bina_rep", {"frames": 0}, r"frames must be in \[1, \d+\], got 0"),
        ("mixed_density_event_stack", {"bins": 0}, "bins must be in .* got 0"),
        ("mixed_density_event_stack", {"count_cutoff": 128}, r"count_cutoff must be in \[1, 127\], got 128"),
        ("time_ordered_recent_events", {"events": 0}, "events must be at least 1"),
        ("time_ordered_recent_events", {"min_time": 5000.0}, "min_time < max_time, got 3, 5000.0 and 4000.0"),
        ("time_ordered_recent_events", {"at": torch.tensor([1, 2])}, r"at must be \[B\] = \(1,\), got \(2,\)"),
        ("averaged_time_surface", {"surface_size": 2}, "surface_size must be odd and at most cell_size = 4, got 2"),
        ("averaged_time_surface", {"surface_size": 5}, "surface_size must be odd and at most cell_size = 4, got 5"),
        ("averaged_time_surface", {"tau": 0.0}, "tau positive, got 900 and 0.0"),
        ("event_spike_tensor", {"bins": 1}, "bins must be in .* got 1"),
        ("event_spike_tensor", {"share": lambda distance: distance[0]}, r"share must return \[E, bins\] = \(10, 4\)"),
        ("event_spike_tensor", {"dtype": torch.float64, "share": torch.Tensor.float}, "float64, got .* in torch.float"),
    ],
)  # fmt: skip
def test_rejects_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, *events(10, HEIGHT, WIDTH), **options)


def test_spike_tensor_rejects_an_integer_dtype():
    with pytest.raises(TypeError, match=r"dtype must be .* got torch\.int32"):
        call("event_spike_tensor", *events(10, HEIGHT, WIDTH), dtype=torch.int32)


def test_spike_tensor_learns_through_its_function():
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 40, 100])

    def grid(rate):
        more = {"share": lambda distance: torch.exp(-rate * distance**2), "dtype": torch.float64, "offsets": offsets}
        return call("event_spike_tensor", *events(100, HEIGHT, WIDTH), **more)

    assert torch.autograd.gradcheck(grid, (rate,))
