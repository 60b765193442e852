"""What trainers are given beside their options."""

import pytest
import torch
import transformers
import trl.trainer.utils

from shared.training.runs import WIDEST_TILE, cosine_options, fit_tiles, plain_options, trainer_options


@pytest.mark.parametrize("kind", [transformers.TrainingArguments, trl.SFTConfig, trl.RewardConfig, trl.DPOConfig])
def test_options_fit_every_config(kind, make_run, tmp_path):
    """Whatever the kind, float32 and nothing written or reported; what is given replaces what is by default."""
    run = make_run()
    schedule = {"steps": 25, "batch_size": 4, "lr": 0.1, "warmup_steps": 3, "seed": 7}
    for options, seed, rows_each in (
        (trainer_options(run), run.seed, 1),
        (trainer_options(run, seed=5, logging_steps=4), 5, 4),
        (plain_options(tmp_path, seed=6, logging_steps=9), 6, 9),
        (cosine_options(tmp_path, **schedule), 7, 2),
    ):
        config = kind(**options)
        assert (config.bf16, config.fp16, config.gradient_checkpointing) == (False, False, False)
        assert (config.save_strategy, config.report_to) == ("no", [])
        assert (config.seed, config.logging_steps) == (seed, rows_each)
    assert (config.max_steps, config.per_device_train_batch_size, config.learning_rate) == (25, 4, 0.1)
    assert (config.lr_scheduler_type, config.warmup_steps) == ("cosine", 3)


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
