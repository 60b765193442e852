"""What each arm is trained on: the multi-stage curriculum as token sequences, alone and in batches.

At stage s the first s reasoning steps of an example are replaced by s·c continuous thoughts (Section 3); the loss is on
the remaining text only. A sequence is

    question  <bot>  thoughts ...  <eot>  remaining steps ...  ### answer <eos>
    |--- prefix ---|               |-------------- tail ---------------|

Axes: N examples, S cut points (steps before the tail), B rows of a batch, L columns up to the first thought, R columns
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.experiments.errors import UserError, unknown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100  # label of a position without loss


@dataclass(frozen=True)
class Arm:
    """What an arm removes of the reasoning, and what it puts there.

    Attributes:
        stages: `given`, the stage of the curriculum; `first`, always the whole reasoning; `last`, never any of it;
            `tokens`, the stage counts single tokens removed from the left of the reasoning instead of steps.
        filler: what stands for a removed step, c times: `latent` or `pause` tokens, or nothing (None).
        markers: whether <bot> and <eot> enclose the fillers.
    """

    stages: str
    filler: str | None = None
    markers: bool = False


ARMS = {
    "coconut": Arm("given", "latent", markers=True),
    "cot": Arm("first"),
    "no_cot": Arm("last"),
    "no_curriculum": Arm("last", "latent", markers=True),
    "no_thought": Arm("given"),
    "pause_as_thought": Arm("given", "pause", markers=True),
    "pause": Arm("last", "pause"),
    # Deng et al. 2024. The paper only cites its result; schedule in train.removed_tokens.
    "icot": Arm("tokens"),
}


@dataclass(frozen=True)
class Curriculum:
    """The sequence format of one arm.

    Attributes:
        arm: one of ARMS.
        c_thought: thoughts per replaced step, c.
        max_latent_stage: K; a later stage keeps K·c thoughts and drops all steps.
        pad_latent_to_max: if False, an example of fewer than K steps gets only c thoughts per step after stage K.
    """

    arm: str
    c_thought: int = 1
    max_latent_stage: int = 3
    pad_latent_to_max: bool = True

    def __post_init__(self):
        if self.arm not in ARMS:
            raise unknown("arm", self.arm, ARMS)
        if self.c_thought < 0 or self.max_latent_stage < 0:
            raise UserError(
                f"c_thought and max_latent_stage must not be negative, got {self.c_thought} and {self.max_latent_stage}"
            )

    @property
    def filler(self) -> str | None:
        return ARMS[self.arm].filler

    @property
    def n_markers(self) -> int:
        """0 or 1, on each side."""
        return int(ARMS[self.arm].markers)

    @property
    def last_stage(self) -> int:
        """The stage without any language steps (for `icot`: more tokens than any reasoning has)."""
        return 2**31 if ARMS[self.arm].stages == "tokens" else self.max_latent_stage + 1

    def plan(self, stage_B: np.ndarray, cuts_BS: np.ndarray, n_steps_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of fillers, number of tokens cut from the left of the tail), each `[B]`.

        Examples with fewer steps than the stage lose all of them and still get stage·c thoughts.

        Args:
            stage_B: stage of each example.
            cuts_BS: `cuts_BS[i, s]` is the number of tokens of the first s steps.
            n_steps_B: number of steps of each example.
        """
        rule = ARMS[self.arm].stages
        rows = np.arange(len(n_steps_B))
        all_tokens_B = cuts_BS[rows, n_steps_B]
        if rule == "tokens":
            return np.zeros_like(n_steps_B), np.minimum(stage_B, all_tokens_B)
        if rule != "given":
            stage_B = np.full_like(n_steps_B, 0 if rule == "first" else self.last_stage)
        late_B = stage_B > self.max_latent_stage
        cut_B = np.where(late_B, all_tokens_B, cuts_BS[rows, np.minimum(stage_B, n_steps_B)])
        if self.filler is None:
            return np.zeros_like(n_steps_B), cut_B
        most_B = self.max_latent_stage if self.pad_latent_to_max else np.minimum(n_steps_B, self.max_latent_stage)
        return self.c_thought * np.where(late_B, most_B, stage_B), cut_B


def draw_stages(
    rng: np.random.Generator, stage: int, n_steps_B: np.ndarray, uniform_prob: float, per_batch: bool = False
) -> np.ndarray:
    """`[B]` stages: `stage`, or with probability `uniform_prob` one drawn uniformly from 0..number of steps.

    `per_batch` draws once for the whole batch (up to its longest example), so that all rows have equally many thoughts
    and no pass is spent on a part of the batch.
    """
    high_B = np.full_like(n_steps_B, n_steps_B.max()) if per_batch else n_steps_B
    size = 1 if per_batch else len(n_steps_B)
    mixed_B = np.broadcast_to(rng.random(size) < uniform_prob, n_steps_B.shape)
    uniform_B = np.broadcast_to(rng.integers(0, high_B[:size] + 1), n_steps_B.shape)
    return np.where(mixed_B, uniform_B, stage)


