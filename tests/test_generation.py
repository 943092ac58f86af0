"""Sampling: equality with transformers.generate, exact log-probabilities, and the right distribution."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lib import generation
from lib.generation import Decoding, draw_tokens, sample

PROMPTS = ["the cat", "you are", "the dog sat on the mat .", "a"]


def generate(model, tokenizer, prompts, max_new_tokens):
    """The library's own greedy decoding, end and padding tokens removed."""
    side = "right" if model.config.is_encoder_decoder else "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    return [strip(row[start:].tolist(), tokenizer) for row in out]


def strip(ids, tokenizer):
    end = tokenizer.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


def forced_log_probs(model, prompt_ids, response_ids):
    """Teacher-forced log-probabilities of one response, float32, no cache, no padding."""
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            logits = model(
                input_ids=torch.tensor([prompt_ids]),
                decoder_input_ids=torch.tensor([start + response_ids[:-1]]),
            ).logits[0]
        else:
            ids = torch.tensor([prompt_ids + response_ids])
            logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response_ids)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", ["tiny", "tiny_seq2seq"])
def test_greedy_equals_generate(family, request):
    model, tokenizer = request.getfixturevalue(family)
    ours = sample(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=12)
    theirs = generate(model, tokenizer, PROMPTS, 12)
    assert [strip(ids, tokenizer) for ids in ours.response_ids] == theirs


def test_greedy_equals_generate_on_real_prompts(policy, real_prompts):
    model, tokenizer = policy
    ours = sample(model, tokenizer, real_prompts, temperature=0, max_new_tokens=16)
    theirs = generate(model, tokenizer, real_prompts, 16)
    assert len({len(ids) for ids in ours.prompt_ids}) > 10
    assert [strip(ids, tokenizer) for ids in ours.response_ids] == theirs


@pytest.mark.parametrize("family", ["tiny", "tiny_seq2seq"])
def test_log_probabilities_are_the_models(family, request):
    model, tokenizer = request.getfixturevalue(family)
    drawn = sample(model, tokenizer, PROMPTS, n=5, max_new_tokens=15, seed=3)
    assert 0 < sum(drawn.finished) < len(drawn)
    for i in range(len(drawn)):
        expected = forced_log_probs(model, drawn.prompt_ids[i], drawn.response_ids[i])
        np.testing.assert_allclose(drawn.model_log_probs[i], expected, atol=1e-4)
        np.testing.assert_allclose(drawn.log_probs[i], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["tiny", "tiny_seq2seq"])
