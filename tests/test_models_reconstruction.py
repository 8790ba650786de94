"""FireNet, E2VID, CISTA-TC: published keys and values, plain PyTorch's numbers over long streams, real checkpoints."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from evkernels import use_backend
from evkernels.events import Events
from evkernels.models import CistaTC, E2VIDRecurrent, FireNet
from evkernels.models.e2vid_layers import GatesConvLSTM
from evkernels.ops import voxel_grid
from evkernels.reconstruct.stream import stream_images
from evkernels.testing import assert_matches, tensor

SMALL = {
    "firenet": lambda: FireNet(3, 4),
    "e2vid": lambda: E2VIDRecurrent(3, 2, 4, 1, norm="BN", use_upsample_conv=False),
    "e2vid upsampling": lambda: E2VIDRecurrent(3, 2, 4, 2),
    "cista-tc": lambda: CistaTC(4, depth=2, num_bins=3),
}


def small(name: str) -> nn.Module:
    """A small network in evaluation mode whose batch normalisations have statistics of their own."""
    torch.manual_seed(0)
    model = SMALL[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.fixture(params=SMALL)
def model(request):
    return small(request.param)


class Plain:
    """The networks as functions of a state dict, in plain PyTorch."""

    def __init__(self, model: nn.Module):
        self.weights = model.state_dict()
        self.run = {FireNet: self.firenet, E2VIDRecurrent: self.e2vid, CistaTC: self.cista}[type(model)]

    def conv(self, name, x, stride=1, reflect=False):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        padding = weight.shape[-1] // 2
        if reflect:
            x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
        return F.conv2d(x, weight, bias, stride, padding)

    def norm(self, name, x):
        if f"{name}.weight" not in self.weights:
            return x
        mean, variance, weight, bias = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def gru(self, name, x, h):
        h = torch.zeros_like(x) if h is None else h
        xh = torch.cat([x, h], 1)
        z, r = (torch.sigmoid(self.conv(f"{name}.{gate}", xh)) for gate in ("update_gate", "reset_gate"))
        n = torch.tanh(self.conv(f"{name}.out_gate", torch.cat([x, h * r], 1)))
        return h * (1 - z) + n * z

    def lstm(self, name, x, state, reflect=False):
        h, c = (torch.zeros_like(x),) * 2 if state is None else state
        i, f, o, g = self.conv(f"{name}.Gates", torch.cat([x, h], 1), reflect=reflect).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def residual(self, name, x):
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
        return (self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y)) + x).relu()

    def firenet(self, grid, state):
        h0, h1 = state or (None, None)
        h0 = self.gru("net.head.recurrent_block", self.conv("net.head.conv.conv2d", grid).relu(), h0)
        h1 = self.gru("net.resblocks.0.recurrent_block", self.residual("net.resblocks.0.conv", h0), h1)
        return self.conv("net.pred.conv2d", self.residual("net.resblocks.1", h1)), (h0, h1)

    def e2vid(self, grid, state):
        head = x = self.conv("unetrecurrent.head.conv2d", grid).relu()
        states = []
        while f"unetrecurrent.encoders.{len(states)}.conv.conv2d.weight" in self.weights:
            name = f"unetrecurrent.encoders.{len(states)}"
            x = self.norm(f"{name}.conv.norm_layer", self.conv(f"{name}.conv.conv2d", x, stride=2)).relu()
            states.append(self.lstm(f"{name}.recurrent_block", x, state and state[len(states)]))
            x = states[-1][0]
        k = 0
        while f"unetrecurrent.resblocks.{k}.conv1.weight" in self.weights:
            x = self.residual(f"unetrecurrent.resblocks.{k}", x)
            k += 1
        for k, (skip, _) in enumerate(reversed(states)):
            name, x = f"unetrecurrent.decoders.{k}", x + skip
            if f"{name}.conv2d.weight" in self.weights:
                x = self.conv(f"{name}.conv2d", F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
            else:
                x = F.conv_transpose2d(x, self.weights[f"{name}.transposed_conv2d.weight"], None, 2, 2, 1)
            x = self.norm(f"{name}.norm_layer", x).relu()
        x = self.conv("unetrecurrent.pred.conv2d", x + head)
        return self.norm("unetrecurrent.pred.norm_layer", x).sigmoid(), states

    def cista(self, grid, state):
        def conv(name, x, stride=1):
            return self.conv(f"{name}.conv2d", x, stride, reflect=True)

        image, before, lstm = state or (torch.zeros_like(grid[:, :1]), None, None)
        x = conv("W0", torch.cat([conv("We", grid), conv("Wi", image)], 1), 2)
        z = conv("P0", x)
        before = torch.zeros_like(z) if before is None else before
        for k in range(sum(name.endswith("Lambda") for name in self.weights)):
            similar = torch.sigmoid(conv("one_conv_for_prev", before) * conv("one_conv_for_cur", z))
            temporal = similar * (before - z) * self.weights[f"alpha.{k}"]
            y = conv(f"lista_blocks.{k}.P", x - conv(f"lista_blocks.{k}.D", z)) + z + temporal
            threshold = self.weights[f"lista_blocks.{k}.Lambda"]
            z = (y - threshold).relu() - (-y - threshold).relu()
        h, c = self.lstm("Dg.recurrent_block", conv("Dg.conv", z).relu(), lstm, reflect=True)
        x = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        image = conv("final_conv", conv("upsamp_conv", x)).sigmoid()
        return image, (image, z, (h, c))


def streamed(step, grids) -> list[torch.Tensor]:
    """All images [T, N, 1, H, W], and the last state's tensors."""
    state, images = None, []
    with torch.no_grad():
        for grid in grids:
            image, state = step(grid, state)
            images.append(image)
    return [torch.stack(images), *tree_leaves(state)]


