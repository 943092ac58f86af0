"""The one pass behind log-probabilities, answers and reward features: shared beginnings change nothing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lib import encoding, logprobs, reward_models
from lib.policy import SharedTrunkPolicy

ids = st.lists(st.integers(2, 14), min_size=1, max_size=9)


def by_hand(model, prompt, response):
    """log p of each response token from a forward pass over this row alone."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            shown = torch.tensor([start + response[:-1]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=shown).logits[0]
        else:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(response)), response].numpy()


def tokens_read(network):
    """A list that grows by the number of ids of each forward pass."""
    sizes = []
    network.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].numel())
    )
    return sizes


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4),
    st.integers(1, 60),
    st.booleans(),
)
def test_rows_of_one_prompt_are_scored_as_alone(tiny, tiny_seq2seq, groups, budget, encodes):
    model, _ = tiny_seq2seq if encodes else tiny
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    scores = logprobs.token_log_probs(model, *zip(*rows, strict=True), tokens_per_batch=budget)
    for row, (prompt, response) in zip(scores, rows, strict=True):
        np.testing.assert_allclose(row, by_hand(model, prompt, response), atol=1e-5)


def test_a_prompt_is_read_once_however_many_responses_it_has(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10]] * 4 + [[10, 9, 8, 7, 6, 5, 4, 3]] * 4
    responses = [[2 + i, 3] for i in range(8)]
    sizes = tokens_read(model)
    logprobs.token_log_probs(model, prompts, responses)
    # of each prompt all but the last token once, then that token and the response's first for each row
    assert sizes == [2 * 7, 8 * 2]
    sizes.clear()
    judge = reward_models.RewardModel(model.model, tokenizer)
    texts = [("the cat sat on the mat", f"{word} .") for word in ["a", "dog", "ran", "are", "nice"]]
    judge.score(*zip(*texts, strict=True))
    assert sizes == [6, 5 * 3]


def test_questions_that_begin_alike_share_the_beginning(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    sizes = tokens_read(model)
    start = "the cat sat on the mat . a dog ran"
    prompts = [f"{start} nice", f"{start} kind cat", f"{start} you are", "stupid"]
    scores = logprobs.answer_log_probs(model, tokenizer, prompts, (" a", " the dog"))
    assert sizes[0] == len(tokenizer(start)["input_ids"])
    for prompt, row in zip(prompts, scores, strict=True):
        for answer, score in zip((" a", " the dog"), row, strict=True):
            pair = encoding.encode(tokenizer, prompt, answer)
            assert score == pytest.approx(by_hand(model, *pair).sum(), abs=1e-4)


def test_questions_about_two_answers_share_the_text_and_then_the_answers(tiny):
    model = copy.deepcopy(tiny[0])
    sizes = tokens_read(model)
    draw = np.random.default_rng(0)
    text, *answers = (draw.integers(5, 20, size=n).tolist() for n in (50, 40, 36))
    prompts = [text + answer + [5 + k] * (k + 2) for answer in answers for k in range(3)]
    prompts += [text + [6, 7], [8, 9, 10]]  # shares the text alone; shares nothing
    starts, _ = logprobs.nested_starts(prompts)
    assert starts == [(50, 90)] * 3 + [(50, 86)] * 3 + [(50,), ()]
    responses = [[4, 5 + k] for k in range(len(prompts))]
    rows = [*zip(prompts, responses, strict=True)]
    read = dict(_states(model, prompts, responses))
    assert sizes[0] == 50 and sum(sizes) < sum(map(len, prompts)) / 2
    for i, (prompt, response) in enumerate(rows):
        ids = torch.tensor([prompt + response])
        whole = model.model(input_ids=ids).last_hidden_state[0, len(prompt) :]
        torch.testing.assert_close(read[i], whole, atol=1e-5, rtol=1e-4)


def _states(model, prompts, responses):
    with torch.inference_mode():
        for places, states in logprobs.response_states(model, prompts, responses, 4096):
            yield from zip(places, states, strict=True)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12), st.integers(1, 4))
def test_what_prompts_share_is_their_common_beginning(prompts, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "LEAST_START", least)
        starts, order = logprobs.nested_starts(prompts)
    for i, own in enumerate(starts):
        assert list(own) == sorted(set(own)) and all(0 < n <= len(prompts[i]) for n in own)
        for n in own:
            mates = [j for j, other in enumerate(starts) if n in other and j != i]
            assert any(prompts[j][:n] == prompts[i][:n] for j in mates)
        assert bool(own) == bool(order[i])


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "opt"])
def test_every_kind_of_output_layer(kind, tiny):
    """Gemma changes logits after it, OPT projects before it, GPT-2 has absolute positions."""
    tokenizer = tiny[1]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if kind == "gemma2":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
        sizes |= {"final_logit_softcapping": 0.5, "sliding_window": 64}
    if kind == "opt":
        sizes |= {"word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = [([3, 4, 5], [6, 7]), ([3, 4, 5], [8]), ([9], [10, 11, 12]), ([4, 4, 4, 4], [5])]
    scores = logprobs.token_log_probs(model, *zip(*rows, strict=True))
    for row, pair in zip(scores, rows, strict=True):
        np.testing.assert_allclose(row, by_hand(model, *pair), atol=1e-5)
    answers = logprobs.answer_log_probs(model, tokenizer, ["the cat", "the dog"], (" a", " you"))
    pairs = [encoding.encode(tokenizer, "the dog", answer) for answer in (" a", " you")]
    np.testing.assert_allclose(answers[1], [by_hand(model, *p)[0] for p in pairs], atol=1e-5)


def test_the_reference_is_the_policy_at_its_start(tiny):
    model = copy.deepcopy(tiny[0]).requires_grad_(True)
    network = SharedTrunkPolicy(model, 0)
    before = logprobs.token_log_probs(model, [[3, 4]], [[5, 6]])[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    moved = logprobs.token_log_probs(model, [[3, 4]], [[5, 6]])[0]
    with pytest.raises(RuntimeError), network.as_reference() as reference:
        np.testing.assert_array_equal(
            logprobs.token_log_probs(reference, [[3, 4]], [[5, 6]])[0], before
        )
        raise RuntimeError
    again = logprobs.token_log_probs(model, [[3, 4]], [[5, 6]])[0]
    np.testing.assert_array_equal(again, moved)
    assert np.abs(moved - before).max() > 1e-3


def test_kl_to_itself_is_zero_and_to_another_is_positive(tiny):
    model, tokenizer = tiny
    same = logprobs.sequence_kl(model, model, tokenizer, n=8, max_new_tokens=6)
    assert set(same["direction"]) == {"forward", "reverse"} and abs(same["value"]).max() < 1e-5
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        other.lm_head.weight.mul_(3)
    apart = logprobs.sequence_kl(other, model, tokenizer, n=200, max_new_tokens=6)
    assert (apart.groupby("direction")["value"].mean() > 0).all()