def icot_offsets(rng: np.random.Generator, size: int, smoothing: float = 4.0) -> np.ndarray:
    """`[size]` numbers of tokens that `icot` removes beyond its schedule: P(o) ∝ exp(-smoothing · o), o = 0, 1, ...

    The removal smoothing of Deng et al. 2024, "From Explicit CoT to Implicit CoT" (inferred: this paper does not say
    whether the number it cites had it).
    """
    return rng.geometric(1 - np.exp(-smoothing), size) - 1


# ---- tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecialIds:
    pad: int
    eos: int
    bot: int
    eot: int
    latent: int
    pause: int


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives a pretrained tokenizer <bot>, <eot>, <latent>, <pause>, and eos as pad if it has none.

    Returns:
        How many tokens were added; if any, the model needs `resize_token_embeddings(len(tokenizer))`.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token: set eos_token")
    added = tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<bot>", "<eot>", "<latent>", "<pause>"]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return added


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Raises UserError if `tokenizer` lacks one (see `add_special_tokens`)."""
    vocab = tokenizer.get_vocab()
    names = {"pad": tokenizer.pad_token, "eos": tokenizer.eos_token}
    names |= {key: f"<{key}>" for key in ("bot", "eot", "latent", "pause")}
    if missing := [key for key, token in names.items() if token not in vocab]:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {', '.join(missing)} token")
    return SpecialIds(**{key: vocab[token] for key, token in names.items()})


def init_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Sets the embeddings of <bot>, <eot>, <latent> and <pause> to that of the token `<<`, as the authors do.

    Where the tokenizer has no single token `<<`: to the mean of all other tokens' embeddings. In place, for the input
    embeddings and, where they are not tied, for the output rows, too.

    Returns:
        `<<` or `mean`: what they were set to.
    """
    import torch

    ids = special_ids(tokenizer)
    new = [ids.bot, ids.eot, ids.latent, ids.pause]
    model_rows = model.get_input_embeddings().weight
    tables = [model_rows]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model_rows:
        tables.append(head.weight)
    source = tokenizer.get_vocab().get("<<")
    rows = [source] if source is not None else sorted(set(range(len(tokenizer))) - set(new))
    with torch.no_grad():
        for table_VD in tables:
            table_VD[new] = table_VD[rows].mean(0)
    return "mean" if source is None else "<<"


def share_special_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """For a model from scratch: <bot>, <eot>, <latent> and <pause> begin with one embedding, as in a pretrained one.

    It matters. In stage 0 the first step is predicted at <eot>. While <bot> looks the same to the model, it predicts
    that step there, too, so the hidden state that becomes the first thought already says something about it.
    """
    import torch

    ids = special_ids(tokenizer)
    with torch.no_grad():
        table_VD = model.get_input_embeddings().weight
        table_VD[[ids.eot, ids.latent, ids.pause]] = table_VD[ids.bot].clone()


@dataclass(frozen=True)
class TokenizedRows:
    """A data set as tokens, in flat arrays that batches are cut from without a loop over rows.

    Attributes:
        questions, tails: all questions, and all tails (steps, answer, eos), one after the other.
        question_start_N, tail_start_N: where each begins, and one entry more: the end.
        cuts_NS: tokens of the first s steps of each row, s = 0 .. most steps; constant after a row's last step.
        n_steps_N: number of steps.
        source: what to call the data in error messages.
    """

    questions: np.ndarray
    question_start_N: np.ndarray
    tails: np.ndarray
    tail_start_N: np.ndarray
    cuts_NS: np.ndarray
    n_steps_N: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.n_steps_N)


