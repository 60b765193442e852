"""Multi-Token Attention: time and peak memory of each way to compute it, against plain attention, by length.

    python scripts/bench/mta.py                                     # sizes suited to the device
    python scripts/bench/mta.py --what kq --lengths 1024,2048 --out runs/bench

What is computed (--what): `kq_pre` and `kq`, the key-query convolution before, and before and after, the softmax, with
a 6x11 kernel; `heads`, head mixing before and after it; `all`, both. By:

    reference  the official algorithm: every map in memory, depthwise conv2d
    chunked    blocks of query rows, plain PyTorch; what runs on a CPU
    triton     fused kernels (GPU only)
    liger      LigerMultiTokenAttentionFunction between two matrix products, on a GPU with liger-kernel, beside `kq`.
               It is something else: a convolution after the softmax only, centred on the query, so that a row reads
               rows after it (7x11 here); no convolution before the softmax, no head mixing.
    sdpa       torch's scaled_dot_product_attention without any of it: the floor
    roofline   the arithmetic of the equations on the visible half of the maps at the speed of a large matrix product,
               measured here: for each entry 4 D operations for the two products, 2 c_q c_k for a convolution, 2 H for
               a mixing; backward takes 2.5 times the products and 3 times the rest (once again, and two gradients)

Times are the fastest of several turns; on a CPU in CPU seconds of one thread, which other work on the machine disturbs
less than the clock, on a GPU of steps queued one behind the other, as in training. Peak memory is that of forward and
backward with inputs and gradients: on a CPU, where each number is from a process of its own, the rise of the process's
largest resident size above what it was after a small warm-up, on a GPU the allocator's. Once forward and backward take
longer than --max-step, longer lengths are left out.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

C_Q, C_K = 6, 11
WHAT = {  # name -> kernels
    "kq_pre": ("kq_pre",),
    "kq": ("kq_pre", "kq_post"),
    "heads": ("head_pre", "head_post"),
    "all": ("kq_pre", "kq_post", "head_pre", "head_post"),
}
WAYS = ("reference", "chunked", "triton", "liger", "sdpa", "roofline")
DEFAULTS = {
    "cpu": {"lengths": (256, 512, 1024, 2048), "heads": 4, "dim": 64, "dtype": "float32"},
    "cuda": {"lengths": (512, 1024, 2048, 4096, 8192, 16384), "heads": 16, "dim": 128, "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Task:
    """One measurement; lengths, sizes and dtype name as on the command line."""

    way: str
    what: str
    length: int
    batch: int
    heads: int
    dim: int
    dtype: str
    device: str
    turns: int


def inputs(task: Task, length: int):
    """q, k, v and the kernels by name, with gradients; kernels are near the identity."""
    import torch

    torch.manual_seed(0)
    shape = (task.batch, task.heads, length, task.dim)
    qkv = [torch.randn(shape, device=task.device, dtype=getattr(torch, task.dtype)).requires_grad_() for _ in range(3)]
    kernels = {}
    for name in WHAT.get(task.what, ()):
        kernel = 0.02 * torch.randn(task.heads, C_Q, C_K)
        kernel[:, -1, C_K // 2] += 1
        if name.startswith("head"):
            kernel = torch.eye(task.heads) + 0.02 * torch.randn(task.heads, task.heads)
        if name == "head_post":
            kernel = kernel[None]
        kernels[name] = kernel.to(task.device).requires_grad_()
    return qkv, kernels


def liger(q, k, v, kq_pre, kq_post):
    """Symmetric padding: the kernel has one row more than the paper's."""
    import torch
    from liger_kernel.ops.multi_token_attention import LigerMultiTokenAttentionFunction

    kernel = torch.nn.functional.pad(kq_post, (0, 0, 0, 1 - C_Q % 2)).to(q.dtype)[:, None]
    padding = (kernel.shape[2] // 2, C_K // 2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return LigerMultiTokenAttentionFunction.apply(scores, kernel, None, 1, padding, 1, q.shape[1]) @ v


def way(name: str):
    from torch.nn.functional import scaled_dot_product_attention

    from shared.kernels import mta_attention

    if name == "sdpa":
        return partial(scaled_dot_product_attention, is_causal=True)
    return liger if name == "liger" else partial(mta_attention, backend=name)


def resident_peak_kb() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(task: Task) -> dict:
    """Milliseconds forward and forward with backward, and MB at the peak; {"failed": why} if memory runs out."""
    import torch

    torch.set_num_threads(1)
    cuda = task.device == "cuda"
    attend = way(task.way)

    def step(qkv, kernels, backward: bool) -> None:
        if backward:
            o = attend(*qkv, **kernels)
            torch.autograd.grad(o, [*qkv, *kernels.values()], torch.ones_like(o), allow_unused=task.way == "liger")
        else:
            with torch.no_grad():
                attend(*qkv, **kernels)

    def milliseconds(backward: bool) -> float:
        if not cuda:
            start = time.process_time()
            step(*tensors, backward)
            return 1e3 * (time.process_time() - start)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(task.turns + 1)]
        for event in events[:-1]:
            event.record()
            step(*tensors, backward)
        events[-1].record()
        torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in pairwise(events))

    try:
        # Memory first, before time's turns; libraries start up and kernels compile on a short sequence.
        step(*inputs(task, min(task.length, 192)), True)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6 if cuda else resident_peak_kb() / 1e3
        tensors = inputs(task, task.length)
        step(*tensors, True)
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else resident_peak_kb() / 1e3
        turns = 1 if cuda else task.turns
        forward, both = (min(milliseconds(backward) for _ in range(turns)) for backward in (False, True))
        return {"forward_ms": forward, "both_ms": both, "peak_mb": peak - before}
    except (torch.OutOfMemoryError, MemoryError):
        return {"failed": "out of memory"}
    except RuntimeError as error:
        if "allocate memory" in str(error):
            return {"failed": "out of memory"}
        raise


