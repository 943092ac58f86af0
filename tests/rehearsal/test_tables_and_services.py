"""Made-up tables pass the library's own readers; the services answer its own clients."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from lib import chat, data, scorers
from lib.papers.fine_grained import schema
from lib.papers.ilf.data import SLF5K_SPLITS, load_slf5k
from lib.papers.rewardlm import load_dialoconan
from rehearsal import data as tables
from rehearsal.services import OPTIONS, Services


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    tables.write_hub(folder)
    tables.write_released(folder / "released")
    return folder


@pytest.fixture
def services(tmp_path, monkeypatch):
    server = Services()
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    monkeypatch.setenv("PERSPECTIVE_URL", server.url)
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "rehearsal")
    monkeypatch.setenv("OPENAI_API_KEY", "rehearsal")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    server.close()


def test_toxicity_prompts_are_read_with_their_scores(root):
    path = root / "datasets/allenai/real-toxicity-prompts/prompts.jsonl"
    prompts = data.load_prompts(str(path))
    assert len(prompts) == 400 and np.isnan(prompts["prompt_score"]).any()
    train, test = data.split_groups(prompts, n_test=100, seed=0)
    assert len(test) >= 95


def test_posts_are_read_in_every_split(root):
    for split in SLF5K_SPLITS:
        rows = load_slf5k(root / "datasets/JeremyAlain/SLF5K", split)
        assert len(rows) == tables.SLF5K_ROWS[split]
        assert (rows[0]["feedback"] is None) == (split == "test")


def test_released_records_pass_their_schema(root):
    for name, n in tables.QUESTIONS.items():
        assert len(schema.load_questions(root / f"released/qa_feedback/{name}.json")) == n
    for name, n in tables.FEEDBACK.items():
        path = root / f"released/qa_feedback/{name}.json"
        records = schema.load_feedback(path, needed=schema.FIELDS)
        kinds = schema.span_table(records)["type"]
        assert len(records) == n and set(kinds) == set(schema.CATEGORIES)


def test_dialogues_of_counter_speech_are_read(root):
    talks = load_dialoconan(root / "released/dialoconan/DIALOCONAN.csv")
    assert len(talks) == 24 and {turn["role"] for turn in talks[0]} == {"user", "assistant"}


def test_schemas_are_those_of_the_real_files(root, real_data):
    for name in ("train_1k", "dev", "dev_feedback"):
        real, made = (
            json.loads((folder / "qa_feedback" / f"{name}.json").read_text(encoding="utf-8"))[0]
            for folder in (real_data, root / "released")
        )
        assert set(made) == set(real), name


def test_dialogues_share_all_but_the_last_answer_and_summaries_are_parquet(root):
    path = root / "datasets/Anthropic/hh-rlhf/helpful-base/train.jsonl.gz"
    for row in pd.read_json(path, lines=True).to_dict("records"):
        head = row["chosen"].rpartition("\n\nAssistant:")[0]
        assert head and row["rejected"].startswith(head)
    [path] = (root / "datasets/CarperAI/openai_summarize_tldr/data").glob("train*.parquet")
    assert list(pd.read_parquet(path).columns) == ["prompt", "label"]


def test_perspective_scores_insults_and_refuses_some_texts(services):
    scorer = scorers.load_scorer("perspective")
    texts = ["you are a stupid idiot", "you are a river and a garden", "..."]
    rude, plain, missing = scorer.score(texts)
    assert rude > 0.5 > plain and math.isnan(missing)
    assert scorer.score(texts[:1])[0] == rude
    assert services.requests["perspective"] == 3  # a reply is kept


def test_the_endpoint_answers_in_the_form_that_a_prompt_asks_for(services):
    client = chat.ChatClient("any")
    for start, options in OPTIONS.items():
        replies = client.ask([chat.chat(f"Item {i}\n{start}") for i in range(30)])
        texts = {reply.text for reply in replies}
        assert texts <= set(options) and len(texts) > 1
    assert services.requests["chat"] == 30 * len(OPTIONS)


def test_the_endpoint_gives_probabilities_of_the_options(services):
    import openai

    messages = [{"role": "user", "content": "Which?\nBetter:"}]
    options = {"model": "any", "messages": messages, "logprobs": True, "top_logprobs": 5}
    reply = openai.OpenAI().chat.completions.create(**options).choices[0]
    first = reply.logprobs.content[0]
    assert reply.message.content.split()[0] == first.token
    assert sum(math.exp(token.logprob) for token in first.top_logprobs) == pytest.approx(
        1 if len(first.top_logprobs) > 1 else 0.99
    )
