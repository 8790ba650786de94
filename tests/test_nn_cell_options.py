"""Options of the recurrent cells against plain PyTorch written from their formulas; statistics of their masks."""

import copy

import pytest
import torch
from test_nn_recurrent import flat
from torch.nn import functional

from evkernels import ops
from evkernels.nn import ConvGRUCell, ConvLSTMCell
from evkernels.nn.cell_options import lstm_update, zoneout
from evkernels.testing import assert_matches, tensor

OPTIONS = {
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "stride, dilation, reflect, 5x5": {"stride": 3, "dilation": 2, "padding_mode": "reflect", "kernel_size": 5},
    "replicate": {"stride": 2, "padding_mode": "replicate", "kernel_size": 1},
    "group norm": {"norm_groups": 2},
    "layer norm, stride": {"norm_groups": 1, "stride": 2},
    "zoneout": {"zoneout": 0.2},
    "dropouts": {"recurrent_dropout": 0.4},
}
LSTM_OPTIONS = {
    **OPTIONS,
    "peephole": {"peephole": True, "order": "fiog"},
    "hard": {"gate_activation": "hardsigmoid", "activation": "hardtanh"},
    "zoneout h, c": {"zoneout": 0.2, "zoneout_c": 0.3},
    "cell dropout": {"cell_dropout": 0.4, "recurrent_dropout": 0.2},
    "all": {
        "peephole": True,
        "norm_groups": 4,
        "stride": 2,
        "padding_mode": "circular",
        "gate_activation": "hardsigmoid",
        "zoneout": 0.1,
        "zoneout_c": 0.2,
        "recurrent_dropout": 0.3,
        "cell_dropout": 0.3,
    },
}
FAST_OPTIONS = {key: value for key, value in OPTIONS.items() if "norm" not in key}
FAST_OPTIONS["depthwise, stride"] = {"depthwise": True, "stride": 2, "dilation": 2}
CELLS = {
    **{f"lstm {key}": (ConvLSTMCell, value) for key, value in LSTM_OPTIONS.items()},
    **{f"gru {key}": (ConvGRUCell, value) for key, value in OPTIONS.items()},
    **{f"gru fast {key}": (ConvGRUCell, {"form": "fast", **value}) for key, value in FAST_OPTIONS.items()},
}


@pytest.fixture(params=CELLS)
def cell(request):
    """In training mode, with norms and peepholes away from their neutral initial values."""
    cell_type, options = CELLS[request.param]
    cell = cell_type(3, 4, **options)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if "norm" in name or "peephole" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return cell


def convolved(cell, x, h, weight, bias, mode):
    """The convolution of [x, h], that of x with the cell's stride and dilation."""
    results = []
    for part, columns, stride, dilation in (
        (x, weight[:, :3], cell.stride, cell.dilation),
        (h, weight[:, 3:], 1, 1),
    ):
        padding = dilation * (cell.kernel_size // 2)
        part = functional.pad(part, (padding,) * 4, mode="constant" if mode == "zeros" else mode)
        results.append(functional.conv2d(part, columns, None, stride, 0, dilation))
    return results[0] + results[1] + bias[:, None, None]


def normed(norm, gates, blocks):
    """Each gate on its own, group by group."""
    if norm is None:
        return gates
    parts = gates.unflatten(1, (norm.num_groups, -1))
    dims = tuple(range(2, parts.dim()))
    centred = parts - parts.mean(dims, keepdim=True)
    parts = centred / (centred.square().mean(dims, keepdim=True) + norm.eps).sqrt()
    return parts.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]


def zoned(new, old, probability, training):
    if not probability:
        return new
    if training:
        return torch.where(torch.rand(new.shape) < probability, old, new)
    return probability * old + (1 - probability) * new


def plain_lstm(cell, x, state, mask):
    h, c = state
    gates = convolved(cell, x, h * mask, cell.conv.weight, cell.conv.bias, cell.conv.padding_mode)
    blocks = dict(zip(cell.order, normed(cell.norm, gates, 4).chunk(4, 1), strict=True))
    i, f, g, o = (blocks[name] for name in "ifgo")
    gate = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda v: (v / 6 + 0.5).clamp(0, 1)}[cell.gate_activation]
    squash = {"tanh": torch.tanh, "hardtanh": lambda v: v.clamp(-1, 1)}[cell.activation]
    w_i, w_f, w_o = (0, 0, 0) if cell.peephole is None else cell.peephole
    g = squash(g)
    if cell.training and cell.cell_dropout:
        g = functional.dropout(g, cell.cell_dropout)
    c_next = gate(f + w_f * c) * c + gate(i + w_i * c) * g
    h_next = zoned(gate(o + w_o * c_next) * squash(c_next), h, cell.zoneout, cell.training)
    return h_next, (h_next, zoned(c_next, c, cell.zoneout_c, cell.training))


