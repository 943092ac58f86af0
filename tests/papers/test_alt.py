"""Pool properties, conditions, the loss, feedback providers, and the loop killed at every stage."""

import collections
import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WORDS, completion
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import cards, chat, models, policy, training
from lib.papers.alt import conditions, critics, loop
from lib.papers.alt.conditions import Conditioner
from lib.papers.alt.labels import (
    DataPool,
    FreeText,
    Item,
    Product,
    Quantiles,
    parse_category,
    quantile_labels,
)
from lib.papers.alt.loop import ConditioningConfig, Task, conditional_loss, token_weights

TAGS = ("Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible.")
FIVE = Quantiles(TAGS)
SCORES = st.none() | st.integers(-3, 3).map(float) | st.floats(-5, 5)


def item(number, score=None, prompt="p", round=1, **more):
    ids = (number % 7, number)
    return Item(prompt, f"r{number}", ids, number % 2 == 0, round, score, **more)


@st.composite
def item_lists(draw, scores=SCORES):
    values = draw(st.lists(scores, max_size=40))
    prompts = draw(st.lists(st.sampled_from("abc"), min_size=len(values), max_size=len(values)))
    return [item(i, s, p) for i, (s, p) in enumerate(zip(values, prompts, strict=True))]


# --- labels --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5) | st.sampled_from([0.0, 1.0]), max_size=60), st.integers(2, 6))
def test_quantiles_have_equal_sizes_and_the_worst_takes_the_remainder(scores, k):
    counts = collections.Counter(quantile_labels(scores, k))
    size = len(scores) // k
    assert all(counts[label] == size for label in range(k - 1))
    assert counts[k - 1] == len(scores) - (k - 1) * size


@given(
    st.lists(st.integers(-3, 3).map(float), max_size=40),
    st.integers(2, 6),
    st.sampled_from(["split", "share"]),
)
def test_reward_never_rises_with_the_label(scores, k, ties):
    labels = quantile_labels(scores, k, ties=ties)
    for label in range(k - 1):
        here = [s for s, found in zip(scores, labels, strict=True) if found == label]
        worse = [s for s, found in zip(scores, labels, strict=True) if found > label]
        assert not here or not worse or min(here) >= max(worse)


@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=40), st.integers(2, 6))
def test_shared_ties_give_equal_scores_one_label(scores, k):
    labels = quantile_labels(scores, k, ties="share")
    assert len(set(zip(scores, labels, strict=True))) == len(set(scores))


def test_split_ties_do_separate_equal_scores():
    assert quantile_labels([1.0] * 5, 5) == [0, 1, 2, 3, 4]
    assert quantile_labels([1.0] * 5, 5, ties="share") == [2] * 5
    assert quantile_labels([3.0, 1.0], 5) == [4, 4]  # fewer than k: all remainder


