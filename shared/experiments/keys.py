"""The content address of a stage: equal keys mean equal config, code, libraries and inputs, hence an equal result."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.experiments.paper import ROOT

# Libraries whose version can change a trained number.
LIBRARIES = ("torch", "transformers", "trl", "numpy")

# The machinery around a stage decides when it runs, never what it computes.
MACHINERY = "shared/experiments/"


def stage_key(script: Path, config: Mapping[str, Any], inputs: Iterable[str] = (), root: Path = ROOT) -> str:
    """A 16-digit hash of `config`, the code that `script` imports, library versions, and the keys of `inputs`."""
    digest = hashlib.sha256()
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in code_files(script, root):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name}=={_version(name)}".encode())
    for key in inputs:
        digest.update(key.encode())
    return digest.hexdigest()[:16]


def code_files(script: Path, root: Path = ROOT) -> list[Path]:
    """`script` and every file of this repository that it imports, directly or not, apart from the machinery."""
    found: set[Path] = set()
    queue = [script.resolve()]
    while queue:
        path = queue.pop()
        relative = path.relative_to(root).as_posix()
        if path in found or relative.startswith(MACHINERY):
            continue
        found.add(path)
        for module in _imports(path, root):
            queue.extend(_files_of(module, root))
    return sorted(found)


def _imports(path: Path, root: Path) -> Iterable[str]:
    package = ".".join(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # `from package import module`


def _files_of(module: str, root: Path) -> list[Path]:
    """The module's file and the __init__.py of each package above it; [] for what is not in this repository."""
    parts = module.split(".")
    here = root.joinpath(*parts)
    files = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)] + [here.with_suffix(".py")]
    return [file for file in files if file.is_file()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
