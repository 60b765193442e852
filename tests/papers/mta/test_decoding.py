import pytest
import torch

ARMS = [
    {"attention": "transformer"},
    {"attention": "diff"},
    {"attention": "talking_heads"},
    {"attention": "mta"},
    {"attention": "mta", "kq_post": False},
    {"attention": "mta", "kq_pre": False},
    {"attention": "mta", "query_kernel_size": 1},
    {"attention": "mta", "kq_layers": [1], "head_pre": False, "head_post": False},
]


def name(changes):
    return "-".join(f"{k}={v}" for k, v in changes.items())


def tokens(*shape):
    return torch.randint(3, 37, shape)


@pytest.fixture
def undecided(tiny_model):
    """Models that don't just repeat the last token, as tied embeddings do at first, and never end."""

    def make(**changes):
        model = tiny_model(tie_word_embeddings=False, **changes)
        model.generation_config.eos_token_id = None
        return model

    return make


@pytest.mark.parametrize("changes", ARMS, ids=name)
@pytest.mark.parametrize("chunks", [[1] * 14, [9, 1, 1, 1, 1, 1], [1, 5, 2, 6], [13, 1]], ids=str)
@torch.no_grad()
def test_decoding_in_pieces_equals_the_full_forward(tiny_model, changes, chunks):
    from papers.mta.cache import MTACache

    model = tiny_model(**changes)
    x = tokens(2, 14)
    cache = MTACache(model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(x).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, 4), ({"kq_pre": False}, 2), ({"kq_post": False}, 2), ({"attention": "talking_heads"}, 0)],
)
@torch.no_grad()
def test_the_cache_keeps_no_more_queries_than_the_kernels_reach(tiny_model, changes, kept):
    model = tiny_model(**changes)
    cache = model(tokens(2, 50), use_cache=True).past_key_values
    cache = model(tokens(2, 1), past_key_values=cache).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape[2] == 51
        if kept == 0:
            assert layer.queries is None
        else:
            assert layer.queries.shape[2] == kept
            # what is held in memory, not only what is visible
            assert layer.queries.untyped_storage().nbytes() == layer.queries.numel() * layer.queries.element_size()


@pytest.mark.parametrize("changes", ARMS, ids=name)
@torch.no_grad()
def test_left_padded_batches_generate_what_each_prompt_does_alone(undecided, changes):
    model = undecided(**changes)
    prompts = [tokens(1, n) for n in (3, 8, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (8 - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=8, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
        assert row[8:].tolist() == alone[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("changes", ARMS[:5], ids=name)
@torch.no_grad()
def test_beam_search_reorders_the_whole_cache(undecided, changes, monkeypatch):
    from papers.mta.cache import MTACache

    reorder, moved = MTACache.reorder_cache, []
    monkeypatch.setattr(
        MTACache,
        "reorder_cache",
        lambda cache, beams: (moved.append(not torch.equal(beams, torch.arange(8))), reorder(cache, beams)),
    )
    model = undecided(**changes)
    batch = torch.cat([torch.nn.functional.pad(tokens(1, 3), (4, 0)), tokens(1, 7)])
    options = {"attention_mask": (batch != 0).long(), "max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    found = model.generate(batch, **options)
    assert torch.equal(found, model.generate(batch, use_cache=False, **options))
    assert sum(moved) > 3, "beams hardly changed places"


@pytest.mark.parametrize("changes", [{"attention": "mta"}, {"attention": "diff"}], ids=name)
@torch.no_grad()
def test_assisted_decoding_takes_guesses_back(undecided, changes):
    """Prompt lookup and another model guess tokens, most of them wrong here; the cache is cropped."""
    model = undecided(**changes)
    prompt = torch.tensor([[0, 0, 5, 6, 7, 8, 5, 6, 9, 5, 6, 7, 5, 6]])
    options = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(
        model.generate(prompt, assistant_model=undecided(num_hidden_layers=1, kq_layers=[0]), **options), expected
    )


@torch.no_grad()
def test_taking_back_without_recording_is_refused(tiny_model):
    cache = tiny_model()(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="minus"):
        cache.crop(5)


@torch.no_grad()
def test_rows_of_the_cache_can_be_repeated_selected_and_reordered(tiny_model):
    model = tiny_model()
    x = torch.cat([torch.nn.functional.pad(tokens(1, 4), (3, 0)), tokens(1, 7)])
    mask, following = (x != 0).long(), tokens(4, 3)
    chosen = torch.tensor([0, 1, 0])
    cache = model(x, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    rows, masks = x[chosen], torch.cat([mask[chosen], torch.ones(3, 3, dtype=torch.long)], dim=1)
    decoded = model(following[:3], attention_mask=masks, past_key_values=cache).logits
    full = model(torch.cat([rows, following[:3]], dim=1), attention_mask=masks).logits
    torch.testing.assert_close(decoded, full[:, 7:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", ARMS[:5], ids=name)
@torch.no_grad()
def test_packed_documents_are_kept_apart_in_the_cache(tiny_model, changes):
    """Two documents in the prompt; then the second goes on, token by token, and a third begins."""
    from papers.mta.cache import MTACache

    model = tiny_model(**changes)
    first, second, third = tokens(1, 5), tokens(1, 8), tokens(1, 4)
    cache = MTACache(model.config)
    prompt = torch.cat([first, second[:, :3]], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    model(prompt, position_ids=positions, past_key_values=cache)
    continued = [model(second[:, [t]], position_ids=torch.tensor([[t]]), past_key_values=cache) for t in range(3, 8)]
    begun = [model(third[:, [t]], position_ids=torch.tensor([[t]]), past_key_values=cache) for t in range(4)]
    decoded = torch.cat([step.logits for step in continued], dim=1)
    torch.testing.assert_close(decoded, model(second).logits[:, 3:], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.cat([step.logits for step in begun], dim=1), model(third).logits, rtol=0, atol=1e-10
    )


@torch.no_grad()
def test_sampling_several_continuations_shares_the_prompt(undecided):
    model = undecided()
    x = tokens(2, 6)
    torch.manual_seed(3)
    cached = model.generate(x, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    assert torch.equal(
        cached, model.generate(x, max_new_tokens=6, do_sample=True, num_return_sequences=3, use_cache=False)
    )


def test_other_caches_are_refused(tiny_model):
    from transformers import DynamicCache

    model = tiny_model()
    with pytest.raises(TypeError, match="MTACache"):
        model(tokens(1, 4), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="MTACache"):
        model.generate(tokens(1, 4), cache_implementation="static", max_new_tokens=2)
