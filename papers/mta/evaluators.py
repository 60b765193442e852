"""How the models of this paper are measured on text: perplexity, needles in a haystack, BabiLong.

The two retrieval tasks ask through a `shared.generation` sampler, whatever runs the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from papers.mta.data import IGNORED
from shared.experiments import UserError
from shared.generation import Sampler, SamplingParams


# ---- perplexity -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def sequence_nll(model, input_ids: torch.Tensor, labels: torch.Tensor | None = None, batch_size: int = 8):
    """Negative log-likelihood in nats of each sequence, (n,) float64, and how many tokens it sums over, (n,).

    Args:
        input_ids: (n, T).
        labels: the tokens that count, IGNORED elsewhere; None: all but the first.

    `nll.sum() / tokens.sum()` is the token-weighted mean whose exponential is the paper's perplexity.
    """
    labels = input_ids if labels is None else labels
    model.eval()
    nll, tokens = [], []
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
        targets = targets[:, 1:].to(model.device)
        loss = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        nll.append(loss.double().sum(1).cpu())
        tokens.append((targets != IGNORED).sum(1).cpu())
    return torch.cat(nll), torch.cat(tokens)


def _greedy(sampler: Sampler, prompts: list[str], max_new_tokens: int) -> list[str]:
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop=("\n",))
    return [completion.text for (completion,) in sampler.sample(prompts, params=params)]


# ---- needles --------------------------------------------------------------------------------------------------------
CITIES = (
    "Accra", "Athens", "Bangkok", "Berlin", "Bogota", "Boston", "Cairo", "Chicago", "Dakar", "Delhi", "Denver",
    "Dublin", "Geneva", "Hanoi", "Havana", "Helsinki", "Istanbul", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon",
    "London", "Madrid", "Manila", "Mumbai", "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Riga", "Rome",
    "Santiago", "Seoul", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip


@dataclass(frozen=True)
class NeedleExample:
    prompt: str
    answer: str
    n_needles: int
    depth: float
    """Where in the text the needle that is asked for stands: 0 at its beginning, 1 at its end."""

    @property
    def document(self) -> str:
        """Prompt and answer, to train on."""
        return f"{self.prompt} {self.answer}."


def needle_example(
    haystack: str,
    tokenizer,
    context_length: int,
    n_needles: int,
    depth: float,
    rng: np.random.Generator,
    digits: int = 5,
) -> NeedleExample:
    """Hides `n_needles` sentences, a number for each of as many cities, in a text and asks for one of the numbers.

    The text is cut so that everything, answer included, takes at most `context_length` tokens. The needle asked for
    stands at `depth`, the others at random places, all at ends of sentences or lines where there are any. The paper
    specifies 2-10 needles in 2k and 4k windows, shuffled, averaged over depths; the sentences, number of digits and
    position of the other needles are ours (the paper's: NOT FOUND).

    Raises:
        UserError: the haystack is too short, or the context too short for the needles.
    """
    if not 1 <= n_needles <= len(CITIES):
        raise ValueError(f"n_needles={n_needles}: expected 1 to {len(CITIES)}")
    cities = rng.choice(CITIES, n_needles, replace=False)
    numbers = rng.integers(10 ** (digits - 1), 10**digits, n_needles)
    needles = [f" The magic number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    question = f"\nThe magic number of {cities[0]} is"
    depths = [depth, *rng.random(n_needles - 1)]

    def length(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    budget = context_length - length("".join(needles) + f"{question} {numbers[0]}.")
    if budget < 1:
        raise UserError(f"{n_needles} needles and the question don't fit into {context_length} tokens")
    if (available := length(haystack)) < budget:
        raise UserError(f"the haystack has {available} tokens; {budget} are needed to fill {context_length}")
    # Tokens may merge differently where needles stand, so cut again until the whole fits.
    ids = tokenizer(haystack, add_special_tokens=False, verbose=False)["input_ids"]
    while True:
        prompt = _hide(tokenizer.decode(ids[:budget]), needles, depths) + question
        excess = length(f"{prompt} {numbers[0]}.") - context_length
        if excess <= 0:
            return NeedleExample(prompt, str(numbers[0]), n_needles, depth)
        budget -= excess
        if budget < 1:
            raise UserError(f"{n_needles} needles and the question don't fit into {context_length} tokens")


def _hide(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    ends = np.array([0, *(match.end() for match in re.finditer(r"[.!?](?=\s)|\n", text)), len(text)])
    places = [int(ends[np.abs(ends - depth * len(text)).argmin()]) for depth in depths]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        text = text[:place] + needle + text[place:]
    return text


def evaluate_needles(sampler: Sampler, examples: Sequence[NeedleExample], max_new_tokens: int = 16) -> list[dict]:
    """One row per example: prompt, output, answer, n_needles, depth and `correct`: the first number is the answer."""
    rows = []
    outputs = _greedy(sampler, [e.prompt for e in examples], max_new_tokens)
    for example, output in zip(examples, outputs, strict=True):
        number = re.search(r"\d+", output)
        rows.append(
            {
                "prompt": example.prompt,
                "output": output,
                "answer": example.answer,
                "n_needles": example.n_needles,
                "depth": example.depth,
                "correct": number is not None and number.group() == example.answer,
            }
        )
    return rows


# ---- BabiLong -------------------------------------------------------------------------------------------------------
def babilong_prompt(row: dict, shots: Sequence[dict] = ()) -> str:
    """A BabiLong row {"input", "question", "target"} as a question, after solved ones.

    The wording is ours: BabiLong's own templates address chat models, the paper's are NOT FOUND.
    """
    for key in ("input", "question", "target"):
        if not isinstance(row.get(key), str):
            raise UserError(f"BabiLong row without text in {key!r} (its columns: {', '.join(row)})")
    solved = "".join(f"{babilong_prompt(shot)} {shot['target']}\n\n" for shot in shots)
    return f"{solved}{row['input'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:"


def evaluate_babilong(
    sampler: Sampler, rows: Sequence[dict], shots: Sequence[dict] = (), max_new_tokens: int = 16
) -> list[dict]:
    """One row per question: prompt, output, target and `correct`.

    Correct is an answer whose first sentence has the target, as a whole word, and no other target of these rows that
    the question doesn't mention: listing everything isn't an answer.
    """
    targets = {row["target"].strip().lower() for row in rows}
    prompts = [babilong_prompt(row, shots) for row in rows]
    results = []
    for row, prompt, output in zip(rows, prompts, _greedy(sampler, prompts, max_new_tokens), strict=True):
        said = re.split(r"[.\n]", output.strip(), maxsplit=1)[0].lower()
        target, question = row["target"].strip().lower(), row["question"].lower()
        others = {other for other in targets - {target} if not _mentions(question, other)}
        correct = _mentions(said, target) and not any(_mentions(said, other) for other in others)
        results.append({"prompt": prompt, "output": output, "target": row["target"], "correct": correct})
    return results


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None
