"""The pairwise classifier of equivalent responses (Section 3.2): inference, training on labelled pairs, its scores.

It reads `CLS y_i SEP y_j SEP` and never the prompt, as in the authors' code. Each response is cut to half the room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.evaluation.diversity import ngrams
from shared.rewards.diversity import semantic_classes

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str]


class PairClassifier:
    """Whether two texts are equivalent, by a sequence classifier (a `Same` of shared.evaluation.diversity).

    Args:
        checkpoint: directory or hub id of an AutoModelForSequenceClassification, or a loaded (model, tokenizer).
        same_label: the output that stands for "equivalent".
        threshold: on its probability: .32 for the paper's ModernBERT, .5 for its Qwen3 classifier.
        max_tokens: room for both responses and three special tokens.
        batch_tokens: most tokens at a time, padding counted.
        short_answer_words: two texts of at most so many words are equivalent iff twice their shared words are at least
            as many as the words of the longer one (authors' code); 0: ask the classifier.
    """

    def __init__(
        self,
        checkpoint,
        *,
        same_label: int = 1,
        threshold: float = 0.5,
        max_tokens: int = 2048,
        batch_tokens: int = 32_768,
        short_answer_words: int = 0,
    ):
        import torch

        if isinstance(checkpoint, str | Path):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = "auto" if device.type == "cuda" else torch.float32
            model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype).to(device)
            checkpoint = model, AutoTokenizer.from_pretrained(checkpoint)
        self.model, self.tokenizer = checkpoint
        if self.model.config.num_labels <= same_label:
            raise ValueError(
                f"same_label is {same_label}, but the classifier has {self.model.config.num_labels} outputs"
            )
        self.model.eval()
        if self.model.config.pad_token_id is None:  # models that pool at the last token need to know the padding
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.same_label, self.threshold = same_label, threshold
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.short_answer_words = short_answer_words

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        verdicts = [self._by_words(a, b) for a, b in pairs]
        asked = [i for i, verdict in enumerate(verdicts) if verdict is None]
        for i, p in zip(asked, self.probabilities([pairs[i] for i in asked]), strict=True):
            verdicts[i] = bool(p > self.threshold)
        return verdicts

    def probabilities(self, pairs: Sequence[Pair]) -> np.ndarray:
        """P(equivalent) of each pair, (pairs,)."""
        import torch

        ids = encode_pairs(pairs, self.tokenizer, self.max_tokens)
        found_P = np.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: len(ids[i]), reverse=True)
        while order:
            rows = max(1, self.batch_tokens // len(ids[order[0]]))
            batch, order = order[:rows], order[rows:]
            inputs = collate([ids[i] for i in batch], self.tokenizer.pad_token_id)
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            with torch.inference_mode():
                logits_BC = self.model(**inputs).logits.float()
            found_P[batch] = logits_BC.softmax(-1)[:, self.same_label].cpu().numpy()
        return found_P

    def _by_words(self, a: str, b: str) -> bool | None:
        a_words, b_words = a.lower().split(), b.lower().split()
        longer = max(len(a_words), len(b_words))
        if longer > self.short_answer_words:
            return None
        return 2 * len(set(a_words) & set(b_words)) >= longer


def encode_pairs(pairs: Sequence[Pair], tokenizer, max_tokens: int) -> list[list[int]]:
    """Token ids of CLS a SEP b SEP; a tokenizer without these tokens gets its end-of-sequence token in their place."""
    cls = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.eos_token_id
    sep = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    room = (max_tokens - 3) // 2
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = {text: tokens[:room] for text, tokens in zip(texts, encoded, strict=True)}
    return [[cls, *ids[a], sep, *ids[b], sep] for a, b in pairs]


def collate(rows: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Padded to the right: (B, T) ids and mask."""
    import torch

    T = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (T - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows]),
    }


def labelled_pairs(
    groups: Sequence[Sequence[str]], meaning: Callable[[str], Hashable], rng: np.random.Generator, noise: float
) -> list[tuple[str, str, int]]:
    """Training pairs (a, b, equivalent?) of different texts: of each group at most two equivalent and three others, in
    random order. `noise` is the share of labels that are turned around, as human labels are not perfect either."""
    pairs = []
    for texts in groups:
        found: dict[bool, list[Pair]] = {True: [], False: []}
        for a, b in pairs_of(texts):
            found[meaning(a) == meaning(b)].append((a, b))
        for same, most in ((True, 2), (False, 3)):
            chosen = rng.permutation(len(found[same]))[:most]
            pairs += [(*found[same][i], int(same)) for i in chosen]
    flips, swaps = rng.random(len(pairs)) < noise, rng.random(len(pairs)) < 0.5
    return [
        (*((b, a) if swap else (a, b)), 1 - same if flip else same)
        for (a, b, same), flip, swap in zip(pairs, flips, swaps, strict=True)
    ]


