"""Exchanges layers of an existing model for ones that run on this package's ops.

What may be fused is read off the structure alone: the order in which modules run is known inside torch.nn.Sequential
and nowhere else, so that only there neighbours become one op. Depthwise convolutions are exchanged wherever they are.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evkernels.nn.converted import E2VIDConvGRU, E2VIDConvLSTM, FusedSequential, Path, RVTConvLSTM, Step, take_place
from evkernels.nn.depthwise import DepthwiseConv2d
from evkernels.ops import checks

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS = {
    nn.Identity: lambda module: "none",
    nn.ReLU: lambda module: "relu",
    nn.SiLU: lambda module: "silu",
    nn.Sigmoid: lambda module: "sigmoid",
    nn.GELU: lambda module: _GELUS[module.approximate],
}
# Class name of a recurrent cell -> what takes its place, its parameters' modules, and how many states it has.
_CELLS = {
    "DWSConvLSTM2d": (RVTConvLSTM, ({"conv1x1"}, {"conv1x1", "conv3x3_dws"}), 2),
    "ConvLSTM": (E2VIDConvLSTM, ({"Gates"},), 2),
    "ConvGRU": (E2VIDConvGRU, ({"reset_gate", "update_gate", "out_gate"},), 1),
}


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        model: The converted model: the one given, or what took its place if it is itself such a layer.
        changed: (name of the module, what takes its place).
        kept: (name of the module, why it was left alone) of the candidates that were not exchanged.
    """

    model: nn.Module
    changed: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} changed, {len(self.kept)} left alone"]
        lines += [f"  changed     {name or '(the model)'}: {what}" for name, what in self.changed]
        lines += [f"  left alone  {name or '(the model)'}: {why}" for name, why in self.kept]
        return "\n".join(lines)


def convert(model: nn.Module, fold_batch_norm: bool = False, verbose: bool = True) -> Conversion:
    """Exchanges the layers of a model for which there are kernels, in place.

    Exchanged are depthwise convolutions (Conv2d with as many groups as channels); in torch.nn.Sequential a depthwise
    convolution, activation, 1 x 1 convolution and activation that follow one another, for one op; and the recurrent
    cells of RVT (DWSConvLSTM2d) and E2VID (ConvLSTM, ConvGRU). Parameters and buffers are shared with what was there,
    not copied, and the state dict keeps its keys: optimisers and checkpoints go on working. Results stay the same up
    to rounding, in training mode too.

    Args:
        model: Changed in place, except that it cannot take its own place: see Conversion.model.
        fold_batch_norm: Also fuse across BatchNorm2d. At every call in which the norm is in evaluation mode its current
            statistics are folded into the weights, which are rounded to their dtype once more; in training mode the
            modules run one by one.
        verbose: Print the result.

    Returns:
        Conversion: what was changed, and what was left alone and why.

    A cell is known by its class name and its parameters, and exchanged only if both compute the same on a small input.
    Left alone are subclasses with a forward of their own, parametrised modules and modules with hooks, and options that
    the ops do not have. Later changes to the model's structure are not seen: convert last.
    """
    conversion = Conversion(model)
    conversion.model = _Converter(conversion, fold_batch_norm).visit(model, "", False)
    if verbose:
        print(conversion)
    return conversion