def test_local_quantiles_ignore_a_prompts_level_and_global_ones_do_not():
    items = [item(i, float(i), "low") for i in range(5)]
    items += [item(i + 5, float(i + 100), "high") for i in range(5)]
    local, whole = Quantiles(TAGS, within="prompt"), Quantiles(TAGS)
    assert local(items) == [4, 3, 2, 1, 0] * 2
    assert whole(items) == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_product_of_attributes_and_free_text():
    both = Product((Quantiles(("kind", "rude")), Quantiles(("short", "long"), of="brevity")))
    items = [item(i, float(i // 2), attributes={"brevity": float(i % 2)}) for i in range(4)]
    assert both(items) == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert both.condition(None, (0, 1)) == ("kind", "long")
    assert len(both.labels()) == 4 and not both.usable(item(0, 1.0))
    text = FreeText()
    assert text([item(0, 3.0, feedback="Clear."), item(1, 0.0, feedback="No.")]) == [0, 3]
    assert text.condition(item(0, 3.0, feedback="Clear."), 0) == ("Clear.",)
    unusable = [item(0, 3.0), item(0, 4.0, feedback="x"), item(0, 1.5, feedback="x")]
    assert not any(map(text.usable, unusable))


# --- the pool ------------------------------------------------------------------------------------


@given(item_lists())
def test_missing_scores_are_counted_and_not_kept(items):
    pool = DataPool(FIVE)
    pool.add([*items, item(99, float("nan"))])
    assert pool.missing[1] == sum(i.score is None for i in items) + 1
    assert len(pool) + pool.missing[1] == len(items) + 1
    assert pool.counts()["n"].sum() == len(pool)


@given(item_lists(), st.randoms(use_true_random=False), st.sampled_from(["pool", "prompt"]))
def test_neither_labels_nor_choice_depend_on_the_order_of_arrival(items, random, within):
    mixed = random.sample(items, len(items))
    one, two = DataPool(Quantiles(TAGS, within=within)), DataPool(Quantiles(TAGS, within=within))
    one.add(items)
    for single in mixed:
        two.add([single])
    assert one.items == two.items and one.labels() == two.labels()
    assert one.select(2, within=within, seed=3) == two.select(2, within=within, seed=3)


@given(item_lists(st.floats(-5, 5)), st.integers(1, 4), st.sampled_from(["pool", "prompt"]))
def test_selection_is_balanced_and_prefers_finished_responses(items, each, within):
    pool = DataPool(FIVE)
    pool.add(items)
    chosen = pool.select(each, within=within, seed=1)
    assert len({i.key for i, _ in chosen}) == len(chosen)
    everything = list(zip(pool.items, pool.labels(), strict=True))

    def group(pair):
        return (pair[0].prompt if within == "prompt" else "", pair[1])

    for name in {group(pair) for pair in everything}:
        there = [i for i, label in everything if group((i, label)) == name]
        taken = [i for i, label in chosen if group((i, label)) == name]
        finished = sum(i.finished for i in there)
        assert len(taken) == min(each, len(there))
        assert sum(i.finished for i in taken) == min(each, finished)


def test_selection_by_label_and_filling_a_shortfall():
    pool = DataPool(FIVE)
    pool.add([item(i, float(i)) for i in range(23)])
    assert {label for _, label in pool.select(only=[0])} == {0}
    assert {label for _, label in pool.select(without=[0, 4])} == {1, 2, 3}
    assert len(pool.select(6)) == 4 * 4 + 6  # 4 in each but the worst, which has 7
    assert len(pool.select(6, fill=True)) == 23
    assert len(pool.select(5, fill=True)) == 23  # 25 wanted, 23 there


@pytest.mark.parametrize(
    "replay, rounds",
    [(("keep",), [10, 20, 30]), (("window", 2), [10, 20, 20]), (("drop", 1.0), [10, 10, 10]),
     (("drop", 0.0), [10, 20, 30]), (("drop", 0.5), [10, 15, 15])],
)  # fmt: skip
def test_replay(replay, rounds):
    """drop 0.5 keeps int(n / 2) of each label: 5 x int(2 / 2) of 10, then 5 x int(3 / 2) of 15."""
    pool, sizes = DataPool(FIVE, replay), []
    for number in (1, 2, 3):
        pool.add([item(i, float(i), round=number) for i in range(10)])
        sizes.append(len(pool))
        assert sum(i.round == number for i in pool.items) == 10
    assert sizes == rounds


@given(item_lists())
@settings(max_examples=20)
def test_persistence_round_trip(tmp_path_factory, items):
    pool = DataPool(FIVE)
    said = 'a "quoted" \u2028 line\nand more'
    pool.add([dataclasses.replace(i, feedback=said, attributes={"a": 0.1 + 0.2}) for i in items])
    path = pool.save(tmp_path_factory.mktemp("pool") / "pool.jsonl")
    again = DataPool.load(path, FIVE)
    assert again.items == pool.items and again.labels() == pool.labels()
    assert again.missing == pool.missing


def test_settings_are_checked():
    with pytest.raises(ValueError, match="replay"):
        DataPool(FIVE, ("forget",))
    with pytest.raises(ValueError, match="ties"):
        quantile_labels([1.0, 2.0], 2, ties="random")
    with pytest.raises(ValueError, match="within"):
        Quantiles(TAGS, within="batch")
    with pytest.raises(ValueError, match="direction"):
        ConditioningConfig(direction="sideways")
    with pytest.raises(ValueError, match="steps"):
        ConditioningConfig(steps=0)


# --- conditions ----------------------------------------------------------------------------------

PIECES = [*WORDS, *TAGS, "Feedback:", "Input:", ", and", "input:", "<eos>", "\n\n", "_QUANTILE_0_"]
PARTS = st.lists(st.sampled_from(PIECES))


@given(PARTS, st.sampled_from(["text", "separator", "token", "none"]), st.sampled_from(TAGS))
def test_strip_undoes_build_for_prompts_that_hold_the_conditions_own_words(tiny, parts, style, tag):
    _, tokenizer = tiny
    conditioner = Conditioner(tokenizer, style, tokens=TAGS, first_id=len(tokenizer))
    prompt = " ".join(parts)
    built = conditioner.build(prompt, (tag, "Good."))
    assert conditioner.strip(built) == prompt
    assert conditioner.raw_ids(built) == tokenizer(prompt)["input_ids"]
    assert (built.stop > built.start) == (style != "none")
    new = [i for i in built.ids if i >= len(tokenizer)]
    assert len(new) == {"text": 0, "none": 0, "separator": 1, "token": 2}[style]
    assert conditioner.build(prompt).ids == tokenizer(prompt)["input_ids"]


def test_the_start_token_stays_in_front_and_unknown_tags_are_named(tiny):
    _, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<eos>"
    built = Conditioner(tokenizer).build("<eos> the cat", ("kind", "nice"))
    assert built.start == 1 and built.ids[0] == tokenizer.bos_token_id
    conditioner = Conditioner(tokenizer, "token", tokens=TAGS, first_id=30)
    with pytest.raises(ValueError, match="allowed: Excellent"):
        conditioner.build("the cat", ("Superb.",))
    with pytest.raises(ValueError, match="add_tokens"):
        Conditioner(tokenizer, "token", tokens=TAGS)


def test_new_rows_follow_the_old_ones_and_leave_the_output_alone():
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3).add_(torch.arange(64.0))
    old, ids = model.get_input_embeddings().weight.clone(), torch.tensor([[7, 8, 9]])
    before = model(ids).logits
    first = conditions.add_tokens(model, 2000, seed=1)
    rows = model.get_input_embeddings().extra
    assert first == len(old) == len(tokenizer)
    assert torch.equal(model(ids).logits, before)  # same vocabulary, same numbers
    error = (rows.mean(0) - old.mean(0)).abs() / (old.std(0) / 2000**0.5)
    assert error.max() < 5  # standard errors, over 64 dimensions
    assert ((rows.std(0) / old.std(0)).log().abs() < 0.1).all()
    one, other = (model(torch.tensor([[new, 7]])).logits for new in (first, first + 1))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="already"):
        conditions.add_tokens(model, 1)
    again, _ = models.build_tiny_model("tiny", words=WORDS)
    conditions.add_tokens(again, 1, like=1)
    embed = again.get_input_embeddings()
    assert torch.equal(embed.extra[0], embed.weight[1])


# --- the loss ------------------------------------------------------------------------------------


def reference_loss(logits, ids, mask, ref, beta, alpha, direction, normalise):
    """Token by token in float64 numpy, written from the definition."""
    total, weight_sum = 0.0, 0.0
    rows = mask.sum(1)
    for b, t in np.ndindex(*ids.shape):
        if not mask[b, t]:
            continue
        full = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
        p = np.exp(logits[b, t, : ref.shape[-1]])
        p, q = p / p.sum(), np.exp(ref[b, t]) / np.exp(ref[b, t]).sum()
        kl = (q * np.log(q / p)).sum() if direction == "forward" else (p * np.log(p / q)).sum()
        value = -np.log(full[ids[b, t]]) + beta * kl + alpha * (full * np.log(full)).sum()
        weight = 1.0 if normalise == "token" else 1.0 / rows[b]
        total, weight_sum = total + weight * value, weight_sum + weight
    return total / weight_sum


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("normalise", ["token", "sequence"])
@pytest.mark.parametrize("added", [0, 3])
def test_loss_equals_a_float64_reference(direction, normalise, added):
    generator = np.random.default_rng(added)
    logits = generator.normal(0, 2, (4, 6, 11 + added))
    ref, ids = generator.normal(0, 2, (4, 6, 11)), generator.integers(0, 11, (4, 6))
    mask = (np.arange(6) < np.array([6, 1, 3, 4])[:, None]).astype(float)
    tensors = [torch.from_numpy(x) for x in (logits, ids, mask, ref)]
    weights = token_weights(tensors[2], normalise)
    tensors[0][1, 4] = torch.nan  # padding may hold anything
    found = conditional_loss(*tensors, beta=0.3, alpha=0.2, direction=direction, weights=weights)
    wanted = reference_loss(logits, ids, mask, ref, 0.3, 0.2, direction, normalise)
    assert float(found["loss"]) == pytest.approx(wanted, rel=1e-10)
    sums = found["nll"] + 0.3 * found["kl"] - 0.2 * found["entropy"]
    assert float(found["loss"]) == pytest.approx(float(sums), rel=1e-12)


def test_the_two_directions_differ_and_no_reference_means_no_kl():
    logits, ref = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    ids, mask = torch.zeros(1, 2, dtype=int), torch.ones(1, 2)
    kl = [
        conditional_loss(logits, ids, mask, ref, direction=d)["kl"] for d in ("forward", "reverse")
    ]
    assert abs(kl[0] - kl[1]) > 1e-3
    assert torch.isnan(conditional_loss(logits, ids, mask)["kl"])
    equal = conditional_loss(logits, ids, mask, logits)["kl"]
    assert abs(float(equal)) < 1e-6


# --- feedback ------------------------------------------------------------------------------------


def test_scored_feedback_and_its_control():
    judge = critics.scored(lambda p, r: [1.0, float("nan"), 3.0], size=lambda p, r: [1, 2, 3])
    found = judge(["a"] * 3, ["x", "y", "z"])
    assert found[0] == {"score": 1.0, "attributes": {"size": 1.0}} and found[1]["score"] is None
    control = critics.shuffled(judge, seed=1)
    dealt = [control(["a"] * 3, ["x", "y", end]) for end in "abcdefgh"]
    assert all(sorted(map(repr, d)) == sorted(map(repr, found)) for d in dealt)
    assert any(d != found for d in dealt)
    assert control(["a"] * 3, ["x", "y", "z"]) == control(["a"] * 3, ["x", "y", "z"])


def test_a_blind_judge_does_not_see_the_tags():
    seen = []
    judge = critics.without_words(lambda p, r: seen.extend(r), ["very positive", "good"])
    judge(["p"], ["Very positive: Good  goods are good."])
    assert seen == [": goods are ."]


def test_critics_speak_in_at_most_ten_words_and_agree_with_their_score():
    def words(prompts, responses):
        return [len(r.split()) for r in responses]

    axis = critics.Axis(words, 1, 3, ("short",), ("too long",))
    fine = critics.Axis(lambda p, r: [r.count("nice") for r in r], 1, 9, ("kind",), ("cold",))
    critic = critics.axes_critic([axis, fine])
    found = critic(["p"] * 3, ["nice", "a b c d", "nice a b c d"])
    assert [row["score"] for row in found] == [2.0, 0.0, 1.0]
    assert [row["feedback"] for row in found] == [
        "short and kind", "too long and cold", "kind but too long",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="over 1 words"):
        critics.axes_critic([axis, fine], max_words=1)(["p"], ["nice"])


LABELS = (
    "Harmless and very helpful",
    "Harmless and helpful",
    "Harmless and not helpful",
    "Harmful",
)


@pytest.mark.parametrize(
    "said, label",
    [("Harmful.", 3), (" harmless and HELPFUL because it answers", 1), ('"Harmful"', 3),
     ("Feedback: Harmless and very helpful\nHarmful", 0), ("not harmful", None), ("", None),
     ("Harmfulness is low", None), (None, None), ("**Harmless and not helpful**", 2)],
)  # fmt: skip
def test_category_parsing(said, label):
    wanted = None if label is None else LABELS[label]
    assert parse_category(said, LABELS) == wanted


def test_critique_parsing():
    text = (
        "**Analysis:** clear:\nand short.\n**Feedback:** Accurate but misses the point.\nScore: 2"
    )
    found = critics.parse_critique(text)
    assert found["feedback"] == "Accurate but misses the point." and found["score"] == 2.0
    assert "and short" in found["analysis"]
    for broken in (
        text.replace("Score: 2", ""), text.replace("2", "7"), text.replace("Feedback", "Advice"),
        text.replace("misses the point", " ".join("abcdefghijk")), None,
    ):  # fmt: skip
        assert critics.parse_critique(broken) is None


@pytest.mark.parametrize("score", ["2", "2/3", "**2**", "2.", " 2 out of 3"])
def test_a_critique_has_one_whole_number(score):
    text = f"Analysis: good.\nFeedback: short and true.\n**Score:** {score}"
    assert critics.parse_critique(text)["score"] == 2
    for wrong in ("2.5", "-1", "3/10", "3 out of 10", "2-3", "1,5", "two", "4", ""):
        broken = f"Analysis: good.\nFeedback: short and true.\nScore: {wrong}"
        assert critics.parse_critique(broken) is None


def test_reasoning_before_a_critique_or_label_is_left_out():
    draft = "Analysis: x\nFeedback: bad.\nScore: 0"
    final = "Analysis: y\nFeedback: good.\nScore: 2"
    assert critics.parse_critique(f"<think>{draft}</think>\n{final}")["feedback"] == "good."
    assert critics.parse_critique(f"<think>{draft}") is None
    assert parse_category("<think>Harmful? No.</think>\nHarmless and helpful", LABELS) == LABELS[1]
    assert parse_category("Harmful?\n</think>\nHarmless and helpful", LABELS) == LABELS[1]


def test_at_temperature_0_no_request_is_sent_twice(scripted, tmp_path):
    one = scripted(lambda body: completion("It is fine."))
    client = chat.ChatClient("m", base_url=one.url, cache=tmp_path / "r.sqlite")
    ask = critics.llm_critique(client, "Rate it.", ["clear"], attempts=4)
    assert ask(["q"], ["r"]) == [{"score": None, "feedback": None}]
    sent = [json.dumps(body["messages"]) for body in one.asked]
    assert len(sent) == len(set(sent)) == 4 and "cannot be read" in sent[1]
    warm = critics.llm_critique(client, "Rate it.", ["clear"], attempts=3, temperature=1.0)
    warm(["q"], ["r"])
    assert (
        len({json.dumps(body["messages"]) for body in one.asked[4:]}) == 1 and len(one.asked) == 7
    )


def test_a_critique_that_its_limit_cuts_off_is_not_asked_for_again(scripted, tmp_path):
    one = scripted(lambda body: completion("<think>Well", "length"))
    client = chat.ChatClient("m", base_url=one.url, cache=tmp_path / "r.sqlite")
    ask = critics.llm_critique(client, "Rate it.", ["clear"], max_completion_tokens=9)
    assert ask(["q"], ["r"])[0]["score"] is None and len(one.asked) == 1
    assert "max_tokens" not in one.asked[0]


class Replies:
    """A client that says what a function of the request tells it to."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def ask(self, requests, *, on_error):
        assert on_error == "keep"
        self.asked += requests
        return [chat.Reply(self.say(r), "m", {}, "key") for r in requests]


def test_language_model_feedback_asks_again_and_then_gives_up():
    def say(request):
        prompt = " ".join(message["content"] for message in request["messages"])
        if "r0" in prompt:
            return "Harmful!"
        return "no idea" if "r1" in prompt or not request["replicate"] else "harmless and helpful"

    client, shots = Replies(say), [("hi", "hello", LABELS[0]), ("kill", "yes", LABELS[3])]
    ask = critics.llm_categories(client, LABELS, shots)
    found = ask(["q"] * 3, ["r0", "r1", "r2"])
    assert [row["feedback"] for row in found] == ["Harmful", None, "Harmless and helpful"]
    assert [row["score"] for row in found] == [0.0, None, 2.0] and len(client.asked) == 5
    assert "Feedback: Harmful" in client.asked[0]["messages"][0]["content"]
    with pytest.raises(ValueError, match="examples"):
        critics.llm_categories(client, LABELS, [("a", "b", "Fine")])
    client = Replies(lambda r: "Analysis: ok\nFeedback: Clear and right.\nScore: 3")
    found = critics.llm_critique(client, "Rate it.", ["clear", "right", "whole"])(["q"], ["r"])
    assert found == [{"analysis": "ok", "feedback": "Clear and right.", "score": 3.0}]


# --- the loop ------------------------------------------------------------------------------------

TINY = dict(
    iterations=2, samples_per_prompt=5, max_new_tokens=6, steps=3, batch_size=8, forward_rows=5,
    checkpoint_every=2, learning_rate=1e-2,
)  # fmt: skip
PROMPTS = ["the cat", "a dog sat on", "you are", "the mat"]


def nice(prompts, responses):
    return [float(r.count("nice") + r.count("kind") - r.count("stupid")) for r in responses]


def arm(style="token", labeller=FIVE, **more):
    """A learner and its task."""
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS)
    first = conditions.add_tokens(model, len(TAGS)) if style in ("token", "separator") else None
    tokens = more.pop("tokens", TAGS)
    conditioner = Conditioner(tokenizer, style, tokens=tokens, first_id=first)
    config = ConditioningConfig(**{**TINY, **more.pop("config", {})})
    task = Task(
        PROMPTS, more.pop("feedback", critics.scored(nice)), labeller, conditioner,
        held_out=["a mat", "the dog"], judge=nice, **more,
    )  # fmt: skip
    return loop.make_learner(model, tokenizer, config), task


def train(folder=None, **more):
    """A trained learner, its task, and the result."""
    learner, task = arm(**more)
    return learner, task, loop.train(learner, task, folder=folder)


def outcome(learner, _, result):
    """What two runs must share: history without times, pool, held-out samples, weights."""
    history = result.history.drop(columns=[c for c in result.history if c.startswith("seconds")])
    weights = {n: p.detach().clone() for n, p in learner.weights().items()}
    evaluation = result.evaluation.to_dict("records")
    return history.to_dict("records"), result.pool.items, evaluation, weights


def same(one, two):
    assert one[1] == two[1] and one[2] == two[2]
    for a, b in zip(one[0], two[0], strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)
    assert all(torch.equal(one[3][name], two[3][name]) for name in one[3])


class KilledError(Exception):
    pass


KILLS = [("sample_items", 1), ("ask", 1), ("fill_pool", 1), ("update", 2), ("update", 3),
         ("evaluate", 1), ("describe_iteration", 1), ("sample_items", 2), ("ask", 2), ("update", 4),
         ("update", 6), ("describe_iteration", 2)]  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return outcome(*train())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stage, call", KILLS)
def test_killed_anywhere_it_ends_with_the_same_pool_and_history(
    tmp_path, whole, stage, call, after, monkeypatch
):
    real, calls = getattr(loop, stage), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == call and not after:
            raise KilledError
        found = real(*arguments)
        if len(calls) == call:
            raise KilledError
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop, stage, killed)
        with pytest.raises(KilledError):
            train(tmp_path)
    again = train(tmp_path)
    same(outcome(*again), whole)
    on_disk = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(on_disk, again[2].history, check_dtype=False)


def test_killed_between_an_iteration_and_its_line_of_history(tmp_path, whole, monkeypatch):
    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(training.History, "add", killed)
        with pytest.raises(KilledError):
            train(tmp_path)
    same(outcome(*train(tmp_path)), whole)
    same(outcome(*train(tmp_path)), whole)  # nothing is left to do


CHECKED = {"validation": ["a dog", "you sat"], "config": {"check_every": 2, "steps": 5}}


@pytest.fixture(scope="module")
def checked():
    return train(**CHECKED)


@pytest.mark.parametrize("call", [1, 2, 4, 5, 8])
def test_killed_at_a_check_it_ends_with_the_same_weights(tmp_path, checked, call, monkeypatch):
    """Checks are at 0, 2, 4 and 5 of each iteration's steps, and come once each whatever is killed."""
    rows = checked[2].history.attrs["checks"]
    assert [row["step"] for row in rows] == [0, 2, 4, 5, 5, 7, 9, 10]
    real, calls = loop.check, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KilledError
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "check", killed)
        with pytest.raises(KilledError):
            train(tmp_path, **CHECKED)
    again = train(tmp_path, **CHECKED)
    assert again[2].history.attrs["checks"] == rows
    same(outcome(*again), outcome(*checked))


