"""What the paper adds to semi-online DPO (`shared.training.preference`): GroupDPO, and GRPO as the paper writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from shared.training.pairs import Pool, split_binary
from shared.training.preference import PreferenceTrainer


def group_dpo_loss(
    logratio_PN: torch.Tensor, right_PN: torch.Tensor, wrong_PN: torch.Tensor, beta: float
) -> torch.Tensor:
    """GroupDPO (Eq. 4): every right response against every wrong one of the same prompt.

        L(x) = 1 / (|right| |wrong|) sum_c sum_r -log sigmoid(beta (logratio_c - logratio_r))

    Args:
        logratio_PN: log pi(y|x) - log pi_ref(y|x) of P prompts' N responses, summed over tokens.
        right_PN, wrong_PN: masks; a response that is neither takes no part.

    Returns: `[P]`; 0 for a prompt without right or without wrong responses.
    """
    pairs_PNN = right_PN[:, :, None] & wrong_PN[:, None, :]
    margin_PNN = logratio_PN[:, :, None] - logratio_PN[:, None, :]
    # Other pairs are replaced before the sigmoid, lest an infinity times 0 becomes a NaN.
    loss_PNN = -F.logsigmoid(beta * margin_PNN.masked_fill(~pairs_PNN, 0.0))
    return (loss_PNN * pairs_PNN).sum((1, 2)) / pairs_PNN.sum((1, 2)).clamp(min=1)


def grpo_advantages(rewards_PN: torch.Tensor, divide_by_std: bool = False) -> torch.Tensor:
    """A = r - mean of its group (Eq. 1); NaN rewards, of responses that could not be scored, get the advantage 0.

    Args:
        divide_by_std: by the group's standard deviation + 1e-6, as the authors' code did.
    """
    scored_PN = ~rewards_PN.isnan()
    filled_PN = rewards_PN.nan_to_num(0.0)
    n_P1 = scored_PN.sum(1, keepdim=True).clamp(min=1)
    centred_PN = (filled_PN - filled_PN.sum(1, keepdim=True) / n_P1) * scored_PN
    if divide_by_std:
        variance_P1 = (centred_PN**2).sum(1, keepdim=True) / (n_P1 - 1).clamp(min=1)
        centred_PN = centred_PN / (variance_P1.sqrt() + 1e-6)
    return centred_PN


def grpo_loss(logprobs_PNT: torch.Tensor, mask_PNT: torch.Tensor, advantages_PN: torch.Tensor) -> torch.Tensor:
    """GRPO (Eq. 1) on the policy's own samples: ratios are 1 and nothing is clipped.

        L(x) = -1/N sum_i A_i sum_t rho_it,    rho = exp(log pi - stop_gradient(log pi))

    Args:
        logprobs_PNT, mask_PNT: of the sequences' tokens; 1 where they belong to the response.

    Returns: `[P]`.
    """
    ratio_PNT = (logprobs_PNT - logprobs_PNT.detach()).exp() * mask_PNT
    return -(advantages_PN * ratio_PNT.sum(2)).mean(1)


class GroupDPOTrainer(PreferenceTrainer):
    """PreferenceTrainer with the loss of GroupDPO, and `grpo_weight` times that of GRPO on the same samples.

    As there, void prompts count in the mean over prompts. `select` only decides what is logged as usable.
    """

    def __init__(self, *args: Any, grpo_weight: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.grpo_weight = grpo_weight

    def build_inputs(self, pools: Sequence[Pool]) -> dict[str, Any]:
        """All N responses of every prompt that has right and wrong ones (of any prompt if none has), with masks.

        In prompts of all right or all wrong responses both losses are 0.
        """
        used = [pool for pool in pools if pool.pairs] or list(pools[:1])
        n = self.args.num_generations
        examples = [
            {"prompt_ids": prompt, "chosen_ids": completion.token_ids, "rejected_ids": []}
            for prompt, pool in zip([self._encode(pool.row, "a row") for pool in used], used, strict=True)
            for completion in pool.completions
        ]
        batch = self.data_collator(examples)
        half = len(examples)  # of a preference batch: the chosen ones; the others are prompts alone
        kind_PN = torch.zeros(len(used), n, dtype=torch.long)
        for kind_N, pool in zip(kind_PN, used, strict=True):
            right, wrong = split_binary(pool)
            kind_N[right], kind_N[wrong] = 1, -1
        rewards_PN = torch.tensor([[math.nan if r is None else r for r in pool.rewards] for pool in used])
        return {
            **{name: tensor[:half] for name, tensor in batch.items()},
            "kind": kind_PN,
            "advantages": grpo_advantages(rewards_PN.float()),
            "share": len(used) / len(pools),
        }

    def _compute_loss(self, model, inputs, return_outputs):
        kind_PN, advantages_PN = inputs["kind"], inputs["advantages"]
        ids_MT, completion_MT = inputs["input_ids"], inputs["completion_mask"]
        batch = {
            "input_ids": ids_MT,
            "attention_mask": inputs["attention_mask"],
            "labels": ids_MT.masked_fill(completion_MT == 0, -100),
            "use_cache": False,
            "fused_lm_head": True,
        }
        logprobs_MT = model(**batch).log_probs
        with torch.no_grad():
            reference_M = self.ref_model(**batch).log_probs.sum(1)
        logratio_PN = (logprobs_MT.sum(1) - reference_M).view(kind_PN.shape)
        loss_P = group_dpo_loss(logratio_PN, kind_PN == 1, kind_PN == -1, self.beta)
        if self.grpo_weight:
            of_tokens = (tensor.view(*kind_PN.shape, -1) for tensor in (logprobs_MT, completion_MT[:, 1:]))
            loss_P = loss_P + self.grpo_weight * grpo_loss(*of_tokens, advantages_PN)
        self._log_group(logratio_PN.detach(), kind_PN, logprobs_MT.detach().sum(1).view(kind_PN.shape))
        return loss_P.mean() * inputs["share"]

    def _log_group(self, logratio_PN: torch.Tensor, kind_PN: torch.Tensor, logprob_PN: torch.Tensor) -> None:
        """The names that DPOTrainer logs, of this process."""
        for name, kind in (("chosen", 1), ("rejected", -1)):
            if (mask_PN := kind_PN == kind).any():
                self._metrics["train"][f"rewards/{name}"].append(self.beta * logratio_PN[mask_PN].mean().item())
                self._metrics["train"][f"logps/{name}"].append(logprob_PN[mask_PN].mean().item())
