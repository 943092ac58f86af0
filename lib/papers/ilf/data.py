"""Posts, summaries and human feedback (SLF5K), TL;DR comparisons, and Wikipedia's leads in their place."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from lib import data, runtime, tables
from lib.course import assets, fetch

SLF5K, TLDR = "JeremyAlain/SLF5K", "openai/summarize_from_feedback"
SLF5K_SPLITS = {"train": 5000, "development": 200, "validation": 500, "test": 698}
SLF5K_NEEDED = ("id", "subreddit", "title", "post")  # in every split; test has little more
SLF5K_TEXTS = (
    *SLF5K_NEEDED, "tldr_human_reference_summary", "summary_prompt",
    "generated_summary_for_comparison_A", "generated_summary_for_comparison_B",
    "comparison_preference", "generated_summary_for_feedback", "feedback", "feedback_class",
    "has_additional_feedback", "ideal_human_summary",
)  # fmt: skip
SLF5K_SECONDS = tuple(
    f"time_spent_in_seconds_{task}" for task in ("feedback", "ideal_human_summary", "comparison")
)
PREFERENCES = ("Summary A", "Summary B")
WIKIPEDIA_SPLITS = SLF5K_SPLITS | {"pool": 3602}  # shares of the articles that are fit


def load_slf5k(source: str | Path = SLF5K, split: str = "train") -> datasets.Dataset:
    """One split of SLF5K: Reddit posts, FeedME summaries, human feedback and human summaries (ILF, 3.1).

    `source`: the Hub id (what `python -m lib fetch slf5k` got is used), a folder that holds
    <split>*.jsonl, or one such file.  Splits: train (5000
    rows; the paper's 100 and 1K are its first rows), development (200), validation (500), test (698).
    Columns `SLF5K_TEXTS` (text) and `SLF5K_SECONDS` (float); what a file lacks is None (the test split
    has posts and human summaries only), and so is a comparison_preference other than "Summary A" or
    "Summary B".  Other fields are left out.  Raises ValueError with file and line for a bad row,
    FileNotFoundError, assets.AssetError.
    """
    if split not in SLF5K_SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SLF5K_SPLITS)}.")
    rows, seen = [], {}
    path = _jsonl_of(source, split)
    for line, record in tables.json_records(path):
        row = _slf5k_row(record, f"{path.name}, line {line}")
        first = seen.setdefault(row["id"], line)
        if first != line:
            raise ValueError(
                f"{path.name}, line {line}: id {row['id']!r} stands on line {first} too."
            )
        rows.append(row)
    kinds = dict.fromkeys(SLF5K_TEXTS, "string") | dict.fromkeys(SLF5K_SECONDS, "float64")
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    return datasets.Dataset.from_list(rows, features=features)


def _jsonl_of(source: str | Path, split: str) -> Path:
    """The file of a split: the source itself, in the source folder, or fetched from the Hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted([*path.glob(f"{split}*.jsonl"), *path.glob(f"{split}*.json")])
        if len(files) != 1:
            names = ", ".join(p.name for p in files or sorted(path.iterdir())[:10]) or "nothing"
            raise FileNotFoundError(
                f"{path}: needed is one file {split}*.jsonl; found: {names}. Try the file's own path."
            )
        return files[0]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{path}: no such file or folder, and no Hub id such as {SLF5K}.")
    fetched = fetch.find("slf5k", f"{split}.jsonl") if str(source) == SLF5K else None
    return fetched / f"{split}.jsonl" if fetched else _hub_file(str(source), f"{split}.jsonl")


def _hub_file(name: str, filename: str, revision: str | None = None) -> Path:
    """One file of a data set on the Hub: loading scripts, which SLF5K has, are not run any more."""
    from huggingface_hub import hf_hub_download

    own = os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE")
    folder = None if own else str(runtime.cache_dir() / "hub")
    try:
        place = {"repo_type": "dataset", "revision": revision, "cache_dir": folder}
        return Path(hf_hub_download(name, filename, **place))
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise assets.AssetError(
            f"{filename} of {name!r} could not be had from the Hugging Face Hub ({why}). Check the name "
            "and the network, or give a local folder with the file."
        ) from None


def _slf5k_row(record: object, where: str) -> dict:
    """The documented fields of a record, checked; None where there is none."""
    record = record if isinstance(record, dict) else {}
    row = {}
    for name in SLF5K_TEXTS:
        value = record.get(name)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if missing and name in SLF5K_NEEDED or not (missing or isinstance(value, str)):
            raise ValueError(
                f"{where}: {name} is {value!r}; it must be a text. Fields needed: "
                f"{', '.join(SLF5K_NEEDED)}; found: {', '.join(record) or 'none'}."
            )
        row[name] = None if missing else value
    for name in SLF5K_SECONDS:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a number of seconds.")
        row[name] = None if value is None or math.isnan(value) else float(value)
    if row["comparison_preference"] not in PREFERENCES:
        row["comparison_preference"] = None
    return row


def load_tldr_comparisons(source: str | Path = TLDR, split: str = "train") -> datasets.Dataset:
    """The TL;DR comparisons that SLF5K's posts come from (Stiennon et al. 2020), about 93k and 84k.

    `source`: the Hub id (its parquet files, some 20 MB a split; what `python -m lib fetch
    tldr_comparisons` got is used), or a folder or file of the released
    JSON lines (batch*.json), of which the rows of this split ("train", "validation") are kept.  Columns
    id, subreddit, title, post, summary_A, summary_B, comparison_preference ("Summary A" or "Summary B"),
    worker, batch.  Rows without a Reddit post (news articles) are left out.  Raises ValueError with
    file and row, FileNotFoundError, assets.AssetError.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; allowed: train, validation.")
    rows = [
        _comparison(record, where)
        for where, record in _comparison_records(source, split)
        if not isinstance(record, dict) or (record.get("info") or {}).get("post") is not None
    ]
    if not rows:
        raise ValueError(f"{source} holds no comparison of split {split!r}.")
    return datasets.Dataset.from_list(rows)


def _comparison_records(source: str | Path, split: str) -> Iterator[tuple[str, object]]:
    path = Path(source).expanduser()
    if path.exists():
        for file in [path] if path.is_file() else sorted(path.glob("*.json*")):
            for line, record in tables.jsonl_records(file):
                named = record.get("split", split) if isinstance(record, dict) else split
                if (named == "train") == (split == "train"):  # the others: valid1, valid2
                    yield f"{file.name}, line {line}", record
        return
    name = f"summarize_from_feedback_comparisons-{split}.parquet"
    fetched = fetch.find("tldr_comparisons", name) if str(source) == TLDR else None
    if fetched:
        file = fetched / name
    else:
        file = _hub_file(str(source), f"comparisons/{split}/0000.parquet", "refs/convert/parquet")
    for row, record in enumerate(pd.read_parquet(file).to_dict("records"), 1):
        yield f"{file.name}, row {row}", record


def _comparison(record: object, where: str) -> dict:
    try:
        info, (first, second), choice = record["info"], record["summaries"], record["choice"]
        row = {name: info[name] for name in SLF5K_NEEDED}
        row |= {"summary_A": first["text"], "summary_B": second["text"]}
        row["comparison_preference"] = {0: PREFERENCES[0], 1: PREFERENCES[1]}[choice]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: not a comparison; needed: info (with {', '.join(SLF5K_NEEDED)}), two summaries with "
            "a text each, and choice (0 or 1)."
        ) from None
    return row | {name: str(record.get(name) or "") for name in ("worker", "batch")}


def wikipedia_as_slf5k(
    split: str, n: int | None = None, *, keep: Callable[[str], bool] | None = None,
    n_words: tuple[int, int] = (40, 90),
) -> datasets.Dataset:  # fmt: skip
    """Wikipedia's lead paragraphs under SLF5K's names: id, subreddit (the topic), title, post (the lead).

    The one-line description stands in one_line_description; it is no human summary.  Splits are those of
    SLF5K in about its proportions, and "pool", by a hash of the title: no article is in two, and a smaller
    `n` gives the start of a larger one.  Leads have `n_words` words (lowest, highest); `keep` says of a
    lead whether it is fit.  Raises ValueError, also where fewer than `n` are fit.
    """
    if split not in WIKIPEDIA_SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(WIKIPEDIA_SPLITS)}.")
    starts = np.cumsum([0, *WIKIPEDIA_SPLITS.values()]) / sum(WIKIPEDIA_SPLITS.values())
    place = list(WIKIPEDIA_SPLITS).index(split)
    rows = []
    for article in data.load_wikipedia():
        key = runtime.content_hash("wikipedia", article["title"].casefold())
        inside = starts[place] <= int(key[:12], 16) / 16**12 < starts[place + 1]
        if inside and n_words[0] <= article["n_words"] <= n_words[1]:
            rows.append((key, article))
    rows = sorted(rows, key=lambda row: row[0])
    rows = [(key, a) for key, a in rows if keep is None or keep(a["text"])]
    if n is not None and not 0 < n <= len(rows):
        raise ValueError(f"n is {n!r}; split {split!r} has {len(rows)} leads that are fit.")
    records = [
        {
            "id": f"wiki_{key[:12]}",
            "subreddit": article["topic"],
            "title": article["title"],
            "post": article["text"],
            "one_line_description": article["description"],
        }
        for key, article in rows[:n]
    ]
    return datasets.Dataset.from_list(records)
