"""Loaders keep text exactly and name bad rows by file and line; splits keep near-equal texts together."""

import csv
import json

import datasets
import numpy as np
import pytest
from conftest import asset
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import data, models
from lib.papers import rewardlm

HOSTILE = [
    "None",
    "NA",
    "nan",
    "null",
    '"quoted", comma',
    "two\r\nlines",
    "🙂 émoji",
    " spaces ",
    "1",
    "-1",
]
HEADER = ["", "prompts", "responses", "prompt_score", "response_score", "pro_API_response_score"]


def write_csv(path, rows, header=HEADER):
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


# --- prompts -------------------------------------------------------------------------------------


def test_samples_are_ours_and_balanced():
    table = data.load_prompts("samples")
    assert len(table) == 48
    assert set(np.unique(table["category"], return_counts=True)[1]) == {12}


def test_real_prompts_are_623_with_all_their_categories():
    asset("prompts")
    table = data.load_prompts("realtoxicityprompts")
    assert len(table) == len(set(table["prompt"])) == len(set(table["prompt_id"])) == 623
    assert sum(map(len, table["categories"])) == 700
    assert len(set(table["category"])) == 7


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json", "rtp"])
def test_hostile_texts_survive_every_format(tmp_path, kind):
    texts = [t for t in HOSTILE if kind != "txt" or "\n" not in t]
    path = tmp_path / f"prompts.{'jsonl' if kind == 'rtp' else kind}"
    if kind == "txt":
        path.write_bytes("\n".join(texts).encode())
    elif kind == "csv":
        write_csv(path, [[t] for t in texts], ["prompt"])
    elif kind == "json":
        path.write_text(json.dumps([{"prompt": t} for t in texts]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    else:
        rows = [
            {"prompt": {"text": t, "toxicity": 0.25 if i else None}} for i, t in enumerate(texts)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    table = data.load_prompts(path)
    assert list(table["prompt"]) == texts
    if kind == "rtp":
        assert np.isnan(table["prompt_score"][0]) and table["prompt_score"][1] == 0.25


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt\nfine\n'',extra\n", "p.csv, line 3: 2 fields; the header has 1"),
        ("p.csv", "text\nhello\n", "p.csv, line 1: missing column 'prompt'; found: text"),
        ("p.csv", 'prompt\n"two\nlines"\n"  "\n', "p.csv, line 4: prompt is '  '"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2: not JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}',
            "p.jsonl, line 2: no field 'prompt'; found: text",
        ),
        ("p.jsonl", '{"prompt": "a \\ud83d"}', "p.jsonl, line 1: half an emoji"),
        ("p.json", '[{"prompt": "a"},\n{"prompt": 3}]', "p.json, line 2: prompt is 3"),
        ("p.txt", "fine\n\nfine too\n", "p.txt, line 2: prompt is ''"),
        ("p.txt", "", "p.txt is empty"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        data.load_prompts(path)
    assert message in str(caught.value)


def test_unknown_sources_and_counts_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="unknown source 'nonsense'; allowed: realtoxicityprompts, samples"
    ):
        data.load_prompts("nonsense")
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_prompts(tmp_path / "absent.csv")
    for n in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="n is"):
            data.load_prompts("samples", n=n)


def test_a_drawn_sample_is_even_deterministic_and_nested():
    small, large = (data.load_prompts("samples", n=n, seed=1) for n in (8, 20))
    assert list(small["prompt"]) == list(large["prompt"])[:8]
    assert set(np.unique(small["category"], return_counts=True)[1]) == {2}
    assert list(data.load_prompts("samples", n=20, seed=2)["prompt"]) != list(large["prompt"])
    assert len(data.load_prompts("samples", n=1000)) == 48


def test_equal_texts_become_one_row(tmp_path):
    rows = [
        {"prompt": "same", "category": c, "prompt_score": s} for c, s in (("a", 0.1), ("b", 0.9))
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = data.load_prompts(path)
    assert table[0]["categories"] == ["a", "b"] and table[0]["prompt_score"] == 0.1


# --- splits --------------------------------------------------------------------------------------


def test_near_equal_texts_share_a_group():
    texts = [
        "The man then grabbed a knife and started",
        "the man -- then grabbed a knife, AND ran",  # same first six words
        "Quite another text about the weather today",
        "Entirely new: text about the weather today!",  # same last five only
        "thisone",
        "This one",
    ]
    groups = data.text_groups(texts)
    assert groups[0] == groups[1] and groups[4] == groups[5]
    assert groups[2] != groups[3] and len(set(groups)) == 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("ab ,.", min_size=1, max_size=6), min_size=4, max_size=40), st.integers(0, 99)
)
def test_no_group_stands_on_both_sides(texts, seed):
    table = datasets.Dataset.from_dict({"prompt": texts})
    groups = data.text_groups(texts)
    n_test = max(1, len(texts) // 2)
    if np.bincount(groups).min() > n_test:
        with pytest.raises(ValueError, match="smallest group"):
            data.split_groups(table, n_test=n_test, seed=seed)
        return
    train, test = data.split_groups(table, n_test=n_test, seed=seed)
    assert len(train) + len(test) == len(texts)
    assert n_test - np.bincount(groups).max() < len(test) <= n_test
    both = data.text_groups([*train["prompt"], *test["prompt"]])
    assert not set(both[: len(train)]) & set(both[len(train) :])


# --- templates -----------------------------------------------------------------------------------


def test_templates():
    _, tokenizer = models.build_tiny_model("tiny")
    assert data.apply_template(["x y"], None, "raw") == ["x y"]
    assert data.apply_template(["x y"], None, "tagged") == ['User: "x y".\nAssistant:']
    assert data.apply_template(["x"], None, "tagged+system", system="S.")[0].startswith("S.\nUser:")
    assert data.apply_template(["x"], tokenizer, "chat") == ["<user> x <assistant>"]
    chat = data.apply_template(["x"], tokenizer, "chat+system", system="S.")
    assert chat == ["<system> S. <user> x <assistant>"]


def test_templates_refuse_what_they_cannot_do():
    _, tokenizer = models.build_tiny_model("tiny")
    with pytest.raises(ValueError, match="style is 'chatty'; allowed: raw, chat"):
        data.apply_template(["x"], tokenizer, "chatty")
    with pytest.raises(ValueError, match="needs a text in system="):
        data.apply_template(["x"], tokenizer, "chat+system")
    with pytest.raises(ValueError, match="prompts is one text"):
        data.apply_template("x", tokenizer, "raw")
    for template, message in (
        ("{{ raise_exception('no system role') }}", "refuses this .no system role"),
        ("{{ messages + 1 }}", "the chat template refuses this"),
        (
            "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}",
            "leaves the prompt out",
        ),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"{message}.*Try 'tagged"):
            data.apply_template(["x"], tokenizer, "chat")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template. Try 'tagged'"):
        data.apply_template(["x"], tokenizer, "chat")


# --- RewardLM's tables ---------------------------------------------------------------------------


def test_rewardlm_table_keeps_text_and_tells_the_missing_apart(tmp_path):
    scores = [
        ("0.1", "1.0000001", "-1"),
        ("0.9", "0.5", ""),
        ("0.2", "0.0", "nan"),
        ("1", "0", "-1.0"),
    ]
    rows = [[i, t, t, *scores[i % 4]] for i, t in enumerate(HOSTILE)]
    table = rewardlm.read_rewardlm_csv(write_csv(tmp_path / "t.csv", rows))
    assert list(table["prompts"]) == list(table["responses"]) == HOSTILE
    assert list(table.index) == list(range(len(HOSTILE)))
    assert table["response_score"].max() == 1.0 and table["prompt_score"].dtype == float
    why = list(table["pro_API_response_score_missing"][:4])
    assert why == ["not scored", "unsupported", "unsupported", "not scored"]
    assert table["pro_API_response_score"].isna().all()
    assert set(table["response_score_missing"]) == {""}


def test_rewardlm_table_without_perspective_and_index(tmp_path):
    path = write_csv(
        tmp_path / "t.csv", [["p", "r", "0.5", "0.25", "x"]], [*HEADER[1:5], "response_similarity"]
    )
    table = rewardlm.read_rewardlm_csv(path)
    assert "pro_API_response_score" not in table
    assert table.loc[0, "response_similarity"] == "x"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            [[0, "p\np", "r", "0.5", "high", "1"]],
            HEADER,
            "t.csv, line 2, response_score: score 'high'",
        ),
        (
            [[0, "p\np", "r", 0, 0, 0], [1, "p", "r", "1.5", "0", "0"]],
            HEADER,
            "line 4, prompt_score: score '1.5'",
        ),
        ([[0, "p", "r", "0.5", "0.5"]], HEADER, "line 2: 5 fields; the header has 6"),
        ([[0, "p", "r", "0.5"]], HEADER[:4], "line 1: missing column 'response_score'"),
        ([], HEADER, "a header but no rows"),
    ],
)
def test_rewardlm_table_names_what_is_wrong(tmp_path, rows, header, message):
    with pytest.raises(ValueError) as caught:
        rewardlm.read_rewardlm_csv(write_csv(tmp_path / "t.csv", rows, header))
    assert message in str(caught.value)


def test_dialoconan_becomes_conversations(tmp_path):
    header = ["text", "TARGET", "dialogue_id", "turn_id", "type", "source"]
    rows = [
        ["no\nthey are not", "X", "7", "1", "CN", "s"], ["they are bad", "X", "7", "0", "HS", "s"],
        ["unanswered", "X", "7", "2", "HS", "s"], ["so?", "Y", "3", "0", "HS", "s"],
        ["", "Y", "3", "1", "CN", "s"],
    ]  # fmt: skip
    talks = rewardlm.load_dialoconan(write_csv(tmp_path / "d.csv", rows, header))
    assert talks == [
        [
            {"role": "user", "content": "they are bad"},
            {"role": "assistant", "content": "no they are not"},
        ]
    ]
    with pytest.raises(ValueError, match="d.csv, line 2: type 'XX', turn_id '0'"):
        rewardlm.load_dialoconan(
            write_csv(tmp_path / "d.csv", [["t", "X", "1", "0", "XX", "s"]], header)
        )


def test_wikipedia():
    asset("wikipedia")
    table = data.load_wikipedia()
    assert len(table) == 10_033
    assert table.column_names == ["title", "text", "description", "topic", "n_words"]
    assert 70 < np.mean(table["n_words"]) < 85