def assert_streams_match(model, grids):
    exact = streamed(Plain(copy.deepcopy(model).double()).run, grids.double())
    eager = streamed(Plain(model).run, grids)
    last = [grid.contiguous(memory_format=torch.channels_last) for grid in grids]
    others = [streamed(Plain(copy.deepcopy(model).to(memory_format=torch.channels_last)).run, last)]
    with use_backend("reference"):
        others.append(streamed(model, grids))
    assert_matches(streamed(model, grids), exact, eager, others=others)
    model.to(memory_format=torch.channels_last)
    assert_matches(streamed(model, last), exact, eager, others=others)


class TestPublished:
    def test_e2vid_lightweight(self):
        """E2VID_lightweight: 74 tensors, 10,712,098 parameters."""
        model = E2VIDRecurrent(num_encoders=3, norm="BN", use_upsample_conv=False)
        shapes = {name.removeprefix("unetrecurrent."): tuple(v.shape) for name, v in model.state_dict().items()}
        assert len(shapes) == 74
        assert sum(parameter.numel() for parameter in model.parameters()) == 10_712_098
        expected = {
            "head.conv2d.weight": (32, 5, 5, 5),
            "head.conv2d.bias": (32,),
            "encoders.0.conv.conv2d.weight": (64, 32, 5, 5),
            "encoders.2.conv.conv2d.weight": (256, 128, 5, 5),
            "encoders.1.conv.norm_layer.running_var": (128,),
            "encoders.0.recurrent_block.Gates.weight": (256, 128, 3, 3),
            "encoders.2.recurrent_block.Gates.weight": (1024, 512, 3, 3),
            "encoders.2.recurrent_block.Gates.bias": (1024,),
            "resblocks.1.conv2.weight": (256, 256, 3, 3),
            "resblocks.0.bn1.num_batches_tracked": (),
            "decoders.0.transposed_conv2d.weight": (256, 128, 5, 5),
            "decoders.2.transposed_conv2d.weight": (64, 32, 5, 5),
            "decoders.2.norm_layer.bias": (32,),
            "pred.conv2d.weight": (1, 32, 1, 1),
            "pred.norm_layer.weight": (1,),
        }
        assert {name: shapes.get(name) for name in expected} == expected
        assert "encoders.0.conv.conv2d.bias" not in shapes

    def test_e2vid_upsampling_names(self):
        shapes = {name: tuple(value.shape) for name, value in E2VIDRecurrent(num_encoders=3).state_dict().items()}
        assert shapes["unetrecurrent.decoders.0.conv2d.weight"] == (128, 256, 5, 5)
        assert shapes["unetrecurrent.decoders.0.conv2d.bias"] == (128,)
        assert not any("transposed" in name or "norm" in name or "bn" in name for name in shapes)

    def test_parameters(self):
        assert sum(parameter.numel() for parameter in FireNet().parameters()) == 37_777
        assert sum(parameter.numel() for parameter in CistaTC().parameters()) == 669_251

    def test_conv_lstm_of_e2vid(self):
        """The values of the original for weights, inputs and states that are sines."""
        cell = GatesConvLSTM(3, 4).double()
        with torch.no_grad():
            for j, parameter in enumerate(cell.parameters()):
                positions = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_(0.5 * torch.sin(0.37 * positions + 0.11 * j).reshape(parameter.shape))
        assert list(cell.state_dict()) == ["Gates.weight", "Gates.bias"]

        def wave(frequency, channels):
            positions = torch.arange(2 * channels * 15, dtype=torch.float64)
            return torch.sin(frequency * positions).reshape(2, channels, 3, 5)

        h, c = cell(wave(0.23, 3), (wave(0.31, 4), wave(0.17, 4)))
        assert h.flatten()[[1, 60, -1]].tolist() == pytest.approx([-0.603293, 0.001524, -0.005479], abs=1e-6)
        assert c.sum().item() == pytest.approx(-26.324411, abs=1e-6)