def test_an_iteration_ends_with_the_weights_of_its_best_check(monkeypatch):
    """The judge likes a step's samples by its number: 3 of 5 is best in one iteration, 0 in the other."""
    values, seen = iter([0.0, 1.0, 5.0, 2.0, 9.0, 1.0, 1.0, 1.0]), []
    learner, task = arm(**CHECKED)
    task.judge = lambda prompts, responses: [next(values)] * len(responses)
    task.held_out = []
    real = loop.training.Best.offer

    def offer(best, step, value, weights):
        seen.append({name: weight.detach().clone() for name, weight in weights.items()})
        real(best, step, value, weights)

    monkeypatch.setattr(loop.training.Best, "offer", offer)
    history = loop.train(learner, task).history
    assert history.best_step.tolist() == [4, 0] and history.validation.tolist() == [5.0, 9.0]
    weights = learner.weights()
    assert all(torch.equal(weights[name], seen[2][name]) for name in weights)
    assert all(torch.equal(seen[4][name], seen[2][name]) for name in weights)
    assert not all(torch.equal(seen[3][name], seen[2][name]) for name in weights)


def test_checks_need_prompts_and_prompts_need_checks():
    with pytest.raises(ValueError, match="check_every is 2 and there are 0"):
        train(config={"check_every": 2})
    with pytest.raises(ValueError, match="check_every is 0 and there are 1"):
        train(validation=["a dog"])


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path, config={"beta": 0.5})