def test_prompt_once_equals_one_by_one(family, request, monkeypatch):
    """Shared prompt cache and dropped rows against every row on its own, at fixed seeds."""
    model, tokenizer = request.getfixturevalue(family)
    settings_ = dict(n=6, max_new_tokens=15, seed=5, temperature=0.8, top_p=0.95)
    fast = sample(model, tokenizer, PROMPTS, **settings_)
    monkeypatch.setenv("LIB_PLAIN", "1")
    plain = sample(model, tokenizer, PROMPTS, rows_per_batch=1, **settings_)
    assert fast.prompt_index == plain.prompt_index
    for ours, theirs in zip(fast.log_probs, plain.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_prompt_once_on_the_real_policy(policy, real_prompts, monkeypatch):
    model, tokenizer = policy
    settings_ = dict(n=4, max_new_tokens=8, seed=5, top_p=0.9)
    fast = sample(model, tokenizer, real_prompts[:8], **settings_)
    for i in range(0, len(fast), 5):
        expected = forced_log_probs(model, fast.prompt_ids[i], fast.response_ids[i])
        np.testing.assert_allclose(fast.model_log_probs[i], expected, atol=1e-3)
    monkeypatch.setenv("LIB_PLAIN", "1")
    plain = sample(model, tokenizer, real_prompts[:8], **settings_)
    for ours, theirs in zip(fast.log_probs, plain.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("family", ["tiny", "tiny_seq2seq"])
def test_fast_and_plain_paths_draw_the_same_tokens(family, request, monkeypatch):
    model, tokenizer = request.getfixturevalue(family)
    drawn = {}
    for plain in ("0", "1"):
        monkeypatch.setenv("LIB_PLAIN", plain)
        how = dict(n=4, max_new_tokens=20)
        drawn[plain] = [
            sample(model, tokenizer, PROMPTS, seed=seed, temperature=heat, **how).response_ids
            for seed, heat in ((0, 0.0), (1, 1.0), (2, 0.7))
        ]
    assert drawn["0"] == drawn["1"]


def test_same_seed_same_samples_other_seed_others(tiny):
    model, tokenizer = tiny
    first, again, other = (
        sample(model, tokenizer, PROMPTS, n=4, seed=s).response_ids for s in (1, 1, 2)
    )
    assert first == again != other


def test_progress_moves_with_every_token_and_ends_full(tiny, monkeypatch):
    class Bar:
        steps: list[int] = []
        total = 0
        update, close = steps.append, staticmethod(lambda: None)

    def progress(*, total, **_):
        Bar.total = total
        return Bar

    monkeypatch.setattr(generation.runtime, "progress", progress)
    sample(*tiny, ["the museum"] * 3, n=2, max_new_tokens=7, rows_per_batch=4)
    assert Bar.total == sum(Bar.steps) == 6 * 7
    assert Bar.steps[:6] == [4] * 6  # no row of a tiny model ends so soon
    assert max(Bar.steps) == 4


def test_samples_do_not_depend_on_batching(tiny):
    model, tokenizer = tiny
    together = sample(model, tokenizer, PROMPTS, n=3, seed=1, rows_per_batch=64)
    for rows_per_batch in (3, 2):  # fewer than a prompt's samples, too
        apart = sample(model, tokenizer, PROMPTS, n=3, seed=1, rows_per_batch=rows_per_batch)
        assert together.response_ids == apart.response_ids


def test_end_token_closes_a_row(tiny):
    model, tokenizer = tiny
    drawn = sample(model, tokenizer, PROMPTS, n=20, max_new_tokens=30, seed=0)
    end = tokenizer.eos_token_id
    for ids, finished in zip(drawn.response_ids, drawn.finished, strict=True):
        assert (ids[-1] == end) == finished
        assert end not in ids[:-1]
        assert finished or len(ids) == 30
    assert drawn.tokens == sum(map(len, drawn.response_ids))


@pytest.mark.parametrize(
    "how", [Decoding(), Decoding(temperature=0.7), Decoding(top_k=3), Decoding(top_p=0.8)]
)
def test_drawn_frequencies_follow_the_reported_distribution(how):
    torch.manual_seed(0)
    logits = torch.randn(1, 12).repeat(40_000, 1)
    noise = torch.rand(40_000)
    tokens, log_probs, plain = draw_tokens(logits, noise, how)
    for token in tokens.unique():
        chosen = tokens == token
        assert torch.allclose(log_probs[chosen], log_probs[chosen][0])
        assert abs(chosen.float().mean() - log_probs[chosen][0].exp()) < 0.01
        assert torch.allclose(plain[chosen], logits[0].log_softmax(-1)[token], atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 9), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_filters_keep_what_transformers_keeps(seed, top_k, top_p):
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(seed)) * 3
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ranked = logits.log_softmax(-1).sort(-1, descending=True)
    values, candidates = generation.keep_likely(*ranked, Decoding(top_k=top_k, top_p=top_p))
    kept = torch.full_like(logits, float("-inf")).scatter(-1, candidates, values)
    assert torch.equal(kept.isfinite(), expected.isfinite())


def test_zero_probability_tokens_are_never_drawn():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0, 0.0]])
    noise = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 1e-8])
    drawn = generation.invert_cdf(probs.repeat(5, 1), noise)
    assert set(drawn.tolist()) == {1, 3}


def test_padded_tensors(tiny):
    model, tokenizer = tiny
    drawn = sample(model, tokenizer, PROMPTS, n=4, max_new_tokens=10, seed=2)
    log_probs, mask = drawn.padded("model_log_probs")
    assert log_probs.shape == mask.shape == (16, max(map(len, drawn.response_ids)))
    assert mask.sum() == drawn.tokens
    assert torch.all(log_probs[mask == 0] == 0)


def test_some_rows_of_samples(tiny):
    model, tokenizer = tiny
    drawn = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=4, seed=2)
    some = drawn.rows([3, 0])
    assert some.texts == [drawn.texts[3], drawn.texts[0]]
    assert some.prompt_index == [drawn.prompt_index[3], drawn.prompt_index[0]]
    assert len(some) == 2 and len(some.log_probs[0]) == len(some.response_ids[0])


def test_token_ids_as_prompts_and_empty_list(tiny):
    model, tokenizer = tiny
    ids = tokenizer(PROMPTS)["input_ids"]
    assert (
        sample(model, tokenizer, ids, seed=1).response_ids
        == sample(model, tokenizer, PROMPTS, seed=1).response_ids
    )
    assert len(sample(model, tokenizer, [], n=3)) == 0
    with pytest.raises(ValueError, match="prompts is one text"):
        sample(model, tokenizer, "the")
    with pytest.raises(ValueError, match="prompt 1 is nan"):
        sample(model, tokenizer, ["the", math.nan])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_model_without_numbers_is_told(tiny, settings):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.get_output_embeddings().weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="token 0: .* not numbers"):
        sample(model, tokenizer, PROMPTS, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(n=0), "n is 0"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_k=-2), "top_k is -2"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=600), "over the model's 512"),
    ],
)
def test_bad_settings_are_refused(tiny, arguments, message):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=message):
        sample(model, tokenizer, PROMPTS, **arguments)


def test_empty_prompt_needs_a_start_token(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(model, tokenizer, ["the", ""])
