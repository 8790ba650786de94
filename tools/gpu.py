"""`make gpu`: what can only be checked and measured where there is a GPU, in one go.

The whole test suite, in which every test that takes a backend runs on the device as well; CUDA graphs, streams and a
second device; the kernels under compute-sanitizer; the benchmark against PyTorch, torch.compile and, for 1x1 cells,
cuDNN's LSTM; the table of resources. All results go to build/gpu/. Every step runs, whatever the others say; the exit
code is 1 if one of them failed. Standard library only: `--check` runs before anything is installed.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "gpu"


def why_no_gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "there is no nvidia-smi, so no NVIDIA driver"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return None if "GPU 0" in listed.stdout else "nvidia-smi lists no GPU"


def why_not_torch() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; set TORCH to a CUDA build"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def steps(jobs: int) -> list[tuple[str, list[str]]]:
    pytest, results = [sys.executable, "-m", "pytest"], OUT / "benchmarks"
    return [
        # test_gpu.py has the device to itself: it captures graphs and counts streams.
        ("tests", [*pytest, "-n", str(jobs), "--dist", "worksteal", "--ignore", "tests/test_gpu.py"]),
        ("graphs, streams, devices, sanitizer", [*pytest, "tests/test_gpu.py", "-m", ""]),
        ("budgets", [*pytest, "tests/test_cuda_build.py", "tests/test_triton_compile.py"]),
        ("benchmark", [sys.executable, "-m", "benchmarks", "--device", "cuda", "--out", str(results)]),
        ("resources", [sys.executable, "tests/gpu_resources.py"]),
    ]


def run(name: str, command: list[str]) -> bool:
    log = OUT / f"{name.split(',')[0]}.txt"
    print(f"  {name:<38} ", end="", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    last = (log.read_text().strip().splitlines() or [""])[-1]
    print(f"{'ok' if code == 0 else 'FAILED'} after {time.monotonic() - start:.0f} s  {last[:80]}  ({log})", flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="processes of the tests (4)")
    options = parser.parse_args()
    reason = why_no_gpu() or (None if options.check else why_not_torch())
    if reason:
        sys.exit(f"make gpu: {reason}. It needs a machine with a GPU; `make gpu-check` does what can be done without.")
    if options.check:
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    # A list: every step runs, also after one that failed.
    passed = [run(name, command) for name, command in steps(options.jobs)]
    table = OUT / "benchmarks" / "results.md"
    if table.exists():
        print(f"\n{table.read_text()}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
