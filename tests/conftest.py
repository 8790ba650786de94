"""Session-wide settings of the test suite."""

import os
import random

# Thread and block order of emulated CUDA kernels: another one in every session, repeatable with the printed seed.
os.environ.setdefault("EVKERNELS_EMULATION_SEED", str(random.randrange(2**32)))


def pytest_report_header():
    return f"EVKERNELS_EMULATION_SEED={os.environ['EVKERNELS_EMULATION_SEED']}"
