"""Registers an op with PyTorch's dispatcher: schema, reference as the default kernel, fake, autograd, autocast.

`define` is called once per op by the file that holds its contract. Kernels for a device key come from `evkernels._C`
(CPU, CUDA) or `triton_kernels`; the reference stays underneath them, so that an op without a kernel is slow and never
missing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("evkernels", "FRAGMENT")

# name -> schema of every registered op, in order of definition; read by status() and by the tests' emulated device.
schemas: dict[str, str] = {}
# name -> the reference as a kernel.
default_kernels: dict[str, Callable] = {}
# name -> a kernel made of other registered ops and PyTorch's own, for backends that have none of their own.
composed_kernels: dict[str, Callable] = {}
# name -> the dispatch keys at which that kernel is registered.
composed_keys: dict[str, tuple[str, ...]] = {}


def define(schema: str, *, reference: Callable, fake: Callable, layout_of: int | None = None) -> torch._ops.OpOverload:
    """Registers `evkernels::<schema>` with `reference` as the kernel of every device and `fake` as its shape rule.

    `layout_of` is the position of the argument whose layout the outputs take: the reference's are brought to it, so
    that its strides are those of the kernels and of `fake`.
    """
    name = schema.partition("(")[0]
    schemas[name] = schema
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    default_kernels[name] = reference if layout_of is None else _in_layout_of(layout_of, reference)
    _library.impl(name, default_kernels[name], "CompositeExplicitAutograd")
    op = getattr(torch.ops.evkernels, name).default
    if op._schema.is_mutable:
        _library.impl(name, _noting_writes(op), "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"evkernels::{name}", fake, lib=_library)
    return op


def _noting_writes(op: torch._ops.OpOverload) -> Callable:
    """Tells autograd of the tensors that `op` writes to, as PyTorch's own in-place operators do."""
    written = [k for k, argument in enumerate(op._schema.arguments) if argument.is_write]

    def kernel(keyset, *arguments):
        for position in written:
            torch.autograd.graph.increment_version(arguments[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _in_layout_of(position: int, reference: Callable) -> Callable:
    def kernel(*arguments):
        layout = common_layout(arguments[position])

        def in_layout(output):
            return output.contiguous(memory_format=layout if output.dim() == 4 else torch.contiguous_format)

        return torch.utils._pytree.tree_map_only(Tensor, in_layout, reference(*arguments))

    return kernel


def define_composed(op: torch._ops.OpOverload, kernel: Callable, keys: tuple[str, ...] = ("CUDA",)) -> None:
    """Backends without a kernel of `op` run it as `kernel`, which calls registered ops and so follows the backend.

    `keys` are the devices for which nothing compiled exists in any build.
    """
    name = op.name().partition("::")[2]
    composed_kernels[name] = kernel
    for key in keys:
        _library.impl(name, kernel, key)
    composed_keys[name] = keys


def define_composite(op: torch._ops.OpOverload, kernel: Callable, key: str) -> None:
    """At `key`, a device's autograd key, `op` is what `kernel` does with PyTorch's operators, gradients included."""
    _library.impl(op.name().partition("::")[2], kernel, key)


def forbid_gradient(op: torch._ops.OpOverload, why: str) -> None:
    """Differentiating through `op` raises instead of being silently zero."""

    def backward(ctx, *gradients):
        raise RuntimeError(f"{op.name()} cannot be differentiated: {why}")

    torch.library.register_autograd(op.name(), backward, lib=_library)


def define_gradient(op: torch._ops.OpOverload, *, setup_context: Callable, backward: Callable) -> None:
    """Registers the backward formula of `op`. Undefined gradients reach `backward` as None."""

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=_library)


def define_autocast(op: torch._ops.OpOverload, cast: Callable[..., tuple]) -> None:
    """Under autocast `op` receives `cast(dtype, *arguments)`, with `dtype` the autocast dtype of the device."""
    name = op.name().partition("::")[2]
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        _library.impl(name, _autocast_kernel(op, cast, device_type, key), key)


def _autocast_kernel(op, cast, device_type, key):
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments):
        # PyTorch's own autocast leaves float64 alone too.
        is_wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in arguments)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*(arguments if is_wide else cast(torch.get_autocast_dtype(device_type), *arguments)))

    return kernel


def needs_reference() -> bool:
    """True under functorch transforms and forward-mode AD, which the registered backward formulas cannot serve.

    There PyTorch's own operators compute, from the reference: without this a forward-mode tangent would be silently
    zero.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def call(op: torch._ops.OpOverload, *arguments):
    """`op(*arguments)`, past autograd's kernel where no gradient is recorded: that is Python, and takes as long as the
    dispatcher and the checks of arguments together.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def matmul_precision() -> str:
    """`torch.get_float32_matmul_precision()`, which torch.compile cannot trace itself.

    A compiled function is compiled anew when the switch leaves "highest" or returns to it, by PyTorch's own guard, but
    not between "high" and "medium".
    """
    return torch.get_float32_matmul_precision()


# What torch.compiler.assume_constant_result does, which would import torch._dynamo, and Triton with it, for everybody.
matmul_precision._dynamo_marked_constant = True


def common_layout(tensor: Tensor) -> torch.memory_format:
    """The layout that kernels work in and return: channels_last if `tensor` is, contiguous otherwise."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
