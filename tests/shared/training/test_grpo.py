"""TRL's GRPO loss against its equation, and what our subclass adds."""

import numpy as np
import pytest

WORDS = [f"w{i}" for i in range(12)]
PROMPTS = ["w0 w1", "w2", "w3 w4 w5", "w6 w7"]


@pytest.fixture(scope="module")
def tokenizer():
    from shared.models import word_tokenizer

    return word_tokenizer(WORDS)


def make_trainer(tokenizer, directory, reward, n=4, double=False, steps=2, updates=1, stock=False, **options):
    import torch
    import trl
    from trl import GRPOConfig

    from shared.models import llama_from_scratch
    from shared.training.grpo import GRPOTrainer, prompt_stream

    model = llama_from_scratch(tokenizer, layers=2, width=16, heads=2, positions=32, seed=0)
    if options.get("beta"):  # TRL loads the reference policy from where the policy came from
        from transformers import AutoModelForCausalLM

        model.save_pretrained(directory / "start")
        model = AutoModelForCausalLM.from_pretrained(directory / "start", dtype="float32")
    rollouts = len(PROMPTS) * n
    arguments = GRPOConfig(
        output_dir=str(directory),
        max_steps=steps * updates,
        per_device_train_batch_size=rollouts // updates,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=n,
        max_completion_length=6,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        loss_type="dapo",
        lr_scheduler_type="constant",
        **{"scale_rewards": "none", "learning_rate": 1e-2, **options},
    )
    stream = prompt_stream([{"prompt": prompt, "length": len(prompt)} for prompt in PROMPTS], steps * len(PROMPTS), 3)
    torch.manual_seed(3)
    trainer = (trl.GRPOTrainer if stock else GRPOTrainer)(
        model=model.double() if double else model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=stream,
        processing_class=tokenizer,
    )
    return trainer


def first_words(prompts, completions, **columns):
    """A reward between 0 and 1 that differs between completions."""
    return [(sum(ord(c) for c in text) % 7) / 6 for text in completions]