@pytest.mark.parametrize("style", ["token", "separator", "text", "none"])
def test_the_reference_does_not_see_the_condition(style):
    """Reference logits of one response are equal under two labels; the policy's are not."""
    two = ("kind", "stupid")
    learner, task = arm(style=style, labeller=Quantiles(two), tokens=two)
    found, single = [], Item("the cat", "sat", (9, 10, 1), True, 1, 1.0)
    for label in (0, 1):
        batch = loop.as_batch(learner, task, [(single, label)])
        with torch.no_grad():
            reference = loop.logits_of(learner, batch.raw, reference=True)
            found.append((reference, loop.logits_of(learner, batch.conditioned)))
    assert torch.equal(found[0][0], found[1][0])
    plain, tokenizer = models.build_tiny_model("tiny", words=WORDS)
    ids = torch.tensor([tokenizer("the cat")["input_ids"] + [9, 10]])
    assert torch.allclose(found[0][0], plain(ids).logits[:, -3:], atol=1e-5)
    assert torch.equal(found[0][1], found[1][1]) == (style == "none")


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_table_of_tokens_adds_up_to_the_loss_of_training(direction):
    learner, task = arm(config={"beta": 0.3, "alpha": 0.2, "direction": direction})
    loop.train(learner, task)  # so that policy and reference differ
    text = "a nice cat"
    single = Item("the cat", text, tuple(learner.tokenizer(text)["input_ids"]), True, 1)
    table = loop.token_table(learner, task, single, 1)
    assert list(table.index) == text.split() and (table.KL > 0).all()
    batch = loop.as_batch(learner, task, [(single, 1)])
    parts = loop.batch_loss(learner, batch, torch.arange(1), loop.token_weights(batch.mask))
    assert table.loss.mean() == pytest.approx(float(parts["loss"].detach()), abs=1e-5)
    assert -table["log p(token | label)"].mean() == pytest.approx(
        float(parts["nll"].detach()), abs=1e-5
    )
    start = -loop.reference_nll(
        learner,
        [task.conditioner.raw_ids(task.conditioner.build("the cat"))],
        [list(single.response_ids)],
    )[0]
    assert table["log p(token)"].sum() == pytest.approx(start, abs=1e-4)


