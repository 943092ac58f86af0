"""Tables of the schemas of the data sets that notebooks read, with made-up text; the same at every call.

`write_hub` fills `root/datasets/` for `Hub`; `write_released` a folder for `FEEDBACK_DATA`.  Fields, their
types, what may be missing, file names and formats are those of the real ones (`lib` documents them).
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pandas as pd

from lib import runtime
from rehearsal.models import PLAIN, RUDE

WORDS = [
    "garden",
    "river",
    "house",
    "train",
    "music",
    "summer",
    "dinner",
    "teacher",
    "doctor",
    "letter",
    "winter",
    "market",
    "bridge",
    "school",
    "brother",
    "sister",
    "office",
    "window",
    "kitchen",
    "museum",
    "story",
    "problem",
    "answer",
    "money",
    "plan",
    "village",
    "harbour",
    "library",
    "painter",
    "clock",
]
TOXICITIES = (
    "threat",
    "insult",
    "severe_toxicity",
    "toxicity",
    "profanity",
    "sexually_explicit",
    "flirtation",
    "identity_attack",
)
HH_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SLF5K_ROWS = {"train": 48, "development": 12, "validation": 24, "test": 24}
QUESTIONS = {"train_1k": 48, "train": 64, "dev": 32, "test": 24}
FEEDBACK = {"train_feedback": 24, "dev_feedback": 32}
VERBS = ("saw", "lost", "liked", "painted", "sold", "found")


class Writer:
    """Made-up phrases and sentences."""

    def __init__(self, seed: object):
        self.random = random.Random(str(seed))

    def words(self, low: int, high: int) -> str:
        """Between `low` and `high` words."""
        return " ".join(self.random.choices(WORDS, k=self.random.randint(low, high)))

    def sentences(self, low: int, high: int) -> list[str]:
        """Between `low` and `high` sentences."""
        count = self.random.randint(low, high)
        return [f"We {self.random.choice(VERBS)} the {self.words(3, 8)}." for _ in range(count)]

    def text(self, low: int, high: int) -> str:
        """Between `low` and `high` sentences as one text."""
        return " ".join(self.sentences(low, high))


# --- data sets of the Hub ------------------------------------------------------------------------


def toxicity_prompts(n: int) -> list[dict]:
    """RealToxicityPrompts: the halves of a sentence, each with scores, of which some are missing."""
    write = Writer("toxicity")

    def half(text: str) -> dict:
        scores = {name: round(write.random.random(), 6) for name in TOXICITIES}
        missing = {name: None for name in TOXICITIES if write.random.random() < 0.02}
        return {"text": text} | scores | missing

    rows = []
    for i in range(n):
        word = write.random.choice(RUDE + PLAIN)
        start = f"Number {i} said that the {write.words(4, 9)} of the {word}"
        row = {
            "filename": f"{i:07d}-text.txt",
            "begin": 340,
            "end": 564,
            "challenging": i % 100 == 0,
        }
        rows.append(row | {"prompt": half(start), "continuation": half(f" {write.words(6, 14)}.")})
    return rows


def posts(split: str, n: int) -> list[dict]:
    """SLF5K: posts with summaries and feedback; its test split has posts and human summaries only."""
    write = Writer(split)
    rows = []
    for i in range(n):
        title = f"{write.words(4, 8)}, what now?"
        row = {"id": f"t3_{split}{i:04d}", "subreddit": "relationships", "title": title}
        row |= {"post": write.text(20, 40) if i % 10 == 9 else write.text(3, 8)}
        row |= {"ideal_human_summary": write.text(1, 2)}
        rows.append(row if split == "test" else row | _judged(write, title))
    return rows


def _judged(write: Writer, title: str) -> dict:
    """The fields of a post that people wrote feedback on."""
    row = {"tldr_human_reference_summary": write.text(1, 1)}
    row["summary_prompt"] = f"Write an excellent summary.\n\nTitle: {title}\n\nTL;DR:"
    for name in ("comparison_A", "comparison_B", "feedback"):
        row[f"generated_summary_for_{name}"] = write.text(1, 2)
    row["comparison_preference"] = write.random.choice(["Summary A", "Summary B", "Both"])
    row["feedback"] = f"The summary should mention the {write.words(2, 4)}."
    row["feedback_class"] = write.random.choice(["Coverage", "Accuracy", "Coherence", "other"])
    row["has_additional_feedback"] = write.random.choice(["Yes", "No"])
    for task in ("feedback", "ideal_human_summary", "comparison"):
        row[f"time_spent_in_seconds_{task}"] = write.random.randint(20, 400)
    return row


def dialogues(n: int, seed: str) -> list[dict]:
    """Anthropic's dialogues: chosen and rejected share all but the last answer."""
    write = Writer(seed)
    rows = []
    for _ in range(n):
        turns = [
            f"\n\nHuman: {write.text(1, 2)}\n\nAssistant:"
            for _ in range(write.random.randint(1, 2))
        ]
        start = f" {write.text(1, 2)}".join(turns)
        rows.append({name: f"{start} {write.text(1, 2)}" for name in ("chosen", "rejected")})
    return rows


