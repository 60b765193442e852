"""The content address of a stage: equal keys mean equal config, code, libraries and inputs, hence an equal result."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.experiments.errors import UserError
from shared.experiments.paper import ROOT

# Libraries whose version can change a trained number.
LIBRARIES = ("torch", "transformers", "trl", "numpy")

# The machinery around a stage decides when it runs, never what it computes.
MACHINERY = "shared/experiments/"


def stage_key(script: Path, config: Mapping[str, Any], inputs: Iterable[str] = (), root: Path = ROOT) -> str:
    """A 16-digit hash of what determines a stage's result.

    These are: `config`; the files and directories it names (by size and time of change); the code that `script`
    imports (comments and layout do not count) and the data files beside it; library versions; the keys in `inputs`.
    """
    parts = [json.dumps(config, sort_keys=True, default=str)]
    parts += [_fingerprint(path) for path in _named_paths(config, root)]
    for path in code_files(script, root):
        parts += [path.relative_to(root.resolve()).as_posix(), _meaning(path, path.stat().st_mtime_ns)]
    parts += [f"{name}=={_version(name)}" for name in LIBRARIES]
    parts += inputs
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def remember(script: Path, root: Path = ROOT) -> None:
    """Reads the code of `script`, so that `stage_key` need not, neither in this process nor in its forks."""
    for path in code_files(script, root):
        _meaning(path, path.stat().st_mtime_ns)


def code_files(script: Path, root: Path = ROOT) -> list[Path]:
    """`script`, every file of this repository that it imports, directly or not, apart from the machinery, and the
    data files that these name in a string and that stand beside them."""
    root = root.resolve()
    found: set[Path] = set()
    queue = [script.resolve()]
    while queue:
        path = queue.pop()
        if path in found or path.relative_to(root).as_posix().startswith(MACHINERY):
            continue
        found.add(path)
        if path.suffix == ".py":
            modules, names = _references(path, root, path.stat().st_mtime_ns)
            for module in modules:
                queue.extend(_files_of(module, root))
            queue.extend(beside for name in names if (beside := path.parent / name).is_file())
    return sorted(found)


def imported_modules(script: Path, root: Path = ROOT) -> set[str]:
    """Every module, of this repository or not, that `code_files(script)` import, also inside functions."""
    root = root.resolve()
    return {
        module
        for path in code_files(script, root)
        if path.suffix == ".py"
        for module in _references(path, root, path.stat().st_mtime_ns)[0]
    }


def imports(path: Path, root: Path = ROOT) -> tuple[str, ...]:
    """The modules that one file imports, also inside functions."""
    path = path.resolve()
    return _references(path, root.resolve(), path.stat().st_mtime_ns)[0]


@functools.cache
def _references(path: Path, root: Path, mtime: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules that `path` imports, and its string literals that look like a data file's name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    package = ".".join(path.relative_to(root).parent.parts)
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    names = {
        s for s in strings if "." in s and len(s) < 100 and "/" not in s and not s.endswith(".py") and s.strip(".")
    }
    return tuple(_imports(tree, package)), tuple(sorted(names))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # `from package import module`


@functools.cache
def _meaning(path: Path, mtime: int) -> str:
    """A hash of the code without its comments and layout, or of a data file's bytes."""
    content = path.read_bytes()
    if path.suffix == ".py":
        content = ast.dump(ast.parse(content, filename=str(path))).encode()
    return hashlib.sha256(content).hexdigest()


def _named_paths(config: Any, root: Path) -> Iterator[Path]:
    """Files and directories that a value of the config names; only values with a slash between names can."""
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            yield from _named_paths(value, root)
    elif isinstance(config, str | Path) and "/" in str(config).strip("/.") and (path := root / config).exists():
        yield path


def _fingerprint(path: Path) -> str:
    """Size and time of change of a file, or of every file in a directory: checkpoints are too big to read each time."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return json.dumps([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _files_of(module: str, root: Path) -> list[Path]:
    """The module's file and the __init__.py of each package above it; [] for what is not in this repository."""
    parts = module.split(".")
    here = root.joinpath(*parts)
    files = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)] + [here.with_suffix(".py")]
    return [file for file in files if file.is_file()]


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