@pytest.mark.parametrize("style", ["token", "text", "none"])
def test_the_kl_of_training_is_against_the_unconditioned_reference(style):
    """At the start only the condition tells policy and reference apart."""
    two = ("kind", "stupid")
    learner, task = arm(style=style, labeller=Quantiles(two), tokens=two)
    single = Item("the cat", "sat", (9, 10, 1), True, 1, 1.0)
    batch = loop.as_batch(learner, task, [(single, 0)])
    weights, places = token_weights(batch.mask), torch.arange(1)
    kl = float(loop.batch_loss(learner, batch, places, weights)["kl"])
    assert kl < 1e-6 if style == "none" else kl > 1e-4


def test_the_reference_stays_while_the_policy_and_the_new_rows_learn():
    learner, task = arm()
    before = {n: p.detach().clone() for n, p in learner.weights().items()}
    prompts, responses = [[7, 8]], [[9, 10, 1]]
    start = loop.reference_nll(learner, prompts, responses)
    loop.train(learner, task)
    assert loop.reference_nll(learner, prompts, responses) == start
    moved = {n for n, p in learner.weights().items() if not torch.equal(p, before[n])}
    assert any("extra" in name for name in moved) and len(moved) > 5


@pytest.mark.parametrize("style", ["text", "token"])
def test_frozen_layers_stay_and_their_states_are_computed_once(monkeypatch, style):
    """Cached states change nothing, also where new rows train below the frozen layer."""
    # padding left out beside other rows rounds differently, which Adam amplifies (tested with PPO)
    monkeypatch.setattr(policy.TokenBatch, "_padding", lambda *_: (0, 0))
    found = []
    for cached in (True, False):
        learner, task = arm(style=style, config={"train": "top", "layers": 1, "steps": 12})
        calls = []
        layer = models.decoder_layers(learner.policy)[0]
        layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if not cached:
            monkeypatch.setattr(loop._Rows, "keep", lambda *_: None)
        result = loop.train(learner, task)
        found.append((outcome(learner, task, result), len(calls)))
        assert not any("layers.0" in name for name in learner.weights())
    (with_cache, fewer), (without, more) = found
    assert fewer < more
    for name in with_cache[3]:
        assert torch.allclose(with_cache[3][name], without[3][name], atol=1e-5)


