"""Offline to online DPO: the loss by its equation, the schedule of copies, resuming, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from shared.experiments import files
from shared.experiments.errors import UserError
from shared.generation import Completion
from shared.training.pairs import Pool, best_vs_worst, right_vs_wrong

STEPS, B, N = 7, 4, 6


def digit_sum(prompts, completions, **columns):
    """A scalar reward that rarely ties."""
    return [sum(int(w) * (i + 1) for i, w in enumerate(text.split()) if w.isdigit()) / 10 for text in completions]


@pytest.fixture
def make(model, tokenizer, rows, make_run):
    from shared.training.preference import PreferenceConfig, PreferenceTrainer
    from shared.training.runs import trainer_options

    def make(
        run=None, rows=rows, reward=digit_sum, select=best_vs_worst, policy=None, cls=PreferenceTrainer, **options
    ):
        run = run or make_run()
        defaults = {"max_steps": STEPS, "per_device_train_batch_size": B, "num_generations": N, "max_new_tokens": 3}
        defaults["use_cpu"] = True
        args = PreferenceConfig(**trainer_options(run, **{**defaults, "learning_rate": 1e-2, **options}))
        policy = copy.deepcopy(model) if policy is None else policy
        return cls(policy, args, rows=rows, reward=reward, select=select, tokenizer=tokenizer)

    return make


def moving(s):
    """The reference moves with the generator."""
    return {"sync_steps": s, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": s}


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def disturb(model):
    """A reference that differs from the policy."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def wide(model):
    """The model in float64, untouched by any trainer."""
    copied = type(model)(model.config).double()
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def logprob(model, tokenizer, pool, i):
    """ln p(completion i | prompt), summed over its tokens."""
    prompt = tokenizer(pool.row["prompt"])["input_ids"]
    ids = prompt + pool.completions[i].token_ids
    logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs_TV[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def pool_of(trainer, tokenizer, index, *texts):
    completions = [
        Completion(text, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id], None, "stop") for text in texts
    ]
    return Pool(trainer.rows[index], completions, [None] * len(texts))


def test_the_loss_is_the_sum_over_pairs_by_the_number_of_prompts(make, tokenizer):
    """Eq. 3 in float64, with a reference that differs from the policy and a prompt without a pair."""
    trainer = make(beta=0.3)
    with torch.no_grad():
        for p in trainer.ref_model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pools = [pool_of(trainer, tokenizer, i, "1 2", "3", "4 5 6") for i in range(3)]
    for pool, pairs in zip(pools, ([(0, 1)], [], [(2, 0), (1, 2)]), strict=True):
        pool.pairs.extend(pairs)
    found = trainer._compute_loss(trainer.model, trainer.build_inputs(pools), False)
    policy, reference = wide(trainer.policy), wide(trainer.ref_model)
    expected = 0.0
    for pool in pools:
        for chosen, rejected in pool.pairs:
            ratios = [
                logprob(policy, tokenizer, pool, i) - logprob(reference, tokenizer, pool, i) for i in (chosen, rejected)
            ]
            expected -= F.logsigmoid(0.3 * (ratios[0] - ratios[1]))
    assert found.item() == pytest.approx(expected.item() / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [{}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}])
