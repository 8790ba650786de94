"""Makes and keeps .venv: an interpreter, torch, the compiled package, and the extras named on the command line.

`python3 tools/environment.py test io` prints one line per step. A step is done again only when something it depends
on has changed: its stamp in .venv/stamps holds a hash of that. The package is rebuilt when csrc/, setup.py,
pyproject.toml, torch, a compiler or a switch of setup.py changed. What pip says goes to build/log and is shown when a
step fails. Standard library only, since it runs before anything is installed.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMPS = VENV / "stamps"
LOGS = ROOT / "build" / "log"
TOOLS = ["pip", "setuptools>=77", "wheel", "pybind11>=2.13", "ninja"]
TORCH = os.environ.get("TORCH") or "torch==2.13.0"
# Networks that the tests convert. They import torch alone, but name torchvision, which would bring another torch.
MODELS = ["geffnet==1.0.2", "pytorchcv==0.0.74"]
SWITCHES = ("CXX", "CUDA_HOME", "CUDA_PATH", "DEBUG", "EVKERNELS_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")


def main(extras: list[str]) -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"evkernels needs Python 3.10 to 3.13, got {sys.version.split()[0]}: set PYTHON, as PYTHON=python3.12")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"

    def is_made():
        return ask("import sys; print('%d.%d' % sys.version_info[:2])") == version

    # An environment of the same Python is kept and completed, whoever made it.
    step(f"Python {version}", [], [sys.executable, "-m", "venv", *(() if is_made() else ("--clear",)), VENV], is_made)
    step("build tools", TOOLS, pip("--upgrade", *TOOLS))
    step("torch", [TORCH], pip(*shlex.split(TORCH)))
    torch = ask("from importlib.metadata import version; print(version('torch'))")
    compilers = [shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]), shutil.which("nvcc")]

    def is_built():
        return compilers[0] is None or any((ROOT / "evkernels").glob("_C*"))

    inputs = [ROOT, torch, compilers, [os.environ.get(name) for name in SWITCHES], hash_of_sources()]
    step("evkernels", inputs, pip("--no-build-isolation", "--no-deps", "--editable", ROOT), is_built)
    # The package is there already, so pip installs what its extras ask for and nothing else.
    wanted = f"evkernels[{','.join(sorted(extras))}]"
    step(wanted, [torch, (ROOT / "pyproject.toml").read_bytes()], pip(wanted))
    if "test" in extras:
        step("models of other projects", [torch, MODELS], pip("--no-deps", *MODELS))


def step(name: str, inputs: list, command: list, is_done: Callable[[], bool] = lambda: True) -> None:
    """Runs `command` unless its stamp holds the hash of `inputs`; shows its output and ends if it fails."""
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()
    file = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
    stamp, log = STAMPS / file, LOGS / f"{file}.txt"
    print(f"  {name:<28} ", end="", flush=True)
    if stamp.exists() and stamp.read_text() == key and is_done():
        print("up to date", flush=True)
        return
    stamp.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    took = f"{time.monotonic() - start:.1f} s"
    if code != 0:
        print(f"failed after {took}\n\n{log.read_text(errors='replace')}\n{name} failed; the above is in {log}")
        sys.exit(1)
    STAMPS.mkdir(exist_ok=True)
    stamp.write_text(key)
    print(took, flush=True)


def pip(*arguments) -> list:
    # Python compiles the modules that it imports; compiling all of torch's would be two thirds of pip's time.
    options = ["--disable-pip-version-check", "--no-input", "install", "--no-compile"]
    return [VENV / "bin/python", "-m", "pip", *options, *arguments]


def ask(code: str) -> str | None:
    """What the environment's Python prints, None if there is none or it fails."""
    try:
        return subprocess.run(
            [VENV / "bin/python", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hash_of_sources() -> str:
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted(f for f in (ROOT / "csrc").rglob("*") if f.is_file())]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT)} {len(content)} ".encode() + content)
    return digest.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
