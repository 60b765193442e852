"""The losses against their equations, and against TRL's own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from papers.semi_online.method import group_dpo_loss, grpo_advantages, grpo_loss
from shared.generation import Completion
from shared.training.pairs import Pool
from tests.papers.semi_online.conftest import small_config


def sigmoid_loss(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def test_group_dpo_is_the_mean_over_all_right_and_wrong_pairs():
    """Eq. 4, by loops."""
    rng = np.random.default_rng(0)
    logratio_PN = rng.normal(size=(4, 5)) * 3
    kind_PN = np.array([[1, -1, 1, 0, -1], [1, 1, 1, 1, 1], [-1, -1, -1, 0, -1], [0, -1, 1, 1, 1]])
    expected = []
    for logratio_N, kind_N in zip(logratio_PN, kind_PN, strict=True):
        losses = [
            sigmoid_loss(0.3 * (logratio_N[c] - logratio_N[r]))
            for c in np.flatnonzero(kind_N == 1)
            for r in np.flatnonzero(kind_N == -1)
        ]
        expected.append(np.mean(losses) if losses else 0.0)
    found = group_dpo_loss(torch.tensor(logratio_PN), torch.tensor(kind_PN == 1), torch.tensor(kind_PN == -1), beta=0.3)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found[1] == found[2] == 0


def test_group_dpo_of_one_right_and_one_wrong_is_dpo():
    logratio_PN = torch.tensor([[1.5, -0.5], [-2.0, 0.25]], dtype=torch.float64, requires_grad=True)
    right_PN = torch.tensor([[True, False], [False, True]])
    found = group_dpo_loss(logratio_PN, right_PN, ~right_PN, beta=0.1)
    margin_P = torch.stack([logratio_PN[0, 0] - logratio_PN[0, 1], logratio_PN[1, 1] - logratio_PN[1, 0]])
    torch.testing.assert_close(found, -F.logsigmoid(0.1 * margin_P))


def test_group_dpo_leaves_prompts_of_one_kind_alone_whatever_their_ratios():
    logratio_PN = torch.tensor([[1e30, -1e30, 3e38]], requires_grad=True)
    loss_P = group_dpo_loss(logratio_PN, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool), 0.1)
    loss_P.sum().backward()
    assert loss_P.tolist() == [0.0]
    assert logratio_PN.grad.tolist() == [[0.0] * 3]


def test_advantages_by_hand():
    rewards_PN = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0.5, math.nan, 1.5, 4]], dtype=torch.float64)
    found_PN = grpo_advantages(rewards_PN)
    expected = [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-1.5, 0, -0.5, 2]]
    torch.testing.assert_close(found_PN, torch.tensor(expected, dtype=torch.float64))
    # Divided by the (unbiased) deviation of the scored ones.
    with_std_PN = grpo_advantages(rewards_PN, divide_by_std=True)
    deviations = [np.std([1, 0, 0, 1], ddof=1), 1, np.std([0.5, 1.5, 4], ddof=1)]
    torch.testing.assert_close(with_std_PN, found_PN / (torch.tensor(deviations)[:, None] + 1e-6), rtol=1e-5, atol=0)


def test_grpo_on_its_own_samples_has_the_gradient_of_reinforce():
    """d/d theta of Eq. 1 where rho = 1: -1/N sum_i A_i sum_t grad log pi."""
    torch.manual_seed(0)
    logprobs_PNT = -torch.rand(2, 3, 4, dtype=torch.float64)
    logprobs_PNT.requires_grad_()
    mask_PNT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).expand(2, 3, 4)
    advantages_PN = torch.tensor([[1.0, -2, 1], [0, 0, 0]], dtype=torch.float64)
    loss_P = grpo_loss(logprobs_PNT, mask_PNT, advantages_PN)
    assert loss_P.tolist() == pytest.approx([-(1 * 3 - 2 * 1 + 1 * 4) / 3, 0])
    loss_P.sum().backward()
    torch.testing.assert_close(logprobs_PNT.grad, -advantages_PN[:, :, None] * mask_PNT / 3)


# ---- trainers --------------------------------------------------------------------------------------------------------


def pool(trainer, tokenizer, index: int, texts: list[str], rewards: list[float | None]) -> Pool:
    from papers.semi_online.train import select

    completions = [Completion(t, [*tokenizer(t)["input_ids"], tokenizer.eos_token_id], None, "stop") for t in texts]
    found = Pool(trainer.rows[index], completions, rewards)
    found.pairs.extend(select(found))
    return found


def disturb(model) -> None:
    """A reference that differs from the policy."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def loss_and_gradient(trainer, pools):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, trainer.build_inputs(pools), False)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def test_group_dpo_trainer_with_one_pair_per_prompt_is_the_dpo_trainer(make_trainer):
    """Also with a prompt whose responses are all wrong: it counts in the mean."""
    both = []
    for method in ("dpo", "group_dpo"):
        trainer, tokenizer = make_trainer(small_config(method=method, num_generations=2, recipe={"beta": 0.4}))
        disturb(trainer.ref_model)
        pools = [
            pool(trainer, tokenizer, 0, ["1 2 ANS 2", "3 ANS 3"], [1.0, 0.0]),
            pool(trainer, tokenizer, 1, ["0 ANS 0", "4 4 ANS 4"], [0.0, 1.0]),
            pool(trainer, tokenizer, 2, ["0 ANS 0", "1 ANS 1"], [0.0, 0.0]),
        ]
        both.append(loss_and_gradient(trainer, pools))
    (dpo, dpo_gradient), (group, group_gradient) = both
    assert dpo == pytest.approx(group, abs=1e-6)
    assert dpo > 0.1
    torch.testing.assert_close(dpo_gradient, group_gradient, rtol=1e-4, atol=1e-6)


