"""The literal definition of Coconut's latent mode: the oracle of the tests and of the benchmark.

Everything is recomputed from the first token for every thought and for every generated token, one row at a time,
without padding, masks or caches. Slow, and plainly right.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


def naive_hidden(base: PreTrainedModel, ids: list[int], latent_token_id: int) -> torch.Tensor:
    """Final hidden states ``[T, D]`` of one row: at each latent position the input is the hidden state before it."""
    inputs_TD: list[torch.Tensor] = []
    for token in ids:
        if token == latent_token_id:
            inputs_TD.append(_transformer(base, inputs_TD)[-1])
        else:
            inputs_TD.append(base.get_input_embeddings()(torch.tensor(token, device=base.device)))
    return _transformer(base, inputs_TD)


def naive_logits(base: PreTrainedModel, ids: list[int], latent_token_id: int) -> torch.Tensor:
    """Next-token logits ``[T, V]`` of one row."""
    return base.get_output_embeddings()(naive_hidden(base, ids, latent_token_id))


def naive_loss(
    base: PreTrainedModel, rows: list[list[int]], labels: list[list[int]], latent_token_id: int
) -> torch.Tensor:
    """Mean cross-entropy over all tokens of all rows whose label is not -100."""
    losses = []
    for ids, targets in zip(rows, labels, strict=True):
        log_probs_TV = F.log_softmax(naive_logits(base, ids, latent_token_id), dim=-1)
        losses += [-log_probs_TV[t - 1, targets[t]] for t in range(1, len(ids)) if targets[t] != -100]
    return torch.stack(losses).mean()


@torch.no_grad()
def naive_generate(
    base: PreTrainedModel, ids: list[int], latent_token_id: int, max_new_tokens: int, eos_token_id: int | None = None
) -> list[int]:
    """Greedy continuation of one row up to and including the end token. The latent token is never a candidate."""
    new: list[int] = []
    while len(new) < max_new_tokens and eos_token_id not in new:
        logits_V = naive_logits(base, ids + new, latent_token_id)[-1]
        logits_V[latent_token_id] = -torch.inf
        new.append(int(logits_V.argmax()))
    return new


def _transformer(base: PreTrainedModel, inputs_TD: list[torch.Tensor]) -> torch.Tensor:
    return base.base_model(inputs_embeds=torch.stack(inputs_TD)[None], use_cache=False).last_hidden_state[0]
