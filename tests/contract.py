"""What every op promises, as tests: subclass `OpContract` in the op's test file and describe the op.

The checks that are the same for all ops are written here once: values and gradients against plain PyTorch in every
dtype, layout and backend, gradcheck, opcheck, torch.compile, export, torch.func, forward mode, threads, aliasing.
"""

import gc
import hashlib
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from evkernels.testing import LAYOUTS, assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class OpContract:
    """Describe an op by `op`, `eager` and `samples`; override the flags where a promise does not apply."""

    dtypes = DTYPES
    layouts = LAYOUTS
    differentiable = False
    # Whether the gradient is an operator of ours: Inductor is not tried with those that PyTorch's own make up.
    has_backward = True
    # Times that torch.compile's backend may be called for three samples.
    most_frames = 3
    # How many times as far from the exact result as plain PyTorch an op may be.
    times_eager = 2
    # Settings of torch.set_float32_matmul_precision under which its kernels differ.
    precisions = ("highest",)

    def op(self, *arguments):
        """The function under test, from `evkernels.ops`."""
        raise AssertionError("a subclass must define op")

    def eager(self, *arguments):
        """The same in plain PyTorch, computing in the dtype of its arguments."""
        raise AssertionError("a subclass must define eager")

    def other_eagers(self) -> list:
        """Further ways to write `eager`, which sum in another order: see `evkernels.testing.assert_matches`."""
        return []

    def samples(self, dtype: torch.dtype, layout: str, large: bool) -> list[tuple]:
        """Argument tuples on the CPU: sizes 1, odd, one more than a vector; with `large` also several tasks' worth."""
        raise AssertionError("a subclass must define samples")

    def typical(self, dtype: torch.dtype, layout: str) -> list[tuple]:
        """Sizes of real networks, multiples of 16, for which GPU kernels are compiled and held to their budgets."""
        return self.samples(dtype, layout, large=False)[:1]

    def samples_for(self, backend, dtype: torch.dtype, layout: str) -> list[tuple]:
        """What a backend is tried with: slow ones with every sample in the first dtype and the first two layouts.

        Other dtypes and layouts differ in conversions and copies: there slow backends take one sample each, in turn.
        """
        samples = self.samples(dtype, layout, large=not backend.is_slow)
        place = self.dtypes.index(dtype), self.layouts.index(layout)
        if not backend.is_slow or (place[0] == 0 and place[1] < 2):
            return samples
        return [samples[sum(place) % len(samples)]]

    def empty_samples(self) -> list[tuple]:
        """Argument tuples in float32 with a size 0 in each place where the op allows one."""
        raise AssertionError("a subclass must define empty_samples")

    def tiny(self) -> tuple:
        """One float64 argument tuple small enough for gradcheck."""
        return self.samples(torch.float64, "contiguous", large=False)[0]

    def requiring_grad(self, arguments) -> tuple:
        """The arguments, requiring gradients if the op has any."""
        return requiring_grad(arguments) if self.differentiable else tuple(arguments)

    def test_values(self, backend, dtype, layout):
        for arguments in self.samples_for(backend, dtype, layout):
            before = snapshot(arguments)
            on_device = to_device(arguments, backend.device)
            result = self.op(*on_device)
            exact, eager, others = in_plain_pytorch(self, call, arguments)
            assert_matches(result, exact, eager, others=others, times=self.times_eager)
            assert_unchanged(arguments if backend.device == "cpu" else on_device, before)
            assert_no_alias(result, on_device)

    def test_empty(self, backend):
        for arguments in self.empty_samples():
            arguments = to_device(arguments, backend.device)
            arguments = self.requiring_grad(arguments)
            result = self.op(*arguments)
            expected = self.eager(*arguments)
            torch.testing.assert_close(result, expected)
            if self.differentiable:
                weighted_sum(tree_flatten(result)[0]).backward()

    def test_opcheck(self, backend):
        arguments = self.tiny()
        arguments = self.requiring_grad(arguments)
        calls = registered_calls(self.op, to_device(arguments, backend.device))
        assert calls
        # Registration of gradients and the way through AOTAutograd are in Python, the same for all kernels.
        checks = ("test_schema", "test_faketensor")
        if backend.name == "reference":
            checks += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        for overload, call_arguments in calls:
            torch.library.opcheck(overload, call_arguments, test_utils=checks)

    def test_shape_rule_matches_kernels(self, backend):
        for turn, layout in enumerate(self.layouts):
            samples = self.samples_for(backend, self.dtypes[0], layout)
            for arguments in [samples[turn % len(samples)]] if backend.is_slow else samples:
                assert_shape_rule(self.op, to_device(arguments, backend.device))

    def test_shape_rule_on_fake_cuda(self):
        with FakeTensorMode():
            arguments = tree_map_only(
                Tensor, lambda v: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda"), self.tiny()
            )
            results, _ = tree_flatten(self.op(*arguments))
        assert all(result.device.type == "cuda" for result in results)

    def test_compiles_on_fake_cuda(self):
        """Without gradients: autograd asks for the device, which a CPU build of PyTorch does not have."""
        torch._dynamo.reset()
        with FakeTensorMode(), torch.no_grad():
            arguments = tree_map_only(
                Tensor, lambda v: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda"), self.tiny()
            )
            results, _ = tree_flatten(torch.compile(self.op, fullgraph=True, backend="aot_eager")(*arguments))
        assert all(result.device.type == "cuda" for result in results)

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compiles_to_one_graph(self, compiler):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
        compiled = torch.compile(self.op, fullgraph=True, dynamic=True, backend=counter)
        # What differs between sizes happens before Inductor, which takes most of the time.
        count = 1 if compiler == "inductor" else 3
        with_gradient = self.differentiable and (compiler == "aot_eager" or self.has_backward)
        for arguments in self.samples(torch.float32, "contiguous", large=False)[-count:]:
            arguments = requiring_grad(arguments) if with_gradient else arguments
            torch.testing.assert_close(compiled(*arguments), self.op(*arguments), rtol=0, atol=0)
            if with_gradient:
                torch.testing.assert_close(gradients(compiled, arguments), gradients(self.op, arguments))
        assert counter.frame_count <= self.most_frames

    def test_exports(self, tmp_path):
        arguments = self.samples(torch.float32, "contiguous", large=False)[-1]
        tensors = tuple(value for value in arguments if isinstance(value, Tensor))

        class Module(torch.nn.Module):
            def forward(module, *given):
                rest = iter(given)
                return self.op(*(next(rest) if isinstance(value, Tensor) else value for value in arguments))

        torch.export.save(torch.export.export(Module(), tensors), tmp_path / "op.pt2")
        loaded = torch.export.load(tmp_path / "op.pt2").module()
        torch.testing.assert_close(loaded(*tensors), self.op(*arguments), rtol=0, atol=0)

    def test_same_bits_for_any_number_of_threads(self):
        arguments = self.samples(torch.float32, "contiguous", large=True)[-1]
        threads = torch.get_num_threads()
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values = tree_flatten(self.op(*arguments))[0]
            results.append(values + (list(gradients(self.op, arguments)) if self.differentiable else []))
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_called_from_several_python_threads(self):
        arguments = self.samples(torch.float32, "contiguous", large=True)[-1]
        expected = tree_flatten(self.op(*arguments))[0]
        results = []

        def call():
            results.extend(tree_flatten(self.op(*arguments))[0] for _ in range(5))

        workers = [threading.Thread(target=call) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 20
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


class DifferentiableOpContract(OpContract):
    """The promises of an op with gradients, in addition."""

    differentiable = True

    def test_gradients(self, backend, dtype, layout):
        for arguments in self.samples_for(backend, dtype, layout):
            actual = gradients(self.op, to_device(arguments, backend.device))
            exact, eager, others = in_plain_pytorch(self, gradients, arguments)
            assert_matches(actual, exact, eager, "gradient", others, self.times_eager)

    def test_gradcheck(self, backend):
        """Slow backends by one random direction; their gradients' elements are compared in test_gradients."""
        arguments = requiring_grad(to_device(self.tiny(), backend.device))
        assert torch.autograd.gradcheck(self.op, arguments, check_undefined_grad=True, fast_mode=backend.is_slow)

    def test_each_argument_alone_requires_grad(self, backend):
        arguments = to_device(self.tiny(), backend.device)
        together = gradients(self.op, arguments)
        tensors = [k for k, value in enumerate(arguments) if is_differentiable(value)]
        for position, expected in zip(tensors, together, strict=True):
            alone = list(arguments)
            alone[position] = arguments[position].detach().requires_grad_()
            result, _ = tree_flatten(self.op(*alone))
            weighted_sum(result).backward()
            torch.testing.assert_close(alone[position].grad.cpu(), expected.cpu(), rtol=1e-12, atol=1e-12)

    def test_second_derivatives_and_forward_mode(self):
        arguments = requiring_grad(self.tiny())
        assert torch.autograd.gradgradcheck(self.op, arguments)
        assert torch.autograd.gradcheck(self.op, arguments, check_forward_ad=True, check_backward_ad=False)

    def test_torch_func(self):
        arguments = self.tiny()
        positions = tuple(k for k, value in enumerate(arguments) if is_differentiable(value))

        def loss_of(function):
            return lambda *a: weighted_sum(tree_flatten(function(*a))[0])

        for transform in (
            lambda f: torch.func.grad(f, argnums=positions),
            lambda f: torch.func.jacrev(f, argnums=positions),
            lambda f: torch.func.jacfwd(f, argnums=positions),
        ):
            actual, expected = (transform(loss_of(function))(*arguments) for function in (self.op, self.eager))
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def test_vmap(self):
        arguments = self.tiny()
        in_dims = tuple(0 if isinstance(value, Tensor) else None for value in arguments)
        batched = tree_map_only(Tensor, lambda value: torch.stack([value, -value]), arguments)
        actual = torch.func.vmap(self.op, in_dims)(*batched)
        expected = torch.func.vmap(self.eager, in_dims)(*batched)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def test_autocast_leaves_float64_alone(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = tree_flatten(self.op(*self.tiny()))[0]
        assert {result.dtype for result in results} == {torch.float64}

    def test_checkpointing(self):

        def checkpointed(*arguments):
            return torch.utils.checkpoint.checkpoint(self.op, *arguments, use_reentrant=False)

        arguments = self.tiny()
        expected = gradients(self.op, arguments)
        torch.testing.assert_close(gradients(checkpointed, arguments), expected, rtol=0, atol=0)


def pytest_generate_contract(metafunc) -> None:
    """Parametrises `dtype` and `layout` by what the test's class says the op takes."""
    contract = metafunc.cls if metafunc.cls and issubclass(metafunc.cls, OpContract) else None
    for name in ("dtype", "layout"):
        if contract and name in metafunc.fixturenames:
            values = getattr(contract, name + "s")
            metafunc.parametrize(name, values, ids=[str(value).removeprefix("torch.") for value in values])


# Results of plain PyTorch by what they were computed from. The backends of one dtype and layout are tested in a row.
_in_plain_pytorch: dict[tuple, tuple] = {}


def in_plain_pytorch(contract: OpContract, compute, arguments) -> tuple:
    """`compute(eager, arguments)` exactly, in the arguments' dtype, and in other orders of summation."""
    key = (type(contract), compute, torch.get_float32_matmul_precision(), *map(identity, tree_flatten(arguments)[0]))
    if key not in _in_plain_pytorch:
        if len(_in_plain_pytorch) >= 32:
            _in_plain_pytorch.clear()
        others = [compute(contract.eager, same) for same in in_each_layout(arguments)]
        others += [compute(other, arguments) for other in contract.other_eagers()]
        exact, eager = compute(contract.eager, widened(arguments)), compute(contract.eager, arguments)
        _in_plain_pytorch[key] = exact, eager, others
    return _in_plain_pytorch[key]


def identity(value):
    """Equal for equal arguments: of a tensor, all that plain PyTorch's result may depend on."""
    if not isinstance(value, Tensor):
        return value
    content = value.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return value.dtype, tuple(value.shape), value.stride(), hashlib.sha256(content).digest()


def call(function, arguments):
    """The function's result, as `gradients` are another thing to compute of it."""
    return function(*arguments)


def snapshot(arguments):
    return [value.clone() for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]


def assert_unchanged(arguments, before):
    tensors = [value for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]
    for value, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(value.cpu(), old, rtol=0, atol=0, equal_nan=True)


def assert_no_alias(result, arguments):
    owned = {value.untyped_storage().data_ptr() for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)}
    for value in tree_flatten(result)[0]:
        assert value.numel() == 0 or value.untyped_storage().data_ptr() not in owned


def to_device(arguments, device):
    """Moves tensors without losing their strides; on the CPU the very same tensors."""
    return arguments if device == "cpu" else tree_map_only(Tensor, lambda value: value.to(device), arguments)


def in_each_layout(arguments) -> list[tuple]:
    """The arguments with all images contiguous, and all channels_last: PyTorch sums in another order in each.

    Without the layout that they have, and so without both if there are no images: the sums are the same.
    """

    def images_in(layout):
        return lambda value: value.contiguous(memory_format=layout) if value.dim() == 4 else value

    layouts = (torch.contiguous_format, torch.channels_last)
    others = [tree_map_only(Tensor, images_in(layout), arguments) for layout in layouts]
    leaves, _ = tree_flatten(arguments)
    return [same for same in others if any(a is not b for a, b in zip(leaves, tree_flatten(same)[0], strict=True))]


def is_differentiable(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def widened(arguments):
    """Floating tensors in float64: the arguments of the exact result."""
    return tree_map(lambda value: value.double() if is_differentiable(value) else value, arguments)


def requiring_grad(arguments) -> tuple:
    return tuple(value.detach().requires_grad_() if is_differentiable(value) else value for value in arguments)


def weighted_sum(results) -> Tensor:
    """A scalar whose gradient is different at every element; its weights are exact in every dtype."""
    total = results[0].new_zeros((), dtype=torch.float64)
    for offset, result in enumerate(results):
        index = torch.arange(result.numel(), device=result.device).reshape(result.shape) + 7 * offset
        weights = (torch.remainder(index * 37, 64) / 32 - 1).to(result.dtype)
        total = total + (result * weights).double().sum()
    return total


def gradients(function, arguments) -> tuple:
    """Gradients of a weighted sum of the results with respect to every floating argument."""
    arguments = requiring_grad(arguments)
    results, _ = tree_flatten(function(*arguments))
    inputs = [value for value in arguments if is_differentiable(value)]
    return torch.autograd.grad(weighted_sum(results), inputs)


def significant_strides(value) -> list:
    """Shape and the strides that matter: none where a size is 0 or 1."""
    if value.numel() == 0:
        return [tuple(value.shape)]
    return [tuple(value.shape), [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]]


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "evkernels":
            first_order = not function._opname.endswith("_backward")
            copies = tree_map_only(Tensor, lambda v: v.detach().requires_grad_(first_order and v.requires_grad), args)
            self.calls.append((function, copies))
        return function(*args, **(kwargs or {}))


def assert_shape_rule(function, arguments) -> None:
    """The operators that `function` and its gradient reach make the shapes, strides and dtypes of their fakes."""
    for overload, call_arguments in registered_calls(function, arguments):
        with FakeTensorMode() as mode:
            fake = overload(*tree_map_only(Tensor, mode.from_tensor, call_arguments))
        for real, shape in zip(tree_flatten(overload(*call_arguments))[0], tree_flatten(fake)[0], strict=True):
            assert significant_strides(real) == significant_strides(shape)
            assert real.dtype == shape.dtype
            assert real.device == shape.device


def registered_calls(function, arguments) -> list[tuple]:
    """The registered operators, with their arguments, that calling and differentiating `function` reaches."""
    with _Recorder() as recorder:
        results = [value for value in tree_flatten(function(*arguments))[0] if value.requires_grad]
        if results:
            weighted_sum(results).backward()
    return recorder.calls


def peak_memory(function) -> int:
    """Bytes that PyTorch's allocator has handed out at most while `function()` ran, beyond what was there before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
