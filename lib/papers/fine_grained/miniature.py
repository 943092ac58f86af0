"""The chain of `jobs` in miniature: six small data files, and tiny models of the real ones' classes.

Records are the first of the released files, or, where those are not at hand, made of articles with errors put
in by rule (`models.constructed_records`).  Models are a T5 as policy, a narrower T5 for the values and a
Longformer, with random weights over a vocabulary of the records' commonest words.  Nothing that comes out of
such a chain says anything about the method: it shows which stage writes what, and that the next one reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LongformerConfig, LongformerModel

from lib import models, runtime
from lib.papers.fine_grained import schema as qa
from lib.papers.fine_grained.jobs import DATA
from lib.papers.fine_grained.models import constructed_records

FIRST = "first_24"  # a folder beside the whole files with the first records of the others
QUESTIONS = ("train_1k", "train", "dev", "test")


def released_file(folder: Path | str, name: str) -> Path | None:
    """A released file in a folder, whole or its first records; None where there is neither."""
    places = (Path(folder) / f"{name}.json", Path(folder) / FIRST / f"{name}.json")
    return next((path for path in places if path.exists()), None)


def copy_released(source: Path | str, target: Path | str, counts: dict[str, int]) -> Path:
    """The first so many records of each released file, written to `target`."""
    for name, count in counts.items():
        path = released_file(source, name)
        if path is None:
            raise FileNotFoundError(
                f"{source} has no {name}.json; all of {', '.join(DATA)} are needed."
            )
        load = qa.load_questions if name in QUESTIONS else qa.load_feedback
        write(load(path)[:count], Path(target) / f"{name}.json")
    return Path(target)


def construct(
    articles: Sequence[tuple[str, str]], target: Path | str, counts: dict[str, int], seed: int = 0
) -> Path:
    """The six files made of (title, text) of articles; as in the released ones `train` holds the questions of
    `train_1k` and of `train_feedback`, and `dev_feedback` those of `dev`."""
    records = iter(constructed_records(articles, seed=seed))

    def take(name: str) -> list[dict]:
        part = [record for _, record in zip(range(counts[name]), records, strict=False)]
        if len(part) < counts[name]:
            raise ValueError(f"{len(articles)} articles are too few for {counts}.")
        return part

    parts = {name: take(name) for name in ("train_1k", "train_feedback", "dev", "test")}
    parts["dev_feedback"] = parts["dev"][: counts["dev_feedback"]]
    parts["train"] = (parts["train_1k"] + parts["train_feedback"])[: counts["train"]]
    for name, part in parts.items():
        if name in QUESTIONS:
            part = [question_of(record) for record in part]
        write(part, Path(target) / f"{name}.json")
    return Path(target)


def question_of(record: dict) -> dict:
    """A feedback record's question in the form of `train.json`."""
    passages = [{"wikipage": t, "content": c} for t, c in qa.passages_of(record)]
    text = qa.prompt(record["question"], qa.passages_of(record))
    question = {"question": record["question"], "passages": passages, "text": text}
    return question | {"answer": [record["gold"]]}


def write(records: Sequence[dict], path: Path) -> None:
    """Records as a released file holds them: one JSON list."""
    runtime.write_atomic(path, json.dumps(list(records), ensure_ascii=False))


def build_models(data: Path | str, target: Path | str, *, words: int = 4000, seed: int = 0) -> dict:
    """Write the three tiny models; their folders as the `Chain` takes them: policy, values, encoder."""
    files = [Path(data) / f"{name}.json" for name in DATA]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    text = json.dumps(records, ensure_ascii=False)
    counts = Counter(re.findall(r"[^\W\d_]+|\d+|[^\w\s]", text))
    vocabulary = sorted(word for word, _ in counts.most_common(words))
    folders = {name: str(Path(target) / name) for name in ("policy", "values", "encoder")}
    for name, width in (("policy", 64), ("values", 32)):  # as T5-large beside T5-base: two widths
        sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 4}
        model, tokenizer = models.build_tiny_model(
            "tiny-encoder-decoder", words=vocabulary, seed=seed, **sizes
        )
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LongformerConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, attention_window=[32, 32], max_position_embeddings=1026,
            type_vocab_size=1, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, sep_token_id=tokenizer.eos_token_id,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        encoder = LongformerModel(config, add_pooling_layer=False)
    encoder.save_pretrained(folders["encoder"])
    tokenizer.save_pretrained(folders["encoder"])
    return folders
