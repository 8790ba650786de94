"""convert: results, gradients, parameters and keys stay; the report names what changed and what did not, and why."""

import copy
import importlib

import pytest
import torch
from torch import nn

from evkernels.nn import ConvLSTMCell, DepthwiseConv2d, SeparableBlock, convert
from evkernels.nn.converted import E2VIDConvGRU, E2VIDConvLSTM, FusedSequential, RVTConvLSTM


def depthwise(channels=6, k=3, **options):
    return nn.Conv2d(channels, channels, k, groups=channels, **{"padding": k // 2} | options)


def conv_norm_act(*layers):
    """As torchvision's Conv2dNormActivation: a subclass of Sequential with the forward of Sequential."""

    class ConvNormActivation(nn.Sequential):
        pass

    return ConvNormActivation(*layers)


class TimmStyle(nn.Module):
    """The block of timm's EfficientNets: a forward of its own."""

    def __init__(self):
        super().__init__()
        self.conv_dw, self.bn1, self.act1 = depthwise(bias=False), nn.BatchNorm2d(6), nn.SiLU(inplace=True)
        self.conv_pw, self.bn2 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return x + self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))


MODELS = {
    "pair": lambda: nn.Sequential(depthwise(), nn.Conv2d(6, 9, 1)),
    "pair in the middle": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 3), depthwise(k=5, stride=2), nn.GELU(), nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True), nn.Tanh()
    ),
    "depthwise and activation": lambda: nn.Sequential(depthwise(), nn.GELU("tanh"), nn.Conv2d(6, 6, 3)),
    "torchvision block": lambda: nn.Sequential(
        conv_norm_act(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        conv_norm_act(depthwise(stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.BatchNorm2d(8),
    ),
    "timm block": TimmStyle,
    "reflected, dilated, same": lambda: nn.Sequential(
        depthwise(padding_mode="reflect"), nn.Sigmoid(), nn.Conv2d(6, 6, 1), depthwise(padding="same", dilation=2),
        nn.ReLU(), depthwise(padding="valid"), nn.Identity(), nn.Conv2d(6, 4, 1),
    ),
    "shared block": lambda: nn.Sequential(*[nn.Sequential(depthwise(), nn.SiLU(), nn.Conv2d(6, 6, 1))] * 2),
}  # fmt: skip


def filled(model):
    """Weights and statistics that are not the initial ones."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else 0.5 * torch.randn_like(value))
    return model


def results(model, x):
    """Output, gradients and buffers after one step."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
    return [y.detach(), *gradients, *model.buffers()]


def assert_alike(actual, expected, tolerance=1e-9):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_results_parameters_and_keys_stay(name, fold, training):
    model = filled(MODELS[name]()).double().train(training)
    before, x = copy.deepcopy(model), torch.randn(2, 6, 13, 11, dtype=torch.float64)
    expected = results(model, x)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    conversion = convert(model, fold_batch_norm=fold, verbose=False)
    assert conversion.changed
    assert list(conversion.model.state_dict()) == list(before.state_dict())
    assert all(value is parameters[key] for key, value in conversion.model.named_parameters())
    assert all(value is buffers[key] for key, value in conversion.model.named_buffers())
    assert_alike(results(conversion.model, x), expected)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_alike([conversion.model(x.contiguous(memory_format=layout))], [before(x)])


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name):
    model = convert(filled(MODELS[name]()).eval(), fold_batch_norm=True, verbose=False).model
    x = torch.randn(2, 6, 13, 11)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_folding_follows_statistics_and_mode():
    model = filled(MODELS["torchvision block"]()).double().eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    converted = convert(model, fold_batch_norm=True, verbose=False).model
    for training in (True, False, True, False):
        assert_alike([converted.train(training)(x)], [plain.train(training)(x)])
    assert_alike(converted.state_dict().values(), plain.state_dict().values())


def test_one_op_runs(monkeypatch):
    model = convert(MODELS["torchvision block"]()[1:].eval(), fold_batch_norm=True, verbose=False).model
    assert type(model) is FusedSequential
    for layer in (nn.Conv2d, nn.BatchNorm2d, DepthwiseConv2d):
        monkeypatch.setattr(layer, "forward", None)
    assert model(torch.randn(1, 6, 5, 5)).shape == (1, 8, 3, 3)


def test_reports_what_it_did(capsys):
    model = nn.Sequential(depthwise(), nn.ReLU6(), nn.Sequential(depthwise(), nn.SiLU(), nn.Conv2d(6, 6, 1)))
    conversion = convert(model)
    assert conversion.changed == [
        ("0", "DepthwiseConv2d"),
        ("2.0", "DepthwiseConv2d"),
        ("", "one op of 2.0 + 2.1 + 2.2"),
    ]
    assert conversion.kept == [("0", "not fused with what follows: ReLU6")]
    assert capsys.readouterr().out == (
        "3 changed, 1 left alone\n"
        "  changed     0: DepthwiseConv2d\n"
        "  changed     2.0: DepthwiseConv2d\n"
        "  changed     (the model): one op of 2.0 + 2.1 + 2.2\n"
        "  left alone  0: not fused with what follows: ReLU6\n"
    )
    assert not convert(conversion.model, verbose=False).changed


class Conv2dSame(nn.Conv2d):
    """As timm's: pads by the size of the input."""


def with_hook(module):
    module.register_forward_hook(lambda *_: None)
    return module


def with_forward(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: depthwise(k=4), "its filter of 4 x 4 is not square, odd and at most 31"),
        (lambda: nn.Conv2d(6, 6, (3, 5), groups=6), "its filter of 3 x 5 is not square, odd and at most 31"),
        (lambda: depthwise(k=33), "its filter of 33 x 33 is not square, odd and at most 31"),
        (lambda: depthwise(stride=3), "its stride (3, 3) is not 1 or 2"),
        (lambda: depthwise(stride=(1, 2)), "its stride (1, 2) is not 1 or 2"),
        (lambda: depthwise(dilation=(1, 2)), "its dilation (1, 2) differs by direction"),
        (lambda: depthwise(dilation=2, stride=2), "its dilation 2 at stride 2 has no kernel"),
        (lambda: depthwise(padding=(1, 2)), "its padding (1, 2) differs by direction"),
        (lambda: depthwise(padding_mode="circular"), "its padding mode is circular"),
        (lambda: nn.Conv2d(6, 12, 3, groups=6), "makes 2 channels of each"),
        (lambda: Conv2dSame(6, 6, 3, groups=6), "is a Conv2dSame, which may compute something else than Conv2d"),
        (lambda: nn.utils.parametrizations.weight_norm(depthwise()), "is a ParametrizedConv2d, which may"),
        (lambda: depthwise(dtype=torch.complex64), "its weight is torch.complex64"),
        (lambda: with_hook(depthwise()), "has hooks"),
        (lambda: with_forward(depthwise()), "has hooks"),
    ],
)
def test_leaves_alone(make, why):
    model = nn.ModuleDict({"layer": make()})
    layer = model["layer"]
    conversion = convert(model, verbose=False)
    assert model["layer"] is layer
    assert conversion.changed == []
    ((name, reason),) = conversion.kept
    assert name == "layer"
    assert reason.startswith(why)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(1, 1, 3), lambda: nn.Conv2d(6, 6, 3, groups=3), nn.Identity])