def plain_gru(cell, x, h, mask):
    if cell.form == "fast":
        z, r, n = (cell.conv_x(x) + cell.layer_norm(cell.conv_h(h * mask))).chunk(3, 1)
        n = n + r.sigmoid() * h
    else:
        mode = cell.out_gate.padding_mode
        z, r = (
            convolved(cell, x, h * mask, gate.weight, gate.bias, mode) for gate in (cell.update_gate, cell.reset_gate)
        )
        z, r = normed(cell.norm_zr, torch.cat([z, r], 1), 2).chunk(2, 1)
        n = convolved(cell, x, r.sigmoid() * h * mask, cell.out_gate.weight, cell.out_gate.bias, mode)
        n = normed(cell.norm_n, n, 1)
    h_next = zoned((1 - z.sigmoid()) * h + z.sigmoid() * n.tanh(), h, cell.zoneout, cell.training)
    return h_next, h_next


def plain_sequence(cell, x, state):
    step = plain_lstm if isinstance(cell, ConvLSTMCell) else plain_gru
    mask = torch.ones(())
    if cell.training and cell.recurrent_dropout:
        mask = functional.dropout(torch.ones_like(flat((x, state))[1]), cell.recurrent_dropout)
    outputs = []
    for frame in x:
        output, state = step(cell, frame, state, mask)
        outputs.append(output)
    return torch.stack(outputs), state


def random_state(cell, x):
    zeros = cell.initial_state(x[0])
    if isinstance(zeros, tuple):
        return tuple(tensor(*value.shape, dtype=x.dtype, seed=k + 1) for k, value in enumerate(zeros))
    return tensor(*zeros.shape, dtype=x.dtype, seed=1)


class TestFormulas:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_evaluation_equals_plain_pytorch(self, cell, dtype):
        cell.to(dtype).eval()
        x = tensor(3, 2, 3, 9, 8, dtype=dtype)
        state = random_state(cell, x)
        wide = torch.utils._pytree.tree_map(torch.Tensor.double, state)
        exact = flat(plain_sequence(copy.deepcopy(cell).double(), x.double(), wide))
        actual = flat(cell.forward_sequence(x, state))
        assert_matches(actual, exact, flat(plain_sequence(cell, x, state)))
        assert actual[0].shape[-2:] == ((9 - 1) // cell.stride + 1, (8 - 1) // cell.stride + 1)

    def test_training_draws_the_masks_of_the_formula(self, cell):
        """From one seed: a mask of h for the sequence, then for every step new ones of g, h and c, in this order."""
        cell.double()
        x = tensor(4, 2, 3, 9, 8, dtype=torch.float64)
        state = random_state(cell, x)
        results = []
        for run in (cell.forward_sequence, lambda *arguments: plain_sequence(cell, *arguments)):
            torch.manual_seed(5)
            results.append(flat(run(x, state)))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)

    def test_gradcheck(self, cell):
        cell.double().eval()
        x = tensor(2, 1, 3, 7, 8, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda value: cell.forward_sequence(value)[0], x, fast_mode=True)

    def test_every_parameter_gets_its_gradient(self, cell):
        cell.double().eval()
        x = tensor(3, 2, 3, 9, 8, dtype=torch.float64)
        state = random_state(cell, x)
        gradients = []
        for run in (cell.forward_sequence, lambda *arguments: plain_sequence(cell, *arguments)):
            loss = sum(part.square().sum() for part in flat(run(x, state)))
            gradients.append(torch.autograd.grad(loss, list(cell.parameters())))
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)

    def test_steps_equal_the_sequence(self, cell):
        cell.eval()
        x = tensor(3, 2, 3, 9, 8)
        output, state = cell.forward_sequence(x)
        stepped, steps = None, []
        for frame in x:
            stepped = cell(frame, stepped)
            steps.append(stepped[0] if isinstance(stepped, tuple) else stepped)
        torch.testing.assert_close((torch.stack(steps), stepped), (output, state))

    def test_autocast(self, cell):
        x = tensor(2, 2, 3, 9, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, state = cell.forward_sequence(x)
        assert flat((output, state))[-1].dtype == torch.float32
        output.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())