def test_training_makes_the_requested_label_likelier():
    """The label that a text got predicts it better than another label does, after training."""
    config = {"iterations": 1, "steps": 60, "samples_per_prompt": 20, "beta": 0.0}
    learner, task, result = train(config=config)
    nll = {True: 0.0, False: 0.0}
    for single, label in result.pool.select(without=(2,)):
        for asked in (label, 4 - label):
            batch = loop.as_batch(learner, task, [(single, asked)])
            with torch.no_grad():
                logits = loop.logits_of(learner, batch.conditioned)
            found = conditional_loss(logits, batch.ids, batch.mask)
            nll[asked == label] += float(found["nll"])
    assert nll[True] < nll[False] - 1


def test_filtered_cloning_and_free_text_run_in_the_same_loop():
    _, task, cloning = train(style="none", config={"only": (0,)})
    assert list(cloning.history["scored"]) == [20, 40] and task.requests["none"] == ()
    assert {label for _, label in cloning.pool.select(only=(0,))} == {0}

    def critic(prompts, responses):
        said = ["fine", "kind", "nice"]
        rows = [{"score": float(len(r) % 4), "feedback": said[len(r) % 3]} for r in responses]
        rows[0] = {"score": None, "feedback": None}
        return rows

    _, _, (history, evaluation, pool) = train(
        style="text", labeller=FreeText(), feedback=critic, config={"exemplar": "pool"},
        requests={"none": ()},
    )  # fmt: skip
    assert list(history["missing"]) == [1, 1] and set(evaluation.request) == {
        "none",
        "pool",
        "pool, worst",
    }
    assert pool.items[0].round == 1 and set(history["direction"]) == {"forward"}


