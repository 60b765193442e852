"""What trainers are given beside their options."""

import pytest
import torch
import trl.trainer.utils

from shared.training.runs import WIDEST_TILE, fit_tiles


@pytest.fixture
def tile(monkeypatch):
    """Puts TRL's width back in the end."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", WIDEST_TILE)


def test_narrow_tiles_change_no_bit(model, tokenizer, tile):
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("1 + 2 = 3", "4 + 4 = 8")])

    def computed() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids, fused_lm_head=True)
        (out.log_probs.sum() - 0.1 * out.entropy.sum()).backward()
        return [out.log_probs.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    before = computed()
    fit_tiles(model)
    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == 64
    assert all(torch.equal(a, b) for a, b in zip(before, computed(), strict=True))


def test_tiles_are_never_wider_than_trls(model, tile):
    model.config.vocab_size = 10 * WIDEST_TILE
    fit_tiles(model)
    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE == WIDEST_TILE
