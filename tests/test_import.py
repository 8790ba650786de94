"""Importing the package: with parts of it missing it works and says so; switches that cannot be obeyed are errors.

Every case runs in a process of its own, since a process imports once: in a copy of one that has imported torch alone,
which takes ten times as long as the package, or where a case hides what torch may look for in a fresh one.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from evkernels import backends

SWITCHES = ("EVKERNELS_BACKEND", "EVKERNELS_CPU_ISA", "TRITON_INTERPRET")
needs_compiled = pytest.mark.skipif(bool(backends.compiled_error), reason=str(backends.compiled_error))

OPTIONAL = ("triton", "pybind11", "h5py", "hdf5plugin", "faery", "rich", "matplotlib", "skimage", "pytest")
GATES = "torch.ones(1, 4, 2, 2), torch.ones(1, 1, 2, 2)"

# Copies leave the loop, go on as if they had been started with the code, and end as a process ends.
COPIES = """
import json, os, sys
import torch
for line in sys.stdin:
    code, switches, output, error = json.loads(line)
    copy = os.fork()
    if not copy:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)
else:
    sys.exit()
for stream, path in (1, output), (2, error):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
os.environ.update(switches)
exec(code, {"__name__": "__main__", "sys": sys})
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SWITCHES}


@pytest.fixture(scope="module")
def copies():
    """The process to copy; it reads what the next copy is to run."""
    with subprocess.Popen(
        [sys.executable, "-c", COPIES], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(copies, tmp_path):
    """Runs code in a copy for which the modules in `hidden` do not exist."""

    def run(code: str, hidden: tuple = (), **switches: str) -> subprocess.CompletedProcess:
        output, error = tmp_path / "output", tmp_path / "error"
        print(json.dumps([hide(hidden) + code, switches, str(output), str(error)]), file=copies.stdin, flush=True)
        status = int(copies.stdout.readline())
        return subprocess.CompletedProcess(code, status, output.read_text(), error.read_text())

    return run


def run_fresh(code: str, hidden: tuple = (), **switches: str) -> subprocess.CompletedProcess:
    """The same in a fresh Python."""
    command = [sys.executable, "-c", hide(hidden) + code]
    return subprocess.run(command, env=environment() | switches, capture_output=True, text=True, timeout=120)


def hide(modules: tuple) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"


def result(run, code: str, hidden: tuple = (), **switches: str):
    """What `code` leaves in `result`, run by one of the above."""
    done = run(code + "\nimport json; print(json.dumps(result))", hidden, **switches)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_with_nothing_optional_the_references_serve_and_the_user_is_told():
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import evkernels
    import torch
gates = torch.randn(2, 12, 3, 3, requires_grad=True)
c = torch.randn(2, 3, 3, 3)
h, c_next = evkernels.ops.lstm_gates(gates, c)
h.sum().backward()
expected = evkernels.reference.lstm_gates(gates, c)
refused = []
for name in ("cpu", "cuda", "triton"):
    try:
        with evkernels.use_backend(name):
            pass
    except RuntimeError as error:
        refused.append(str(error))
result = {{
    "equal": torch.equal(h, expected[0]) and torch.equal(c_next, expected[1]) and gates.grad is not None,
    "warnings": [str(w.message) for w in caught if "evkernels" in str(w.message)],
    "refused": refused,
    "status": evkernels.status(),
    "loaded": [name for name in {OPTIONAL!r} if sys.modules.get(name)],
}}
"""
    seen = result(run_fresh, code, hidden=("evkernels._C", "evkernels._host", *OPTIONAL))
    assert seen["equal"]
    assert seen["loaded"] == []
    assert len(seen["warnings"]) == 1
    assert "evkernels._C is not built or does not load" in seen["warnings"][0]
    for backend, reason in zip(("cpu", "cuda", "triton"), ("evkernels._C", "evkernels._C", "triton"), strict=True):
        assert any(f"backend {backend!r} cannot serve: {reason}" in message for message in seen["refused"])
    assert "evkernels._C is not built or does not load" in seen["status"]
    assert "evkernels._host is not built or does not load" in seen["status"]
    assert "triton is not installed" in seen["status"]


def test_import_is_silent_and_loads_nothing_optional(run):
    code = f"""
import torch
before = set(sys.modules)
import evkernels
result = sorted(set({OPTIONAL!r}) & (set(sys.modules) - before))
"""
    done = run(code + "print(result)")
    assert (done.returncode, done.stderr) == (0, "")
    if torch.version.cuda is None:
        assert done.stdout.strip() == "[]"


@needs_compiled
def test_a_compiled_module_that_does_not_load_is_named(run):
    code = """
import importlib.machinery, importlib.util
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "evkernels._C":
            raise ImportError("undefined symbol: aoti_torch_from_the_future")
sys.meta_path.insert(0, Broken())
import warnings
warnings.simplefilter("ignore")
import evkernels
result = evkernels.status()
"""
    assert "aoti_torch_from_the_future" in result(run, code)


def test_reference_by_environment_warns_of_nothing(run):
    code = f"import evkernels, torch; evkernels.ops.lstm_gates({GATES}); print(evkernels.backends.chosen())"
    done = run(code, hidden=("evkernels._C",), EVKERNELS_BACKEND="reference")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "reference", "")


def test_unknown_backend_in_the_environment(run):
    error = run("import evkernels", EVKERNELS_BACKEND="nonsense").stderr.splitlines()[-1]
    assert error == (
        "ValueError: EVKERNELS_BACKEND=nonsense: backend must be one of reference, cpu, cuda, triton, got 'nonsense'"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the backend can serve")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backend_in_the_environment_without_a_gpu(run, name):
    error = run("import evkernels", EVKERNELS_BACKEND=name).stderr.splitlines()[-1]
    assert error.startswith(f"RuntimeError: EVKERNELS_BACKEND={name}: backend {name!r} cannot serve: ")
    assert (backends.unavailable("cuda") if name == "cuda" else backends.why_no_gpu()) in error


@needs_compiled
@pytest.mark.parametrize("isa", ["baseline", "best", ""])
def test_instruction_set_in_the_environment(run, isa):
    code = f"import evkernels, torch; evkernels.ops.lstm_gates({GATES}); result = torch.ops.evkernels.cpu_isa()"
    expected = "baseline" if isa == "baseline" else torch.ops.evkernels.best_cpu_isa()
    assert result(run, code, EVKERNELS_CPU_ISA=isa) == expected


@needs_compiled
def test_unknown_instruction_set_in_the_environment(run):
    done = run("import evkernels", EVKERNELS_CPU_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: EVKERNELS_CPU_ISA=sse9: instruction set must be baseline, avx2, avx512, amx or best, got sse9"
    )


@needs_compiled
@pytest.mark.skipif(
    not backends.compiled_error and torch.ops.evkernels.best_cpu_isa() == "amx",
    reason="this processor has every instruction set",
)
def test_instruction_set_above_the_processors(run):
    done = run("import evkernels", EVKERNELS_CPU_ISA="amx")
    assert done.returncode == 1
    best = torch.ops.evkernels.best_cpu_isa()
    assert f"amx is not available on this processor, whose best is {best}" in done.stderr.splitlines()[-1]
