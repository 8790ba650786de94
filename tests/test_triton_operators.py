"""Operators of Triton's interpreter that NumPy alone computes give what Triton gives, errors included."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
import triton_interpreter
import triton_operators
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder, interpreter_semantic

SHAPES = [(), (4,), (2, 1), (2, 4)]
NUMBERS = [3, -1, 0, 2**31 - 1, 2.5, -0.0, float("inf")]
DTYPES = {
    np.bool_: tl.int1, np.int32: tl.int32, np.int64: tl.int64, np.uint32: tl.uint32,
    np.float16: tl.float16, np.float32: tl.float32, np.float64: tl.float64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_what_is_known(monkeypatch):
    monkeypatch.setattr(triton_operators, "_known", {})
    # As the test session has it: triton_interpreter.py.
    monkeypatch.setattr(interpreter_builder, "options", type("Options", (), {"sanitize_overflow": False}))


def tensor(numpy_dtype, shape, seed: int) -> tl.tensor:
    """Random values of both signs, the extremes of the dtype among them; none of the integers is 0, a divisor."""
    random, dtype = np.random.default_rng(seed), DTYPES[numpy_dtype]
    if numpy_dtype is np.bool_:
        data = random.integers(0, 2, shape or (1,)).astype(bool)
    elif np.issubdtype(numpy_dtype, np.integer):
        limits = np.iinfo(numpy_dtype)
        data = random.choice([limits.min + (limits.min == 0), limits.max, 5, 1, 3, 2], shape or (1,)).astype(
            numpy_dtype
        )
    else:
        data = random.choice([np.nan, np.inf, -np.inf, -0.0, 1.5, -3, 1e-6], shape or (1,)).astype(numpy_dtype)
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def of_triton(name: str):
    return lambda a, b: getattr(tl.tensor, name)(a, b, _semantic=interpreter_semantic)


def result_of(function, *operands):
    """Bits, shape and types of a result, or its error."""
    with np.errstate(all="ignore"):
        try:
            result = function(*operands)
        except Exception as error:
            return type(error), str(error)
    return result.handle.data.tobytes(), result.handle.data.shape, result.handle.dtype.name, result.type.name


@pytest.mark.parametrize("name", triton_operators.NAMES)
def test_tensors(name):
    original = of_triton(name)
    method = triton_operators.quick(name, original)
    for first, second, *shapes in itertools.product(DTYPES, DTYPES, SHAPES, SHAPES):
        for seed in range(3):
            operands = [tensor(*kind, 2 * seed + k) for k, kind in enumerate(zip((first, second), shapes, strict=True))]
            assert result_of(method, *operands) == result_of(original, *operands), (first, second, shapes)
    quick = {key[1:] for key, found in triton_operators._known.items() if found}
    assert (("int32", "int32") in quick) == (name not in triton_operators.REVERSED and name != "__truediv__")
    assert not {("int32", "uint32"), ("int32", "fp32"), ("fp16", "fp32"), ("int64", "fp64")} & quick


@pytest.mark.parametrize("name", triton_operators.NAMES)
def test_numbers(name):
    original = of_triton(name)
    method = triton_operators.quick(name, original)
    for dtype, shape, number in itertools.product(DTYPES, SHAPES, NUMBERS):
        if number == 0 and ("div" in name or "mod" in name):
            continue
        for seed, kind in itertools.product(range(2), (lambda value: value, tl.constexpr)):
            operands = tensor(dtype, shape, seed), kind(number)
            assert result_of(method, *operands) == result_of(original, *operands), (dtype, shape, number)
    quick = {key[1:] for key, found in triton_operators._known.items() if found}
    assert ("int32", float) not in quick
    assert (("fp32", float) in quick) == (name not in {*triton_operators.OF_BITS, "__floordiv__"})


@pytest.mark.parametrize("shapes", list(itertools.product(SHAPES, SHAPES)), ids=str)
def test_addresses(shapes):
    original = of_triton("__add__")
    method = triton_operators.quick("__add__", original)
    pointer = tl.pointer_type(tl.float64)
    for offset, seed in itertools.product((np.int32, np.int64), range(3)):
        data = np.full(shapes[0] or (1,), 2**40 + seed, np.uint64)
        kind = tl.block_type(pointer, list(shapes[0])) if shapes[0] else pointer
        operands = tl.tensor(TensorHandle(data, pointer), kind), tensor(offset, shapes[1], seed)
        assert result_of(method, *operands) == result_of(original, *operands)
    assert any(triton_operators._known.values())


def test_triton_goes_on_where_numpy_gives_other_bits(monkeypatch):
    monkeypatch.setitem(triton_operators.OF_NUMBERS, "__add__", np.subtract)
    original = of_triton("__add__")
    method = triton_operators.quick("__add__", original)
    operands = tensor(np.int32, (4,), 0), tensor(np.int32, (4,), 1)
    for _ in range(2):
        assert result_of(method, *operands) == result_of(original, *operands)
    assert list(triton_operators._known.values()) == [None]


def test_bfloat16_converts_like_triton():
    """All of bfloat16, and as many of float32; those without an exponent, where Triton is wrong, like PyTorch."""
    triton_own = getattr(interpreter._convert_float, "args", [interpreter._convert_float])[0]
    halves = np.arange(2**16, dtype=np.uint16)
    floats = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    for bits, source, target in ((halves, tl.bfloat16, tl.float32), (floats.view(np.float32), tl.float32, tl.bfloat16)):
        actual = triton_interpreter.convert_float(None, bits, source, target, None)
        with np.errstate(all="ignore"):
            expected = triton_own(bits, source, target, None)
        has_exponent = (np.abs(bits) >= np.finfo(np.float32).tiny) if source == tl.float32 else (bits & 0x7F80) != 0
        has_exponent |= bits != bits
        assert actual.dtype == expected.dtype
        assert np.array_equal(actual[has_exponent], expected[has_exponent])
    exact = torch.from_numpy(halves).view(torch.bfloat16).float().view(torch.int32).numpy().view(np.uint32)
    assert np.array_equal(triton_interpreter.convert_float(None, halves, tl.bfloat16, tl.float32, None), exact)
