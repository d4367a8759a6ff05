"""What several test files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=50)  # a busy machine is not a failure
settings.load_profile("project")


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real models, speech and video; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MMQLORA_REAL", Path(__file__).parents[2] / "shared" / "real")).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set MMQLORA_REAL to a folder of real models, speech and video")
    return folder