class TestStreams:
    def test_hundred_steps_match_plain_pytorch(self, model):
        grids = tensor(100, 2, 3, 12, 16) * (tensor(100, 2, 3, 12, 16, seed=1) > 0.5)
        assert_streams_match(model, grids)

    def test_all_backends(self, backend):
        for name in SMALL:
            model, grids = small(name), tensor(3, 1, 3, 4, 8)
            exact = streamed(Plain(copy.deepcopy(model).double()).run, grids.double())
            eager = streamed(Plain(model).run, grids)
            actual = streamed(model.to(backend.device), grids.to(backend.device))
            others = []
            with use_backend("reference"):
                others.append(streamed(model, grids.to(backend.device)))
            assert_matches(actual, exact, eager, what=name, others=others)

    def test_steps_do_not_write_to_their_inputs(self, model):
        grid, state = tensor(1, 3, 8, 8), None
        for _ in range(2):
            kept = copy.deepcopy((grid, state))
            with torch.no_grad():
                _, following = model(grid, state)
            torch.testing.assert_close((grid, state), kept, rtol=0, atol=0)
            state = following

    def test_samples_do_not_mix(self, model):
        grids = tensor(3, 2, 3, 8, 8).double()
        model.double()
        together, alone = streamed(model, grids), streamed(model, grids[:, 1:])
        torch.testing.assert_close(together[0][:, 1:], alone[0])

    def test_gradients_through_three_steps(self, model):
        model.double()
        grids = tensor(3, 1, 3, 4, 8).double().requires_grad_()
        results = []
        for step in (model, Plain(model).run):
            if isinstance(model, CistaTC):
                step = _detaching(step)
            state, total = None, 0
            for grid in grids:
                image, state = step(grid, state)
                total = total + image.sin().sum()
            results.append(torch.autograd.grad(total, grids)[0])
        assert results[0][0].abs().max() > 0
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)

    def test_trains(self, model):
        """Every parameter gets a gradient, and a detached state truncates it."""
        model.train()
        first, second = tensor(1, 3, 8, 8).requires_grad_(), tensor(1, 3, 8, 8, seed=1)
        _, state = model(first)
        image, _ = model(second, torch.utils._pytree.tree_map(torch.Tensor.detach, state))
        image.sum().backward()
        assert first.grad is None
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_autocast(self, model):
        grids = tensor(2, 1, 3, 8, 8)
        expected = streamed(model, grids)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = streamed(model, grids)[0]
        torch.testing.assert_close(image.float(), expected, rtol=0.05, atol=0.05)

    def test_compiles_to_one_graph(self, model):
        torch._dynamo.reset()
        grids = tensor(2, 1, 3, 8, 8)
        with torch.no_grad():
            _, state = model(grids[0])
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(grids[1], state), model(grids[1], state))


def _detaching(step):
    def wrapped(grid, state):
        image, (kept, *rest) = step(grid, state)
        return image, (kept.detach(), *rest)

    return wrapped


