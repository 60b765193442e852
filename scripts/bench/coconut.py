"""Coconut's training step and evaluation against the straightforward algorithm: same weights, same data, one process.

The straightforward algorithm is the literal reading of the method. Training: one pass per thought with a KV cache
sliced for each pass; to place the thought, the input embeddings are split into B x T single vectors and stacked again;
every pass returns all layers' hidden states and the logits of all its positions. Evaluation: one prompt at a time, and
after the thoughts the whole sequence is run again for every new token.

`literal` picks the B x T vectors by index (`inputs_embeds[b, t]`), as one would write it first; the gradient of each
pick is a tensor of the size of all embeddings, so that the backward pass is quadratic in the number of tokens.
`literal, unbind` is the same with `unbind`, which avoids that.

Token ids are random (they do not change the cost); lengths are those of ProsQA under GPT-2's tokenizer: prompts of
150-250 tokens, about 10 tokens per reasoning step, 12 for the answer. The sides take turns; the table shows each one's
fastest turn (the JSON file also the median) and the rise of resident memory at the peak of its first training step.
All must give the same loss (that of papers/coconut/naive.py), gradients and tokens, or the script fails.
"""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MODELS = {  # name -> (layers, hidden size, heads, vocabulary)
    "small": (4, 256, 8, 50260),  # GPT-2's vocabulary and three markers
    "tiny": (2, 64, 4, 450),  # that of the `tiny` scale
}


@dataclass(frozen=True)
class Task:
    """One line of the table: `batch` rows of `prompt` (shortest, longest) tokens, then thoughts, then text.

    Evaluation counts examples per second, so that the straightforward side may do the first `literal_rows` only.
    """

    name: str
    model: str
    kind: str  # train or eval
    batch: int
    prompt: tuple[int, int]
    latents: int
    text: int
    literal_rows: int | None = None


TASKS = [
    Task("train, stage 1", "small", "train", 8, (150, 250), 1, 42),
    Task("train, stage 6", "small", "train", 8, (150, 250), 6, 12),
    Task("eval, 1 thought then steps", "small", "eval", 16, (150, 250), 1, 42, 2),
    Task("eval, 6 thoughts then answer", "small", "eval", 16, (150, 250), 6, 12, 2),
    Task("train, stage 1", "tiny", "train", 8, (150, 250), 1, 42),
    Task("train, stage 6", "tiny", "train", 8, (150, 250), 6, 12),
    Task("eval, 1 thought then steps", "tiny", "eval", 64, (150, 250), 1, 42, 8),
    Task("eval, 6 thoughts then answer", "tiny", "eval", 64, (150, 250), 6, 12, 8),
    Task("train, `tiny` scale", "tiny", "train", 64, (22, 25), 3, 5),
    Task("eval, `tiny` scale", "tiny", "eval", 256, (22, 25), 3, 5, 32),
]


def make_model(name: str, device: str, seed: int):
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from papers.coconut.model import CoconutForCausalLM

    layers, width, heads, vocab = MODELS[name]
    torch.manual_seed(seed)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab, "n_positions": 320}
    no_end = {"bos_token_id": None, "eos_token_id": None}  # so that all write the same number of tokens
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # so that results can be compared
    config = GPT2Config(**sizes, **no_end, **no_dropout)
    base = AutoModelForCausalLM.from_config(config).to(device)
    return CoconutForCausalLM.from_base(base, vocab - 1, vocab - 3, vocab - 2)


def make_batch(task: Task, device: str, seed: int) -> dict:
    """Left-padded rows `prompt <bot> latents <eot> text`; the text is supervised. Evaluation stops before the text."""
    import torch

    bot, eot, latent = (MODELS[task.model][3] - i for i in (3, 2, 1))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(task.prompt[0], task.prompt[1] + 1, (task.batch,), generator=generator)
    width = int(lengths.max())
    prompt = torch.randint(1, bot, (task.batch, width), generator=generator)
    real = torch.arange(width) >= width - lengths[:, None]
    markers = torch.tensor([bot] + [latent] * task.latents + [eot]).expand(task.batch, -1)
    text = torch.randint(1, bot, (task.batch, task.text), generator=generator)
    parts = [prompt * real, markers] + ([text] if task.kind == "train" else [])
    ids = torch.cat(parts, dim=1)
    mask = torch.cat([real, torch.ones(task.batch, ids.shape[1] - width, dtype=torch.bool)], dim=1).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if task.kind == "train":
        batch["labels"] = torch.cat([torch.full((task.batch, ids.shape[1] - task.text), -100), text], dim=1)
    return {key: value.to(device) for key, value in batch.items()}