def tokenize_rows(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, source: str = "data") -> TokenizedRows:
    """The tokens of `rows`: a question and each step are lines, then `### answer` and eos.

    Raises:
        UserError: there are no rows, or a text that the tokenizer has no tokens for, naming `source`, row and key.
    """
    if not rows:
        raise UserError(f"{source}: no rows")
    questions = _tokenize([f"{row['question']}\n" for row in rows], tokenizer, f"{source}: row {{}}: question", True)
    answers = _tokenize([f"### {row['answer']}" for row in rows], tokenizer, f"{source}: row {{}}: answer")
    n_steps_N = np.array([len(row["steps"]) for row in rows])
    owners = np.repeat(np.arange(len(rows)), n_steps_N)
    texts = [f"{step}\n" for row in rows for step in row["steps"]]
    steps = iter(_tokenize(texts, tokenizer, f"{source}: row {{}}: steps", owners=owners))

    cuts_NS = np.zeros((len(rows), n_steps_N.max() + 1), dtype=np.int64)
    tails: list[list[int]] = []
    for i, answer in enumerate(answers):
        tail: list[int] = []
        for s in range(n_steps_N[i]):
            tail += next(steps)
            cuts_NS[i, s + 1] = len(tail)
        cuts_NS[i, n_steps_N[i] + 1 :] = len(tail)
        tails.append([*tail, *answer, tokenizer.eos_token_id])
    return TokenizedRows(*_flat(questions), *_flat(tails), cuts_NS, n_steps_N, source)


