"""How results came about: commit, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from shared.experiments.resources import cpu_count, cpu_model, gpu_names

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "scipy", "vllm")


def git_state(root: Path) -> dict:
    """`commit` (None outside a git checkout) and `dirty`: whether files differ from it."""
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    return {"commit": commit, "dirty": bool(status)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_model(), "cores": cpu_count(), "memory_gb": round(memory / 2**30, 1), "gpus": gpu_names()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
    return result.stdout.strip()