def literal_forward(model, input_ids, attention_mask, unbind: bool):
    """The latent passes as first written down. Returns all logits `[B, T, V]` and the final inputs `[B, T, D]`."""
    import torch
    from transformers import DynamicCache

    latent = model.config.latent_token_id
    inputs_embeds = model.get_input_embeddings()(input_ids)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    places = [(input_ids[b] == latent).nonzero().flatten().tolist() for b in range(len(input_ids))]
    logits, start, cache = [], 0, None
    passes = max(map(len, places))
    for n in range(passes + 1):
        if n < passes:
            end = min(row[n] for row in places if len(row) > n)
        else:
            end = input_ids.shape[1]
        if cache is not None:
            sliced = DynamicCache()
            for i, layer in enumerate(cache.layers):
                sliced.update(layer.keys[:, :, :start], layer.values[:, :, :start], i)
            cache = sliced
        output = model.base(
            inputs_embeds=inputs_embeds[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        cache, hidden = output.past_key_values, output.hidden_states[-1]
        logits.append(output.logits)
        if n < passes:
            batch, length = input_ids.shape
            if unbind:
                vectors = [list(row.unbind()) for row in inputs_embeds.unbind()]
            else:
                vectors = [[inputs_embeds[b, t] for t in range(length)] for b in range(batch)]
            for b, row in enumerate(places):
                if len(row) > n:
                    vectors[b][row[n]] = hidden[b, row[n] - 1 - start]
            inputs_embeds = torch.stack([torch.stack(row) for row in vectors])
        start = end
    return torch.cat(logits, dim=1), inputs_embeds


def literal_step(model, batch, unbind: bool):
    import torch.nn.functional as F

    logits, _ = literal_forward(model, batch["input_ids"], batch["attention_mask"], unbind)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach()


def our_step(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def naive_loss_of(model, batch):
    import torch

    from papers.coconut.naive import naive_loss

    real = [mask.bool() for mask in batch["attention_mask"]]
    rows = [ids[keep].tolist() for ids, keep in zip(batch["input_ids"], real, strict=True)]
    labels = [targets[keep].tolist() for targets, keep in zip(batch["labels"], real, strict=True)]
    with torch.no_grad():
        return naive_loss(model.base, rows, labels, model.config.latent_token_id)


def literal_generate(model, batch, new_tokens: int, rows: int):
    """Greedy decoding of each prompt alone, without a cache after the thoughts. Returns `[rows, new_tokens]`."""
    import torch

    outputs = []
    for row in range(rows):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        logits, inputs_embeds = literal_forward(model, ids, torch.ones_like(ids), unbind=False)
        new = []
        while True:
            logits[:, -1, model.config.latent_token_id] = -torch.inf
            new.append(int(logits[0, -1].argmax()))
            if len(new) == new_tokens:
                break
            token = model.get_input_embeddings()(torch.tensor([[new[-1]]], device=ids.device))
            inputs_embeds = torch.cat([inputs_embeds, token], dim=1)
            logits = model.base(inputs_embeds=inputs_embeds, use_cache=False).logits
        outputs.append(new)
    return torch.tensor(outputs)


def our_generate(model, batch, new_tokens: int):
    sequences = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return sequences[:, batch["input_ids"].shape[1] :].cpu()


def peak_memory(function, device: str) -> tuple[object, float | None]:
    """Call `function`; its result, and the MiB by which it raised the memory in use at its peak.

    CUDA: PyTorch's allocator. CPU: the process's resident set, from Linux's high-water mark, which is reset before;
    None where the system does not have one.
    """
    import ctypes
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that an earlier step freed hides what this one takes
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return function(), None
    before = _status_mib("VmRSS")
    result = function()
    return result, _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def timed(function, device: str) -> float:
    """Seconds of `function`. One CPU thread is timed by its own clock, which other processes do not slow down."""
    import torch

    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = clock()
    function()
    synchronize()
    return clock() - start


def run_task(task: Task, model, device: str, seconds: float, seed: int) -> dict:
    """Run each side once to compare results and memory, then time turns of each for `seconds`, at least 3."""
    import torch

    batch = make_batch(task, device, seed)
    if task.kind == "train":
        model.train()
        sides = {
            "ours": lambda: our_step(model, batch),
            "literal": lambda: literal_step(model, batch, unbind=False),
            "literal, unbind": lambda: literal_step(model, batch, unbind=True),
        }
    else:
        model.eval()
        rows = task.literal_rows
        sides = {
            "ours": lambda: our_generate(model, batch, task.text),
            "literal": torch.no_grad()(lambda: literal_generate(model, batch, task.text, rows)),
        }
    memory, expected = {}, None
    if task.kind == "train":
        torch.testing.assert_close(our_step(model, batch), naive_loss_of(model, batch), rtol=1e-4, atol=1e-4)
        model.zero_grad()
    for side, function in sides.items():
        result, memory[side] = peak_memory(function, device)
        if task.kind == "train":
            result = [result, *(parameter.grad for parameter in model.parameters())]
            expected = expected or result
        else:
            expected = result if expected is None else expected[: len(result)]
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)
        model.zero_grad()
    del result, expected
    times = {side: [] for side in sides}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 3 or time.perf_counter() < end:
        for side, function in sides.items():
            times[side].append(timed(function, device))
            model.zero_grad()
    return {
        "task": asdict(task),
        "examples": {side: task.batch if side == "ours" else task.literal_rows or task.batch for side in sides},
        "turns": len(times["ours"]),
        "seconds_min": {side: min(values) for side, values in times.items()},
        "seconds_median": {side: statistics.median(values) for side, values in times.items()},
        "peak_mib": memory,
    }


COLUMNS = ["model", "task", "rows x (prompt + thoughts + text)", "ours", "literal", "ratio", "literal, unbind", "ratio"]
COLUMNS += ["peak MiB of each"]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def table_line(row: dict) -> str:
    """One line of the Markdown table; a ratio is that of the fastest turns, straightforward / ours."""
    task = row["task"]
    shape = f"{task['batch']} x ({task['prompt'][0]}-{task['prompt'][1]} + {task['latents']} + {task['text']})"
    per_example = {side: seconds / row["examples"][side] for side, seconds in row["seconds_min"].items()}
    cells = [task["model"], task["name"], shape]
    for side in ("ours", "literal", "literal, unbind"):
        if side not in per_example:
            cells += ["-", "-"]
            continue
        if task["kind"] == "train":
            cells.append(f"{row['seconds_min'][side] * 1e3:.0f} ms")
        else:
            cells.append(f"{1 / per_example[side]:.3g} examples/s")
        if side != "ours":
            cells.append(f"{per_example[side] / per_example['ours']:.1f}x")
    peaks = ["?" if mib is None else f"{mib:.0f}" for mib in row["peak_mib"].values()]
    cells.append(" / ".join(peaks) if task["kind"] == "train" else "-")  # evaluation differs in batch size
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="only the lines of this model")
    parser.add_argument("--kind", choices=["train", "eval"], help="only these lines")
    parser.add_argument("--batch", type=int, help="rows instead of each line's own number")
    parser.add_argument("--seconds", type=float, default=5, help="time for each line, >= 3 turns (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    import torch
    import transformers

    from shared.experiments.files import write_json

    torch.set_num_threads(args.threads)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{args.device}, {args.threads} threads, {versions}\n\n{HEADER}", flush=True)
    rows = []
    for task in TASKS:
        if args.model not in (None, task.model) or args.kind not in (None, task.kind):
            continue
        if args.batch:
            literal_rows = task.literal_rows and min(task.literal_rows, args.batch)
            task = replace(task, batch=args.batch, literal_rows=literal_rows)
        model = make_model(task.model, args.device, args.seed)
        rows.append(run_task(task, model, args.device, args.seconds, args.seed))
        print(table_line(rows[-1]), flush=True)
    if args.out:
        write_json(args.out, {"args": vars(args) | {"out": str(args.out)}, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