def matmul_flops(task: Task) -> float:
    """Operations per second of a large matrix product in the task's dtype."""
    import torch

    torch.set_num_threads(1)
    cuda = task.device == "cuda"
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=task.device, dtype=getattr(torch, task.dtype))
    best = float("inf")
    for _ in range(10):
        if cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if cuda else time.process_time
        start = clock()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return 2 * n**3 / best


def roofline(task: Task, flops: float) -> dict:
    entries = task.batch * task.heads * task.length * (task.length + 1) / 2
    per_map = {"kq": 2 * C_Q * C_K, "he": 2 * task.heads}
    products, maps = 4 * task.dim, sum(per_map[name[:2]] for name in WHAT[task.what])
    # q, k, v, their gradients, and o and its own.
    tensors = 8 * task.batch * task.heads * task.length * task.dim * (4 if task.dtype == "float32" else 2)
    both = entries * (3.5 * products + 4 * maps)
    return {
        "forward_ms": 1e3 * entries * (products + maps) / flops,
        "both_ms": 1e3 * both / flops,
        "peak_mb": tensors / 1e6,
    }


def isolated(function, task: Task):
    """function(task), on a CPU in a new process; on a GPU memory is counted anyway and every start would compile."""
    if task.device == "cuda":
        import torch

        torch.cuda.empty_cache()
        return function(task)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return {"failed": "killed, probably out of memory"}


def line(row: dict) -> str:
    cells = [f"{row['what']:7}", f"{row['length']:6}", f"{row['way']:10}"]
    if "failed" in row:
        return "| " + " | ".join([*cells, f"{row['failed']:41}"]) + " |"
    numbers = [f"{row[name]:12.2f}" for name in ("forward_ms", "both_ms")] + [f"{row['peak_mb']:11.0f}"]
    return "| " + " | ".join([*cells, *numbers]) + " |"


HEADER = """| what    | length | way        | forward, ms  | + back, ms   | peak, MB    |
|---------|-------:|------------|-------------:|-------------:|------------:|"""