def test_group_dpo_trainer_follows_the_equation(make_trainer):
    """Eq. 4 in float64 from the models' logits, with an unscored response and alpha GRPO."""
    trainer, tokenizer = make_trainer(
        small_config(method="group_dpo", num_generations=3, grpo_weight=0.5, recipe={"beta": 0.4})
    )
    disturb(trainer.ref_model)
    texts = ["1 2 ANS 2", "3 ANS 3", "4 4 4 ANS"]
    pools = [
        pool(trainer, tokenizer, 0, texts, [1.0, 0.0, 0.0]),
        pool(trainer, tokenizer, 1, texts, [1.0, None, 0.0]),
        pool(trainer, tokenizer, 2, texts, [0.0, 0.0, 0.0]),
    ]
    found, _ = loss_and_gradient(trainer, pools)

    def wide(model):
        copied = type(model)(model.config).double()
        copied.load_state_dict(model.state_dict())
        return copied.eval()

    policy, reference = wide(trainer.policy), wide(trainer.ref_model)

    def logprob(model, pool, i) -> float:
        prompt = tokenizer(pool.row["prompt"])["input_ids"]
        ids = prompt + pool.completions[i].token_ids
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logprobs_TV[t - 1, ids[t]] for t in range(len(prompt), len(ids))))

    expected = 0.0
    for of, right, wrong, advantages in ((0, [0], [1, 2], [2 / 3, -1 / 3, -1 / 3]), (1, [0], [2], [0.5, 0, -0.5])):
        ratio = [logprob(policy, pools[of], i) - logprob(reference, pools[of], i) for i in range(3)]
        expected += np.mean([sigmoid_loss(0.4 * (ratio[c] - ratio[r])) for c in right for r in wrong])
        lengths = [len(c.token_ids) for c in pools[of].completions]
        expected -= 0.5 * np.dot(advantages, lengths) / 3
    assert found == pytest.approx(expected / 3, rel=1e-5)


def test_group_dpo_trainer_without_usable_prompts_has_no_gradient(make_trainer):
    trainer, tokenizer = make_trainer(small_config(method="group_dpo", num_generations=2, grpo_weight=1.0))
    loss, gradient = loss_and_gradient(trainer, [pool(trainer, tokenizer, 0, ["1 ANS 1", "2 ANS 2"], [1.0, 1.0])])
    assert loss == 0
    assert not gradient.any()


def test_trls_grpo_is_eq_1(make_trainer):
    """The gradient of TRL's loss, with our options, is that of Eq. 1 by 1 / max_new_tokens; groups of equal rewards add
    nothing."""
    config = small_config(method="grpo", recipe={"prompts": 4, "clip": 1e9, "lr": 1e-9})
    trainer, _ = make_trainer(config)
    captured = {}
    step, score = trainer.training_step, trainer._generate_and_score_completions

    def scored(inputs):
        captured["batch"] = score(inputs)
        return captured["batch"]

    def stepped(model, inputs, *args):
        loss = step(model, inputs, *args)
        captured["gradient"] = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        trainer.control.should_training_stop = True
        return loss

    rewards = iter([[1.0, 0, 0, 0, 1, 0], [1.0] * 6, [0.0] * 6, [0.0, 0, 0, 0, 0, 1]])
    given_PN = torch.tensor([next(rewards) for _ in range(4)])
    trainer.reward_funcs = [lambda prompts, completions, **columns: given_PN.flatten().tolist()]
    trainer._generate_and_score_completions, trainer.training_step = scored, stepped
    trainer.train()

    batch = captured["batch"]
    ids_MT = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask_MT = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    T = batch["completion_ids"].shape[1]
    model = trainer.model
    model.zero_grad()
    logits_MTV = model(input_ids=ids_MT, attention_mask=mask_MT).logits[:, -T - 1 : -1]
    logprobs_MT = logits_MTV.log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]
    # The batch is shuffled: advantages say which response is which.
    advantages_M = batch["advantages"].flatten()
    assert sorted(advantages_M.tolist()) == pytest.approx(sorted(grpo_advantages(given_PN).flatten().tolist()))
    loss = -(advantages_M[:, None] * logprobs_MT * batch["completion_mask"]).sum() / len(ids_MT)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(captured["gradient"] * config.math.max_new_tokens, expected, rtol=1e-3, atol=1e-5)
    assert expected.norm() > 1e-3


def test_grpo_meets_the_prompts_of_the_dpo_arms(make_trainer):
    config = small_config(recipe={"prompts": 3, "n_train": 10, "steps": 6})
    dpo, _ = make_trainer(config)
    grpo, _ = make_trainer(config, method="grpo")
    expected = [sorted(dpo.rows[i]["prompt"] for i in dpo.rows_at(step)) for step in range(6)]
    batches = list(grpo.get_train_dataloader())
    assert [sorted({row["prompt"] for row in batch}) for batch in batches] == [sorted(set(of)) for of in expected]


def test_options_of_grpo_undo_trls_constant(make_run):
    from papers.semi_online.train import grpo_options

    config = small_config(method="grpo", recipe={"clip": 0.1, "adam_epsilon": 1e-4, "max_new_tokens": 2048, "kl": 1e-3})
    options = grpo_options(config, config.math, make_run())
    assert options["max_grad_norm"] == 0.1 / 2048
    assert options["adam_epsilon"] == 1e-4 / 2048
    assert (options["scale_rewards"], options["loss_type"], options["beta"]) == ("none", "dr_grpo", 1e-3)
    assert options["steps_per_generation"] == options["gradient_accumulation_steps"] == 1
    semi = grpo_options(small_config(method="grpo", sync_steps=10), config.math, make_run())
    assert semi["steps_per_generation"] == 10
