"""The contract's value, gradient and empty-input tests again, on kernels built with ASan and UBSan."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build

TESTS = Path(__file__).parent


@pytest.mark.timeout(7200)
@pytest.mark.sanitizer
@pytest.mark.skipif(
    platform.system() != "Linux", reason="preloads the sanitizers' libraries, which is done on Linux only"
)
def test_contracts_under_sanitizers():
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "OpContract):" in path.read_text()]
    # The layouts left out reach the kernels as copies; the dtypes left out differ only in their conversions.
    selection = "(test_values or test_gradients or test_empty) and (cpu or emulated)"
    selection += " and not float64 and not float16 and not transposed and not expanded"
    process = subprocess.run(
        [
            sys.executable,
            str(TESTS / "run_sanitized.py"),
            "-q",
            "-x",
            "--durations=8",
            "-k",
            selection,
            "-p",
            "no:cacheprovider",
            *files,
        ],
        capture_output=True,
        text=True,
        env=build.sanitizer_environment(),
        cwd=TESTS.parent,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert " passed" in process.stdout