def _tokenize(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    add_special_tokens: bool = False,
    owners: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids of each text; equal texts are tokenized once. `owners` are the rows that the texts belong to."""
    unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if not unique:
        return []

    def run(some: list[str]) -> list[list[int]]:
        return tokenizer(some, add_special_tokens=add_special_tokens).input_ids

    try:
        ids = run(list(unique))
    except Exception as error:  # a word-level tokenizer raises a bare Exception on a word it does not know
        for i, text in enumerate(texts):
            try:
                run([text])
            except Exception:
                row = i if owners is None else owners[i]
                raise UserError(
                    f"{where.format(row)}: the tokenizer cannot encode {text.strip()!r:.80} ({error}); build the "
                    "tokenizer from all of the data"
                ) from error
        raise
    return [ids[unique[text]] for text in texts]


def _flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(all entries, where each list begins and the end)."""
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
    return np.fromiter((i for ids in lists for i in ids), dtype=np.int64, count=starts[-1]), starts


# ---- one example, and batches -------------------------------------------------------------------------------------


def format_example(
    data: TokenizedRows, row: int, stage: int, curriculum: Curriculum, ids: SpecialIds
) -> tuple[list[int], int, list[int], list[int]]:
    """One example at `stage`: (prefix ids, number of fillers, suffix ids, labels of the whole sequence).

    The sequence is prefix, that many `curriculum.filler` tokens, suffix. This is the definition; `Batches.train` makes
    the same sequences many at a time.
    """
    one = slice(row, row + 1)
    (n_fillers,), (cut,) = curriculum.plan(np.array([stage]), data.cuts_NS[one], data.n_steps_N[one])
    markers = curriculum.n_markers
    question = data.questions[data.question_start_N[row] : data.question_start_N[row + 1]].tolist()
    tail = data.tails[data.tail_start_N[row] + cut : data.tail_start_N[row + 1]].tolist()
    prefix = question + [ids.bot] * markers
    suffix = [ids.eot] * markers + tail
    labels = [IGNORE] * (len(prefix) + int(n_fillers) + markers) + tail
    return prefix, int(n_fillers), suffix, labels


class Batches:
    """Cuts training and prompt batches of one arm from a data set."""

    def __init__(self, data: TokenizedRows, curriculum: Curriculum, ids: SpecialIds):
        self.data, self.curriculum, self.ids = data, curriculum, ids
        self._filler_id = getattr(ids, curriculum.filler) if curriculum.filler else None

    def check_positions(self, limit: int) -> None:
        """Raises UserError if a row is longer than a model of `limit` positions takes, at any stage."""
        data, curriculum = self.data, self.curriculum
        longest_N = np.zeros(len(data), dtype=np.int64)
        # The stages of icot only shorten: its first is the longest.
        for stage in range(min(curriculum.last_stage, curriculum.max_latent_stage + 1) + 1):
            n_fillers_N, cut_N = curriculum.plan(np.full(len(data), stage), data.cuts_NS, data.n_steps_N)
            length_N = np.diff(data.question_start_N) + np.diff(data.tail_start_N) - cut_N + n_fillers_N
            longest_N = np.maximum(longest_N, length_N + 2 * curriculum.n_markers)
        row = int(longest_N.argmax())
        if longest_N[row] > limit:
            most = curriculum.c_thought * curriculum.max_latent_stage if curriculum.filler else 0
            raise UserError(
                f"{data.source}: row {row} takes up to {longest_N[row]} positions (with up to {most} thoughts), but "
                f"the model has {limit}: lower c_thought or max_latent_stage, remove the row, or use a model with more "
                "positions"
            )

    def train(self, rows_B: np.ndarray, stage_B: np.ndarray | int) -> dict[str, torch.Tensor]:
        """A training batch: `input_ids`, `attention_mask`, `position_ids`, `labels`, all `[B, L + R]` int64.

        Rows are padded on the left so that their first thoughts stand in column L, and on the right. Positions count
        from 0 after the left pads. Labels are -100 except for the tail.
        """
        data, ids, markers = self.data, self.ids, self.curriculum.n_markers
        stage_B = np.broadcast_to(stage_B, rows_B.shape)
        n_fillers_B, cut_B = self.curriculum.plan(stage_B, data.cuts_NS[rows_B], data.n_steps_N[rows_B])

        ids_BL, mask_BL = self._prefixes(rows_B)
        prefix_B = mask_BL.sum(1)
        width = ids_BL.shape[1]

        # Right part: fillers, <eot>, tail, pads.
        tail_B = data.tail_start_N[rows_B] + cut_B
        head_B = n_fillers_B + markers
        length_B = head_B + data.tail_start_N[rows_B + 1] - tail_B
        column_R = np.arange(length_B.max())
        mask_BR = column_R < length_B[:, None]
        is_tail_BR = mask_BR & (column_R >= head_B[:, None])
        tail_index_BR = (tail_B - head_B)[:, None] + column_R
        tail_ids_BR = data.tails.take(tail_index_BR, mode="clip")
        ids_BR = np.where(is_tail_BR, tail_ids_BR, ids.pad)
        if markers:
            ids_BR[np.arange(len(rows_B)), n_fillers_B] = ids.eot
        if self._filler_id is not None:
            ids_BR[column_R < n_fillers_B[:, None]] = self._filler_id

        label_BT = np.full((len(rows_B), width + len(column_R)), IGNORE)
        np.copyto(label_BT[:, width:], tail_ids_BR, where=is_tail_BR)
        mask_BT = np.concatenate([mask_BL, mask_BR], axis=1)
        # A pad after the end repeats the last position: it must not reach beyond the model's positions.
        last_B1 = (prefix_B + length_B - 1)[:, None]
        position_BT = (np.arange(mask_BT.shape[1]) - (width - prefix_B)[:, None]).clip(0, last_B1)
        return _tensors(
            input_ids=np.concatenate([ids_BL, ids_BR], axis=1),
            attention_mask=mask_BT,
            position_ids=position_BT,
            labels=label_BT,
        )

    def prompts(
        self, rows_B: np.ndarray, stage: int | None = None, continuation: Sequence[int] = ()
    ) -> dict[str, torch.Tensor]:
        """Prompts to generate from: `input_ids` and `attention_mask`, `[B, T]` int64, padded on the left only.

        Args:
            stage: k, to let the model think k·c thoughts and then write the steps from k + 1 on; None for the prompt
                that the arm answers in its last stage (K·c thoughts).
            continuation: token ids to begin the model's answer with (to read off what follows them).
        """
        curriculum = self.curriculum
        stage = curriculum.last_stage if stage is None else stage
        sequences = []
        for row in rows_B:
            prefix, n_fillers, _, _ = format_example(self.data, row, stage, curriculum, self.ids)
            fillers = [self._filler_id] * n_fillers
            sequences.append([*prefix, *fillers, *[self.ids.eot] * curriculum.n_markers, *continuation])
        width = max(map(len, sequences))
        return _tensors(
            input_ids=np.array([[self.ids.pad] * (width - len(s)) + s for s in sequences]),
            attention_mask=np.array([[0] * (width - len(s)) + [1] * len(s) for s in sequences]),
        )

    def _prefixes(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of questions and <bot>, `[B, L]`, padded on the left."""
        data, markers = self.data, self.curriculum.n_markers
        start_B = data.question_start_N[rows_B]
        length_B = data.question_start_N[rows_B + 1] - start_B + markers
        width = length_B.max()
        column_L = np.arange(width)
        n_pads_B = width - length_B
        mask_BL = column_L >= n_pads_B[:, None]
        ids_BL = np.where(
            mask_BL, data.questions.take((start_B - n_pads_B)[:, None] + column_L, mode="clip"), self.ids.pad
        )
        if markers:
            ids_BL[:, -1] = self.ids.bot
        return ids_BL, mask_BL


def _tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    import torch

    return {key: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for key, array in arrays.items()}


# ---- answers ------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str:
    """What follows the last `#` (all of `text` if there is none), without commas and surrounding space."""
    return text.rpartition("#")[2].replace(",", "").strip()


def is_correct(text: str, answer: str) -> bool:
    """Exact match of a generated text's answer with the row's."""
    return extract_answer(text) == answer.replace(",", "").strip()