class _Converter:
    def __init__(self, conversion: Conversion, fold: bool):
        self.conversion = conversion
        self.fold = fold
        self.seen: dict[nn.Module, nn.Module] = {}

    def visit(self, module: nn.Module, name: str, in_sequence: bool) -> nn.Module:
        """What takes the place of `module`; `in_sequence`: a sequence around it takes care of its order."""
        if module not in self.seen:
            self.seen[module] = module
            self.seen[module] = self._visit(module, name, in_sequence)
        return self.seen[module]

    def _visit(self, module, name, in_sequence):
        if type(module).__module__.startswith("evkernels.nn."):
            return module
        if type(module).__name__ in _CELLS:
            cell, why = _converted_cell(module)
            if why:
                self.conversion.kept.append((name, why))
            else:
                self.conversion.changed.append((name, f"{type(module).__name__} on the package's gates"))
                module = cell
        is_sequence = _is_sequence(module)
        for child_name, child in list(module._modules.items()):
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                module._modules[child_name] = self.visit(child, path, is_sequence)
        if _is_depthwise(module):
            why = _why_not_depthwise(module)
            if why:
                self.conversion.kept.append((name, why))
                return module
            self.conversion.changed.append((name, "DepthwiseConv2d"))
            padding = (_padding(module),) * 2
            return take_place(DepthwiseConv2d, module, activation="none", padding=padding)
        if is_sequence and not in_sequence:
            return self._sequence(module, name)
        return module

    def _sequence(self, module, name):
        leaves, steps, position = _leaves(module), [], 0
        while position < len(leaves):
            step, why = _step(leaves[position:], self.fold)
            steps.append(step)
            position += len(step.members)
            if why:
                self.conversion.kept.append((".".join(filter(None, (name, *step.members[-1]))), why))
        if not any(step.fused for step in steps):
            return module
        for step in steps:
            if step.fused:
                parts = " + ".join(".".join(path) for path in step.members)
                self.conversion.changed.append((name, f"one op of {parts}"))
        return take_place(FusedSequential, module, steps=tuple(steps))


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not _hooks(module)


def _leaves(module: nn.Module, path: Path = ()) -> list[tuple[Path, nn.Module]]:
    """The modules that a sequence runs one after the other, nested sequences taken apart."""
    if not _is_sequence(module):
        return [(path, module)]
    return [leaf for name, child in module._modules.items() for leaf in _leaves(child, (*path, name))]


def _step(leaves: list[tuple[Path, nn.Module]], fold: bool) -> tuple[Step, str | None]:
    """What the first of these modules begins, and why it is no longer."""
    first, depthwise = leaves[0]
    single = Step(first, members=(first,))
    if type(depthwise) is not DepthwiseConv2d or depthwise.activation != "none" or _hooks(depthwise):
        return single, None
    members, rest = [first], leaves[1:]

    def take(accepts):
        nonlocal rest
        if rest and accepts(rest[0][1]):
            path, module = rest[0]
            members.append(path)
            rest = rest[1:]
            return path, module
        return None, None

    norm, _ = take(_is_norm) if fold else (None, None)
    _, activation = take(_is_activation)
    pointwise, _ = take(lambda module: _is_pointwise(module, depthwise))
    output_norm, output_activation = None, None
    if pointwise:
        output_norm, _ = take(_is_norm) if fold else (None, None)
        _, output_activation = take(_is_activation)
    why = None
    if pointwise is None and rest:
        kind = type(rest[0][1]).__name__
        if isinstance(rest[0][1], nn.BatchNorm2d) and not fold:
            kind = f"{kind}, which fold_batch_norm=True would fold in evaluation mode"
        why = f"not fused with what follows: {kind}"
    if len(members) == 1:
        return single, why
    step = Step(
        first, norm, _name_of(activation), pointwise, output_norm, _name_of(output_activation), True, tuple(members)
    )
    return step, why


def _name_of(activation: nn.Module | None) -> str:
    return "none" if activation is None else _ACTIVATIONS[type(activation)](activation)


def _is_activation(module: nn.Module) -> bool:
    return type(module) in _ACTIVATIONS and not _hooks(module)


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and not _hooks(module)


def _is_pointwise(module: nn.Module, depthwise: nn.Conv2d) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.in_channels == depthwise.out_channels
        and module.weight.shape[1:] == (depthwise.out_channels, 1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.weight.dtype == depthwise.weight.dtype
        and depthwise.dilation == (1, 1)
        and not _hooks(module)
    )


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels


