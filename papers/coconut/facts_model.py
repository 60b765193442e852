"""A GPT-2 whose input is one token per fact: the model of the tiny experiment.

With two layers and facts written as sentences, the first layer would be spent on putting the words of each fact
together. Here the embedding does that: the token `a>b` enters as E[a] + M E[b]. Everything else is transformers' GPT-2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

POSITION_STD = 0.02  # small beside the embeddings: the order of facts means nothing


class FactsGPT2Config(GPT2Config):
    """GPT2Config and `fact_table`: for each token id (source, destination), the ids of a fact's nodes, or (-1, -1)."""

    model_type = "facts_gpt2"

    fact_table: list[list[int]] | None = None


class FactEmbedding(nn.Embedding):
    """Token embeddings; that of a fact is composed of its nodes': E[source] + M E[destination]."""

    def __init__(self, fact_table: list[list[int]], width: int):
        super().__init__(len(fact_table), width)
        self.destination = nn.Linear(width, width, bias=False)  # M
        self.register_buffer("fact_table", torch.tensor(fact_table))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Composed once per token of the vocabulary: a batch has ten times as many positions.
        source_V, destination_V = self.fact_table.unbind(-1)
        facts_F = (source_V >= 0).nonzero().flatten()
        ends_F = F.embedding(source_V[facts_F], self.weight), F.embedding(destination_V[facts_F], self.weight)
        table_VD = self.weight.index_copy(0, facts_F, ends_F[0] + self.destination(ends_F[1]))
        return F.embedding(ids, table_VD)


class FactsGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 with a :class:`FactEmbedding`, its weight tied to the output layer as usual."""

    config_class = FactsGPT2Config

    def __init__(self, config: FactsGPT2Config):
        super().__init__(config)
        self.transformer.wte = FactEmbedding(config.fact_table, config.n_embd)
        self.post_init()


def init_scales(model: FactsGPT2LMHeadModel, embedding_std: float, thought_scale: float) -> None:
    """What a model from scratch needs so that thoughts, the final norm's outputs, start at the scale of embeddings.

    Args:
        embedding_std: standard deviation of the token embeddings; GPT-2's own .02 is far below that of a thought.
        thought_scale: initial gain of the final norm.
    """
    transformer = model.transformer
    nn.init.normal_(transformer.wte.weight, std=embedding_std)
    nn.init.orthogonal_(transformer.wte.destination.weight)
    nn.init.normal_(transformer.wpe.weight, std=POSITION_STD)
    nn.init.constant_(transformer.ln_f.weight, thought_scale)


AutoConfig.register("facts_gpt2", FactsGPT2Config)
AutoModelForCausalLM.register(FactsGPT2Config, FactsGPT2LMHeadModel)
