"""The README's example runs, and fusing the gates as it shows leaves the training what it was."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def patched(code: str, diff: str) -> str:
    """`code` with every hunk of `diff` applied; blank lines separate the hunks."""
    for hunk in diff.strip("\n").split("\n\n"):
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert code.count(old) == 1
        code = code.replace(old, new)
    return code


def test_drop_in_example_trains_the_same():
    torch.use_deterministic_algorithms(False)
    before, after = block("python"), patched(block("python"), block("diff"))
    runs = []
    for code in (before, after):
        names = {}
        exec(code, names)
        runs.append(names["losses"])
    assert "ops.lstm_gates" in after
    assert runs[0][-1] < runs[0][0]
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("target", ["demo", "test", "sanitize", "gpu-check", "bench", "lint", "clean"])
def test_make_knows_the_targets(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert plan.returncode == 0, plan.stderr
    assert ".venv" in plan.stdout


def test_first_lines_are_the_two_commands():
    commands = [line.split("#")[0].strip() for line in README.splitlines()[1:5] if line.strip()]
    assert commands == ["make demo", "make test"]


def test_every_switch_in_the_sources_is_in_the_readme():
    used = set()
    for folder in ("evkernels", "csrc", "triton_kernels"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.cpp")]:
            used |= set(re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\()\"(\w+)\"", path.read_text()))
    used |= set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\"(\w+)\"", (ROOT / "setup.py").read_text()))
    assert {"EVKERNELS_BACKEND", "EVKERNELS_CPU_ISA", "MAX_JOBS"} - used == {"MAX_JOBS"}
    assert [name for name in used - {"CUDA_PATH"} if f"`{name}" not in README] == []
