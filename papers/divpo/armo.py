"""ArmoRM (Wang et al. 2024, arXiv 2406.12845), the paper's reward model for stories, as a reward.

The code that comes with its checkpoint needs an older transformers. The model is small enough to be written here:

    r = W h_last                    19 objectives, from the hidden state of the last token
    g = c softmax(MLP(h_prompt)/T)  their weights, from that of the prompt's last token
    score = sum_k g_k (r M)_k       M takes the influence of length out
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, LlamaPreTrainedModel

from shared.rewards.contract import Completions, checked, texts


class Gate(nn.Module):
    def __init__(self, config: LlamaConfig, objectives: int):
        super().__init__()
        hidden = getattr(config, "gating_hidden_dim", 1024)
        sizes = [config.hidden_size, *[hidden] * getattr(config, "gating_n_hidden", 3), objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = getattr(config, "gating_temperature", 10)

    def forward(self, h_BD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            h_BD = layer(h_BD).relu()
        return self.logit_scale * torch.softmax(self.layers[-1](h_BD) / self.temperature, dim=-1)


class LlamaForGatedReward(LlamaPreTrainedModel):
    """The checkpoint's parameters, under their names."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives))
        self.gating = Gate(config, objectives)
        self.post_init()

    def forward(self, input_ids, attention_mask, prompt_end_B, end_B) -> torch.Tensor:
        """Scores [B]. prompt_end_B, end_B: position of the last token of the prompt, of the whole conversation."""
        h_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(h_BTD), device=h_BTD.device)
        rewards_BK = self.regression_layer(h_BTD[rows, end_B]) @ self.reward_transform_matrix
        return (self.gating(h_BTD[rows, prompt_end_B]) * rewards_BK).sum(-1)


class ArmoRM:
    """The score that ArmoRM gives to a conversation's last answer; `RLHFlow/ArmoRM-Llama3-8B-v0.1` or a directory.

    batch_size: most rows scored at a time; lower it when memory runs out.
    """

    __name__ = "armo"

    def __init__(self, checkpoint: str | Path, *, batch_size: int = 16):
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model, loaded = LlamaForGatedReward.from_pretrained(
            checkpoint, dtype="auto" if self.device.type == "cuda" else torch.float32, output_loading_info=True
        )
        if loaded["missing_keys"]:
            raise ValueError(f"{checkpoint} is no ArmoRM: it has no weights for {sorted(loaded['missing_keys'])}")
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        rows = [self._encode(prompt, text) for prompt, text in zip(prompts, texts(completions), strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
        scores: list[float] = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._scores([rows[i] for i in batch]), strict=True):
                scores[i] = score
        return checked(scores, len(rows), self.__name__)

    def _encode(self, prompt: Sequence[dict], text: str) -> tuple[list[int], int]:
        """Token ids of the conversation, and the position of the last token of its prompt."""

        def ids(messages: list[dict]) -> list[int]:
            return self.tokenizer.apply_chat_template(messages, return_dict=False)

        asked = ids(list(prompt))
        whole = ids([*prompt, {"role": "assistant", "content": text}])
        if len(whole) > self.model.config.max_position_embeddings:
            raise ValueError(f"{len(whole)} tokens do not fit into ArmoRM's context: lower max_new_tokens")
        return whole, len(asked) - 1

    @torch.inference_mode()
    def _scores(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        T = max(len(ids) for ids, _ in rows)
        ids_BT = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in rows])
        ends = torch.tensor([(end, len(ids) - 1) for ids, end in rows])
        inputs = [tensor.to(self.device) for tensor in (ids_BT, mask_BT, ends[:, 0], ends[:, 1])]
        return self.model(*inputs).float().tolist()