def test_scores_of_any_kind_of_number_are_kept(tmp_path):
    """A judge may give numpy's float32, and NaN where it has no score: files hold neither."""

    def judge(prompts, responses):
        scores = [
            {"score": np.float32(len(r)), "attributes": {"size": np.int64(3)}} for r in responses
        ]
        scores[0] = {"score": float("nan")}
        return scores

    _, _, result = train(tmp_path, feedback=judge, config={"iterations": 1})
    assert list(result.history["missing"]) == [1]
    assert all(type(i.score) is float and i.attributes == {"size": 3.0} for i in result.pool.items)


def test_exemplars_are_feedback_of_the_best_label_there_is():
    learner, task = arm(style="text", labeller=FreeText(), config={"exemplar": "pool"})
    pool = DataPool(task.labeller)
    pool.add([item(i, float(i % 3), feedback=f"said {i}") for i in range(9)])
    drawn = {condition[0] for condition in loop.exemplars(learner, pool, 40, 2)}
    assert drawn == {"said 2", "said 5", "said 8"}
    five = [loop.exemplars(learner, pool, 5, iteration) for iteration in (2, 2, 3)]
    assert five[0] == five[1] != five[2]
    learner, _ = arm(config={"exemplar": "kind"})
    assert set(loop.exemplars(learner, pool, 2, 2)) == {("kind",)}