def test_no_group_of_a_norm_crosses_gates():
    lstm, gru = ConvLSTMCell(3, 4, norm_groups=2), ConvGRUCell(3, 4, norm_groups=2)
    assert [norm.num_groups for norm in (lstm.norm, gru.norm_zr, gru.norm_n)] == [8, 4, 2]


class TestLstmUpdate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_is_the_op_without_options(self, dtype):
        gates, c = tensor(2, 12, 4, 5, dtype=dtype), tensor(2, 3, 4, 5, dtype=dtype, seed=1)
        torch.testing.assert_close(lstm_update(gates, c, "fiog"), ops.lstm_gates(gates, c, "fiog"))

    @pytest.mark.parametrize(
        ("dtype", "c_dtype"),
        [
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_is_the_op_under_autocast(self, dtype, c_dtype):
        gates, c = tensor(2, 12, 4, 5, dtype=dtype), tensor(2, 3, 4, 5, dtype=c_dtype, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(lstm_update(gates, c), ops.lstm_gates(gates, c))

    def test_cell_dropout_reaches_h(self):
        gates, c = tensor(1, 400, 4, 5), tensor(1, 100, 4, 5)
        h, c_next = lstm_update(gates, c, cell_dropout=0.5)
        assert ((h == 0) == (c_next == 0)).all()
        assert 0.4 < (c_next == 0).float().mean() < 0.6


class TestZoneout:
    def test_mixes_old_and_new_in_proportion(self):
        new, old = torch.ones(100, 100), torch.zeros(100, 100)
        assert zoneout(new, old, 0.3, training=True).mean() == pytest.approx(0.7, abs=0.02)
        assert zoneout(new, old, 0.3, training=False).mean() == pytest.approx(0.7, abs=1e-6)
        assert zoneout(new, old, 0, training=True) is new

    def test_keeps_everything_at_one(self):
        cell = ConvLSTMCell(3, 4, zoneout=1.0, zoneout_c=1.0)
        x = tensor(3, 2, 3, 5, 7)
        state = random_state(cell, x)
        torch.testing.assert_close(cell.forward_sequence(x, state)[1], state, rtol=0, atol=0)

    def test_masks_of_successive_steps_differ(self):
        cell = ConvGRUCell(3, 4, zoneout=0.5)
        output, _ = cell.forward_sequence(tensor(3, 2, 3, 9, 8))
        kept = (output[1:] == output[:-1]).float()
        assert 0.4 < kept.mean() < 0.6
        assert 0.2 < kept[0][kept[1] == 1].mean() < 0.8

    def test_reset_samples_keep_zero_not_their_past(self):
        cell = ConvGRUCell(3, 4, zoneout=1.0)
        x = tensor(1, 2, 3, 5, 7)
        output, _ = cell.forward_sequence(x, random_state(cell, x), torch.tensor([[False, True]]))
        assert output[0, 1].abs().max() == 0
        assert output[0, 0].abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvLSTMCell(3, 4, stride=0), "stride must be at least 1, got 0"),
        (lambda: ConvGRUCell(3, 4, dilation=0), "dilation must be at least 1, got 0"),
        (lambda: ConvLSTMCell(3, 4, zoneout=1.5), r"zoneout must be in \[0, 1\], got 1.5"),
        (lambda: ConvLSTMCell(3, 4, zoneout_c=-1), r"zoneout_c must be in \[0, 1\], got -1"),
        (lambda: ConvGRUCell(3, 4, recurrent_dropout=1), r"recurrent_dropout must be in \[0, 1\), got 1"),
        (lambda: ConvLSTMCell(3, 4, cell_dropout=1.0), r"cell_dropout must be in \[0, 1\), got 1.0"),
        (lambda: ConvLSTMCell(3, 4, norm_groups=3), "norm_groups must divide hidden_channels = 4, got 3"),
        (lambda: ConvGRUCell(3, 4, norm_groups=0), "norm_groups must divide hidden_channels = 4, got 0"),
        (lambda: ConvGRUCell(3, 4, form="fast", norm_groups=1), "norm_groups belongs to form='classic'"),
        (lambda: ConvLSTMCell(3, 4, activation="relu"), "activation must be one of 'tanh', 'hardtanh', got 'relu'"),
        (lambda: ConvLSTMCell(3, 4, gate_activation="hard"), "gate_activation must be one of 'sigmoid', 'hardsigmoid'"),
        (lambda: ConvLSTMCell(3, 4, stride=2)(torch.zeros(1, 3, 4, 4), [torch.zeros(1, 4, 4, 4)] * 2), "after the str"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