def step_inputs(trainer):
    """One batch of rollouts with its advantages, and TRL's loss on it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._prepare_inputs(batch)
    return inputs, trainer.compute_loss(trainer.model, inputs)


def equation_6(model, inputs, beta=0.0, reference=None, clip=0.2, old=None):
    """The loss of DARLING's Eq. 6 token by token in float64, without any batching of completions.

    old, reference: log-probabilities of the tokens of each completion; old is by default the policy itself.
    """
    import torch

    total, tokens = 0.0, 0
    for i in range(len(inputs["completion_ids"])):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        answer = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        ids = torch.cat([prompt, answer])[None]
        logprobs = model(ids).logits[0].double().log_softmax(-1)
        for t, token in enumerate(answer, start=len(prompt)):
            new = logprobs[t - 1, token]
            before = new.detach() if old is None else old[i][t - len(prompt)]
            ratio = torch.exp(new - before)
            advantage = inputs["advantages"][i].double()
            term = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            if reference is not None:
                gap = reference[i][t - len(prompt)] - new
                term = term - beta * (gap.exp() - gap - 1)
            total, tokens = total + term, tokens + 1
    return -total / tokens


def gradients(model, loss):
    import torch

    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_loss_dapo_is_equation_6_in_float64(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, first_words, double=True)
    inputs, loss = step_inputs(trainer)
    model = trainer.model
    expected = equation_6(model, inputs)
    # TRL's log-probabilities are float32, whatever the model.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradients(model, loss).numpy() == pytest.approx(gradients(model, expected).numpy(), rel=1e-4, abs=1e-7)


def test_loss_with_clipping_and_kl_is_equation_6(tokenizer, tmp_path):
    import torch

    trainer = make_trainer(tokenizer, tmp_path, first_words, double=True, beta=0.3)
    inputs, _ = step_inputs(trainer)
    old = [row.double() for row in trainer_logprobs(trainer, inputs)]
    inputs["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(old, batch_first=True)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"].clone()
    with torch.no_grad():  # move the policy away from where it sampled, so that some ratios are clipped
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loss = trainer.compute_loss(trainer.model, inputs)
    expected = equation_6(trainer.model, inputs, beta=0.3, reference=old, old=old)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] > 0
    # k3 is a small difference of float32 numbers in TRL.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    without = equation_6(trainer.model, inputs, old=old)
    assert abs(expected.item() - without.item()) > 1e-2 * abs(loss.item())  # the KL term counts


def trainer_logprobs(trainer, inputs):
    import torch

    rows = []
    for i in range(len(inputs["completion_ids"])):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        answer = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        with torch.no_grad():
            logprobs = trainer.model(torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
        rows.append(logprobs[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0])
    return rows


@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages(tokenizer, tmp_path, scale):
    seen = {}

    def reward(prompts, completions, **columns):
        seen["rewards"] = first_words(prompts, completions)
        return seen["rewards"]

    trainer = make_trainer(tokenizer, tmp_path, reward, scale_rewards=scale)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    groups = np.array(seen["rewards"]).reshape(-1, 4)
    expected = groups - groups.mean(1, keepdims=True)
    if scale == "group":
        expected = expected / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    assert inputs["advantages"].numpy() == pytest.approx(expected.reshape(-1), abs=1e-5)


def test_rewards_that_ask_for_logprobs_get_those_of_the_policy(tokenizer, tmp_path):
    import torch

    seen = {}

    def reward(prompts, completions, *, completion_ids, logprobs, **columns):
        seen.update(prompts=prompts, ids=completion_ids, logprobs=logprobs)
        return [0.0] * len(prompts)

    reward.needs_logprobs = True
    trainer = make_trainer(tokenizer, tmp_path, reward, temperature=0.7)
    step_inputs(trainer)
    assert len(seen["logprobs"]) == 16
    for prompt, ids, found in zip(seen["prompts"], seen["ids"], seen["logprobs"], strict=True):
        start = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = trainer.model(torch.tensor([start + ids])).logits[0] / 0.7
        expected = logits.log_softmax(-1)[len(start) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_without_what_we_add_it_is_trls_trainer(tokenizer, tmp_path):
    """The weights after two steps, to the last bit."""
    import torch

    weights = []
    for stock in (False, True):
        trainer = make_trainer(tokenizer, tmp_path / str(stock), first_words, stock=stock)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        weights.append(list(trainer.model.parameters()))
        assert not torch.equal(weights[-1][0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_rewards_that_do_not_ask_get_none(tokenizer, tmp_path):
    def reward(prompts, completions, **columns):
        assert "logprobs" not in columns
        assert columns["length"]  # the dataset's columns arrive
        return [0.0] * len(prompts)

    step_inputs(make_trainer(tokenizer, tmp_path, reward))


def test_equal_rewards_give_no_gradient(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, lambda prompts, completions, **columns: [1.0] * len(prompts))
    _, loss = step_inputs(trainer)
    assert loss.item() == 0
    assert gradients(trainer.model, loss).abs().max().item() == 0
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [1.0]


def test_a_reward_of_the_wrong_length_is_refused(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, lambda prompts, completions, **columns: [1.0])
    with pytest.raises(ValueError, match="returned 1 rewards"):
        step_inputs(trainer)


@pytest.mark.parametrize("updates", [1, 4])
def test_resuming_between_updates_changes_nothing(tokenizer, tmp_path, updates):
    """With several updates per batch of rollouts, the kill comes in their middle."""
    import torch

    def run(directory, stop=None, resume=None):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    control.should_save = control.should_training_stop = True

        trainer = make_trainer(tokenizer, directory, first_words, steps=5, updates=updates)
        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        rows = [row for row in trainer.state.log_history if "reward" in row]
        return trainer.model, [(row["step"], row["loss"], row["reward"], row["entropy"]) for row in rows]

    through, log = run(tmp_path / "through")
    stop = 6 if updates > 1 else 2
    run(tmp_path / "killed", stop=stop)
    resumed, rest = run(tmp_path / "killed", resume=str(tmp_path / "killed" / f"checkpoint-{stop}"))
    assert rest == log
    for a, b in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prompt_stream_visits_every_row_once_per_epoch():
    from shared.training.grpo import prompt_stream

    rows = [{"prompt": f"p{i}", "digits": [i, i]} for i in range(5)]
    stream = [row["prompt"] for row in prompt_stream(rows, 12, seed=1)]
    assert sorted(stream[:5]) == sorted(stream[5:10]) == [f"p{i}" for i in range(5)]
    assert stream[:5] != stream[5:10]
    assert [row["prompt"] for row in prompt_stream(rows, 7, seed=1)] == stream[:7]
    assert [row["prompt"] for row in prompt_stream(rows, 12, seed=2)] != stream
    assert prompt_stream(rows, 1, seed=1)[0].keys() == {"prompt", "digits"}


def test_fitting_rows(tokenizer, qwen_chat, capsys):
    from transformers import AutoTokenizer

    from shared.training.grpo import fitting_rows

    rows = [{"prompt": prompt} for prompt in PROMPTS]
    assert fitting_rows(rows, tokenizer, 3) == rows
    assert fitting_rows(rows, tokenizer, 2) == [rows[i] for i in (0, 1, 3)]
    assert "1 of 4 prompts have more than 2 tokens: left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="each of the 4 prompts has more than 0 tokens; the shortest: 1"):
        fitting_rows(rows, tokenizer, 0)
    with pytest.raises(ValueError, match="no prompts"):
        fitting_rows([], tokenizer, 5)
    chat = AutoTokenizer.from_pretrained(qwen_chat)
    conversations = [{"prompt": [{"role": "user", "content": "a" * length}]} for length in (1, 200)]
    length = len(chat.apply_chat_template(conversations[0]["prompt"], add_generation_prompt=True)["input_ids"])
    assert fitting_rows(conversations, chat, length) == conversations[:1]
