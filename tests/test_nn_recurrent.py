"""ConvLSTMCell and ConvGRUCell: published values and weights, sequences, states, and what every module must survive."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from evkernels.nn import ConvGRUCell, ConvLSTMCell
from evkernels.testing import assert_matches, tensor

CELLS = {
    "lstm": lambda: ConvLSTMCell(3, 4),
    "lstm ifog 1x1": lambda: ConvLSTMCell(3, 4, kernel_size=1, bias=False, order="ifog"),
    "lstm reflect": lambda: ConvLSTMCell(3, 4, padding_mode="reflect"),
    "gru classic": lambda: ConvGRUCell(3, 4),
    "gru classic 5x5": lambda: ConvGRUCell(3, 4, kernel_size=5),
    "gru fast": lambda: ConvGRUCell(3, 4, form="fast"),
    "gru fast no norm": lambda: ConvGRUCell(3, 4, form="fast", layer_norm=False),
    "gru fast depthwise": lambda: ConvGRUCell(3, 4, form="fast", depthwise=True),
}


def wave(frequency: float, *shape: int) -> Tensor:
    """The inputs for which the published modules' values were computed: sin(frequency * i) over flat positions."""
    return torch.sin(frequency * torch.arange(np.prod(shape), dtype=torch.float64)).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    """The weights for which they were computed: parameter j holds 0.5*sin(0.37*i + 0.11*j)."""
    module.double()
    with torch.no_grad():
        for j, parameter in enumerate(module.parameters()):
            positions = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.5 * torch.sin(0.37 * positions + 0.11 * j).reshape(parameter.shape))
    return module


