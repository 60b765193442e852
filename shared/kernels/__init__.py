"""Kernels that no maintained library has: for each a plain PyTorch definition, fast paths, one dispatching function.

Functions are imported when first asked for, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.kernels.mta import mta_attention
    from shared.kernels.mta_norm_gate import head_norm_gate

__all__ = ["head_norm_gate", "mta_attention"]

_MODULES = {"mta_attention": "shared.kernels.mta", "head_norm_gate": "shared.kernels.mta_norm_gate"}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)
