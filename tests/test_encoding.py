"""One encoder for every reader of a prompt, one definition of the end, and tokenizers with gaps."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from lib import (
    data,
    encoding,
    generation,
    logprobs,
    models,
    ppo,
    reward_models,
    rewards,
    rloo,
    sft,
)
from lib.papers.alt import conditions, critics, labels, loop
from lib.papers.fine_grained import models as fine_grained

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "yes",
    "no",
    "User",
    "Assistant",
    ":",
    '"',
    ".",
    '".',
]
MARKS = ["<pad>", "<s>", "</s>", "<turn>", "<user>", "<bot>", "<unk>"]
PAD, START, END, TURN = range(4)
CHAT = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<bot>"


def word_tokenizer(around="$A", chat=CHAT, pad="<pad>", end="</s>", start="<s>"):
    """Words as tokens; `around` says which special tokens it writes around a text."""
    vocabulary = {word: i for i, word in enumerate([*MARKS, *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    marks = [("<s>", START), ("</s>", END)]
    core.post_processor = TemplateProcessing(single=around, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        extra_special_tokens=["<turn>", "<user>", "<bot>"],
        chat_template=chat,
    )


def llama(ends=END, **sizes):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(MARKS) + len(WORDS),
        max_position_embeddings=128,
        bos_token_id=START,
        eos_token_id=ends,
        pad_token_id=None,
        initializer_range=0.5,
        **shape | sizes,
    )
    return LlamaForCausalLM(config).eval()


# --- the start -----------------------------------------------------------------------------------


def readers(tokenizer, prompt):
    """Name -> the prompt's ids as each part of the library reads them."""
    model = llama()
    row = sft.encode_completions(tokenizer, [prompt], ["yes"])[0]
    judge = reward_models.RewardModel(llama().model, tokenizer)
    conditioner = conditions.Conditioner(tokenizer)
    asked = conditioner.build(prompt, ("cat",))
    return {
        "sampling": generation.sample(model, tokenizer, [prompt], max_new_tokens=1).prompt_ids[0],
        "encode": encoding.encode(tokenizer, prompt, " yes").prompt,
        "encode, joined": encoding.encode(tokenizer, prompt, " yes", joined=True).prompt,
        "fine-tuning": row["input_ids"][: row["labels"].count(sft.NO_LOSS)],
        "answers": logprobs.split_answers(tokenizer, prompt, (" yes", " no"))[0],
        "reward model": judge.encode([prompt], ["yes"])[0][0],
        "no condition": conditioner.build(prompt).ids,
        "condition taken off": conditioner.raw_ids(asked),
    }


@pytest.mark.parametrize("chat", [CHAT, "<s>" + CHAT])
@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("style", ["raw", "chat"])
def test_every_reader_of_a_prompt_sees_the_ids_it_is_sampled_with(chat, around, style):
    tokenizer = word_tokenizer(around, chat)
    prompt = data.apply_template(["the cat"], tokenizer, style)[0]
    seen = readers(tokenizer, prompt)
    assert seen["sampling"][0] == START and seen["sampling"].count(START) == 1
    for name, ids in seen.items():
        assert ids == seen["sampling"], name


def test_a_template_without_the_tokenizers_help_keeps_its_start_token():
    tokenizer = word_tokenizer("$A", "<s>" + CHAT)
    prompt = data.apply_template(["the cat"], tokenizer, "chat")[0]
    seen = readers(tokenizer, prompt)
    assert all(ids.count(START) == 1 and ids[0] == START for ids in seen.values())


def test_trl_reads_one_start_token_and_rewards_see_the_prompt_as_given():
    tokenizer = word_tokenizer("<s> $A", "<s>" + CHAT)
    prompts = data.apply_template(["the cat", "a mat"], tokenizer, "chat")
    model, read, rewarded = llama(), [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0]))

    def reward(samples):
        rewarded.extend(zip(samples.prompts, samples.prompt_ids, strict=True))
        return [float(len(ids)) for ids in samples.response_ids]

    config = ppo.PPOConfig(
        steps=1, prompts_per_step=2, samples_per_prompt=2, minibatch_size=4, max_new_tokens=3
    )
    rloo.train_rloo(model, tokenizer, prompts, reward, config)
    whole = [ids[:, :5] for ids in read if ids.shape[1] >= 5]  # both prompts have five tokens
    assert whole and all(((ids == START).sum(1) == 1).all() for ids in whole)
    for prompt, ids in rewarded:
        assert prompt in prompts and ids == encoding.encode(tokenizer, prompt).prompt


