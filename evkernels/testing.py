"""Inputs and comparisons shared by the tests and the benchmarks.

Tolerances come from arithmetic, not from experience: a kernel may be twice as far from the float64 result as plain
PyTorch computing in the kernel's own dtype is, plus one rounding unit of the largest value.
"""

import torch
from torch import Tensor


def tensor(*shape: int, dtype=torch.float32, layout: str = "contiguous", device="cpu", seed: int = 0) -> Tensor:
    """A normally distributed tensor; `layout` is "contiguous", "channels_last", "transposed", "sliced" or "expanded".

    The last three have strides that no kernel reads in place: two axes swapped, a view with gaps and a storage
    offset, a first axis of stride 0.
    """
    generator = torch.Generator().manual_seed(seed)
    if layout == "sliced":
        padded = torch.randn(*(size + 2 for size in shape), generator=generator)
        value = padded.to(device, dtype)
        for dim in range(len(shape)):
            value = value.narrow(dim, 1, shape[dim])
        return value
    value = torch.randn(shape, generator=generator).to(device, dtype)
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return value[:1].expand(*shape) if shape[0] else value
    return value


LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")


def assert_matches(actual, exact, eager, what: str = "result", others=(), times: float = 2) -> None:
    """`actual` is at most `times` as far from `exact` (float64) as `eager` (in the kernel's dtype), plus one unit.

    Shapes and dtypes must be those of `eager`; NaN and infinities must stand where `eager` has them. Tuples are
    compared element by element, integers must be equal. `others` are further results of plain PyTorch, such as those of
    another layout, which sums in another order: the worst of them counts, because one short sum may be exact by luck.
    In float64 `exact` is itself rounded at every operation, so eight units are allowed there.
    """
    if isinstance(eager, tuple | list):
        assert len(actual) == len(eager) == len(exact), f"{what}: {len(actual)} results, expected {len(eager)}"
        for index, parts in enumerate(zip(actual, exact, eager, strict=True)):
            assert_matches(*parts, what=f"{what}[{index}]", others=[other[index] for other in others], times=times)
        return
    assert actual.shape == eager.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(eager.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    if not eager.dtype.is_floating_point:
        wrong = actual.cpu() != eager.cpu()
        assert not wrong.any(), f"{what}: differs at {wrong.nonzero()[:3].tolist()}, {int(wrong.sum())} places in all"
        return
    unit = torch.finfo(eager.dtype).eps * (8 if eager.dtype == torch.float64 else 1)
    actual, exact, eager = (value.detach().to("cpu", torch.float64) for value in (actual, exact, eager))
    others = [other.detach().to("cpu", torch.float64) for other in others]
    finite = exact.isfinite() & eager.isfinite()
    if not (finite.all() and actual.isfinite().all()):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            wrong = kind(actual) != kind(eager)
            assert not wrong.any(), f"{what}: {kind.__name__} differs at {wrong.nonzero()[:3].tolist()}"
        actual, exact, eager, *others = (value[finite] for value in (actual, exact, eager, *others))
    if exact.numel():
        error, *lost = (_largest(value - exact) for value in (actual, eager, *others))
        allowed = times * max(lost) + unit * _largest(exact)
        assert error <= allowed, f"{what}: error {error:.3g}, eager PyTorch's allows {allowed:.3g}"


def _largest(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, float("inf")).item()
