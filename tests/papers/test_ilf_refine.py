"""Refinement: drafts and flags, incorporation, choosers, InstructRM on three tokenizers, word removal."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import chat, embeddings, encoding, logprobs, models
from lib.annotator import Critique, Rubric, SimulatedAnnotator
from lib.papers.ilf import refine as rf

POST = (
    "Lake Ormin is a shallow lake in Halland. It was formed when the Torvald Glacier melted. "
    "The lake covers 42 square kilometres and is fed by the River Sund."
)
RUBRIC = Rubric()


def articles(n=3):
    return pd.DataFrame(
        {
            "id": [f"a{i}" for i in range(n)],
            "title": "Lake Ormin",
            "post": POST,
            "summary": "Lake Ormin is a shallow lake.",
            "feedback": [f"It does not say Halland, {i}." for i in range(n)],
            "feedback_class": "coverage",
            "feedback_target": "Halland",
        }
    )


def scripted(*texts):
    """A writer that gives the same drafts for each prompt, and keeps the prompts."""

    def write(prompts, n=1, seed=0):
        write.prompts = list(prompts)
        return [[rf.Draft(t, True) for t in texts[:n]] for _ in prompts]

    return write


# --- prompts and drafts --------------------------------------------------------------------------


def test_prompts_have_the_papers_parts_in_order():
    prompt = rf.refinement_prompt("T1", "P1", "S1", "F1")
    places = [prompt.index(part) for part in ("Title: T1", "Text: P1", "Summary: S1", "F1")]
    assert places == sorted(places) and prompt.endswith("Improved TL;DR:")
    control = rf.refinement_prompt("T1", "P1", "S1")
    assert "eedback" not in control and control.endswith("Improved TL;DR:")
    assert rf.summary_prompt("T1", "P1").endswith("TL;DR:")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (' "A  lake.  It is deep. It was', "A lake. It is deep."),
        ("\n\nA lake\nsecond line.", "A lake"),
        ("...", ""),
        ("no end", "no end"),
    ],
)
def test_tidy(text, kept):
    assert rf.tidy(text) == kept


def test_refine_flags_and_order_of_filling():
    drafts = ["", "Lake Ormin is a shallow lake.", "New text.", "New text.", "Other text."]
    writer = scripted(*drafts)
    table = rf.refine(writer, articles(2), n=4, extra=1)
    assert table["refinement"][:4].tolist() == [drafts[1], drafts[2], drafts[4], drafts[3]]
    assert table["candidate"].tolist() == [0, 1, 2, 3] * 2
    flags = table[["empty", "overlong", "duplicate", "unchanged"]].sum()
    assert flags.tolist() == [0, 0, 2, 2]
    assert rf.refine(writer, articles(1), n=5)["empty"].sum() == 1


def test_refine_shows_the_feedback_asked_for():
    writer, rows = scripted("A lake."), articles()
    rf.refine(writer, rows, n=1)
    assert [f"Halland, {i}." in p for i, p in enumerate(writer.prompts)] == [True] * 3
    rf.refine(writer, rows, n=1, feedback=None)
    assert not any("Halland, " in p for p in writer.prompts)
    shuffled = rf.shuffled_feedback(rows)
    rf.refine(writer, rows, n=1, feedback=shuffled)
    assert [f"Halland, {i}." in p for i, p in enumerate(writer.prompts)] == [False] * 3
    assert sorted(shuffled) == sorted(rows["feedback"])
    with pytest.raises(ValueError, match="no feedback"):
        rf.refine(writer, rows.assign(feedback=""), n=1)


def test_local_writer_marks_unfinished_drafts(tiny):
    drafts = rf.LocalWriter(*tiny, max_new_tokens=4)(["the cat", "a dog"], 3, seed=1)
    assert [len(row) for row in drafts] == [3, 3]
    assert {draft.finished for row in drafts for draft in row} <= {True, False}
    again = rf.LocalWriter(*tiny, max_new_tokens=4)(["the cat", "a dog"], 3, seed=1)
    assert drafts == again


@pytest.fixture
def endpoint(tmp_path):
    """A loopback endpoint that answers four requests, refuses the fifth, and then answers again."""
    settings = {"script": ["ok"] * 4 + ["401!bad key"]}
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "bench" / "endpoint.py"),
        json.dumps(settings),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_api_writer_goes_on_without_buying_again(endpoint, tmp_path):
    def write():
        how = {"concurrency": 1, "cache": tmp_path / "replies.sqlite", "price": (1.0, 2.0)}
        return rf.ApiWriter(chat.ChatClient("m", base_url=f"{endpoint}/v1", **how))

    with pytest.raises(chat.EndpointError, match="bad key"):
        rf.refine(write(), articles(), n=2)
    prompt = rf.refinement_prompt(*articles().loc[0, ["title", "post", "summary", "feedback"]])
    left = write()
    assert left.client.estimate(left.requests([prompt], 2)) | {"cost": 0} == {
        **left.client.estimate([]), "calls": 2, "cached": 2, "cost": 0,
    }  # fmt: skip
    table = rf.refine(left, articles(), n=2)
    assert len(table) == 6 and left.client.bought == 2 and not table["overlong"].any()
    again = write()
    assert rf.refine(again, articles(), n=2).equals(table) and again.client.bought == 0
    rf.refine(again, articles(), n=2, seed=1)
    assert again.client.bought == 6
    with urllib.request.urlopen(f"{endpoint}/log") as log:
        outcomes = [kind for _, _, kind in json.load(log)]
    assert outcomes.count("ok") == 12
    sent = again.requests(["p"], 2)
    assert sent[0] != sent[1] and sent[0]["max_tokens"] == 48 and sent[0]["top_p"] == 0.95


# --- incorporation and the rule edit -------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "target", "refinement", "followed"),
    [
        ("coverage", "Halland", "Lake Ormin is a lake in Halland.", True),
        ("coverage", "Halland", "Lake Ormin is a shallow lake.", False),
        ("coverage", "Halland", "", False),
        ("support", "It is full of crocodiles", "Lake Ormin is a shallow lake.", True),
        ("support", "It is full of crocodiles", "Lake Ormin has crocodiles.", False),
        ("repetition", "", "A lake in Halland. A lake in Halland.", False),
        ("repetition", "", "Lake Ormin is a lake in Halland.", True),
        ("length", "", "Lake.", False),
        ("length", "", "Lake Ormin is a shallow lake in Halland, by a river.", True),
        ("none", "", "Lake Ormin is a lake in Halland.", False),
    ],
)
def test_incorporates(category, target, refinement, followed):
    summary = "Lake Ormin is a lake. It is full of crocodiles."
    critique = Critique(category, target, "said so")
    assert rf.incorporates(RUBRIC, POST, summary, critique, refinement) is followed


def test_rule_edit_keeps_what_was_right_and_follows_every_critique():
    summary = "Lake Ormin is a shallow lake. It is full of tropical crocodiles."
    for target in ("Halland", "42", "River Sund"):
        critique = Critique("coverage", target, "")
        edited = rf.rule_edit(RUBRIC, POST, summary, critique)
        assert edited.startswith("Lake Ormin is a shallow lake") and "crocodiles" not in edited
        assert RUBRIC.states(edited, target)
        assert RUBRIC.judge(POST, edited).score > RUBRIC.judge(POST, summary).score
    assert rf.rule_edit(RUBRIC, POST, summary, Critique("coverage", "Paris", "")) == ""
    wrong = rf.rule_edit(RUBRIC, POST, "It is full of crocodiles.", Critique("coverage", "42", ""))
    assert wrong.split(" Also: ")[0] in POST and "42" in wrong  # a text, and not "Also:" alone


def test_simulated_feedback_and_warm_up():
    rows = articles(4).drop(columns=["feedback", "feedback_class", "feedback_target"])
    rows.loc[3, "summary"] = POST
    found = rf.give_feedback(rows, SimulatedAnnotator())
    assert found.attrs["without_feedback"] == 1 and len(found) == 3
    assert all(t in f for t, f in zip(found.feedback_target, found.feedback, strict=True))
    vague = rf.give_feedback(rows, SimulatedAnnotator(), name_facts=False)
    assert vague["feedback_target"].tolist() == found["feedback_target"].tolist()
    assert not any(t in f for t, f in zip(vague.feedback_target, vague.feedback, strict=True))
    examples = rf.warm_up_examples(found, RUBRIC, without_feedback=0.5)
    assert len(examples) == 5 and examples.attrs["left_out"] == 0
    assert examples["prompt"].str.contains("Feedback on summary").sum() == 3


def test_measure_leaves_other_feedback_unknown():
    table = rf.refine(scripted("Lake Ormin lies in Halland."), articles(), n=1)
    assert rf.measure(table, RUBRIC)["incorporated"].tolist() == [1, 1, 1]
    human = rf.measure(table.assign(feedback_class="Coverage"), RUBRIC)
    assert human["incorporated"].isna().all() and human["score"].notna().all()


# --- choosers ------------------------------------------------------------------------------------


def candidates():
    texts = ["Lake Ormin.", "Lake Ormin is in Halland.", "Lake Ormin is a lake."]
    return rf.refine(scripted(*texts), articles(), n=3)


def test_ties_go_to_the_first_candidate_and_empty_ones_lose():
    table = candidates()
    assert rf.choose(table, np.zeros(9))["candidate"].tolist() == [0, 0, 0]
    assert rf.choose(table, [0, 1, 1, 5, 4, 3, 0, 0, 1])["candidate"].tolist() == [1, 0, 2]
    empty = table.assign(empty=[True, False, False] * 3)
    assert rf.choose(empty, [9, 0, 1] * 3)["candidate"].tolist() == [2, 2, 2]
    assert rf.choose(empty.assign(empty=True), [9, 0, 1] * 3)["candidate"].tolist() == [0] * 3
    assert rf.choose(table.iloc[::-1], np.zeros(9))["id"].tolist() == ["a2", "a1", "a0"]
    with pytest.raises(ValueError, match="1 missing"):
        rf.choose(table, [np.nan] + [0] * 8)


def test_ties_count_different_texts_only():
    table = pd.DataFrame(
        {
            "id": list("aaabbbcc"), "candidate": [0, 1, 2, 0, 1, 2, 0, 1],
            "refinement": ["x", "y", "z", "x", "x", "y", "x", ""], "empty": [False] * 7 + [True],
        }
    )  # fmt: skip
    scores = [1.0, 1.0, 0.0, 2.0, 2.0, 1.0, 3.0, 3.0]
    assert list(rf.tied(table, scores)) == [True, False, False]


def test_a_choosers_report_is_the_gain_over_an_articles_mean():
    table = rf.measure(candidates(), RUBRIC)
    oracle = table["incorporated"].fillna(0) + table["score"]
    scores = {"longest": rf.longest(table), "oracle": oracle.to_numpy()}
    best = rf.choose(table, scores["oracle"])["refinement"]
    assert best.tolist() == ["Lake Ormin is in Halland."] * 3
    report = rf.chooser_report(table, scores)
    oracle = report.set_index(["chooser", "measure"]).loc[("oracle", "incorporated")]
    assert oracle["value"] == 1 and oracle["n"] == 3
    assert oracle["difference"] == pytest.approx(1 - 1 / 3)


def test_a_random_choice_is_the_mean_of_an_articles_candidates():
    table = pd.DataFrame(
        {
            "id": list("aaabbb"), "candidate": [0, 1, 2] * 2, "refinement": list("xyyxyz"),
            "empty": [False] * 5 + [True], "incorporated": [1.0, 0, 0, 1, 0, 0],
            "score": [0.2, 0.5, 0.5, 0.9, 0.1, 0.0], "words": 1.0,
        }
    )  # fmt: skip
    best = rf.chooser_report(table, {"best": table["score"]}).set_index(["chooser", "measure"])
    assert best.loc[("random", "incorporated"), "value"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert best.loc[("random", "points"), "value"] == 0.5
    assert best.loc[("best", "points"), "value"] == pytest.approx((2 / 3 + 0.75) / 2)
    assert best.loc[("best", "score"), "difference"] == pytest.approx((0.1 + 0.4) / 2)
    assert rf.chance_agreement(table) == pytest.approx(((1 + 4) / 9 + 1 / 2) / 2)
    first, last = table["candidate"] == 0, table["candidate"] == 1
    found = rf.chooser_agreement(table, {"first": first, "last": last})
    found = found.set_index(["category", "condition"])["value"]
    assert found["first", "first"] == 1 and found["first", "last"] == 0


def test_embedding_similarity(tiny):
    model, tokenizer = tiny
    chooser = rf.EmbeddingSimilarity(model.base_model, tokenizer)
    table = candidates().assign(feedback="the cat sat", refinement=["the cat sat", "a dog", ""] * 3)
    scores = chooser(table)
    assert np.allclose(scores[::3], 1) and (scores[1::3] < 1).all() and (scores[2::3] == 0).all()
    encoder = chooser.model, chooser.tokenizer
    alone = embeddings.embed(*encoder, ["the cat sat"])
    both = embeddings.embed(*encoder, ["the cat sat", "a dog ran on the mat"])
    assert np.allclose(alone, both[:1], atol=1e-6)


# --- InstructRM ----------------------------------------------------------------------------------


def small_model(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            initializer_range=0.5, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def words_tokenizer():
    return models.tiny_tokenizer([*"the a cat Answer Yes No True False ? : .".split()])  # noqa: SIM905


def bytes_tokenizer():
    """One token a byte, after a start token: answers are three and four tokens long."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(token_models.BPE({**alphabet, "<s>": len(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(alphabet))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")