@pytest.mark.parametrize("chat", [CHAT, "<s>" + CHAT])
def test_a_conversation_begins_as_its_prompt_is_sampled(chat):
    chat = chat.replace(
        "{% endfor %}<bot>", "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chat = chat.replace("<user>", "{{ '<user>' if m['role'] == 'user' else '<bot>' }}")
    tokenizer = word_tokenizer("<s> $A", chat)
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    row = sft.encode_conversations(tokenizer, [talk])[0]
    prompt = data.apply_template(["the cat"], tokenizer, "chat")[0]
    expected = encoding.encode(tokenizer, prompt, "sat")
    assert row["input_ids"] == [*expected.prompt, *expected.response, END]
    assert row["labels"] == [sft.NO_LOSS] * len(expected.prompt) + expected.response + [END]


def test_without_a_template_training_and_sampling_share_the_plain_format():
    tokenizer = word_tokenizer("<s> $A", chat=None)
    system = {"role": "system", "content": "a mat ."}
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    row = sft.encode_conversations(tokenizer, [[system, *talk, *talk]])[0]
    asked = data.apply_template(["the cat"], tokenizer, "auto+system", system="a mat .")
    assert asked == data.apply_template(["the cat"], None, "tagged+system", system="a mat .")
    expected = encoding.encode(tokenizer, asked[0], "sat")
    start = [*expected.prompt, *expected.response, END]
    assert row["input_ids"][: len(start)] == start
    assert [label for label in row["labels"] if label != sft.NO_LOSS] == 2 * [
        *expected.response,
        END,
    ]


def test_an_empty_prompt_is_the_start_token_where_there_is_one():
    with_start, without = word_tokenizer(), word_tokenizer(start=None)
    for joined in (False, True):
        assert encoding.encode(with_start, "", "cat", joined=joined).prompt == [START]
        assert encoding.encode(without, "", "cat", joined=joined).prompt == []


# --- prompt and reply ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "reply", "expected"),
    [
        ("You are", "such a bore", "You are such a bore"),
        ("You are", " such a bore", "You are such a bore"),
        ("You are\n", "such", "You are\nsuch"),
        ("Stop", ", please", "Stop, please"),
        ("You", "’re late", "You’re late"),
        ('She said "', 'no"', 'She said "no"'),
        ("猫は", "眠る", "猫は眠る"),
        ("", "such", "such"),
        ("You are", "", "You are"),
    ],
)
def test_prompt_and_reply_as_one_text(prompt, reply, expected):
    assert encoding.join_texts(prompt, reply) == expected