def _why_not_depthwise(module: nn.Conv2d) -> str | None:
    if type(module) is not nn.Conv2d:
        return f"is a {type(module).__name__}, which may compute something else than Conv2d"
    if _hooks(module):
        return "has hooks"
    (height, width), stride, dilation = module.kernel_size, module.stride, module.dilation
    reasons = {
        f"makes {module.out_channels // module.in_channels} channels of each": module.out_channels
        != module.in_channels,
        f"its filter of {height} x {width} is not square, odd and at most 31": height != width
        or height % 2 == 0
        or height > 31,
        f"its stride {stride} is not 1 or 2": stride not in ((1, 1), (2, 2)),
        f"its dilation {dilation} differs by direction": dilation[0] != dilation[1],
        f"its dilation {dilation[0]} at stride 2 has no kernel": stride == (2, 2) and dilation[0] > 1,
        f"its padding {module.padding} differs by direction": _padding(module) is None,
        f"its padding mode is {module.padding_mode}": module.padding_mode not in ("zeros", "reflect", "replicate"),
        f"its weight is {module.weight.dtype}": module.weight.dtype not in checks.FLOATING,
    }
    return next((why for why, applies in reasons.items() if applies), None)


def _padding(module: nn.Conv2d) -> int | None:
    """What is added at every border, None if borders differ."""
    if isinstance(module.padding, str):
        return 0 if module.padding == "valid" else (module.kernel_size[0] - 1) * module.dilation[0] // 2
    return module.padding[0] if module.padding[0] == module.padding[1] else None


def _hooks(module: nn.Module) -> bool:
    """Does a call of the module do more than its class's forward?"""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)


def _converted_cell(module: nn.Module) -> tuple[nn.Module | None, str | None]:
    """What takes a recurrent cell's place, or None and why nothing does."""
    kind, parts, states = _CELLS[type(module).__name__]
    found = {name.rpartition(".")[0] for name in module.state_dict()}
    if found not in parts:
        return None, f"{type(module).__name__}: its parameters are those of {sorted(found)}, of no cell known"
    if any(_hooks(part) for part in module.modules()):
        return None, "has hooks"
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
        return None, "has dropout"
    convolutions = [module.get_submodule(part) for part in sorted(found)]
    if any(type(convolution) is not nn.Conv2d for convolution in convolutions):
        return None, f"{type(module).__name__}: its convolutions are of a class of their own"
    cell = take_place(kind, module)
    try:
        agree = _agree(module, cell, convolutions[0], states)
    except Exception as error:  # whatever another project's forward may raise
        return None, f"{type(module).__name__}: a small input raised {error}"
    return (cell, None) if agree else (None, f"{type(module).__name__}: does not compute what its name says")


@torch.no_grad()
def _agree(cell: nn.Module, other: nn.Module, first: nn.Conv2d, states: int) -> bool:
    """Do both compute the same on a small input, with a state and without? `first` is one of their convolutions."""
    hidden = first.out_channels // 4 if states == 2 else first.out_channels
    inputs = first.in_channels - hidden

    def wave(channels: int, frequency: float) -> Tensor:
        index = torch.arange(channels * 20, dtype=torch.float64, device=first.weight.device)
        return (index * frequency).sin().reshape(1, channels, 4, 5).to(first.weight.dtype)

    x, state = wave(inputs, 0.7), [wave(hidden, 0.31 * (k + 1)) for k in range(states)]
    tolerance = 100 * torch.finfo(first.weight.dtype).eps
    for given in (None, tuple(state) if states == 2 else state[0]):
        expected, actual = (function(x, given) for function in (cell, other))
        expected, actual = ((value,) if isinstance(value, Tensor) else value for value in (expected, actual))
        if len(expected) != len(actual):
            return False
        if not all(
            torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
            for a, b in zip(expected, actual, strict=True)
        ):
            return False
    return True
