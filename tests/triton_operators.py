"""Operators between tensors of Triton's interpreter as one call of NumPy, where that is all that they come to.

`a + b` makes about thirty calls before NumPy adds, the same ones for all operands of the same types. When two types
meet for the first time, Triton computes, and NumPy beside it. Where that gives the same bits, NumPy alone computes from
then on; where it does not, and for types that convert into one another, Triton goes on to compute.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

SIGNED = ("int8", "int16", "int32", "int64")
FLOATING = ("fp16", "fp32", "fp64")
OF_BITS = {"__and__": np.bitwise_and, "__or__": np.bitwise_or, "__xor__": np.bitwise_xor}
OF_NUMBERS = {
    "__add__": np.add,
    "__sub__": np.subtract,
    "__mul__": np.multiply,
    "__truediv__": np.divide,
    "__floordiv__": lambda a, b: (a - np.fmod(a, b)) // b,
    "__mod__": np.fmod,
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}
REVERSED = {"__radd__": "__add__", "__rsub__": "__sub__", "__rmul__": "__mul__", "__rtruediv__": "__truediv__"}
NAMES = (*OF_BITS, *OF_NUMBERS, *REVERSED)

# What is known of an operator and two types: the function of their data and what else the result consists of, or None
# where Triton is to compute.
_known: dict[tuple, tuple | None] = {}


def quick(name: str, original):
    """The method `name` of tl.tensor, of which `original` is Triton's."""

    def method(self, other):
        if type(other) is tl.constexpr:
            other = other.value
        kind = type(other)
        if kind is tl.tensor:
            key, data = (name, self.type.name, other.type.name), other.handle.data
        elif (kind is int and -(2**31) <= other < 2**31) or kind is float:
            key, data = (name, self.type.name, kind), other
        else:
            return original(self, other)
        if key in _known:
            found = _known[key]
            return original(self, other) if found is None else made(found[0](self.handle.data, data), *found[1:])
        result = original(self, other)
        function = function_of(name, self, other.dtype if kind is tl.tensor else kind)
        is_found = function is not None and same_bits(function(self.handle.data, data), result.handle.data)
        fields = {field: value for field, value in vars(result).items() if field != "handle"}
        _known[key] = (function, result.handle.dtype, fields) if is_found and is_plain(result.handle) else None
        return result

    return method


def function_of(name: str, tensor: tl.tensor, other):
    """What NumPy computes of the tensor's data and a number or the data of dtype `other`; None where types convert."""
    dtype, operator = tensor.dtype.name, REVERSED.get(name, name)
    function = {**OF_BITS, **OF_NUMBERS}[operator]
    if other in (int, float):
        if dtype not in (FLOATING if other is float else (*FLOATING, "int32", "int64")):
            return None
        number = tensor.handle.data.dtype.type
        if name in REVERSED:
            return lambda data, value: function(number(value), data)
        return lambda data, value: function(data, number(value))
    if tensor.dtype.is_ptr() and operator == "__add__" and other.name in SIGNED:
        width = max(1, tensor.dtype.element_ty.primitive_bitwidth // 8)
        return lambda address, offset: address + width * offset.astype(np.uint64)
    plain = {*SIGNED, "int1"} if operator in OF_BITS else {*SIGNED, *FLOATING}
    is_plain = dtype in plain and (dtype == other.name or {dtype, other.name} <= {*SIGNED})
    return function if is_plain and name not in REVERSED else None


def made(data: np.ndarray, dtype: tl.dtype, fields: dict) -> tl.tensor:
    """A tensor without the checks that its like has passed."""
    handle, tensor = TensorHandle.__new__(TensorHandle), tl.tensor.__new__(tl.tensor)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    vars(tensor).update(fields, handle=handle)
    return tensor


def is_plain(handle: TensorHandle) -> bool:
    """Whether a handle has what `made` gives it, and nothing else."""
    return vars(handle).keys() == {"data", "dtype", "attr"} and handle.attr == {}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
