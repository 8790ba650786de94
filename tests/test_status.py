"""`evkernels.status()` and the command line around it."""

import subprocess
import sys

import pytest
import torch

import evkernels
from evkernels import backends, status, use_backend
from evkernels.__main__ import main
from evkernels.ops.registration import schemas


def rows(text: str) -> dict[str, list[str]]:
    """The table of the ops: name -> what serves CPU and CUDA tensors."""
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["op", "CPU", "tensors", "CUDA", "tensors"]
    return {line.split()[0]: line.split()[1:] for line in table[1:]}


def test_names_the_versions_the_machine_and_every_op():
    text = status()
    facts = {line[:16].strip(): line[17:] for line in text.split("\n\n")[0].splitlines()}
    assert facts["evkernels"].startswith(evkernels.__version__)
    assert facts["torch"].startswith(torch.__version__)
    assert facts["threads"] == str(torch.get_num_threads())
    assert all(facts.values())
    for name in ("Python", "system", "processor", "instruction set", "build", "CUDA driver", "CUDA device", "triton"):
        assert name in facts
    assert list(rows(text)) == list(schemas)
    assert len(text.splitlines()) <= len(schemas) + 25


def test_table_follows_the_chosen_backend():
    with use_backend("reference"):
        text = status()
    assert set(map(tuple, rows(text).values())) == {("reference", "reference")}
    assert "reference chosen for all ops" in text


def test_says_why_the_others_do_not_serve(monkeypatch):
    reasons = status().split("\n\n")[2]
    served = {kernel for row in rows(status()).values() for kernel in row}
    for name in {"cpu", "cuda", "reference"} - served:
        assert f"  {name}" in reasons
    if not torch.cuda.is_available():
        assert backends.why_no_gpu() in reasons
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "takes CPU tensors only with TRITON_INTERPRET=1" in status()


def test_a_missing_kernel_is_shown():
    backends.add_backend("partial", "cpu", lambda op: None)
    with use_backend("partial"):
        assert "raises: no partial kernel" in status()
    del backends._extra["partial"]


def test_status_on_the_command_line(capsys):
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("evkernels ")


def test_module_runs_and_prints_help_without_arguments():
    done = subprocess.run([sys.executable, "-m", "evkernels"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "status" in done.stdout
    assert "demo" in done.stdout


@pytest.mark.parametrize("argv", [["nonsense"], ["status", "--nonsense"], ["demo", "/nowhere/recording.npz"]])
def test_errors_are_one_line_and_exit_code_2(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("evkernels")