def test_with_a_pair_for_every_prompt_it_is_trls_trainer(make, tokenizer, loss, tmp_path):
    """A DPOTrainer of TRL's own, from texts: same loss, same gradient."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = make(beta=0.7, **loss)
    disturb(trainer.ref_model)
    chosen, rejected = ["1 2", "5", "2 2", "4 0 1"], ["3", "1 1 1", "0", "6 6"]
    pools = [pool_of(trainer, tokenizer, i, *texts) for i, texts in enumerate(zip(chosen, rejected, strict=True))]
    for pool in pools:
        pool.pairs.append((0, 1))

    table = {
        "prompt": [pool.row["prompt"] for pool in pools],
        "chosen": [f" {text}" for text in chosen],
        "rejected": [f" {text}" for text in rejected],
    }
    options = DPOConfig(
        str(tmp_path), beta=0.7, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **loss
    )
    plain = DPOTrainer(
        wide(trainer.policy).float().train(),
        wide(trainer.ref_model).float(),
        options,
        train_dataset=Dataset.from_dict(table),
        processing_class=tokenizer,
    )
    batches = [trainer.build_inputs(pools), plain.data_collator(list(plain.train_dataset))]
    found = []
    for one, batch in zip((trainer, plain), batches, strict=True):
        value = one.compute_loss(one.model, batch)
        value.backward()
        found.append((value.item(), torch.cat([p.grad.flatten() for p in one.model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)
    assert abs(found[0][0] - math.log(2)) > 1e-2


def test_entropy_of_the_chosen_is_rewarded(make, tokenizer):
    """Eq. 3 minus lambda_H times the chosen responses' mean of -sum p log p, over B, with its gradient, in float64 from
    the plain model's logits; pairs of unequal lengths, and a prompt without a pair."""
    pools_of = [([(0, 1)], "1 2", "3"), ([], "1", "2"), ([(1, 0), (0, 1)], "4 5 6", "2")]
    trainer = make(beta=0.3, entropy_weight=0.7)
    disturb(trainer.ref_model)
    pools = [pool_of(trainer, tokenizer, i, *texts) for i, (_, *texts) in enumerate(pools_of)]
    for pool, (pairs, *_) in zip(pools, pools_of, strict=True):
        pool.pairs.extend(pairs)
    found = trainer._compute_loss(trainer.model, trainer.build_inputs(pools), False)
    found.backward()
    policy, reference = wide(trainer.policy), wide(trainer.ref_model)

    def entropy(pool, i):
        prompt = tokenizer(pool.row["prompt"])["input_ids"]
        ids = prompt + pool.completions[i].token_ids
        p_TV = policy(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        return -(p_TV * p_TV.log()).sum() / len(p_TV)

    expected = 0.0
    for pool in pools:
        for chosen, rejected in pool.pairs:
            ratios = [
                logprob(policy, tokenizer, pool, i) - logprob(reference, tokenizer, pool, i).detach()
                for i in (chosen, rejected)
            ]
            expected = expected - F.logsigmoid(0.3 * (ratios[0] - ratios[1])) - 0.7 * entropy(pool, chosen)
    (expected / 3).backward()
    assert found.item() == pytest.approx(expected.item() / 3, rel=1e-5)
    for mine, theirs in zip(trainer.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_entropy_of_the_chosen_by_finite_differences():
    """Through the mean over a response: positions outside of it and the rejected half have no part."""
    from shared.training.preference import chosen_entropy

    entropy_MT = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    mask_MT = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    found_P = chosen_entropy(entropy_MT, mask_MT)
    assert found_P.tolist() == pytest.approx([entropy_MT[0, :2].mean().item(), 0.0])
    assert torch.autograd.gradcheck(lambda e: chosen_entropy(e, mask_MT), entropy_MT)


def test_without_an_entropy_weight_no_bit_changes_and_void_batches_have_no_gradient(make, tokenizer):
    losses = []
    for weight in ({}, {"entropy_weight": 1e-30}, {"entropy_weight": 0.5}):
        trainer = make(beta=0.3, **weight)
        disturb(trainer.ref_model)
        pool = pool_of(trainer, tokenizer, 0, "1 2", "3")
        void = trainer._compute_loss(trainer.model, trainer.build_inputs([pool, pool]), False)
        void.backward()
        assert void.item() == 0
        assert not any(p.grad.any() for p in trainer.policy.parameters())
        pool.pairs.append((0, 1))
        losses.append(trainer._compute_loss(trainer.model, trainer.build_inputs([pool]), False).item())
    assert losses[0] == losses[1]
    assert losses[2] < losses[0]


def test_lengths_of_chosen_and_rejected_are_logged(make, tokenizer):
    trainer = make()
    pools = [pool_of(trainer, tokenizer, i, "1 2", "3", "4 5 6") for i in range(2)]
    trainer._log_rollouts(pools)
    log = trainer._metrics["train"]
    assert {"rollout/reward", "rollout/chosen_length"} & log.keys() == set()  # nothing was scored or paired
    pools[0].pairs.extend([(0, 1), (2, 1)])
    trainer._log_rollouts(pools)
    assert log["rollout/chosen_length"] == [3.5]
    assert log["rollout/rejected_length"] == [2.0]
    assert log["rollout/length"] == [3.0, 3.0]


def test_without_any_pair_nothing_is_learned(make, tokenizer):
    trainer = make(select=lambda pool: [], weight_decay=0.0)
    before = vector(trainer.policy)
    trainer.train()
    assert torch.equal(vector(trainer.policy), before)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS
    assert all(row["loss"] == row["rollout/usable"] == 0 for row in rows)


def test_online_with_a_moving_reference_is_contrastive_reinforce(make, tokenizer):
    """s = 1: policy and reference are equal, so the loss is log 2 for each pair and its gradient
    -beta/2 (grad log p(chosen) - grad log p(rejected))."""
    trainer = make(**moving(1), max_grad_norm=0.0)
    seen = []
    step = trainer.training_step

    def watched(model, inputs, *args):
        loss = step(model, inputs, *args)
        pools = [pool for of_pass in trainer._pools[trainer.state.global_step] for pool in of_pass]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        expected = torch.zeros_like(gradient)
        policy = wide(trainer.policy)
        for pool in pools:
            for chosen, rejected in pool.pairs:
                policy.zero_grad()
                (logprob(policy, tokenizer, pool, chosen) - logprob(policy, tokenizer, pool, rejected)).backward()
                expected -= 0.1 / 2 / B * torch.cat([p.grad.flatten() for p in policy.parameters()])
        seen.append((loss.item(), sum(bool(pool.pairs) for pool in pools)))
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert len(seen) == STEPS
    for loss, usable in seen:
        assert loss == pytest.approx(math.log(2) * usable / B, abs=1e-6)


def test_offline_the_generator_and_the_reference_stay_those_of_the_start(make, model):
    trainer = make(sync_steps=None)
    start = vector(model)
    trainer.train()
    assert torch.equal(vector(trainer.generator.model), start)
    assert torch.equal(vector(trainer.ref_model), start)
    assert not torch.equal(vector(trainer.policy), start)


@pytest.mark.parametrize(("s", "ahead"), [(1, 1024), (3, 1024), (3, B), (None, 1024), (None, 2 * B)])
def test_copies_and_samples_are_made_when_they_should(make, s, ahead):
    trainer = make(sync_steps=s, prompts_per_call=ahead)
    copies, calls = [], []
    copy_from, sample = trainer.generator.copy_from, trainer.generator.sample

    def watched_copy(of):
        copies.append(of.state.global_step)
        return copy_from(of)

    def watched_sample(prompts, *args):
        calls.append((trainer.state.global_step, len(prompts) // B))
        return sample(prompts, *args)

    trainer.generator.copy_from, trainer.generator.sample = watched_copy, watched_sample
    trainer.train()
    assert copies == ([] if s is None else list(range(0, STEPS, s)))
    interval = s or STEPS
    ahead = ahead // B
    ends = [*range(interval, STEPS, interval), STEPS]
    begins = [t for t in range(STEPS) if t % interval % ahead == 0]
    assert calls == [(t, min(ahead, next(end for end in ends if end > t) - t)) for t in begins]
    staleness = [row["rollout/staleness"] for row in trainer.state.log_history if "loss" in row]
    assert staleness == [t % interval for t in range(STEPS)]


def test_the_generator_lags_behind_the_policy_by_the_interval(make):
    trainer = make(sync_steps=3)
    policies, generators = [], []
    prepare = trainer._prepare_inputs

    def watched(inputs):
        result = prepare(inputs)
        policies.append(vector(trainer.policy))
        generators.append(vector(trainer.generator.model))
        return result

    trainer._prepare_inputs = watched
    trainer.train()
    for t, generator in enumerate(generators):
        assert torch.equal(generator, policies[t - t % 3])


def test_gradient_accumulation_changes_nothing(make):
    whole = make(sync_steps=2, max_grad_norm=0.0)
    parts = make(sync_steps=2, max_grad_norm=0.0, per_device_train_batch_size=B // 2, gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(vector(whole.policy), vector(parts.policy), rtol=1e-3, atol=1e-4)


def test_every_pass_takes_each_row_once_in_a_new_order(make, rows):
    trainer = make()
    order = [i for step in range(2 * len(rows) // B) for i in trainer.rows_at(step)]
    first, second = order[: len(rows)], order[len(rows) :]
    assert sorted(first) == sorted(second) == list(range(len(rows)))
    assert first != second
    # One prompt alone gives B pools a step, and they differ.
    single = make(rows=rows[:1])
    assert single.rows_at(3) == [0] * B
    pools = single.make_pools([0, 0], seed=1)
    assert [c.token_ids for c in pools[0].completions] != [c.token_ids for c in pools[1].completions]


@pytest.mark.parametrize("s", [1, 3, None])
def test_killed_and_resumed_training_ends_with_the_same_weights_and_log(make, make_run, s):
    from transformers import TrainerCallback

    from shared.training.runs import fit

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:  # in the middle of an interval of three steps
                raise KeyboardInterrupt

    options = moving(s) if s else {"sync_steps": None}
    whole_run, run = make_run("whole"), make_run("killed")
    whole = make(whole_run, **options)
    fit(whole, whole_run)
    killed = make(run, **options)
    killed.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        fit(killed, run, save_every=0)
    resumed = make(run, **options)
    fit(resumed, run, save_every=0)
    assert resumed.state.global_step == STEPS
    assert torch.equal(vector(resumed.policy), vector(whole.policy))
    assert torch.equal(vector(resumed.ref_model), vector(whole.ref_model))
    logs = [files.read_jsonl(r.dir / "log.jsonl") for r in (whole_run, run)]
    # Times, and counts since the process began, are its own.
    changing = ("time", "rollout/calls", "rollout/tokens", "rollout/seconds", "num_tokens")
    logs = [[{k: v for k, v in row.items() if k not in changing} for row in log] for log in logs]
    assert len(logs[0]) == STEPS
    assert logs[0] == logs[1]
    assert not (run.dir / "trainer").exists()


def test_it_learns_what_is_rewarded(make):
    def sevens(completions, **columns):
        return [text.split().count("7") / 3 for text in completions]

    trainer = make(reward=sevens, max_steps=40, per_device_train_batch_size=8, lr_scheduler_type="constant")
    trainer.train()
    log = [row["rollout/reward"] for row in trainer.state.log_history if "loss" in row]
    assert log[0] < 0.15
    assert sum(log[-5:]) / 5 > 0.6


def test_a_model_that_another_trainer_has_patched_gives_real_copies(make, model):
    first = make()
    first.train()
    second = make(policy=first.policy, sync_steps=2)
    start = vector(first.policy)
    second.train()
    ids = torch.tensor([[5, 6, 7]])
    for frozen in (second.ref_model, second.generator.model):
        torch.testing.assert_close(frozen(ids).logits, wide(frozen)(ids).logits.float())
    assert torch.equal(vector(second.ref_model), start)
    assert not torch.equal(vector(second.policy), start)


def test_chat_prompts_and_a_tokenizer_without_padding(make_run, llama_chat):
    """As Llama 3.1's: three tokens that end a turn, none to pad with; rewards see chat messages."""
    from shared.rewards.verifiable import MathReward
    from shared.training.preference import PreferenceConfig, PreferenceTrainer
    from shared.training.runs import fit, load_policy, save_policy, trainer_options

    run = make_run()
    rows = [{"prompt": [{"role": "user", "content": f"What is {n} - 1?"}], "answer": str(n - 1)} for n in (2, 3)]
    policy, chat_tokenizer = load_policy(llama_chat)
    chat_tokenizer.pad_token = None
    sizes = {"max_steps": 3, "per_device_train_batch_size": 2, "num_generations": 8, "max_new_tokens": 32}
    args = PreferenceConfig(**trainer_options(run, **sizes, sync_steps=2, use_cpu=True))
    parts = {"rows": rows, "reward": MathReward(), "select": right_vs_wrong, "tokenizer": chat_tokenizer}
    trainer = PreferenceTrainer(policy, args, **parts)
    fit(trainer, run)
    save_policy(trainer, chat_tokenizer, run)
    log = files.read_jsonl(run.dir / "log.jsonl")
    assert len(log) == 3
    assert all(0 < row["rollout/reward"] < 1 and row["rollout/truncated"] < 0.2 for row in log)
    assert any(row["rollout/usable"] for row in log)
    saved, saved_tokenizer = load_policy(run.checkpoint)
    assert torch.equal(vector(saved), vector(trainer.policy))
    assert saved_tokenizer.chat_template == chat_tokenizer.chat_template


def test_bad_input_is_named(make, rows):
    with pytest.raises(UserError, match="row 1 has no column 'prompt'; it has: question"):
        make(rows=[rows[0], {"question": "?"}])
    with pytest.raises(UserError, match="there are no prompts"):
        make(rows=[])
    long = {"prompt": " ".join("1" * 16), "answer": "1", "item": "long"}
    with pytest.raises(UserError, match="row 0, item long: its prompt has 16 tokens, which leaves no room"):
        make(rows=[long]).train()
    with pytest.raises(ValueError, match="short returned 1 rewards for 24 completions"):
        make(reward=named("short", lambda **columns: [1.0])).train()
    with pytest.raises(ValueError, match="returned nan for row 0"):
        make(reward=named("nan", lambda completions, **columns: [math.nan] * len(completions))).train()
    for option, message in (
        ({"sync_steps": 0}, "sync_steps must be at least 1"),
        ({"num_generations": 1}, "at least 2 samples"),
        ({"max_steps": -1}, "number of optimizer steps"),
    ):
        with pytest.raises(UserError, match=message):
            make(**option)


def named(name, function):
    function.__name__ = name
    return function


def test_rows_of_different_kinds_get_none_for_the_columns_they_lack(make, rows):
    seen = {}

    def reward(prompts, completions, answer, style, **columns):
        seen.update(answer=answer, style=style)
        return [None if a is None else 1.0 for a in answer]

    trainer = make(rows=[rows[0], {"prompt": "1 =", "style": "terse"}], reward=reward)
    pools = trainer.make_pools([0, 1], seed=0)
    assert seen == {"answer": [rows[0]["answer"]] * N + [None] * N, "style": [None] * N + ["terse"] * N}
    assert [pool.rewards for pool in pools] == [[1.0] * N, [None] * N]
    assert [pool.pairs for pool in pools] == [[], []]


def test_failures_of_the_reward_are_in_the_log(make):
    calls = []

    def reward(completions, log_metric, **columns):
        calls.append(len(completions))
        log_metric("judge/failed", len(calls) / 8)
        return [None] * len(completions)

    trainer = make(reward=reward, sync_steps=4)
    trainer.train()
    logged = {row["step"]: row["judge/failed"] for row in trainer.state.log_history if "judge/failed" in row}
    assert calls == [4 * B * N, 3 * B * N]  # steps 1 to 4, 5 to 7
    assert logged == {1: 1 / 8, 5: 2 / 8}


def test_vllm_samples_go_through_the_same_path(make, monkeypatch):
    """TRL's engine replaced by one that answers from a list: prompts repeated N times, weights pushed at copies."""
    calls, lengths = [], []

    class Engine:
        def __init__(self, **options):
            calls.append(("made", options["mode"], options["max_completion_length"], options["logprobs"]))
            lengths.append(options["max_model_length"])

        def sync_weights(self):
            calls.append("sync")

        def generate(self, prompts, images, num_generations):
            calls.append(len(prompts))
            assert all(prompts[i] == prompts[i - i % N] for i in range(len(prompts)))
            ids = [[5 + i % N, 1] if i % 2 else [5 + i % N, 4, 4] for i in range(len(prompts))]
            return prompts, ids, [[[-0.5] for _ in row] for row in ids], None

    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", Engine)
    trainer = make(use_vllm=True, sync_steps=3)
    trainer.train()
    assert calls == [("made", "colocate", 3, 0), "sync", 3 * B * N, "sync", 3 * B * N, "sync", B * N]
    assert lengths == [max(len(trainer._encode(row, "")) for row in trainer.rows) + 3]
    make(use_vllm=True, vllm_mode="server")
    assert lengths[1:] == [None]  # the server's own
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["rollout/truncated"] == pytest.approx(0.5)
    assert rows[0]["rollout/entropy"] == pytest.approx(0.5)
