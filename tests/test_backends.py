"""Choosing a backend: nesting, restoration, backward and compiled graphs follow, what is missing raises."""

import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS
from torch._dynamo.testing import CompileCounterWithBackend

from evkernels import backends, ops, reference, use_backend
from evkernels.ops.registration import composed_keys, schemas


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_every_way_to_run_the_ops(backend):
    """Skipped for a way that does not work here, and with that all tests of it: the one place that says so."""
    gates, c = (value.to(backend.device) for value in arguments())
    results, expected = ops.lstm_gates(gates, c), reference.lstm_gates(gates, c)
    torch.testing.assert_close(results, expected)


@pytest.fixture
def recorder():
    """A backend of references that notes the ops it is called for; it lacks the ops named in `lacking`."""
    record = SimpleNamespace(calls=[], lacking=set())

    def kernel_of(op):
        def kernel(*arguments):
            record.calls.append(op)
            return getattr(reference, op)(*arguments)

        return None if op in record.lacking else kernel

    backends.add_backend("recorder", "cpu", kernel_of)
    yield record
    del backends._extra["recorder"]


def arguments(requires_grad=False):
    return torch.randn(2, 12, 3, 3, requires_grad=requires_grad), torch.randn(2, 3, 3, 3)


def test_serves_inside_and_not_after(recorder):
    before = backends.chosen()
    with use_backend("recorder"):
        assert backends.chosen() == "recorder"
        assert backends.serving("lstm_gates", "cpu") == ("recorder", True)
        ops.lstm_gates(*arguments())
    assert recorder.calls == ["lstm_gates"]
    assert backends.chosen() == before
    ops.lstm_gates(*arguments())
    assert recorder.calls == ["lstm_gates"]


def test_nests(recorder):
    with use_backend("recorder"):
        with use_backend("reference"):
            ops.lstm_gates(*arguments())
            with use_backend("recorder"):
                ops.lstm_gates(*arguments())
            ops.lstm_gates(*arguments())
        assert len(recorder.calls) == 1
        ops.lstm_gates(*arguments())
    assert len(recorder.calls) == 2


def test_restores_after_an_exception(recorder):
    before = backends.chosen()
    with pytest.raises(ZeroDivisionError), use_backend("recorder"):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="nonsense"), use_backend("recorder"), use_backend("nonsense"):
        pass
    assert backends.chosen() == before
    ops.lstm_gates(*arguments())
    assert recorder.calls == []


def test_a_refused_choice_changes_nothing(recorder):
    with use_backend("recorder"):
        with pytest.raises(ValueError, match="got 'nonsense'"), use_backend("nonsense"):
            pass
        ops.lstm_gates(*arguments())
    assert recorder.calls == ["lstm_gates"]


def test_backward_follows_the_backend_of_its_own_time(recorder):
    with use_backend("recorder"):
        h, _ = ops.lstm_gates(*arguments(requires_grad=True))
        h.sum().backward()
    assert recorder.calls == ["lstm_gates", "lstm_gates_backward"]
    h, _ = ops.lstm_gates(*arguments(requires_grad=True))
    with use_backend("recorder"):
        h.sum().backward()
    assert recorder.calls[2:] == ["lstm_gates_backward"]


def test_compiled_graph_follows_the_backend(recorder):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(ops.lstm_gates, fullgraph=True, backend=counter)
    gates, c = arguments(requires_grad=True)
    expected = compiled(gates, c)
    with use_backend("recorder"):
        h, c_next = compiled(gates, c)
        h.sum().backward()
    assert recorder.calls == ["lstm_gates", "lstm_gates_backward"]
    torch.testing.assert_close((h, c_next), expected)
    compiled(gates, c)
    assert len(recorder.calls) == 2
    assert counter.frame_count == 1, "choosing a backend must not compile again"


def test_missing_kernel_raises_and_names_the_op(recorder):
    recorder.lacking.add("lstm_gates_backward")
    with use_backend("recorder"):
        assert backends.serving("lstm_gates_backward", "cpu") == ("recorder", False)
        h, _ = ops.lstm_gates(*arguments(requires_grad=True))
        with pytest.raises(RuntimeError, match="lstm_gates_backward has no recorder kernel"):
            h.sum().backward()


def test_unknown_name():
    message = r"backend must be one of reference, cpu, cuda, triton.*got 'gpu'"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the backend can serve")
def test_cuda_without_a_gpu_names_the_reason_whatever_is_chosen():
    for outer in ("reference", *(["cpu"] if backends.compiled_error is None else [])):
        with use_backend(outer), pytest.raises(RuntimeError, match="cannot serve: ") as error, use_backend("cuda"):
            pass
        assert backends.unavailable("cuda") in str(error.value)


def test_the_choice_holds_in_every_thread(recorder):
    with use_backend("recorder"):
        worker = threading.Thread(target=lambda: ops.lstm_gates(*arguments()))
        worker.start()
        worker.join()
    assert recorder.calls == ["lstm_gates"]


def test_threads_that_choose_wait_for_each_other(recorder):
    """Each thread sees its own choice for as long as it holds it, and the first state is restored at the end."""
    before = backends.chosen()
    wrong = []

    def work(name):
        for _ in range(5):
            with use_backend(name):
                seen = {backends.chosen() for _ in range(100)}
                ops.lstm_gates(*arguments())
                wrong.extend(seen - {name})

    workers = [threading.Thread(target=work, args=(name,)) for name in ("recorder", "reference") * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert recorder.calls == ["lstm_gates"] * 10
    assert backends.chosen() == before


@pytest.mark.skipif(bool(backends.compiled_error), reason=str(backends.compiled_error))
def test_every_op_has_a_compiled_cpu_kernel():
    composed = {op for op, keys in composed_keys.items() if "CPU" in keys}
    assert [op for op in schemas if not backends.has_compiled_kernel(op, "cpu") and op not in composed] == []


def test_what_is_compiled_does_not_depend_on_what_is_chosen():
    compiled = {(op, device): backends.has_compiled_kernel(op, device) for op in schemas for device in ("cpu", "cuda")}
    with use_backend("reference"):
        assert compiled == {key: backends.has_compiled_kernel(*key) for key in compiled}


@pytest.mark.skipif(bool(backends.why_no_triton()), reason=str(backends.why_no_triton()))
def test_a_cuda_torch_is_served_by_triton_where_the_build_has_no_cuda_kernel(monkeypatch):
    assert "cuda" not in backends._default_tables() or torch.version.cuda
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_compiled_kernels", frozenset({("lstm_gates", "cuda")}))
    served = backends._default_tables()["cuda"]
    assert "lstm_gates" not in served
    assert served["lstm_gates_backward"] is not None
    assert None not in served.values(), "an op that Triton lacks stays with the reference"
    monkeypatch.setattr(backends, "_compiled_kernels", frozenset((op, "cuda") for op in schemas))
    assert backends._default_tables() == {}
