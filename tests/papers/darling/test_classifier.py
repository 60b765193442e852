import numpy as np
import pytest

from papers.darling.classifier import (
    PairClassifier,
    agreement,
    best_threshold,
    encode_pairs,
    held_out_scores,
    labelled_pairs,
    ngram_similarity,
    train_classifier,
)


@pytest.fixture(scope="module")
def classifier(pair_checkpoint):
    return PairClassifier(pair_checkpoint, max_tokens=64)


def test_encoding_is_cls_a_sep_b_sep(pair_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair_checkpoint)
    pairs = [("Name one city.", "Tell me a joke."), ("", "a")]
    found = encode_pairs(pairs, tokenizer, max_tokens=10_000)
    assert found == [tokenizer(a, b)["input_ids"] for a, b in pairs]  # the tokenizer's own way to join a pair
    cut = encode_pairs([("Name one city in Africa " * 50, "a")], tokenizer, max_tokens=23)[0]
    assert len(cut) == 3 + 10 + len(tokenizer("a", add_special_tokens=False)["input_ids"])


def test_a_tokenizer_without_cls_and_sep_gets_its_end_of_sequence_token(tmp_path):
    from tests.tiny_chat import pair_checkpoint as make

    found = PairClassifier(make(tmp_path / "qwen", "qwen"), max_tokens=64)
    end = found.tokenizer.eos_token_id
    ids = encode_pairs([("a", "b")], found.tokenizer, 64)[0]
    assert (ids[0], ids[2], ids[-1]) == (end, end, end)
    assert len(found([("a", "b"), ("Tell me", "a joke, a long one")])) == 2


def test_probabilities_do_not_depend_on_the_batch(classifier):
    import torch

    pairs = [("Name one city.", "Tell me a joke."), ("a", "b"), ("Find the number of digits " * 4, "x"), ("", "")]
    together = classifier.probabilities(pairs)
    alone = [classifier.probabilities([pair])[0] for pair in pairs]
    assert together == pytest.approx(alone, abs=1e-5)
    ids = torch.tensor([classifier.tokenizer(*pairs[0])["input_ids"]])
    with torch.no_grad():
        expected = classifier.model(ids).logits[0].softmax(-1)[1]
    assert together[0] == pytest.approx(float(expected), abs=1e-5)
    classifier.batch_tokens, before = 10, classifier.batch_tokens
    assert classifier.probabilities(pairs) == pytest.approx(together, abs=1e-5)
    classifier.batch_tokens = before
    assert classifier.probabilities([]).shape == (0,)


def test_threshold_and_label(classifier, pair_checkpoint):
    pairs = [("Name one city.", "Tell me a joke."), ("a", "b"), ("c", "a d e")]
    p = classifier.probabilities(pairs)
    for threshold in (0.0, float(np.median(p)), 1.0):
        classifier.threshold = threshold
        assert classifier(pairs) == [bool(value > threshold) for value in p]
    other = PairClassifier(pair_checkpoint, max_tokens=64, same_label=0)
    assert other.probabilities(pairs) == pytest.approx(1 - p, abs=1e-5)
    with pytest.raises(ValueError, match="same_label is 2, but the classifier has 2 outputs"):
        PairClassifier(pair_checkpoint, same_label=2)


def test_short_answers_are_compared_by_words(classifier):
    classifier.short_answer_words, classifier.threshold = 5, 1.0  # the classifier itself never says yes
    try:
        assert classifier([("A red cat", "a red dog"), ("a cat", "dog"), ("b c d e", "b c x y z"), ("", "")]) == [
            True,  # 2 x 2 shared >= 3
            False,  # 0 < 2
            False,  # 2 x 2 < 5
            True,
        ]
        assert classifier([("a b c d e f", "a b c d e f g")]) == [False]  # too long: the classifier's turn
    finally:
        classifier.short_answer_words = 0


def meaning(text):
    return text.split()[0]


def test_labelled_pairs():
    rng = np.random.default_rng(0)
    groups = [["a 1", "a 2", "a 3", "b 1", "b 2", "c", "c"], ["d", "d", "d"]]
    pairs = labelled_pairs(groups, meaning, rng, noise=0.0)
    assert len(pairs) == 5  # two equivalent, three others; equal texts make no pair
    assert sum(same for *_, same in pairs) == 2
    assert all(a != b and same == (meaning(a) == meaning(b)) for a, b, same in pairs)
    many = labelled_pairs(groups * 2000, meaning, rng, noise=0.05)
    flipped = np.mean([same != (meaning(a) == meaning(b)) for a, b, same in many])
    assert abs(flipped - 0.05) < 5 * np.sqrt(0.05 * 0.95 / len(many))
    assert abs(np.mean([a < b for a, b, _ in many]) - 0.5) < 0.05  # either text may come first


def test_agreement_by_hand():
    found = agreement(np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 0, 1]))
    assert found == {
        "accuracy": 0.8,
        "tpr": 1.0,
        "fpr": pytest.approx(1 / 3),
        "balanced_accuracy": pytest.approx((1 + 2 / 3) / 2),
    }


def test_ngram_similarity_and_its_threshold():
    pairs = [("a b c d e", "a b c d e"), ("a b c d e", "a b c d f"), ("a b c d", "e f g h"), ("a", "a b")]
    scores = ngram_similarity(pairs)
    assert scores == pytest.approx([1, 1 / 3, 0, 0])
    threshold = best_threshold(scores, np.array([True, True, False, False]))
    assert 0 < threshold < 1 / 3
    assert best_threshold(scores, np.array([True, False, False, False])) > 1 / 3


def test_held_out_scores_of_a_perfect_and_a_blind_classifier():
    groups = [["a 1", "a 2", "b 1"], ["c 1", "d 1", "d 1"]]
    perfect = held_out_scores(lambda pairs: [meaning(a) == meaning(b) for a, b in pairs], groups, meaning)
    assert (perfect["balanced_accuracy"], perfect["partition_exact"]) == (1.0, 1.0)
    blind = held_out_scores(lambda pairs: [True] * len(pairs), groups, meaning)
    assert (blind["tpr"], blind["fpr"], blind["partition_exact"]) == (1.0, 1.0, 0.0)


@pytest.mark.slow
def test_training_finds_the_relation(tmp_path):
    """Pairs of two-word texts, equivalent if their first words are; the second words mean nothing."""
    import torch
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    from shared.models import word_tokenizer

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(6)]
    tokenizer = word_tokenizer(words)
    groups = [[" ".join(rng.choice(words, 2)) for _ in range(8)] for _ in range(300)]
    shape = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        global_attn_every_n_layers=1,
        classifier_pooling="mean",
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
    )
    model = ModernBertForSequenceClassification(shape)
    before = held_out_scores(PairClassifier((model, tokenizer), max_tokens=16), groups[250:], meaning)
    pairs = labelled_pairs(groups[:250], meaning, rng, noise=0.0)
    options = {"max_steps": 300, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "seed": 0}
    train_classifier(model, tokenizer, pairs, directory=tmp_path / "trainer", options=options)
    assert not list(tmp_path.iterdir())
    after = held_out_scores(PairClassifier((model, tokenizer), max_tokens=16), groups[250:], meaning)
    assert before["balanced_accuracy"] < 0.75
    assert after["balanced_accuracy"] > 0.9