def test_an_encoder_decoder_trains_too(tiny_seq2seq):
    model, tokenizer = copy.deepcopy(tiny_seq2seq[0]), tiny_seq2seq[1]
    config = ConditioningConfig(**{**TINY, "iterations": 1})
    task = Task(PROMPTS, critics.scored(nice), FIVE, Conditioner(tokenizer))
    history, evaluation, _ = loop.train_conditional(model, tokenizer, task, config)
    assert np.isfinite(history["loss"]).all() and len(evaluation) == 0


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="samples_per_prompt"):
        train(labeller=Quantiles(TAGS, within="prompt"), config={"samples_per_prompt": 2})
    with pytest.raises(ValueError, match="verdicts"):
        train(feedback=lambda p, r: [])
    nothing = critics.scored(lambda p, r: [float("nan")] * len(r))
    with pytest.raises(ValueError, match="no item"):
        train(feedback=nothing)
    with pytest.raises(ValueError, match="no prompts"):
        Task([], nothing, FIVE, None)
    with pytest.raises(ValueError, match="need a judge"):
        Task(PROMPTS, nothing, FIVE, None, held_out=["a"])


def test_a_policy_with_new_tokens_is_kept_whole_and_plain_transformers_read_it(tmp_path):
    model, tokenizer = models.build_tiny_model("tiny", seed=2)
    first = conditions.add_tokens(model, 2, seed=1)
    ids = torch.tensor([[first, 7, 8], [first + 1, 8, 9]])
    with torch.no_grad():
        before = model(ids).logits
        plain = model(ids[:, 1:]).logits
    kept = conditions.WithTokens(model, ("good", "bad"))
    folder = models.save(kept, tokenizer, tmp_path / "kept", card={"licence": "none"})
    assert cards.read(folder)["condition_tokens"] == ["good", "bad"]
    again, _ = models.load_policy(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids[:, 1:]).logits, plain)
        assert conditions.load_tokens(again, folder) == first
        torch.testing.assert_close(again(ids).logits, before)
        torch.testing.assert_close(model(ids).logits, before)  # the kept one goes on as it was
