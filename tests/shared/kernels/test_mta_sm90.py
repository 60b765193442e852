"""Every Triton kernel, with the sizes that the host code picks, compiles for an H100 and fits on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shared.kernels


@pytest.mark.slow
def test_kernels_fit_on_an_h100():
    """Triton keeps what it has compiled, so that this takes minutes only after a kernel has changed."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("sm90.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    names = {kernel["kernel"] for kernel in kernels}
    sources = Path(shared.kernels.__file__).parent.glob("mta_triton_*.py")
    assert names == {f"{x.stem}.{name}" for x in sources for name in re.findall(r"def (\w+_kernel)\(", x.read_text())}
    for kernel in kernels:
        assert kernel["shared"] <= 227 * 1024, kernel
        # A few hundred bytes do not fit where tiles are large and in fp32.
        assert kernel["spilled"] <= 1024, kernel
