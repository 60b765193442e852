import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data files that some tests read if it is there."""
    folder = Path(os.environ.get("REAL_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not (folder / "prosqa").is_dir():
        pytest.skip(f"no public data files in {folder} (set REAL_DATA_DIR)")
    return folder
