import re

import numpy as np
import pytest
import torch

from shared.experiments import UserError


@torch.no_grad()
def test_nll_is_the_sum_over_the_tokens_that_count(tiny_model):
    from papers.mta.evaluators import sequence_nll

    model = tiny_model()
    x = torch.randint(3, 37, (5, 9))
    labels = x.clone()
    labels[0, :4] = -100
    labels[2] = -100
    labels[2, 0] = x[2, 0]  # the first token can't be predicted
    log_p = model(x).logits.log_softmax(-1)
    expected = [-sum(log_p[row, t - 1, x[row, t]] for t in range(1, 9) if labels[row, t] != -100) for row in range(5)]
    nll, counted = sequence_nll(model, x, labels, batch_size=2)
    torch.testing.assert_close(nll, torch.tensor([float(e) for e in expected], dtype=torch.double), rtol=0, atol=1e-5)
    assert counted.tolist() == [5, 8, 0, 8, 8]
    nll, counted = sequence_nll(model, x)
    assert counted.tolist() == [8] * 5


class Answering:
    """A sampler that answers by a function from prompts to texts."""

    def __init__(self, answer):
        self.answer = answer

    def sample(self, prompts, n=1, params=None):
        from shared.generation import Completion

        assert params.temperature == 0
        return [[Completion(text, [], None, "stop")] for text in self.answer(prompts)]


# ---- needles ---------------------------------------------------------------------------------------------------------
HAYSTACK = " ".join(f"Sentence {i} says nothing in particular." for i in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    from papers.mta.data import train_tokenizer

    return train_tokenizer([HAYSTACK], 300)


def find_number(prompts):
    """Answers as a perfect reader would."""
    answers = []
    for prompt in prompts:
        *_, city = re.findall(r"magic number of (\w+) is", prompt)
        answers.append(" " + re.search(rf"magic number of {city} is (\d+)", prompt).group(1) + ". And so on 123.")
    return answers


@pytest.mark.parametrize("n_needles", [1, 2, 10])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_are_hidden_where_asked_and_fit(tokenizer, n_needles, depth):
    from papers.mta.evaluators import needle_example

    length = 700
    example = needle_example(HAYSTACK, tokenizer, length, n_needles, depth, np.random.default_rng(1))
    used = len(tokenizer(f"{example.prompt} {example.answer}.")["input_ids"])
    assert length - 15 <= used <= length
    needles = re.findall(r"The magic number of (\w+) is (\d{5})\.", example.prompt)
    assert len(dict(needles)) == n_needles
    text, question = example.prompt.rsplit("\n", 1)
    (city,) = re.findall(r"^The magic number of (\w+) is$", question)
    assert dict(needles)[city] == example.answer
    without = re.sub(rf" The magic number of (?!{city}\b)\w+ is \d+\.", "", text)
    needle = f" The magic number of {city} is {example.answer}."
    place = without.index(needle) / (len(without) - len(needle))
    assert abs(place - depth) < 0.05
    # nothing of the text is lost around the needles
    assert HAYSTACK.startswith(without.replace(needle, ""))


def test_needle_scores_separate_readers_from_guessers(tokenizer):
    from papers.mta.evaluators import evaluate_needles, needle_example

    rng = np.random.default_rng(0)
    examples = [needle_example(HAYSTACK, tokenizer, 600, 4, depth, rng) for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert len({e.answer for e in examples}) == 5
    rows = evaluate_needles(Answering(find_number), examples)
    assert all(row["correct"] for row in rows)
    assert [row["depth"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    wrong = [" 1", "", f" {examples[2].answer}0", f" 7, or {examples[3].answer}", " unknown"]
    assert not any(row["correct"] for row in evaluate_needles(Answering(lambda prompts: wrong), examples))


def test_haystacks_and_contexts_of_the_wrong_size_are_refused(tokenizer):
    from papers.mta.evaluators import needle_example

    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="haystack has"):
        needle_example("Short.", tokenizer, 200, 1, 0.5, rng)
    with pytest.raises(UserError, match="don't fit"):
        needle_example(HAYSTACK, tokenizer, 40, 10, 0.5, rng)


# ---- BabiLong --------------------------------------------------------------------------------------------------------
ROWS = [
    {"input": "Mary went to the kitchen.", "question": "Where is Mary? ", "target": "kitchen"},
    {"input": "John is in the garden.", "question": "Where is John? ", "target": "garden"},
    {"input": "Is Fred in the office?", "question": "What is north of the garden? ", "target": "office"},
]


@pytest.mark.parametrize(
    ("outputs", "correct"),
    [
        ([" kitchen", " The garden.", " Office, north of the garden"], [True, True, True]),
        ([" garden", " kitchen or garden", " kitchenette"], [False, False, False]),
        ([" hall. kitchen", "", " I think the office\ngarden"], [False, False, True]),
    ],
)
def test_babilong_answers_name_the_target_and_nothing_else(outputs, correct):
    from papers.mta.evaluators import evaluate_babilong

    rows = evaluate_babilong(Answering(lambda prompts: outputs), ROWS)
    assert [row["correct"] for row in rows] == correct


def test_babilong_prompts_hold_text_question_and_solved_examples():
    from papers.mta.evaluators import babilong_prompt

    prompt = babilong_prompt(ROWS[0], shots=ROWS[1:2])
    solved, asked = prompt.split("\n\n")
    assert solved.endswith(" garden")
    assert "John is in the garden." in solved
    assert "Mary went to the kitchen." in asked
    assert asked.endswith("Answer:")
    with pytest.raises(UserError, match="target"):
        babilong_prompt({"input": "x", "question": "y", "answer": "z"})


def test_retrieval_of_a_real_model(tiny_model):
    """An untrained model says anything; the whole path runs, prompts of several lengths in one batch."""
    from papers.mta.data import letter_tokenizer
    from papers.mta.evaluators import evaluate_babilong
    from shared.generation.transformers_backend import TransformersSampler

    model = tiny_model(vocab_size=32, tie_word_embeddings=False)
    sampler = TransformersSampler(model, letter_tokenizer())
    rows = evaluate_babilong(sampler, ROWS, max_new_tokens=5)
    for row in rows:
        ids = letter_tokenizer()(row["prompt"], return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        assert row["output"] == letter_tokenizer().decode(alone, skip_special_tokens=True)
    assert len({row["output"] for row in rows}) == 3
