"""Triton's interpreter without the half of its work that has no effect.

It replaces the functions of `triton.language` by its own when a kernel is launched, and looks through all of them again
in every call of one jit function by another. It computes each integer sum and product twice, the second time in 64 bits
to compare it with the limits of 32, and drops what it found. It makes a table of all dtypes to look one up, and for
every value a type of its own.
"""

import functools
import inspect
from dataclasses import replace

import numpy as np
import triton.language as tl
import triton_operators
from triton.language import semantic
from triton.runtime import interpreter


@functools.cache
def languages(function) -> list:
    """The modules of `triton.language` that a jit function sees."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def patch_once() -> None:
    """Leaves out what has no effect. Where a Triton works in another way it is left as it is."""
    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is not None and scope is not None:

        def patch_if_new(function):
            are_patched = not any(tl.core.is_builtin(language.load) for language in languages(function))
            if are_patched:
                return scope()
            patched = patch(function)
            if not getattr(interpreter.interpreter_builder.options, "sanitize_overflow", True):
                for name in triton_operators.NAMES:
                    patched.set_attr(tl.tensor, name, triton_operators.quick(name, getattr(tl.tensor, name)))
            return patched

        interpreter._patch_lang = patch_if_new

    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    # With `debug` it would fail where 32 bits overflow.
    if not getattr(options, "debug", True) and hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    numpy_dtype = getattr(interpreter, "_get_np_dtype", None)
    if numpy_dtype is not None:
        known = {}

        def numpy_dtype_once(dtype):
            name = dtype.scalar.name
            if name not in known:
                known[name] = numpy_dtype(dtype)
            return known[name]

        interpreter._get_np_dtype = numpy_dtype_once

    broadcast = getattr(getattr(semantic, "TritonSemantic", None), "broadcast_impl_value", None)
    if broadcast is not None:

        def broadcast_if_different(self, lhs, rhs):
            return (lhs, rhs) if shape(lhs.type) == shape(rhs.type) else broadcast(self, lhs, rhs)

        semantic.TritonSemantic.broadcast_impl_value = broadcast_if_different

    convert = getattr(interpreter, "_convert_float", None)
    if convert is not None:
        interpreter._convert_float = functools.partial(convert_float, convert)

    make_types_once()


def convert_float(convert, data, source: tl.dtype, target: tl.dtype, rounding_mode):
    """Triton takes numbers apart; bfloat16 is the upper half of float32, which it rounds towards 0."""
    if source == tl.bfloat16 and target == tl.float32:
        return data.view(np.uint16).astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16 and rounding_mode is None:
        return (data.view(np.uint32) >> 16).astype(np.uint16)
    return convert(data, source, target, rounding_mode)


def make_types_once() -> None:
    """What blocks of one dtype and shape consist of is shared, and what tensors have of their type."""
    block, tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks, tensors = {}, {}

    def init_block(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key in blocks:
            vars(self).update(blocks[key], element_ty=element_ty)
            return
        block(self, element_ty, shape)
        if vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
            blocks[key] = dict(vars(self))

    def init_tensor(self, handle, type):
        if type.name in tensors:
            vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)
            return
        tensor(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            tensors[type.name] = {"shape": self.shape, "numel": self.numel}

    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor


def shape(dtype) -> list[int] | None:
    """Of a block; None of a scalar. Triton's own comparison of shapes makes a dozen objects."""
    return list(dtype.shape) if dtype.is_block() else None