class TestCheckpoints:
    def test_round_trip(self, model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = type(model).from_state_dict(torch.load(file, weights_only=True)).eval()
        grids = tensor(2, 1, 3, 8, 8)
        for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(streamed(copied, grids), streamed(model, grids), rtol=0, atol=0)
        assert list(other.state_dict()) == list(model.state_dict())

    def test_strict(self, model):
        weights = model.state_dict()
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(weights | {"another": torch.zeros(1)})
        # BatchNorm2d does without its count, which early versions did not have.
        for missing in [name for name in weights if not name.endswith("num_batches_tracked")][1::7]:
            kept = {name: value for name, value in weights.items() if name != missing}
            with pytest.raises((RuntimeError, KeyError, ValueError), match=missing.split(".")[-1]):
                model.load_state_dict(kept)

    def test_cista_with_other_weights_in_an_iteration(self):
        weights = small("cista-tc").state_dict()
        weights["lista_blocks.1.D.conv2d.bias"] = weights["lista_blocks.1.D.conv2d.bias"] + 1
        with pytest.raises(ValueError, match=r"lista_blocks\.1\.D\.conv2d\.bias must equal lista_blocks\.0\.D"):
            CistaTC.from_state_dict(weights)

    def test_firenet(self, recordings):
        weights = published(recordings, "firenet_convgru.pth")
        assert list(FireNet().state_dict()) == list(weights)
        grids = real_grids(recordings, 100)[..., 70:111, 100:137]
        assert_streams_match(FireNet.from_state_dict(weights).eval(), grids)

    def test_cista_tc(self, recordings):
        """One step from each of the states that float64 passes through in a hundred frames.

        Free for a hundred frames, the network's feedback amplifies rounding errors ten thousandfold, give or take a
        factor of three as the bits fall: plain PyTorch's two layouts are then as far apart as either and the kernels.
        """
        weights = published(recordings, "cista_tc_convlstm.pth.tar")
        assert list(CistaTC().state_dict()) == list(weights)
        grids = real_grids(recordings, 100)[:, 0, :, 80:96, 150:174]
        model = CistaTC.from_state_dict(weights).eval()
        exact_step, states = Plain(copy.deepcopy(model).double()).run, []
        for grid in grids.double():
            states.append(exact_step(grid[None], states[-1] if states else None)[1])
        before = tree_map(lambda *parts: torch.cat(parts).float(), *states[:-1])
        with torch.no_grad():
            exact = tree_leaves(exact_step(grids[1:].double(), tree_map(torch.Tensor.double, before)))
            for layout in (torch.contiguous_format, torch.channels_last):
                model.to(memory_format=layout)
                frames = grids[1:].contiguous(memory_format=layout)
                eager, actual = (tree_leaves(step(frames, before)) for step in (Plain(model).run, model))
                assert_matches(actual, exact, eager)

    @pytest.mark.parametrize(
        ("network", "file", "at_frame", "at_end"),
        [(FireNet, "firenet_convgru.pth", 0.629, 0.60), (CistaTC, "cista_tc_convlstm.pth.tar", 0.737, 0.716)],
    )
    def test_images_correlate_with_the_camera_frame(self, network, file, at_frame, at_end, recordings):
        """The camera's own frame at 155.1 ms; the ninth window of 5,000 events ends at 155.8 ms, the tenth at 174."""
        Image = pytest.importorskip("PIL.Image", reason="reading the frame needs Pillow (extra demo)")
        frame = np.asarray(Image.open(recordings / "slider_depth_frames" / "frame_00000004.png").convert("L"))
        model = network.from_state_dict(published(recordings, file)).eval()
        images = list(stream_images(model, slider_depth(recordings).windows(count=5000)))
        found = [np.corrcoef(frame.ravel(), image.numpy().ravel())[0, 1] for image in images]
        assert found[8] > at_frame
        assert found[9] > at_end


def published(recordings, name):
    return torch.load(recordings / "checkpoints" / name, weights_only=True, map_location="cpu")["state_dict"]


def slider_depth(recordings) -> Events:
    with np.load(recordings / "npz" / "slider_depth.npz") as events:
        return Events(*(events[name] for name in ("x", "y", "t", "p")), int(events["width"]), int(events["height"]))


def real_grids(recordings, count: int) -> torch.Tensor:
    """slider_depth as normalised voxel grids [count, 1, 5, 180, 240]."""
    windows = slider_depth(recordings).windows(count=50_000 // count)
    grids = [voxel_grid(*part.tensors(), bins=5, height=180, width=240, normalize="e2vid") for part in windows]
    return torch.stack(grids)[:, None]


class TestSizes:
    @pytest.mark.parametrize("size", [(1, 1), (5, 7), (17, 2)])
    def test_firenet_takes_any(self, size):
        image, _ = small("firenet")(torch.zeros(2, 3, *size))
        assert image.shape == (2, 1, *size)

    @pytest.mark.parametrize("name", ["e2vid", "e2vid upsampling"])
    def test_e2vid_says_what_to_pad_to(self, name):
        assert small(name)(torch.zeros(1, 3, 12, 4))[0].shape == (1, 1, 12, 4)
        with pytest.raises(ValueError, match="multiples of 4, got 9x12: pad it to 12x12"):
            small(name)(torch.zeros(1, 3, 9, 12))

    def test_cista_says_what_to_pad_to(self):
        with pytest.raises(ValueError, match="multiples of 2, got 5x6: pad it to 6x6"):
            small("cista-tc")(torch.zeros(1, 3, 5, 6))
        with pytest.raises(ValueError, match="at least 4x4"):
            small("cista-tc")(torch.zeros(1, 3, 2, 6))

    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8)])
    def test_rejects_other_grids(self, model, shape):
        with pytest.raises(ValueError, match="grid must"):
            model(torch.zeros(shape))

    def test_rejects_states_of_another_size(self, model):
        _, state = model(torch.zeros(1, 3, 8, 8))
        with pytest.raises((ValueError, RuntimeError), match=r"must be|must match"):
            model(torch.zeros(1, 3, 8, 16), state)

    def test_rejects_unknown_normalisation(self):
        with pytest.raises(ValueError, match="norm must be 'BN' or None, got 'IN'"):
            E2VIDRecurrent(norm="IN")
