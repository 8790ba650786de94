"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder with real recordings and facts.json: EVKERNELS_DATA, else shared/data beside the checkout."""
    folder = Path(os.environ.get("EVKERNELS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "facts.json").is_file():
        pytest.skip(f"real recordings are not beside the project: no {folder / 'facts.json'}; set EVKERNELS_DATA")
    return folder