def train_classifier(
    model, tokenizer, pairs: Sequence[tuple[str, str, int]], *, directory: Path, options: dict
) -> None:
    """Fine-tunes a two-label sequence classifier in place: cross entropy weighted by total/count of each label.

    Args:
        directory: for the trainer's own files; nothing stays there.
        options: of transformers' TrainingArguments (steps, batch size, learning rate, seed, ...).
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from shared.training.runs import plain_options, train_whole

    ids = encode_pairs([(a, b) for a, b, _ in pairs], tokenizer, max_tokens=10**9)
    labels = [label for *_, label in pairs]
    counts = np.bincount(labels, minlength=2)
    weights = torch.tensor(len(labels) / np.maximum(counts, 1), dtype=torch.float32)

    def collator(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate([row["ids"] for row in rows], tokenizer.pad_token_id)
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weights.to(labels.device))

    arguments = TrainingArguments(**plain_options(directory, **options))
    rows = [{"ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    train_whole(Trainer(model, arguments, train_dataset=rows, data_collator=collator, compute_loss_func=loss))


def ngram_similarity(pairs: Sequence[Pair], n: int = 4) -> np.ndarray:
    """Shared n-grams over all n-grams (Jaccard) of each pair; 0 where there are none."""
    found = []
    for a, b in pairs:
        left, right = set(ngrams(a.split(), n)), set(ngrams(b.split(), n))
        found.append(len(left & right) / max(1, len(left | right)))
    return np.array(found)


def best_threshold(scores_P: np.ndarray, labels_P: np.ndarray) -> float:
    """The threshold on `scores_P` with the best balanced accuracy."""
    candidates = np.unique(scores_P)
    candidates = np.concatenate([[candidates[0] - 1], (candidates[1:] + candidates[:-1]) / 2])
    return float(max(candidates, key=lambda t: agreement(scores_P > t, labels_P)["balanced_accuracy"]))


def agreement(verdicts_P: np.ndarray, labels_P: np.ndarray) -> dict[str, float]:
    """accuracy, true and false positive rate (positive: equivalent), and the mean accuracy of both labels."""
    verdicts_P, labels_P = np.asarray(verdicts_P, dtype=bool), np.asarray(labels_P, dtype=bool)
    tpr = float(verdicts_P[labels_P].mean()) if labels_P.any() else 0.0
    fpr = float(verdicts_P[~labels_P].mean()) if (~labels_P).any() else 0.0
    accuracy = float((verdicts_P == labels_P).mean())
    return {"accuracy": accuracy, "tpr": tpr, "fpr": fpr, "balanced_accuracy": (tpr + 1 - fpr) / 2}


def held_out_scores(
    classifier: PairClassifier, groups: Sequence[Sequence[str]], meaning: Callable[[str], Hashable]
) -> dict[str, float]:
    """Agreement with the truth on all pairs of different texts of each group, and the share of groups that the
    transitive closure of its verdicts partitions exactly as the truth does."""
    pairs = [pair for texts in groups for pair in pairs_of(texts)]
    labels_P = np.array([meaning(a) == meaning(b) for a, b in pairs])
    asked = list(dict.fromkeys(pairs))
    verdicts = dict(zip(asked, classifier(asked), strict=True))
    found = semantic_classes(groups, lambda chosen: [verdicts[pair] for pair in chosen])
    exact = [
        _same_partition(classes, [meaning(text) for text in texts])
        for classes, texts in zip(found, groups, strict=True)
    ]
    verdicts_P = np.array([verdicts[pair] for pair in pairs])
    return {**agreement(verdicts_P, labels_P), "partition_exact": float(np.mean(exact))}


def pairs_of(texts: Sequence[str]) -> list[Pair]:
    """The pairs of different texts, each in the order in which the reward asks for it."""
    return [(a, b) for a, b in combinations(texts, 2) if a != b]


def _same_partition(found: Sequence[Hashable], true: Sequence[Hashable]) -> bool:
    return len(set(zip(found, true, strict=True))) == len(set(found)) == len(set(true))
