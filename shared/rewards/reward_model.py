"""Reward models: sequence classifiers with one output, such as Athene-RM-8B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.experiments.errors import UserError
from shared.rewards.contract import Completions, checked, texts


class RewardModel:
    """The raw score that a sequence classifier gives to prompt and completion.

    A conversation is rendered with the tokenizer's chat template, text is joined as it is. The score may be negative.

    checkpoint: directory or hub name of an `AutoModelForSequenceClassification` with one output.
    batch_size: most rows scored at a time; lower it when memory runs out.
    ending: text appended to every row. Athene-RM-8B (Llama) reads its score at its CLS token there:
        `ending=tokenizer.cls_token`.
    key_mapping: regular expressions from names of the checkpoint's weights to names of the model's, where they differ.
    device: by default the GPU if there is one. On a GPU the checkpoint's own dtype is used, on the CPU float32.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        batch_size: int = 16,
        ending: str = "",
        key_mapping: Mapping[str, str] | None = None,
        device: str | None = None,
    ):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.__name__ = Path(checkpoint).name
        self.batch_size, self.ending = batch_size, ending
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            dtype="auto" if self.device.type == "cuda" else torch.float32,
            key_mapping=dict(key_mapping) if key_mapping else None,
            output_loading_info=True,
        )
        if loaded["missing_keys"]:
            raise UserError(
                f"{checkpoint} has no weights for {', '.join(sorted(loaded['missing_keys']))}, which would be random; "
                "is it a reward model? If its weights have other names, give key_mapping"
            )
        if model.config.num_labels != 1:
            raise UserError(f"{checkpoint} has {model.config.num_labels} outputs; a reward model has one")
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        rows = self._encode(prompts, completions)
        rewards: list[float] = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # little padding
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for row, score in zip(batch, self._scores([rows[row] for row in batch]), strict=True):
                rewards[row] = score
        return checked(rewards, len(completions), f"reward model {self.__name__}")

    def _encode(self, prompts: Sequence, completions: Completions) -> list[list[int]]:
        """Token ids; raises UserError naming a row that is empty or does not fit into the model's context."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded = token_ids(self.tokenizer, prompts, texts(completions), self.ending)
        for row, ids in enumerate(encoded):
            if not ids:
                raise UserError(f"row {row}: prompt and completion are empty, there is nothing to score")
            if context is not None and len(ids) > context:
                raise UserError(
                    f"row {row}: {len(ids)} tokens do not fit into the reward model's context of {context}; "
                    "lower the limits of prompt and completion"
                )
        return encoded

    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        import torch

        # The model reads the score at the last token that is not the padding token: no row may end with that.
        last = {row[-1] for row in rows}
        candidates = (self.tokenizer.pad_token_id, *range(len(last) + 1))
        pad = next(token for token in candidates if token is not None and token not in last)
        self.model.config.pad_token_id = pad
        T = max(map(len, rows))
        ids_BT = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
        with torch.inference_mode():
            logits_B1 = self.model(ids_BT.to(self.device), attention_mask=mask_BT.to(self.device)).logits
        return logits_B1[:, 0].float().tolist()


def token_ids(tokenizer, prompts: Sequence, completions: Sequence[str], ending: str = "") -> list[list[int]]:
    """Token ids of each prompt with its completion: text is joined as it is, and gets the tokenizer's special tokens; a
    conversation is rendered with the chat template, which writes its own.

    All rows in one call of the tokenizer, or two where there are both kinds: a call costs as much as several rows.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
    encoded: list[list[int]] = [[]] * len(prompts)
    for chat in (False, True):
        rows = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) != chat]
        if not rows:
            continue
        if chat:
            conversations = [[*prompts[row], {"role": "assistant", "content": completions[row]}] for row in rows]
            joined = tokenizer.apply_chat_template(conversations, tokenize=False)
        else:
            joined = [prompts[row] + completions[row] for row in rows]
        found = tokenizer([text + ending for text in joined], add_special_tokens=not chat)["input_ids"]
        for row, ids in zip(rows, found, strict=True):
            encoded[row] = ids
    return encoded