def joining_tokenizer():
    """Joins the colon with the blank and the Y after it: "Yes" begins inside the prompt's last token."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in (":Ġ", ":ĠY", "es"):
        alphabet[token] = len(alphabet)
    core = Tokenizer(token_models.BPE(alphabet, [(":", "Ġ"), (":Ġ", "Y"), ("e", "s")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!", eos_token="!")


@pytest.mark.parametrize("make", [words_tokenizer, bytes_tokenizer, joining_tokenizer])
def test_answer_probability_for_any_tokenizer(make):
    tokenizer = make()
    model = small_model(tokenizer)
    prompts = ["the cat . Answer:", "the cat a . Answer:", "a ? Answer:"]
    found = logprobs.answer_log_probs(model, tokenizer, prompts, (" Yes", " No"))
    lead = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for row, prompt in zip(found, prompts, strict=True):
        wholes = [
            lead + tokenizer(prompt + a, add_special_tokens=False)["input_ids"]
            for a in (" Yes", " No")
        ]
        same = 0
        while wholes[0][same] == wholes[1][same]:
            same += 1
        for value, ids in zip(row, wholes, strict=True):  # one plain pass over each whole sequence
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(log_probs[i - 1, ids[i]].item() for i in range(same, len(ids)))
            assert value == pytest.approx(expected, abs=1e-4)
    if make is joining_tokenizer:
        context, rest = logprobs.split_answers(tokenizer, prompts[0], (" Yes", " No"))
        assert tokenizer.convert_ids_to_tokens([r[0] for r in rest]) == [":ĠY", ":Ġ"]


def test_log_odds_of_a_bfloat16_model_are_not_rounded_by_its_output_layer():
    tokenizer = words_tokenizer()
    model = small_model(tokenizer).to(torch.bfloat16)
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    rows = model.lm_head.weight.data  # answers whose logits are large and nearly the same
    rows[yes] *= 4
    rows[no] = rows[yes] + 0.02 * rows[0]
    rng, names = np.random.default_rng(0), ["the", "a", "cat", "?", ":", "."]
    prompts = sorted({" ".join(rng.choice(names, 9)) + " Answer:" for _ in range(120)})
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = logprobs.answer_log_probs(model, tokenizer, prompts[:1], (" Yes", " No"))[0]
    hook.remove()
    state = seen[-1].reshape(-1)  # of the last position
    exact = (state.float() @ (rows[yes].float() - rows[no].float())).item()
    assert first[0] - first[1] == pytest.approx(exact, abs=1e-5)
    found = logprobs.answer_log_probs(model, tokenizer, prompts, (" Yes", " No"))
    odds = found[:, 0] - found[:, 1]
    with torch.no_grad():
        ids = (tokenizer(p, return_tensors="pt")["input_ids"] for p in prompts)
        logits = [model(row).logits[0, -1].float() for row in ids]
    rounded = {(row[yes] - row[no]).item() for row in logits}
    assert len(set(odds)) > 0.97 * len(prompts) and len(rounded) < 0.3 * len(prompts)


def test_instruct_rm_averages_probabilities():
    tokenizer = words_tokenizer()
    model = small_model(tokenizer)
    questions = rf.QUESTIONS[1:3]
    judge = rf.InstructRM(model, tokenizer, questions)
    table = candidates()
    probabilities = judge.probabilities(table)
    assert probabilities.shape == (9, 2) and ((probabilities > 0) & (probabilities < 1)).all()
    assert np.allclose(judge(table), probabilities.mean(1))
    turned = [q._replace(yes=q.no, no=q.yes) for q in questions]
    other = rf.InstructRM(model, tokenizer, turned).probabilities(table)
    assert np.allclose(probabilities + other, 1)
    alone = judge.probabilities(table.iloc[[4]])
    assert np.allclose(alone, probabilities[4], atol=1e-5)


def test_answers_that_cannot_be_told_apart():
    tokenizer = words_tokenizer()
    with pytest.raises(ValueError, match="start of another"):
        logprobs.split_answers(tokenizer, "Answer:", (" Yes", " Yes No"))
    with pytest.raises(ValueError, match="start of another"):  # both unknown
        logprobs.split_answers(tokenizer, "Answer:", (" Maybe", " Perhaps"))


def test_answers_of_an_encoder_decoder(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    found = logprobs.answer_log_probs(model, tokenizer, ["the cat", "a dog"], (" nice", " kind"))
    ids = [encoding.encode(tokenizer, "the cat", w, joined=True)[1] for w in (" nice", " kind")]
    rows = logprobs.token_log_probs(model, [tokenizer("the cat")["input_ids"]] * 2, ids)
    assert np.allclose(found[0], [r.sum() for r in rows], atol=1e-5)


# --- word removal --------------------------------------------------------------------------------


def test_word_removal_items_and_scores():
    items = rf.word_removal_items(20, words=3, remove=2, seed=5)
    for row in items.itertuples():
        assert len(row.remove) == 2 and len(row.keep) == 2 and rf.COMPLIMENT in row.keep
        assert all(name in row.sentence for name in [*row.remove, *row.keep])
        assert not any(name in row.target for name in row.remove)
        assert row.prompt.endswith("You are") and row.sentence in row.prompt
    assert items.equals(rf.word_removal_items(20, words=3, remove=2, seed=5))

    def answers(texts):
        return lambda prompts, n, seed: [[rf.Draft(t, True)] for t in texts]

    exact = rf.word_removal(answers([t.removeprefix("You are") for t in items.target]), items)
    assert exact[["exact", "removed", "kept"]].to_numpy().min() == 1
    begun_anew = rf.word_removal(answers(list(items.target)), items)  # as a chat model does
    assert begun_anew[["exact", "removed", "kept"]].to_numpy().min() == 1
    copied = rf.word_removal(
        answers([s.removeprefix("You are") + "\nMore" for s in items.sentence]), items
    )
    assert copied[["exact", "removed", "kept"]].mean().tolist() == [0, 0, 1]
    silent = rf.word_removal(answers([""] * 20), items)
    assert silent[["exact", "removed", "kept"]].mean().tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="remove=3, words=2"):
        rf.word_removal_items(1, words=2, remove=3)


# --- articles ------------------------------------------------------------------------------------


def test_articles_of_the_project_itself():
    tables = {split: rf.load_articles("samples", split) for split in rf.SAMPLE_SPLITS}
    ids = [i for table in tables.values() for i in table["id"]]
    assert len(ids) == len(set(ids)) == 26
    assert all(len(RUBRIC.facts(post)) >= 4 for t in tables.values() for post in t["post"])
    assert len(rf.load_articles("samples", "train", 3)) == 3
    with pytest.raises(ValueError, match="has 6 articles"):
        rf.load_articles("samples", "test", 7)
    with pytest.raises(ValueError, match="allowed: pool"):
        rf.load_articles("samples", "dev")