def test_does_not_mention_other_layers(make):
    conversion = convert(nn.Sequential(make()), verbose=False)
    assert (conversion.changed, conversion.kept) == ([], [])


def test_leaves_hooks_inside_sequences_and_own_layers_alone():
    model = nn.Sequential(
        depthwise(), with_hook(nn.SiLU()), nn.Conv2d(6, 6, 1), SeparableBlock(6, 6), ConvLSTMCell(6, 4)
    )
    own = list(model)[3:]
    conversion = convert(model, verbose=False)
    assert conversion.changed == [("0", "DepthwiseConv2d")]
    assert list(conversion.model)[3:] == own


class DWSConvLSTM2d(nn.Module):
    """RVT's cell, by its description."""

    def __init__(self, dim, depthwise_of="hidden", dropout=0.0):
        super().__init__()
        self.depthwise_of = depthwise_of
        channels = dim if depthwise_of == "hidden" else 2 * dim
        self.conv3x3_dws = depthwise(channels) if depthwise_of else nn.Identity()
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)
        self.cell_update_dropout = nn.Dropout(dropout)

    def forward(self, x, h_and_c_previous=None):
        h, c = (torch.zeros_like(x),) * 2 if h_and_c_previous is None else h_and_c_previous
        h = self.conv3x3_dws(h) if self.depthwise_of == "hidden" else h
        xh = torch.cat([x, h], 1)
        f, i, o, g = self.conv1x1(self.conv3x3_dws(xh) if self.depthwise_of == "both" else xh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * self.cell_update_dropout(g.tanh())
        return o.sigmoid() * c.tanh(), c


class ConvLSTM(nn.Module):
    """E2VID's cell, by its description."""

    def __init__(self, inputs, hidden, k=3, order="ifog"):
        super().__init__()
        self.order, self.hidden = order, hidden
        self.Gates = nn.Conv2d(inputs + hidden, 4 * hidden, k, padding=k // 2)

    def forward(self, input_, prev_state=None):
        if prev_state is None:
            prev_state = (torch.zeros(len(input_), self.hidden, *input_.shape[2:]),) * 2
        h, c = prev_state
        gate = dict(zip(self.order, self.Gates(torch.cat([input_, h], 1)).chunk(4, 1), strict=True))
        c = gate["f"].sigmoid() * c + gate["i"].sigmoid() * gate["g"].tanh()
        return gate["o"].sigmoid() * c.tanh(), c


class ConvGRU(nn.Module):
    """E2VID's other cell, by its description."""

    def __init__(self, inputs, hidden, k=3):
        super().__init__()
        for name in ("reset_gate", "update_gate", "out_gate"):
            self.add_module(name, nn.Conv2d(inputs + hidden, hidden, k, padding=k // 2))

    def forward(self, input_, prev_state):
        h = prev_state
        if h is None:
            h = torch.zeros(len(input_), self.out_gate.out_channels, *input_.shape[2:])
        xh = torch.cat([input_, h], 1)
        z, r = self.update_gate(xh).sigmoid(), self.reset_gate(xh).sigmoid()
        return (1 - z) * h + z * self.out_gate(torch.cat([input_, r * h], 1)).tanh()


CELLS = {
    "rvt": (lambda: DWSConvLSTM2d(4), RVTConvLSTM, 2),
    "rvt, both": (lambda: DWSConvLSTM2d(4, "both"), RVTConvLSTM, 2),
    "rvt, no depthwise": (lambda: DWSConvLSTM2d(4, None), RVTConvLSTM, 2),
    "e2vid lstm": (lambda: ConvLSTM(4, 4), E2VIDConvLSTM, 2),
    "e2vid gru": (lambda: ConvGRU(4, 4), E2VIDConvGRU, 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    make, kind, states = CELLS[name]
    model = nn.ModuleDict({"cell": filled(make()).double()})
    cell, x = model["cell"], torch.randn(2, 4, 5, 6, dtype=torch.float64)
    state = [torch.randn_like(x) for _ in range(states)]
    state = tuple(state) if states == 2 else state[0]
    keys = list(model.state_dict())
    conversion = convert(model, verbose=False)
    assert type(model["cell"]) is kind
    assert conversion.kept == []
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model["cell"].parameters(), cell.parameters(), strict=True))
    for given in (None, state):
        actual, expected = (
            torch.utils._pytree.tree_leaves(function(x.requires_grad_(), given)) for function in (model["cell"], cell)
        )
        assert_alike(actual, expected)
        inputs = [x, *cell.parameters()]
        assert_alike(*(torch.autograd.grad(sum(v.sum() for v in values), inputs) for values in (actual, expected)))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ConvLSTM(3, 4, order="ifgo"), "ConvLSTM: does not compute what its name says"),
        (lambda: DWSConvLSTM2d(4, dropout=0.1), "has dropout"),
        (lambda: with_hook(ConvGRU(3, 4)), "has hooks"),
        (lambda: type("ConvLSTM", (nn.Linear,), {})(3, 4), "ConvLSTM: its parameters are those of [''], of no cell"),
        (lambda: ConvLSTM(3, 4).bfloat16(), "ConvLSTM: a small input raised"),
    ],
)
def test_leaves_other_cells_alone(make, why):
    model = nn.ModuleDict({"cell": make()})
    cell = model["cell"]
    ((_, reason),) = convert(model, verbose=False).kept
    assert model["cell"] is cell
    assert reason.startswith(why)


# Written by others against plain PyTorch; `make test` installs geffnet and pytorchcv, the other two where they are.
PUBLISHED = {
    "geffnet": ("mobilenetv2_100", "mobilenetv3_rw", "mnasnet_small", "efficientnet_lite0", "mixnet_s"),
    "pytorchcv.models.mobilenet": ("mobilenet_wd4",),
    "pytorchcv.models.mobilenetv2": ("mobilenetv2_wd4",),
    "pytorchcv.models.shufflenetv2": ("shufflenetv2_wd2",),
    "timm": ("mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_b0", "convnext_atto"),
    "torchvision.models": ("mobilenet_v2", "mnasnet0_5", "shufflenet_v2_x0_5"),
}


def published(library, name):
    try:
        models = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{library} cannot be imported: {error}")
    torch.manual_seed(0)
    if library in ("timm", "geffnet"):
        return models.create_model(name)
    model = getattr(models, name)(**{"weights": None} if library == "torchvision.models" else {})
    if library.startswith("pytorchcv"):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # in place of one for inputs of 224 x 224
    return model


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("library", "name"), [(key, name) for key, names in PUBLISHED.items() for name in names])
def test_published_models(library, name, fold):
    model = published(library, name)
    layers = {key: value for key, value in model.named_modules() if isinstance(value, nn.Conv2d)}
    depthwise_layers = {key for key, value in layers.items() if 1 < value.groups == value.in_channels}
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    keys, x = list(model.state_dict()), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    # Statistics of this very input keep the values of all layers near 1.
    model.train()(x)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        conversion = convert(model, fold_batch_norm=fold, verbose=False)
        error = (conversion.model(x) - expected).abs().max()
    assert expected.abs().max() > 1e-3
    assert error <= 1e-11 * expected.abs().max()
    assert list(conversion.model.state_dict()) == keys
    # Every depthwise convolution is named, as changed or, with the reason, as left alone.
    changed = {key for key, what in conversion.changed if what == "DepthwiseConv2d"}
    assert len(changed) >= 5
    assert depthwise_layers == changed | {key for key, _ in conversion.kept if key in depthwise_layers}