def sentencepiece_like():
    """Pieces that carry the space before them; decoding drops the first one's."""
    pieces = {"<unk>": 0, "▁": 1, **{letter: i + 2 for i, letter in enumerate("abc")}}
    core = Tokenizer(BPE(pieces, [], unk_token="<unk>"))
    core.pre_tokenizer = Metaspace(prepend_scheme="always")
    from tokenizers.decoders import Metaspace as Decoder

    core.decoder = Decoder(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("make", [word_tokenizer, sentencepiece_like])
def test_a_decoded_reply_is_read_as_the_tokens_it_was(make):
    tokenizer = make()
    prompt, reply = ("the cat", "sat on") if make is word_tokenizer else ("a b", "c a")
    apart = encoding.encode(tokenizer, prompt, reply)
    text = tokenizer.decode(apart.response)
    assert not text.startswith(" ") and encoding.drops_leading_space(tokenizer)
    assert encoding.encode(tokenizer, prompt, text, joined=True) == apart


@given(st.text("abc", max_size=8), st.text("abc", min_size=1, max_size=8))
def test_exact_tokenizers_join_texts_as_they_stand(context, continuation):
    core = Tokenizer(BPE({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    prompt, response = encoding.encode(tokenizer, context, continuation, joined=True)
    assert prompt + response == encoding.bare_ids(tokenizer, context + continuation)


# --- the end -------------------------------------------------------------------------------------


def ending_model():
    """Its likeliest token is the end of turn, which only its configuration knows as an end."""
    model = llama(ends=[END, TURN])
    bias = torch.zeros(model.config.vocab_size)
    bias[TURN], bias[END] = 4.0, -9.0
    model.lm_head.register_forward_hook(lambda *args: args[-1] + bias)
    return model


def test_whatever_stops_sampling_is_an_end_everywhere():
    model, tokenizer = ending_model(), word_tokenizer()
    ends = encoding.end_tokens(tokenizer, model)
    assert ends == [END, TURN] and encoding.end_tokens(tokenizer) == [END]
    drawn = generation.sample(model, tokenizer, ["the cat"], n=16, max_new_tokens=12, seed=1)
    assert any(ids[-1] == TURN for ids in drawn.response_ids)
    assert drawn.finished == [ids[-1] in ends for ids in drawn.response_ids]
    finished = []

    def reward(samples):
        finished.extend(zip(samples.finished, samples.response_ids, strict=True))
        return [float(len(ids)) for ids in samples.response_ids]

    config = ppo.PPOConfig(
        steps=1, prompts_per_step=1, samples_per_prompt=8, minibatch_size=8, max_new_tokens=12
    )
    history = rloo.train_rloo(model, tokenizer, ["the cat"], reward, config)
    assert any(ended for ended, _ in finished)
    assert all(ended == (ids[-1] in ends) for ended, ids in finished)
    assert history["finished"][0] == pytest.approx(np.mean([ended for ended, _ in finished]))


def test_fine_tuning_puts_no_second_end_after_any_end():
    tokenizer, model = word_tokenizer(), ending_model()
    texts = ["yes <turn>", "yes </s>", "yes"]
    rows = sft.encode_completions(tokenizer, ["the cat"] * 3, texts, model=model)
    assert [row["input_ids"][3:] for row in rows] == [[TURN], [END], [END]]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes <turn>"}]
    chat = CHAT.replace("<user>", "{{ '<user>' if m['role'] == 'user' else '<bot>' }}")
    chat = chat.replace("endfor %}<bot>", "endfor %}{% if add_generation_prompt %}<bot>{% endif %}")
    tokenizer = word_tokenizer(chat=chat)
    row = sft.encode_conversations(tokenizer, [talk], model=model)[0]
    assert row["input_ids"][-1] == TURN


def test_a_tokenizer_without_an_end():
    tokenizer = word_tokenizer(end=None)
    with pytest.raises(ValueError, match="no end token"):
        sft.encode_completions(tokenizer, ["the cat"], ["yes"])
    judge = reward_models.RewardModel(llama().model, tokenizer)
    assert np.isfinite(judge.score(["the cat"], ["yes"])).all()
    with pytest.raises(ValueError, match=r"response 1 is empty.*no end token"):
        judge.score(["the cat"] * 2, ["yes", ""])


# --- gaps: no pad token, no response token, no rows ----------------------------------------------


def test_a_tokenizer_without_a_pad_token_works_everywhere():
    tokenizer, other = word_tokenizer(pad=None), word_tokenizer()
    model, prompts, replies = llama(), ["the cat sat", "a"], ["on a mat", "yes"]
    assert encoding.pad_id(tokenizer) == END and encoding.pad_id(other) == PAD
    assert encoding.pad_id(word_tokenizer(pad=None, end=None)) == 0
    both = [generation.sample(model, t, prompts, n=3, max_new_tokens=6) for t in (tokenizer, other)]
    assert both[0].response_ids == both[1].response_ids
    tables = [logprobs.perplexity(model, t, prompts, replies) for t in (tokenizer, other)]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-5)
    judges = [reward_models.RewardModel(model.model, t) for t in (tokenizer, other)]
    scores = [judge.features(prompts, replies) for judge in judges]
    torch.testing.assert_close(scores[0], scores[1])
    config = ppo.PPOConfig(steps=1, prompts_per_step=2, minibatch_size=2, max_new_tokens=3)
    history = ppo.train_ppo(model, tokenizer, prompts, lambda s: [0.0, 1.0], config)
    assert np.isfinite(history["policy_loss"]).all()


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_an_encoder_decoder_learns_short_answers_in_a_batch_as_alone(pad):
    """Its decoder starts at the first token in training as in sampling, whatever the batch's other rows."""
    model, tokenizer = models.build_tiny_model("tiny-encoder-decoder", words=WORDS)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    rows = sft.encode_completions(tokenizer, ["the cat sat", "a"], ["yes", "no on a mat"])
    total, count = 0.0, 0
    for row in rows:
        prompt = row["labels"].count(sft.NO_LOSS)
        answer = row["labels"][prompt:]
        log_probs = logprobs.token_log_probs(model, [row["input_ids"][:prompt]], [answer])[0]
        total, count = total - log_probs.sum(), count + len(answer)
    how = dict(max_steps=1, learning_rate=1e-6, per_device_train_batch_size=2)
    history = sft.train_sft(copy.deepcopy(model), tokenizer, rows, **how)
    assert history["loss"][0] == pytest.approx(total / count, rel=1e-4)


def test_conditional_training_without_a_pad_token():
    tokenizer, tags = word_tokenizer(pad=None), ("yes", "no")
    config = loop.ConditioningConfig(
        iterations=1, steps=1, batch_size=2, max_new_tokens=3, samples_per_prompt=2
    )
    task = loop.Task(
        ["the cat", "a mat on a mat"],
        critics.scored(lambda prompts, responses: [float(len(r)) for r in responses]),
        labels.Quantiles(tags),
        conditions.Conditioner(tokenizer),
    )
    history, *_ = loop.train_conditional(llama(), tokenizer, task, config)
    assert np.isfinite(history["loss"]).all()


def test_a_response_without_a_token_is_paid_nothing_and_logged_as_nothing():
    for ids in ([[5, 6], []], [[], []], []):
        none = [np.zeros(len(row), dtype=np.float32) for row in ids]
        n = len(ids)
        samples = generation.Samples(
            ["p"] * n, [*range(n)], [[1]] * n, ids, ["x"] * n, none, none, [True] * n
        )
        paid, sums = rewards.place_rewards([1.0, 10.0][:n], samples)
        assert paid.shape == (n, max(map(len, ids), default=0))
        np.testing.assert_allclose(paid.sum(1), sums["reward"])
        dense = rewards.place_rewards([np.ones(len(row)) for row in ids], samples)[1]
        assert dense["reward"].tolist() == [len(row) for row in ids]


# --- batches -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz")), max_size=30),
    st.integers(1, 100),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_batches_keep_to_budget_and_rows_and_hold_groups_together(rows, budget, most):
    lengths = [length for length, _ in rows]
    keys = [key for _, key in rows]
    batches = list(encoding.token_batches(lengths, budget, rows=most, together=keys))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(rows)))
    assert [keys[i] for i in order] == sorted(keys)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        assert most is None or len(batch) <= most


def test_rows_padded_on_either_side_and_none_at_all():
    ids, mask = encoding.pad_rows([[5], [], [6, 7]], 0, "left")
    assert ids.tolist() == [[0, 5], [0, 0], [6, 7]] and mask.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert encoding.pad_rows([], 0, "right")[0].shape == (0, 0)


# --- places --------------------------------------------------------------------------------------


def test_places_of_tokens_where_the_tokenizer_does_not_say_them():
    """Bytes: a letter of two bytes belongs to the second; a fast tokenizer's places are its own."""
    ids, places = encoding.token_places(transformers.ByT5Tokenizer(), "aü b")
    assert len(ids) == 5 and places == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4)]
    assert encoding.token_places(transformers.ByT5Tokenizer(), "") == ([], [])
    tokenizer = models.build_tiny_model("tiny")[1]
    ids, places = encoding.token_places(tokenizer, "the cat saw")
    told = tokenizer("the cat saw", add_special_tokens=False, return_offsets_mapping=True)
    assert ids == told["input_ids"] and places == told["offset_mapping"]


