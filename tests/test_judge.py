"""The local annotator, on tiny models: its numbers by hand, its replies, and what is missing."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import completion

from lib import encoding, judge, models, questions
from lib.chat import ChatClient
from lib.judge import EndpointAnnotator, LocalAnnotator
from lib.papers.ilf import refine
from lib.papers.sparse_feedback import protocols
from lib.questions import Question
from lib.replies import ReplyStore

ROOT = Path(judge.__file__).parents[1]
WORDS = (  # noqa: SIM905
    "Yes yes YES No no NO A B a b good bad text task is the a cat sat on mat . , : 1 2 3 4 5 6 7 Text "
    "Statement Answer Task Output ( )"
).split()
WORDS = list(dict.fromkeys(WORDS))
TEXTS = ["the cat sat", "the mat is good", "a cat is bad"]


@pytest.fixture
def annotator(tmp_path, monkeypatch):
    """A tiny model that answers; its replies are in an empty folder."""
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "load_policy", lambda name: models.build_tiny_model(words=WORDS))
    return LocalAnnotator("tiny", shipped=tmp_path / "shipped")


def again(annotator, **options) -> LocalAnnotator:
    """Another annotator over the same files, as in the next process."""
    return LocalAnnotator("tiny", shipped=annotator.folder, **options)


def probabilities(annotator, question: Question) -> np.ndarray:
    """p(next word) of a question, by a plain forward pass."""
    model, tokenizer = annotator.loaded
    ids = encoding.encode(tokenizer, annotator._prompt(question)).prompt
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1).double().numpy()


def test_yes_no_is_the_log_odds_of_the_spellings_together(annotator):
    question = questions.support_question(TEXTS[0], TEXTS[1])
    p = probabilities(annotator, question)
    number = annotator.loaded[1].convert_tokens_to_ids
    yes, no = (
        sum(p[number(w)] for w in words) for words in (("Yes", "yes", "YES"), ("No", "no", "NO"))
    )
    found = annotator.supports([TEXTS[0]], [TEXTS[1]])
    assert found[0] == pytest.approx(math.log(yes / no), abs=2e-4)


def test_a_rating_is_the_expectation_over_the_seven_digits(annotator):
    p = probabilities(annotator, questions.rating_question(TEXTS[0], TEXTS[2]))
    digits = p[[annotator.loaded[1].convert_tokens_to_ids(str(d)) for d in range(1, 8)]]
    wanted = (digits * np.arange(1, 8)).sum() / digits.sum()
    assert annotator.rate([TEXTS[0]], [TEXTS[2]])[0] == pytest.approx(wanted, abs=1e-3)


def test_a_comparison_averages_both_orders_and_says_what_the_order_did():
    table = questions.both_orders(np.array([2.0, 2.0, np.nan]), np.array([1.0, -2.0, 0.0]))
    p = 1 / (1 + np.exp(-np.array([2.0, 1.0])))
    assert table["p_first"][0] == pytest.approx((p[0] + 1 - p[1]) / 2)
    assert table["order_effect"][0] == pytest.approx((p[0] + p[1]) / 2 - 0.5)
    assert table["order_effect"][1] == pytest.approx(0)
    assert table["verdict"].tolist()[:2] == ["equal", "(a)"]
    assert table["verdict"][2] is None and math.isnan(table["p_first"][2])


def test_swapped_responses_swap_the_comparison(annotator):
    one = annotator.compare(TEXTS[:1], TEXTS[1:2], TEXTS[2:3])
    other = annotator.compare(TEXTS[:1], TEXTS[2:3], TEXTS[1:2])
    assert one["p_first"][0] == pytest.approx(1 - other["p_first"][0], abs=1e-6)


def test_questions_asked_together_and_alone_have_the_same_answers(annotator, tmp_path):
    asked = [questions.support_question(text, s) for text in TEXTS for s in TEXTS]
    asked += [questions.rating_question(TEXTS[0], TEXTS[1])]
    together = annotator.log_probs(asked)
    assert together.shape == (10, 7) and np.isnan(together[0, 2:]).all()
    for k, question in enumerate(asked):
        alone = LocalAnnotator("tiny", shipped=tmp_path / "other")
        alone.store = ReplyStore(tmp_path / f"{k}.sqlite")
        np.testing.assert_allclose(
            alone.log_probs([question])[0], together[k][: len(question.options)], atol=2e-4
        )


def test_categories_are_probabilities(annotator):
    found = annotator.classify(TEXTS, "good or bad", ["good", "bad", "cat"])
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found.sum(1), 1)


def test_what_is_known_is_not_asked_again_and_ships_without_the_model(annotator, monkeypatch):
    wanted = annotator.rate(TEXTS, TEXTS)
    texts = annotator.write(TEXTS, n=2, seed=3, max_new_tokens=5, temperature=1.0)
    path = annotator.export("job")
    monkeypatch.setattr(models, "load_policy", lambda name: 1 / 0)
    np.testing.assert_array_equal(again(annotator).rate(TEXTS, TEXTS), wanted)  # its own replies
    monkeypatch.setenv("FEEDBACK_CACHE", str(path.parent / "empty"))
    shipped = again(annotator, ask=False)
    np.testing.assert_array_equal(shipped.rate(TEXTS, TEXTS), wanted)
    assert shipped.write(TEXTS, n=2, seed=3, max_new_tokens=5, temperature=1.0) == texts


def test_a_changed_item_is_missing_with_its_count_or_asked_anew(annotator):
    annotator.rate(TEXTS, TEXTS)
    annotator.export("job")
    changed = [*TEXTS[:2], "the mat"]
    with pytest.warns(UserWarning, match="1 of 3 answers of tiny are missing"):
        found = again(annotator, ask=False).rate(TEXTS, changed)
    assert np.isfinite(found[:2]).all() and math.isnan(found[2])
    with pytest.warns(UserWarning, match="3 of 3"):
        assert again(annotator, ask=False).write(TEXTS) == [None] * 3
    assert np.isfinite(again(annotator).rate(TEXTS, changed)).all()


def test_an_export_is_the_same_file_whoever_asked_first(annotator, tmp_path):
    annotator.rate(TEXTS, TEXTS)
    first = annotator.export("job").read_bytes()
    other = again(annotator)
    other.rate(TEXTS[::-1], TEXTS[::-1])
    assert other.export("other").read_bytes() == first


def test_texts_are_greedy_unless_told_and_samples_depend_on_the_seed(annotator):
    assert annotator.write(TEXTS) == again(annotator).write(TEXTS)
    options = {"n": 3, "temperature": 1.0, "max_new_tokens": 12}
    one, two = (annotator.write(TEXTS[:1], seed=seed, **options) for seed in (0, 1))
    assert len(one[0]) == 3 and one != two


def test_replies_of_another_model_are_not_taken(annotator, tmp_path):
    model, tokenizer = models.build_tiny_model(words=WORDS, seed=1)
    models.save(model, tokenizer, tmp_path / "mine")
    keys = {judge.model_key("tiny"), judge.model_key(str(tmp_path / "mine"))}
    model, tokenizer = models.build_tiny_model(words=WORDS, seed=2)
    models.save(model, tokenizer, tmp_path / "mine")
    assert len(keys | {judge.model_key(str(tmp_path / "mine"))}) == 3


CHILD = """
import sys
from pathlib import Path
from lib import judge, models
import numpy as np
models.load_policy = lambda name: models.build_tiny_model(words=sys.argv[2].split())
judge.CHUNK = 4
annotator = judge.LocalAnnotator("tiny", shipped=Path(sys.argv[1]))
answer = annotator._answer
def slow(questions):
    import time
    time.sleep(0.3)
    return answer(questions)
