"""Refinement: prompts, drafts, choosers, answers' probabilities on three tokenizers, word removal."""

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
from lib.annotator import Rubric
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
        }
    )


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


def test_shuffled_feedback_is_always_another_article_s():
    rows = articles()
    shuffled = rf.shuffled_feedback(rows)
    assert not (shuffled == rows["feedback"]).any()
    assert sorted(shuffled) == sorted(rows["feedback"])
    with pytest.raises(ValueError, match="1 article"):
        rf.shuffled_feedback(articles(1))


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

    columns = ["title", "post", "summary", "feedback"]
    prompts = [rf.refinement_prompt(*row) for row in articles()[columns].to_numpy()]
    with pytest.raises(chat.EndpointError, match="bad key"):
        write()(prompts, 2)
    left = write()
    assert left.client.estimate(left.requests(prompts[:1], 2)) | {"cost": 0} == {
        **left.client.estimate([]), "calls": 2, "cached": 2, "cost": 0,
    }  # fmt: skip
    drafts = left(prompts, 2)
    assert [len(row) for row in drafts] == [2] * 3 and left.client.bought == 2
    assert all(draft.finished for row in drafts for draft in row)
    again = write()
    assert again(prompts, 2) == drafts and again.client.bought == 0
    again(prompts, 2, seed=1)
    assert again.client.bought == 6
    with urllib.request.urlopen(f"{endpoint}/log") as log:
        outcomes = [kind for _, _, kind in json.load(log)]
    assert outcomes.count("ok") == 12
    sent = again.requests(["p"], 2)
    assert sent[0] != sent[1] and sent[0]["max_tokens"] == 48 and sent[0]["top_p"] == 0.95


# --- choosers ------------------------------------------------------------------------------------


def candidates():
    texts = ["Lake Ormin.", "Lake Ormin is in Halland.", "Lake Ormin is a lake."]
    table = articles().loc[np.repeat(range(3), 3)].reset_index(drop=True)
    return table.assign(candidate=[0, 1, 2] * 3, refinement=texts * 3, empty=False)


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


def test_a_choosers_report_is_the_gain_over_an_articles_mean():
    table = candidates()
    table = table.assign(states=table["refinement"].str.contains("Halland") * 1.0)
    table = table.assign(score=table["states"], words=rf.longest(table))
    scores = {"longest": rf.longest(table), "oracle": table["states"].to_numpy()}
    best = rf.choose(table, scores["oracle"])["refinement"]
    assert best.tolist() == ["Lake Ormin is in Halland."] * 3
    report = rf.chooser_report(table, scores, measures=("states", "score", "words"))
    oracle = report.set_index(["chooser", "measure"]).loc[("oracle", "states")]
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
    measures = ("incorporated", "score", "words")
    best = rf.chooser_report(table, {"best": table["score"]}, measures=measures).set_index(
        ["chooser", "measure"]
    )
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


# --- probabilities of answers --------------------------------------------------------------------


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