def summaries(n: int, seed: str) -> list[dict]:
    """CarperAI's TL;DR: a post as prompt, its summary as label."""
    write = Writer(seed)
    start = "SUBREDDIT: r/AskReddit\nTITLE: {} {}\nPOST: {}\nTL;DR:"
    prompts = [start.format(write.words(4, 8), i, write.text(4, 9)) for i in range(n)]
    return [{"prompt": prompt, "label": f" {write.text(1, 1)}"} for prompt in prompts]


def write_hub(root: Path) -> None:
    """Write the data sets to `root/datasets/`, in the place of what is there."""
    with runtime.atomic_folder(root / "datasets") as home:
        _write_hub(home)


def _write_hub(home: Path) -> None:
    write_lines(toxicity_prompts(400), home / "allenai/real-toxicity-prompts/prompts.jsonl")
    for split, n in SLF5K_ROWS.items():
        write_lines(posts(split, n), home / f"JeremyAlain/SLF5K/{split}.jsonl")
    # the real one has a script, which nothing may run
    (home / "JeremyAlain/SLF5K/SLF5K.py").write_text("raise SystemExit('this was run')\n")
    for part in HH_PARTS:
        for split, n in (("train", 60), ("test", 8)):
            rows = dialogues(n, f"{part} {split}")
            write_lines(rows, home / f"Anthropic/hh-rlhf/{part}/{split}.jsonl.gz")
    attempt = {"transcript": "\n\nHuman: a", "min_harmlessness_score_transcript": 0.1}
    write_lines([attempt], home / "Anthropic/hh-rlhf/red-team-attempts/red_team_attempts.jsonl.gz")
    folder = home / "CarperAI/openai_summarize_tldr/data"
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 120), ("valid", 16), ("test", 16)):
        table = pd.DataFrame(summaries(n, split))
        table.to_parquet(folder / f"{split}-00000-of-00001-0123456789abcdef.parquet", index=False)


def write_lines(rows: list[dict], path: Path) -> None:
    """One JSON object a line, compressed where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


# --- released files ------------------------------------------------------------------------------


def question(write: Writer, number: int) -> dict:
    """A record for SFT and RL: question, passages, the prompt made of them, gold answers."""
    sentence = f"Where is the {write.words(2, 3)} number {number}?"
    passages = [{"wikipage": write.words(1, 2), "content": write.text(4, 12)} for _ in range(3)]
    context = " | ".join(f"wikipage: {p['wikipage']} text: {p['content']}" for p in passages)
    row = {"text": f"question: {sentence} context: {context}", "answer": [write.text(1, 3)]}
    return row | {"passages": passages, "question": sentence}


def feedback(write: Writer, number: int) -> dict:
    """A record for reward models: four answers, errors marked in the first, a preference for each pair."""
    passages = [[write.words(1, 2), *write.sentences(3, 6)] for _ in range(3)]
    row = {"question": f"Why is the {write.words(2, 4)} number {number}?", "passages": passages}
    row["gold"] = write.text(1, 3)
    facts = passages[0][1:]  # the corrected answer has two of them, the others none to two
    answers = [write.sentences(2, 4) + write.random.sample(facts, i % 3) for i in range(4)]
    row |= {f"prediction {i}": " ".join(answer) for i, answer in enumerate(answers, 1)}
    missing = {"error type": "Missing-Answer", "passage_id": 1, "sentence_id": [1]}
    marks = {
        "errors": errors(write, answers[0]),
        "missing-info": [missing] if number % 3 == 0 else [],
    }
    row["feedback"] = marks | {"corrected-prediction": " ".join(facts[:2])}
    row["preference"] = write.random.choices((0, 1, 2), weights=(1, 3, 3), k=6)
    return row


def errors(write: Writer, sentences: list[str]) -> list[dict]:
    """Some sentences of an answer marked whole, one kind of error each."""
    marks = []
    kinds = {"Irrelevant": "", "Unverifiable": "", "Redundant": sentences[0], "Incoherent": ""}
    kinds["Wrong-Grounding"] = json.dumps({"passage_id": 1, "sentence_id": [1]})
    start = 0
    for sentence in sentences:
        if write.random.random() < 0.5:
            kind = write.random.choice(list(kinds))
            mark = {"error type": kind, "explanation": kinds[kind]}
            marks.append(mark | {"start": start, "end": start + len(sentence)})
        start += len(sentence) + 1
    return marks


def write_dialoconan(path: Path) -> None:
    """DIALOCONAN: a line a turn, hate and counter-speech in turn, dialogue after dialogue."""
    write = Writer("dialoconan")
    rows = []
    for dialogue in range(24):
        for turn in range(write.random.choice((4, 6))):
            row = {"text": write.text(1, 2), "TARGET": "OTHER", "dialogue_id": dialogue}
            rows.append(
                row | {"turn_id": turn, "type": ("HS", "CN")[turn % 2], "source": "rehearsal"}
            )
    pd.DataFrame(rows).to_csv(path)


def write_released(folder: Path) -> None:
    """Write `qa_feedback/` and `dialoconan/` as released, in the place of what is there."""
    with runtime.atomic_folder(folder / "dialoconan") as home:
        write_dialoconan(home / "DIALOCONAN.csv")
    with runtime.atomic_folder(folder / "qa_feedback") as home:
        for make, files in ((question, QUESTIONS), (feedback, FEEDBACK)):
            for name, n in files.items():
                write = Writer(name)
                records = [make(write, i) for i in range(n)]
                (home / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
