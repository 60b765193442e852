"""Inputs of Multi-Token Attention, and the Triton modules: interpreted on a CPU, compiled on a GPU."""

import importlib
from dataclasses import dataclass, field

import pytest
import torch

SWITCHES = ("kq_pre", "kq_post", "head_pre", "head_post")


@dataclass
class Case:
    """Tensors of one call; `run` returns output and gradients for a fixed random gradient of the output."""

    qkv: tuple[torch.Tensor, ...]
    kernels: dict[str, torch.Tensor]
    options: dict = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip("qkv", self.qkv, strict=True)) | self.kernels

    def to(self, dtype: torch.dtype, kernels: torch.dtype | None = None, device: str = "cpu") -> "Case":
        """A copy in other dtypes, rounded; kernels default to the same dtype."""
        kernels = kernels or dtype
        moved = {name: x.to(device) if torch.is_tensor(x) else x for name, x in self.options.items()}
        return Case(
            tuple(x.to(device, dtype) for x in self.qkv),
            {name: x.to(device, kernels) for name, x in self.kernels.items()},
            moved,
        )

    def output(self, backend: str) -> torch.Tensor:
        from shared.kernels import mta_attention

        return mta_attention(*self.qkv, **self.kernels, **self.options, backend=backend)

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in self.tensors.items()}
        qkv = tuple(leaves[name] for name in "qkv")
        o = Case(qkv, {name: leaves[name] for name in self.kernels}, self.options).output(backend)
        grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o)
        grads = torch.autograd.grad(o, list(leaves.values()), grad)
        return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def make_case(
    switches=(), B=2, H=4, G=2, T=12, S=None, D=8, pre=(3, 5), post=(2, 3), groups=2, seed=0, **options
) -> Case:
    """Random float64 tensors. switches: names out of SWITCHES; pre, post: (c_q, c_k)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    S = S or T
    qkv = randn(B, H, T, D), randn(B, G, S, D), randn(B, G, S, D)
    shapes = {
        "kq_pre": (H, *pre),
        "kq_post": (H, *post),
        "head_pre": (H, H),
        "head_post": (groups, H // groups, H // groups),
    }
    kernels = {name: randn(*shape) / shape[1] for name, shape in shapes.items()}
    return Case(qkv, {name: kernels[name] for name in SWITCHES if name in switches}, options)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case():
    return make_case


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def triton_modules():
    """The modules with Triton kernels by their last name, e.g. ["kq"]."""
    pytest.importorskip("triton")
    return {
        name: importlib.import_module(f"shared.kernels.mta_triton_{name}")
        for name in ("band", "kq", "heads", "maps", "norm")
    }


@pytest.fixture
def triton_tiles(triton_modules, monkeypatch):
    """Tiles, panels and blocks so small that a few dozen positions need several of each."""
    from shared.kernels import mta_chunked

    band, kq, heads, maps, norm = (triton_modules[name] for name in ("band", "kq", "heads", "maps", "norm"))
    monkeypatch.setattr(band, "ROWS", 16)
    monkeypatch.setattr(band, "WEIGHT_ROWS", 16)
    monkeypatch.setattr(band, "PARTS", 2)
    monkeypatch.setattr(kq, "tiles", lambda *_: {"BM": 16, "BN": 16, "BK": 16})
    monkeypatch.setattr(kq, "PANEL_ELEMENTS", 1)
    monkeypatch.setattr(kq, "PANEL_STEP", 16)
    monkeypatch.setattr(heads, "PANEL_ELEMENTS", 1)
    monkeypatch.setattr(heads, "PANEL_STEP", 16)
    monkeypatch.setattr(heads, "TILE", 256)
    monkeypatch.setattr(maps, "CONV_ROWS", 16)
    monkeypatch.setattr(maps, "CONV_GRAD_ROWS", 16)
    monkeypatch.setattr(maps, "CONV_GRAD_LAGS", 2)
    monkeypatch.setattr(mta_chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(mta_chunked, "GPU_BLOCK", 1)
    monkeypatch.setattr(mta_chunked, "MIN_ROWS", 20)
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    monkeypatch.setattr(norm, "ROWS", 8)
    return triton_modules


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 3 query rows of one sequence."""
    from shared.kernels import mta_chunked

    monkeypatch.setattr(mta_chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(mta_chunked, "MIN_ROWS", 3)
