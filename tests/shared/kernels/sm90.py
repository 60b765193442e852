"""Compiles for an H100 whatever kernels a few calls launch, without a GPU, and prints what each takes of the chip.

Run as a script, in a process of its own: here Triton must not interpret. One line of JSON for each kernel, with its
registers, the bytes that spill from them, and the bytes of shared memory. NVIDIA's assembler comes with Triton.
"""

import json
import os
import re
import subprocess
import tempfile
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED_MEMORY = 227 * 1024  # bytes that a program may have on sm_90
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
seen = set()


def specialise(name: str, value, is_constant: bool) -> tuple[str, object]:
    """Type and, for a constant, value of an argument, as a launch would take them: a 1 becomes a constant."""
    if is_constant or (isinstance(value, int) and value == 1):
        return "constexpr", value
    if torch.is_tensor(value):
        return POINTERS[value.dtype], None
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>", None
    return ("i32" if isinstance(value, int) else "fp32"), None


def compile_instead_of_launching(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args)) | kwargs  # noqa: B905 (the rest are keywords)
    kinds = {p.name: specialise(p.name, values[p.name], p.is_constexpr) for p in kernel.params}
    divisible = [
        i
        for i, p in enumerate(kernel.params)
        if kinds[p.name][0][0] == "*" or (kinds[p.name][0] == "i32" and values[p.name] % 16 == 0)
    ]
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    key = (name, *sorted(kinds.items()), *divisible)
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(
        kernel,
        {name: kind for name, (kind, _) in kinds.items()},
        {(i,): kinds[p.name][1] for i, p in enumerate(kernel.params) if kinds[p.name][0] == "constexpr"},
        {(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    line = {
        "kernel": name,
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
    }
    constants = {name: value for name, (kind, value) in kinds.items() if kind == "constexpr"}
    print(json.dumps(line | {"scenario": scenario, "constants": constants, **options}), flush=True)


JITFunction.run = compile_instead_of_launching
torch.cuda.get_device_properties = lambda _: SimpleNamespace(shared_memory_per_block_optin=SHARED_MEMORY)

from shared.kernels import head_norm_gate, mta_attention  # noqa: E402  (after Triton has been prepared)


def call(dtype, names, H=16, G=4, T=160, S=160, D=128, c_q=6, c_k=11, segments=False):
    """Forward and backward; nothing is computed, the tensors hold what the memory held."""
    shapes = {"kq_pre": (H, c_q, c_k), "kq_post": (H, c_q, c_k), "head_pre": (H, H), "head_post": (1, H, H)}
    qkv = [torch.randn(1, heads, n, D, dtype=dtype, requires_grad=True) for heads, n in ((H, T), (G, S), (G, S))]
    kernels = {name: torch.randn(shapes[name], requires_grad=True) for name in names}
    segment_ids = torch.zeros(1, S, dtype=torch.int64) if segments else None
    mta_attention(*qkv, **kernels, segment_ids=segment_ids, backend="triton").sum().backward()


KQ, HEADS = ("kq_pre", "kq_post"), ("head_pre", "head_post")
ALL = KQ + HEADS
SCENARIOS = {
    "bf16 key-query": lambda: call(torch.bfloat16, KQ),
    "bf16 key-query before the softmax": lambda: call(torch.bfloat16, KQ[:1]),
    "bf16 key-query, D=64": lambda: call(torch.bfloat16, KQ, D=64, segments=True),
    "bf16 heads": lambda: call(torch.bfloat16, HEADS),
    "bf16 all": lambda: call(torch.bfloat16, ALL, H=10, G=10, D=96),
    "fp32 key-query": lambda: call(torch.float32, KQ[:1]),
    "fp32 heads": lambda: call(torch.float32, HEADS, H=64, G=64, D=64),
    "fp32 all": lambda: call(torch.float32, ALL, D=64),
    "one of everything": lambda: call(torch.float16, KQ, H=1, G=1, T=1, S=1, D=8, c_q=1, c_k=3),
    "one head": lambda: call(torch.float16, ALL, H=1, G=1, T=1, S=1, D=8, c_q=1, c_k=1),
    "norm": lambda: head_norm_gate(
        torch.randn(1, 2, 160, 96, dtype=torch.bfloat16, requires_grad=True),
        *(torch.randn(shape, requires_grad=True) for shape in ((96,), (96,), ())),
        backend="triton",
    ).sum().backward(),
}  # fmt: skip

for scenario, launch in SCENARIOS.items():  # noqa: B007 (read by compile_instead_of_launching)
    launch()