annotator._answer = slow
texts = [f"the cat {a} {b}" for a in sys.argv[2].split()[:6] for b in ("good", "bad")]
annotator.rate(texts, texts)
print(annotator.export("job"))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_table(tmp_path):
    def start(folder: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FEEDBACK_CACHE": str(tmp_path / folder),
        }
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / folder), " ".join(WORDS)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole = start("whole")
    assert whole.communicate(timeout=300)[0] and whole.returncode == 0
    killed = start("killed")
    store = tmp_path / "killed" / "replies"
    deadline = time.time() + 60
    while time.time() < deadline:
        files = list(store.glob("*.sqlite"))
        if files and len(ReplyStore(files[0])):
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "tiny.job.jsonl.gz").exists()
    assert start("killed").communicate(timeout=300)[0]
    files = [tmp_path / name / "tiny.job.jsonl.gz" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- the protocols of the sparse-feedback paper --------------------------------------------------


def test_the_protocols_take_a_local_annotator_in_the_place_of_a_client(annotator):
    ratings = pd.DataFrame({"instruction": "task", "input": TEXTS, "response": TEXTS[::-1]})
    found = protocols.rate(annotator, ratings)
    assert found["score"].between(1, 7).all() and found["likeliest"].between(1, 7).all()
    assert set(found["status"]) == {"ok"} and found["id"].is_unique
    rankings = pd.DataFrame(
        {"instruction": "task", "input": TEXTS, "response1": TEXTS[::-1], "response2": "a cat"}
    )
    found = protocols.rank(annotator, rankings)
    assert found["p_first"].between(0, 1).all() and set(found["model"]) == {"tiny"}
    empty = again(annotator, ask=False)
    empty.store = ReplyStore(annotator.folder / "none.sqlite")
    with pytest.warns(UserWarning, match="missing"):
        found = protocols.rate(empty, ratings)
    assert found["score"].isna().all() and set(found["status"]) == {"missing"}


def test_a_protocol_question_is_the_endpoints_prompt(annotator):
    question = protocols.rating_question("task", "the cat", "a mat")
    assert question.shared + question.rest == protocols.rating_prompt("task", "the cat", "a mat")
    assert question.shared.endswith("the cat")
    question = protocols.ranking_question("task", "", "a", "b")
    assert question.shared + question.rest == protocols.ranking_prompt("task", "", "a", "b")
    assert annotator._prompt(question).endswith("Output (")


def test_feedback_and_refinements_are_written_by_an_annotator_and_stored(annotator):
    writer = refine.AnnotatorWriter(annotator, max_new_tokens=6)
    drafts = writer(TEXTS, n=2, seed=1)
    assert [len(row) for row in drafts] == [2, 2, 2] and drafts[0] != drafts[1]
    annotator.export("texts")
    stored = again(annotator, ask=False)
    assert refine.AnnotatorWriter(stored, max_new_tokens=6)(TEXTS, n=2, seed=1) == drafts
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 of 3 texts of tiny"):
        refine.AnnotatorWriter(stored, max_new_tokens=7)(TEXTS, n=2, seed=1)


# --- a model at an endpoint ----------------------------------------------------------------------


def said(text, **tokens):
    """A reply with this text; tokens: the probabilities of its likeliest first ones."""
    raw = completion(text)
    if tokens:
        listed = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
        raw["choices"][0]["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return raw


@pytest.fixture
def endpoint(scripted, tmp_path):
    """Start an annotator at an endpoint that answers as a function of the request's body says."""

    def start(answer, **options):
        server = scripted(answer)
        client = ChatClient("model", base_url=server.url, cache=tmp_path / "replies.sqlite")
        return EndpointAnnotator(client, **options), server

    return start


def test_an_endpoints_first_tokens_are_summed_over_spellings(endpoint):
    reply = said("Yes.", Yes=0.5, yes=0.1, No=0.2, The=0.2)
    annotator, server = endpoint(lambda body: reply)
    found = annotator.supports(TEXTS, TEXTS[::-1])
    np.testing.assert_allclose(found, math.log(0.6 / 0.2))
    asked = server.asked[0]
    assert asked["logprobs"] and asked["messages"][0]["content"] == questions.CHECKER
    rating, _ = endpoint(lambda body: said("6", **{"6": 0.75, "7": 0.25}))
    np.testing.assert_allclose(rating.rate(["task"], ["answer"]), 6.25, atol=1e-6)


@pytest.mark.parametrize("text, log_p", [
    ("No, it does not. Yes?", [judge.UNSEEN, 0]),
    ("**yes**", [0, judge.UNSEEN]),
    ("<think>No ... or yes?</think>Yes", [0, judge.UNSEEN]),
    ("The answer is: YES.", [0, judge.UNSEEN]),
])  # fmt: skip
def test_without_probabilities_the_answer_that_is_named_first_counts(endpoint, text, log_p):
    annotator, server = endpoint(lambda body: said(text, The=1.0), probabilities=False)
    question = questions.support_question("text", "statement")
    assert annotator.log_probs([question]).tolist() == [log_p]
    assert "logprobs" not in server.asked[0]


def test_an_answer_that_names_no_option_is_missing_and_counted(endpoint):
    annotator, _ = endpoint(lambda body: said("Maybe, nobody knows."))
    with pytest.warns(UserWarning, match="2 of 2 replies of model name none"):
        found = annotator.supports(TEXTS[:2], TEXTS[:2])
    assert np.isnan(found).all()


def test_a_pair_is_read_after_its_lead_in_both_orders(endpoint):
    annotator, _ = endpoint(lambda body: said("I say a thing: Output (b)"))
    rankings = pd.DataFrame({"instruction": ["t"], "input": "", "response1": "x", "response2": "y"})
    found = protocols.rank(annotator, rankings)  # the second place, whatever stands there
    assert found.verdict[0] == "equal" and found.p_first[0] == pytest.approx(0.5)
    assert found.order_effect[0] == pytest.approx(-0.5)


def test_an_endpoint_writes_texts_and_what_it_said_is_bought_once(endpoint):
    annotator, server = endpoint(lambda body: said(f" text {len(server.asked)} "))
    texts = annotator.write(TEXTS, n=2, seed=1, max_new_tokens=7, temperature=0.5)
    assert [len(row) for row in texts] == [2, 2, 2] and texts[0][0][1] is True
    assert server.asked[0]["max_tokens"] == 7 and server.asked[0]["temperature"] == 0.5
    assert annotator.write(TEXTS, n=2, seed=1, max_new_tokens=7, temperature=0.5) == texts
    assert annotator.write(TEXTS, n=2, seed=2, max_new_tokens=7, temperature=0.5) != texts
    assert len(server.asked) == annotator.client.bought == 12
    thinking, server = endpoint(lambda body: said("Yes"), max_completion_tokens=2000)
    thinking.write(["a"])
    thinking.supports(["a"], ["b"])
    assert all("max_tokens" not in body for body in server.asked)