def plot(rows: list[dict], directory: Path) -> None:
    """Forward and backward above, peak memory below, over length; a panel for each of `what`."""
    from shared.plotting import COLORS, figure, legend_outside, save

    names = list(dict.fromkeys(row["what"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    fig, axes = figure(columns=len(names), rows=2, width=3.2 * len(names) + 1.4)
    axes = axes.reshape(2, len(names))
    for column, what in enumerate(names):
        for name in ways:
            found = [row for row in rows if row["what"] == what and row["way"] == name and "failed" not in row]
            style = {"color": COLORS[WAYS.index(name)], "label": name}
            style |= {"linestyle": "--"} if name == "roofline" else {"marker": "o"}
            for ax, key in zip(axes[:, column], ("both_ms", "peak_mb"), strict=True):
                ax.plot([row["length"] for row in found], [row[key] for row in found], **style)
        axes[0, column].set_title(what)
        axes[1, column].set_xlabel("length")
        for ax in axes[:, column]:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
    axes[0, 0].set_ylabel("forward and backward, ms")
    axes[1, 0].set_ylabel("peak memory, MB")
    legend_outside(fig)
    save(fig, directory, "mta")


def ways_on(device: str) -> list[str]:
    if device == "cpu":
        return ["reference", "chunked", "sdpa"]
    from importlib.util import find_spec

    return ["reference", "chunked", "triton", *(["liger"] if find_spec("liger_kernel") else []), "sdpa"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(WHAT), help=f"comma-separated; default {','.join(WHAT)}")
    parser.add_argument("--ways", help="comma-separated; default: all that the device has")
    parser.add_argument("--lengths", help="comma-separated; default by device")
    parser.add_argument("--device", choices=DEFAULTS, help="default: cuda where there is one")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--dim", type=int, help="channels of a head; default: 64 on a CPU, 128 on a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-step", type=float, default=10, help="seconds; default 10")
    parser.add_argument("--out", type=Path, help="also write mta.json, mta.png and mta.pdf to this directory")
    args = parser.parse_args()
    if unknown := [what for what in args.what.split(",") if what not in WHAT]:
        parser.error(f"unknown --what {', '.join(unknown)}; valid: {', '.join(WHAT)}")

    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[device]
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else defaults["lengths"]
    sizes = {name: getattr(args, name) or defaults[name] for name in ("heads", "dim", "dtype")}
    task = partial(Task, batch=args.batch, **sizes, device=device, turns=args.turns)
    ways = args.ways.split(",") if args.ways else ways_on(device)
    if unknown := [name for name in ways if name not in ways_on(device)]:
        parser.error(f"--ways {', '.join(unknown)}: not here; valid on {device}: {', '.join(ways_on(device))}")

    flops = isolated(matmul_flops, task("sdpa", "kq", 0))
    name = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    print(f"{name}, torch {torch.__version__}, {args.batch} x {sizes}; a matrix product: {flops / 1e9:.0f} Gflop/s")
    print(f"\n{HEADER}", flush=True)
    about = {"device": name, "torch": torch.__version__, "matmul": flops}
    if device == "cuda":
        about["triton"] = version("triton")
    rows, found = [], {}
    for what in args.what.split(","):
        for way in ways:
            if way == "liger" and what != "kq":
                continue
            for length in lengths:
                now = task(way, what if way != "sdpa" else "none", length)
                if now not in found:
                    found[now] = isolated(measure, now)
                rows.append(asdict(now) | {"what": what} | found[now])
                print(line(rows[-1]), flush=True)
                if rows[-1].get("both_ms", float("inf")) > 1e3 * args.max_step:
                    break
        for length in lengths:
            rows.append(asdict(task("roofline", what, length)) | roofline(task("roofline", what, length), flops))
            print(line(rows[-1]), flush=True)
        if args.out:  # already now: what follows may take long
            from shared.experiments.files import write_json

            write_json(args.out / "mta.json", about | {"rows": rows})
    if args.out:
        plot(rows, args.out)


if __name__ == "__main__":
    main()