def assert_published(value: Tensor, three: tuple, total: float, weighted: float) -> None:
    flat = value.detach().flatten()
    weights = torch.cos(0.1 * torch.arange(flat.numel(), dtype=torch.float64))
    found = [*flat[[1, flat.numel() // 2, -1]].tolist(), flat.sum().item(), (flat * weights).sum().item()]
    assert found == pytest.approx([*three, total, weighted], abs=6e-7)


def eager_lstm(cell: ConvLSTMCell, x, state):
    h, c = state
    blocks = dict(zip(cell.order, cell.conv(torch.cat([x, h], 1)).chunk(4, 1), strict=True))
    c = blocks["f"].sigmoid() * c + blocks["i"].sigmoid() * blocks["g"].tanh()
    h = blocks["o"].sigmoid() * c.tanh()
    return h, (h, c)


def eager_gru(cell: ConvGRUCell, x, h):
    if cell.form == "fast":
        z, r, n = (cell.conv_x(x) + cell.layer_norm(cell.conv_h(h))).chunk(3, 1)
        n = n + r.sigmoid() * h
    else:
        xh = torch.cat([x, h], 1)
        z, r = cell.update_gate(xh), cell.reset_gate(xh)
        n = cell.out_gate(torch.cat([x, r.sigmoid() * h], 1))
    h = (1 - z.sigmoid()) * h + z.sigmoid() * n.tanh()
    return h, h


def eager_sequence(cell, x, state=None):
    """The cell as a loop in plain PyTorch."""
    step = eager_lstm if isinstance(cell, ConvLSTMCell) else eager_gru
    state = cell.initial_state(x[0]) if state is None else state
    outputs = []
    for frame in x:
        output, state = step(cell, frame, state)
        outputs.append(output)
    return torch.stack(outputs), state


def flat(result) -> tuple:
    """output, h, c or output, h of a sequence as one tuple."""
    output, state = result
    return (output, *state) if isinstance(state, tuple) else (output, state)


@pytest.fixture(params=CELLS)
def cell(request):
    return CELLS[request.param]()


class TestPublishedValues:
    def test_e2vid_conv_lstm(self):
        published = filled(nn.ModuleDict({"Gates": nn.Conv2d(7, 16, 3)})).state_dict()
        cell = ConvLSTMCell.from_e2vid(published)
        h, c = cell(wave(0.23, 2, 3, 3, 5), (wave(0.31, 2, 4, 3, 5), wave(0.17, 2, 4, 3, 5)))
        assert_published(h, (-0.603293, 0.001524, -0.005479), -1.145850, -7.658259)
        assert_published(c, (-0.732297, 0.004183, -0.010599), -26.324411, -10.707935)

    def test_rvt_dws_conv_lstm_without_depthwise(self):
        published = filled(nn.ModuleDict({"conv1x1": nn.Conv2d(8, 16, 1)})).state_dict()
        cell = ConvLSTMCell.from_rvt(published)
        h, c = cell(wave(0.23, 2, 4, 3, 5), (wave(0.31, 2, 4, 3, 5), wave(0.17, 2, 4, 3, 5)))
        assert_published(h, (0.021522, -0.176179, 0.152771), -6.460847, 2.317675)
        assert_published(c, (0.038122, -0.334584, 0.443596), -21.867504, 7.211790)

    def test_stacked_conv_lstm_of_eseg(self):
        layers = filled(nn.ModuleList([ConvLSTMCell(3, 4, order="ifog"), ConvLSTMCell(4, 2, order="ifog")]))
        output = wave(0.23, 2, 3, 3, 4, 4).transpose(0, 1)
        for layer in layers:
            output, _ = layer.forward_sequence(output)
        assert_published(output.transpose(0, 1), (-0.140110, 0.192910, -0.069396), 4.381209, 1.447323)

    def test_e2vid_conv_gru(self):
        h = filled(ConvGRUCell(3, 4))(wave(0.23, 2, 3, 3, 5), wave(0.31, 2, 4, 3, 5))
        assert_published(h, (0.792792, -0.278345, 0.879585), 54.976386, 9.769726)

    @pytest.mark.parametrize(
        ("arguments", "three", "total", "weighted"),
        [
            ({}, (-0.567347, -0.752234, 0.287364), -35.681690, -2.307681),
            ({"layer_norm": False}, (0.903621, 0.656309, -0.128339), 31.686882, -4.744774),
            ({"depthwise": True}, (-0.316992, -0.631038, 0.580716), -40.881062, 4.673724),
        ],
    )
    def test_visioncore_conv_gru(self, arguments, three, total, weighted):
        layer = nn.Module()
        layer.h0 = nn.Parameter(torch.zeros(1, 6, 1, 1))
        layer.cell = ConvGRUCell(3, 6, form="fast", **arguments)
        filled(layer)
        x = wave(0.23, 2, 3, 5, 4, 4).permute(2, 0, 1, 3, 4)
        _, h = layer.cell.forward_sequence(x, layer.h0.expand(2, 6, 4, 4))
        assert_published(h, three, total, weighted)

    def test_torch_lstm_at_every_pixel(self):
        lstm = nn.LSTM(3, 4, num_layers=2).double()
        x = wave(0.23, 5, 2, 3, 2, 3)
        pixels = x.permute(0, 1, 3, 4, 2).reshape(5, 12, 3)
        expected, (h, c) = lstm(pixels)
        output, states = x, []
        for layer in range(2):
            output, state = ConvLSTMCell.from_torch_lstm(lstm, layer).forward_sequence(output)
            states.append(state)
        torch.testing.assert_close(output.permute(0, 1, 3, 4, 2).reshape(5, 12, 4), expected, rtol=1e-12, atol=1e-12)
        for k, exact in enumerate((h, c)):
            actual = torch.stack([state[k].permute(0, 2, 3, 1).reshape(12, 4) for state in states])
            torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("bias", [True, False])
    def test_torch_lstm_cell(self, bias):
        lstm = nn.LSTMCell(3, 4, bias=bias).double()
        x = wave(0.23, 2, 3)
        h, c = ConvLSTMCell.from_torch_lstm(lstm)(x[:, :, None, None])
        for actual, expected in zip((h, c), lstm(x), strict=True):
            torch.testing.assert_close(actual[:, :, 0, 0], expected, rtol=1e-12, atol=1e-12)


class TestRealCheckpoints:
    """Published weights on a real recording: the extreme pre-activations that random weights never reach."""

    @staticmethod
    def voxel_grids(recordings, steps: int, bins: int = 5) -> Tensor:
        """Windows of slider_depth as E2VID's normalised voxel grids [steps, 1, bins, 64, 64], a crop of the middle."""
        with np.load(recordings / "npz" / "slider_depth.npz") as events:
            x, y, t, p = (torch.from_numpy(events[name].astype(np.int64)) for name in ("x", "y", "t", "p"))
            size = bins, int(events["height"]), int(events["width"])
        grids = []
        for part in torch.arange(len(t)).chunk(steps):
            time = (bins - 1) * (t[part] - t[part[0]]).double() / (t[part[-1]] - t[part[0]])
            grid = torch.zeros(size, dtype=torch.float64)
            for bin_offset in (0, 1):
                bin_index = time.long() + bin_offset
                weight = (1 - (time - bin_index).abs()) * (2 * p[part] - 1)
                inside = bin_index < bins
                where = (bin_index[inside], y[part][inside], x[part][inside])
                grid.index_put_(where, weight[inside], accumulate=True)
            nonzero = grid != 0
            grid[nonzero] = (grid[nonzero] - grid[nonzero].mean()) / grid[nonzero].std()
            grids.append(grid[None, :, 58:122, 88:152])
        return torch.stack(grids)

    @staticmethod
    def assert_equals_loop(cell, features):
        cell.double()
        with torch.inference_mode():
            exact = flat(eager_sequence(cell, features))
            torch.testing.assert_close(flat(cell.forward_sequence(features)), exact, rtol=1e-10, atol=1e-10)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                # 16-bit convolutions take minutes where the processor has none of its own: a small part will do.
                part = features if dtype == torch.float32 else features[:3, ..., 24:36, 24:36]
                narrow, frames = copy.deepcopy(cell).to(dtype), part.to(dtype)
                exact = flat(eager_sequence(copy.deepcopy(narrow).double(), frames.double()))
                actual = flat(narrow.forward_sequence(frames))
                assert all(value.isfinite().all() for value in actual)
                assert_matches(actual, exact, flat(eager_sequence(narrow, frames)))

    def test_firenet_conv_gru(self, recordings):
        weights = torch.load(recordings / "checkpoints" / "firenet_convgru.pth", weights_only=True, map_location="cpu")
        weights = {name: value.double() for name, value in weights["state_dict"].items()}
        features = self.voxel_grids(recordings, steps=6)
        for block, convolution in (("head", "conv.conv2d"), ("resblocks.0", None)):
            prefix = f"net.{block}."
            if convolution:
                kernel, bias = (weights[f"{prefix}{convolution}.{name}"] for name in ("weight", "bias"))
                features = torch.stack([relu(torch.conv2d(frame, kernel, bias, padding=1)) for frame in features])
            cell = ConvGRUCell(16, 16)
            prefix += "recurrent_block."
            cell.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            self.assert_equals_loop(cell, features)
            with torch.inference_mode():
                features, _ = cell.double().forward_sequence(features)
            assert features.isfinite().all()

    def test_cista_conv_lstm(self, recordings):
        path = recordings / "checkpoints" / "cista_tc_convlstm.pth.tar"
        weights = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        weights = {name: value.double() for name, value in weights.items()}

        def convolved(name, frame):
            return torch.conv2d(frame, weights[f"{name}.conv2d.weight"], weights[f"{name}.conv2d.bias"], padding=1)

        features = []
        for frame in self.voxel_grids(recordings, steps=6):
            image = torch.zeros_like(frame[:, :1])
            features.append(relu(convolved("W0", torch.cat([convolved("We", frame), convolved("Wi", image)], 1))))
        cell = ConvLSTMCell.from_e2vid(weights, "Dg.recurrent_block.", padding_mode="reflect")
        assert (cell.in_channels, cell.hidden_channels) == (64, 64)
        self.assert_equals_loop(cell, torch.stack(features))


class TestStepsAndSequences:
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_sequence_equals_plain_pytorch(self, cell, dtype, layout):
        x = tensor(4, 2, 3, 5, 7, dtype=dtype)
        cell.to(dtype)
        if layout == "channels_last":
            cell.to(memory_format=torch.channels_last)
            x = torch.stack([frame.contiguous(memory_format=torch.channels_last) for frame in x])
        result = flat(cell.forward_sequence(x))
        eager = flat(eager_sequence(cell, x))
        exact = flat(eager_sequence(copy.deepcopy(cell).double(), x.double()))
        assert_matches(result, exact, eager)

    def test_steps_equal_the_sequence(self, cell):
        x = tensor(3, 2, 3, 5, 7)
        output, state = cell.forward_sequence(x)
        stepped, steps = None, []
        for frame in x:
            stepped = cell(frame, stepped)
            steps.append(stepped[0] if isinstance(stepped, tuple) else stepped)
        torch.testing.assert_close(torch.stack(steps), output)
        torch.testing.assert_close(stepped, state)

    def test_sequence_continues_from_its_state(self, cell):
        x = tensor(4, 2, 3, 5, 7)
        whole, final = cell.forward_sequence(x)
        first, state = cell.forward_sequence(x[:1])
        rest, state = cell.forward_sequence(x[1:], state)
        torch.testing.assert_close(torch.cat([first, rest]), whole)
        torch.testing.assert_close(state, final)

    def test_reset_starts_a_sample_anew_even_from_nan(self, cell):
        x = tensor(4, 2, 3, 5, 7)
        state = torch.utils._pytree.tree_map(lambda value: value.clone(), cell.initial_state(x[0]))
        for value in state if isinstance(state, tuple) else (state,):
            value[1] = float("nan")
        reset = torch.tensor([[False, True], [False, False], [True, False], [False, False]])
        output, _ = cell.forward_sequence(x, state, reset)
        torch.testing.assert_close(output[:, 1], cell.forward_sequence(x)[0][:, 1])
        torch.testing.assert_close(output[2:, 0], cell.forward_sequence(x[2:])[0][:, 0])

    def test_layout_stays_channels_last(self, cell):
        cell.to(memory_format=torch.channels_last)
        x = tensor(2, 3, 6, 5, layout="channels_last")
        state = cell(x, cell(x))
        for value in state if isinstance(state, tuple) else (state,):
            assert value.is_contiguous(memory_format=torch.channels_last)

    def test_gradients(self, cell):
        """Of the inputs, the state and every parameter, through three steps."""
        cell.double()
        x = tensor(3, 1, 3, 2, 3, dtype=torch.float64).requires_grad_()
        state = [tensor(1, 4, 2, 3, dtype=torch.float64, seed=k).requires_grad_() for k in (1, 2)]
        state = tuple(state) if isinstance(cell, ConvLSTMCell) else state[0]
        values = [value for value in (x, *(state if isinstance(state, tuple) else (state,)), *cell.parameters())]
        results = []
        for function in (cell.forward_sequence, lambda *a: eager_sequence(cell, *a)):
            results.append(torch.autograd.grad(sum(part.square().sum() for part in flat(function(x, state))), values))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)

    def test_gradcheck(self, cell):
        cell.double()
        x = tensor(1, 3, 2, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda value: cell(value, cell(value)), x, fast_mode=True)

    def test_autocast_keeps_the_state_in_float32(self, cell):
        x = tensor(2, 2, 3, 4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, state = cell.forward_sequence(x)
            loss = output.float().square().sum()
        loss.backward()
        kept = state[1] if isinstance(state, tuple) else state
        assert kept.dtype == torch.float32
        assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())
        torch.testing.assert_close(output.float(), cell.forward_sequence(x)[0], rtol=0.1, atol=0.05)

    def test_wide_state_stays_wide_beside_bfloat16(self, cell):
        cell.bfloat16()
        x = tensor(2, 3, 4, 4, dtype=torch.bfloat16)
        h = torch.zeros(2, 4, 4, 4)
        if isinstance(cell, ConvLSTMCell):
            h, c = cell(x, (h.bfloat16(), h))
            assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
        else:
            assert cell(x, h).dtype == torch.float32


class TestModules:
    def test_state_dict_deepcopy_and_pickle(self, cell):
        x = tensor(2, 3, 4, 5)
        expected = cell(x)
        fresh = copy.deepcopy(cell)
        for parameter in fresh.parameters():
            nn.init.zeros_(parameter)
        fresh.load_state_dict(cell.state_dict())
        for other in (fresh, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["lstm", "gru classic", "gru fast"])
    def test_compiles_to_one_graph(self, name):
        cell = CELLS[name]()
        torch._dynamo.reset()
        compiled = torch.compile(cell.forward_sequence, fullgraph=True, backend="aot_eager")
        x = tensor(3, 2, 3, 5, 7).requires_grad_()
        expected, actual = (flat(function(x)) for function in (cell.forward_sequence, compiled))
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(result[0].square().sum(), x) for result in (actual, expected)]
        torch.testing.assert_close(*gradients)

    def test_state_dict_keys_are_the_published_ones(self):
        classic = {f"{gate}_gate.{name}" for gate in ("update", "reset", "out") for name in ("weight", "bias")}
        fast = {"conv_x.weight", "conv_x.bias", "conv_h.weight", "layer_norm.weight", "layer_norm.bias"}
        depthwise = {"conv_x.0.weight", "conv_x.1.weight", "conv_x.1.bias", "conv_h.0.weight", "conv_h.1.weight"}
        assert set(ConvLSTMCell(3, 4).state_dict()) == {"conv.weight", "conv.bias"}
        assert set(ConvGRUCell(3, 4).state_dict()) == classic
        assert set(ConvGRUCell(3, 4, form="fast").state_dict()) == fast
        cell = ConvGRUCell(3, 4, form="fast", depthwise=True, layer_norm=False)
        assert set(cell.state_dict()) == depthwise

    def test_visioncore_parameter_counts(self):
        assert sum(p.numel() for p in ConvGRUCell(32, 64, form="fast").parameters()) == 166_528 - 64
        assert sum(p.numel() for p in ConvGRUCell(32, 64, form="fast", depthwise=True).parameters()) == 19_936 - 64

    @pytest.mark.parametrize("hidden", [33, 40, 48])
    def test_norm_rejects_indivisible_channels(self, hidden):
        with pytest.raises(ValueError, match="divisible"):
            ConvGRUCell(3, hidden, form="fast")

    def test_groups_must_divide_the_channels(self):
        assert ConvGRUCell(4, 8, form="fast", groups=4).conv_x.groups == 4
        assert ConvGRUCell(1, 8, form="fast", groups=4).conv_x.groups == 1
        with pytest.raises(ValueError, match="divisible"):
            ConvGRUCell(6, 8, form="fast", groups=4)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ConvLSTMCell(3, 4, kernel_size=2), "kernel_size must be odd.*got 2"),
            (lambda: ConvLSTMCell(3, 4, order="ifgg"), "order must hold"),
            (lambda: ConvGRUCell(3, 4, kernel_size=4), "kernel_size must be odd.*got 4"),
            (lambda: ConvGRUCell(3, 4, form="slow"), "form must be 'classic' or 'fast', got 'slow'"),
            (lambda: ConvGRUCell(3, 4, depthwise=True), "belong to form='fast'"),
            (lambda: ConvLSTMCell.from_torch_lstm(nn.LSTM(3, 4, bidirectional=True)), "unidirectional"),
            (lambda: ConvLSTMCell.from_torch_lstm(nn.LSTM(3, 4, proj_size=2)), "without projections"),
            (lambda: ConvLSTMCell.from_rvt({"conv3x3_dws.weight": torch.zeros(1)}), "depthwise convolution on h"),
        ],
    )
    def test_rejects_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_rejects_inputs(self, cell):
        x = tensor(2, 3, 4, 5)
        h = torch.zeros(2, 4, 4, 4)
        with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\] with C = in_channels = 3, got \(2, 4, 4, 5\)"):
            cell(tensor(2, 4, 4, 5))
        with pytest.raises(ValueError, match=r"h must be .* = \(2, 4, 4, 5\), got \(2, 4, 4, 4\)"):
            cell(x, (h, h) if isinstance(cell, ConvLSTMCell) else h)
        with pytest.raises(ValueError, match=r"x must be \[T, N, C, H, W\] with T at least 1, got \(0, 2, 3, 4, 5\)"):
            cell.forward_sequence(x[None][:0])
        with pytest.raises(ValueError, match=r"reset must be \[T, N\] = \(1, 2\), got \(2,\)"):
            cell.forward_sequence(x[None], reset=torch.zeros(2, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"reset must be of dtype torch.bool"):
            cell.forward_sequence(x[None], reset=torch.zeros(1, 2))