def test_a_tokenizer_that_loses_text_is_refused_in_words():
    class Lowered(transformers.ByT5Tokenizer):
        def decode(self, ids, **options):
            return super().decode(ids, **options).lower()

    with pytest.raises(ValueError, match="nor gives the text back: 'Cd' is lost"):
        encoding.token_places(Lowered(), "abCd")


def test_byte_tokenizers_learn_conversations_and_judge_segments():
    tokenizer = transformers.ByT5Tokenizer()
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes é"}]
    (row,) = sft.encode_conversations(tokenizer, [talk])
    said = [token for token in row["labels"] if token != sft.NO_LOSS]
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == "yes é"
    size = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**size)).eval()
    model = fine_grained.FineGrainedModel(encoder, tokenizer, unit="sentence")
    (scores,) = model.score_segments(["question: q"], ["Über one two three. Five six seven."])
    assert scores.shape == (2,)


# --- the cache -----------------------------------------------------------------------------------


class Renamed(LlamaForCausalLM):
    """As transformers writes models from 5.24 on: the cache has another name, in and out."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None,
                use_cache=None, logits_to_keep=0):  # fmt: skip
        how = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        how |= {"attention_mask": attention_mask, "position_ids": position_ids}
        output = super().forward(input_ids=input_ids, past_key_values=cache, **how)
        return CausalLMOutputWithLogits(logits=output.logits, cache=output.past_key_values)


@dataclass
class CausalLMOutputWithLogits(ModelOutput):
    logits: torch.Tensor | None = None
    cache: object = None


def test_a_cache_of_either_name_is_used(monkeypatch):
    """Sampling and log-probabilities are the same, and the cache saves the tokens that were read."""
    model, tokenizer = models.build_tiny_model("tiny")
    renamed = Renamed(model.config).eval()
    renamed.load_state_dict(model.state_dict())
    read = []
    real = LlamaForCausalLM.forward

    def counting(self, *parts, **options):
        read.append(options["input_ids"].numel())
        return real(self, *parts, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    prompts, drawn, counts = ["the cat", "the man saw the"], [], []
    for one in (model, renamed):
        read.clear()
        drawn.append(generation.sample(one, tokenizer, prompts, n=2, seed=1, max_new_tokens=6))
        counts.append(sum(read))
    assert drawn[0].response_ids == drawn[1].response_ids and counts[0] == counts[1]
    scores = [
        logprobs.token_log_probs(one, drawn[0].prompt_ids, drawn[0].response_ids)
        for one in (model, renamed)
    ]
    for a, b in zip(*scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
