"""Reward models of fine-grained RLHF: one for each category of errors, each with its own segments.

Wu et al. (NeurIPS 2023, section 4): R1 judges sub-sentences (irrelevant, repetitive, incoherent), R2
sentences (facts wrong or not in the passages), both right or wrong; R3 judges how complete a whole answer
is, from pairs derived from people's corrections; the preference model learns from people's preferences.
Here one class is all four.  A segment's features are its tokens' mean state on the encoder, and, for
encoders that stay frozen, how far its tokens are found in question, passages and earlier answer.

Simplified: the reference reads a segment at a separator put before it and trains a 149M Longformer; its three
output labels (one dead) are two here, explicit.  Prompts are those of RL, always `schema.prompt`.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers.modeling_outputs import SequenceClassifierOutput

from lib import encoding, models, processes, reward_models, rewards, runtime, stats
from lib.papers.fine_grained import schema as qa
from lib.reward_models import Feedback, TrainConfig
from lib.segments import SHORTEST, Segmenter
from lib.text import check_texts

UNITS = {"C1": "sub_sentence", "C2": "sentence", "C3": "sequence"}
REWARDS = {"R1": "C1", "R2": "C2", "R3": "C3"}
SAME = 0.85  # likeness from which a piece of text says what a passage sentence says
RELATIONS = 20  # numbers that `_relations` gives for each segment
LEARNS_FROM = {
    "R1": "known sub-sentences (from marked error spans)",
    "R2": "known sentences (from marked error spans)",
    "R3": "a decided pair (from corrected answers, beside three more answers)",
    "preference": "a decided comparison of two answers",
}


# --- feedback as training data -------------------------------------------------------------------


def used_for(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Model -> the records it can learn from; a record may hold error spans, comparisons, or both.

    R1 and R2 learn from spans, the preference model from comparisons.  R3's pairs are derived from the
    corrected answer, for four answers; who compares two answers does not say which is the more complete.
    """
    marked = [record for record in records if "feedback" in record]
    four = [record for record in marked if all(name in record for name in qa.PREDICTIONS)]
    compared = [record for record in records if "preference" in record]
    return {"R1": marked, "R2": marked, "R3": four, "preference": compared}


def prompt_of(record: dict) -> str:
    """The record's prompt with its passages, the one that RL gives to policy and reward models."""
    return qa.prompt(record["question"], qa.passages_of(record))


def segment_labels(record: dict, segmenter: Segmenter, category: str) -> np.ndarray:
    """(segments of prediction 1,) 1 where an error span of the category touches a segment, else 0.

    As in the reference, C1 spans of fewer than five words are dropped, and a sentence with C1 errors alone
    is NaN for C2: annotators did not check irrelevant text for facts.
    """
    text, spans = record["prediction 1"], {"C1": [], "C2": []}
    for error in record["feedback"]["errors"]:
        kind, (start, end) = qa.CATEGORIES[error["error type"]], (error["start"], error["end"])
        if kind == "C2" or len(text[start:end].split()) >= SHORTEST:
            spans[kind].append((start, end))

    def touched(kind: str, start: int, end: int) -> bool:
        return any(a < end and start < b for a, b in spans[kind])

    labels = []
    for place in segmenter.spans(text):
        wrong = touched(category, *place)
        unknown = category == "C2" and not wrong and touched("C1", *place)
        labels.append(np.nan if unknown else float(wrong))
    return np.array(labels)


@dataclass
class SegmentFeedback(Feedback):
    """Rows as in `Feedback`; `labels` (segments,) 1 error, 0 none, NaN unknown; `row` (segments,) its row."""

    labels: np.ndarray | None = None
    row: np.ndarray | None = None


def from_errors(records: Sequence[dict], category: str) -> SegmentFeedback:
    """Prediction 1 of each record with its segments' labels; `group` numbers the questions."""
    segmenter = Segmenter(UNITS[category])
    labels = [segment_labels(record, segmenter, category) for record in records]
    prompts, responses = [prompt_of(r) for r in records], [r["prediction 1"] for r in records]
    group = reward_models.number_prompts([r["question"] for r in records])
    row = np.repeat(np.arange(len(records)), [len(segments) for segments in labels])
    labels = np.concatenate([np.zeros(0), *labels])
    return SegmentFeedback(prompts, responses, group, labels=labels, row=row)


def from_preferences(records: Sequence[dict], verdicts: Sequence[Sequence[int] | None]) -> Feedback:
    """Pairs of the four predictions by `verdicts`: six for each record in the schema's form, or None.

    Every prediction is a row, four to a record; equal pairs and records without verdicts give no pair.
    """
    prompts = [p for r in records for p in [prompt_of(r)] * 4]
    responses = [r[name] for r in records for name in qa.PREDICTIONS]
    group = np.repeat(reward_models.number_prompts([r["question"] for r in records]), 4)
    pairs = [
        (4 * i + a, 4 * i + b) if value == 1 else (4 * i + b, 4 * i + a)
        for i, six in enumerate(verdicts)
        for (a, b), value in zip(qa.PAIRS, six or (), strict=six is not None)
        if value
    ]
    return Feedback(prompts, responses, group, pairs=np.array(pairs, dtype=int).reshape(-1, 2))


def feedback_for(name: str, records: Sequence[dict]) -> Feedback:
    """What R1, R2, R3 or the preference model learns from, or is tested on."""
    if name in ("R1", "R2"):
        return from_errors(records, REWARDS[name])
    if name == "R3":
        return from_preferences(records, [verdicts(completeness(record)) for record in records])
    return from_preferences(records, [record["preference"] for record in records])


def subset(feedback: Feedback, keep: np.ndarray) -> Feedback:
    """The rows where `keep` (rows,) is true, with the pairs and segments that lie within them."""
    places, number = np.flatnonzero(keep), np.cumsum(keep) - 1
    texts = {n: [getattr(feedback, n)[i] for i in places] for n in ("prompts", "responses")}
    part = replace(feedback, **texts, group=feedback.group[keep])
    if feedback.pairs is not None:
        part.pairs = number[feedback.pairs[keep[feedback.pairs].all(1)]]
    if getattr(feedback, "labels", None) is not None:
        within = keep[feedback.row]
        part.labels, part.row = feedback.labels[within], number[feedback.row[within]]
    return part


def teaches(feedback: Feedback) -> np.ndarray:
    """(rows,) whether a segment of the row has a known label, or the row stands in a decided pair."""
    taught = feedback.pairs
    if taught is None:
        taught = feedback.row[~np.isnan(feedback.labels)]
    return np.isin(np.arange(len(feedback.responses)), taught)


def with_enough(feedback: dict[str, Feedback], questions: int) -> dict[str, Feedback]:
    """The models that at least so many questions teach; a printed line says which is left out, and why."""
    enough = {}
    for name, rows in feedback.items():
        count = len(np.unique(rows.group[teaches(rows)]))
        if count >= questions:
            enough[name] = rows
        else:
            print(
                f"left out here and below: {name}. It learns from {LEARNS_FROM[name]}; {count} questions "
                f"have that, {questions} are needed."
            )
    return enough


def shuffled(feedback: Feedback, seed: int = 0) -> Feedback:
    """The control: known labels dealt out anew among the segments, or pairs turned round by a coin."""
    if getattr(feedback, "labels", None) is None:
        return reward_models.shuffled(feedback, seed)
    labels, known = feedback.labels.copy(), ~np.isnan(feedback.labels)
    labels[known] = np.random.default_rng(seed).permutation(labels[known])
    return replace(feedback, labels=labels)


# --- R3's pairs: which information an answer holds -----------------------------------------------


class _PassageSentences:
    """The sentences of a record's passages, ready for fuzzy matching by characters."""

    def __init__(self, passages: Sequence[Sequence[str]]):
        self.places = [(p, s) for p, x in enumerate(passages, 1) for s in range(1, len(x))]
        self.texts = [passages[p - 1][s] for p, s in self.places]
        self.letter = {c: i for i, c in enumerate(sorted(set("".join(self.texts))))}
        # letters in the first 0, 1, 2, ... words of each sentence
        counted = [[self._count(word) for word in ["", *text.split()]] for text in self.texts]
        self.counts = [np.cumsum(rows, axis=0) for rows in counted]

    def _count(self, text: str) -> np.ndarray:
        numbers = [self.letter[c] for c in text if c in self.letter]
        return np.bincount(np.array(numbers, dtype=int), minlength=len(self.letter))

    def match(self, piece: str) -> tuple[int, int] | None:
        """(passage, sentence), from 1, that says the same as `piece`; None where none comes near."""
        both = zip(self.texts, self.counts, strict=True)
        likeness = [self._likeness(piece, *one) for one in both]
        best = int(np.argmax(likeness)) if likeness else 0
        return self.places[best] if likeness and likeness[best] >= SAME else None

    def _likeness(self, piece: str, text: str, counts: np.ndarray) -> float:
        """1 if the piece stands in the text, else 2 x shared characters / all, for the best run of words."""
        if piece in text:
            return 1.0
        own = piece.split()
        n = len(own) + len(own) // 20  # words in a run; a text too short is filled up
        m = min(n, len(counts) - 1)
        runs = counts[m:] - counts[: len(counts) - m]
        shared = np.minimum(runs, self._count("".join(own))).sum(1) + len(own) - 1
        size = runs.sum(1) + (n - m) + (n - 1) + len(" ".join(own))
        return float((2 * shared / size).max())


def completeness(record: dict) -> np.ndarray | None:
    """(4,) share of the needed information that each prediction holds; None where nothing is needed.

    Needed are the passage sentences that the corrected answer's sub-sentences match, without those that
    people marked as minor (unless prediction 1 has them word for word).
    """
    sentences, cut = _PassageSentences(record["passages"]), Segmenter("sub_sentence").texts
    feedback, first = record["feedback"], record["prediction 1"]
    minor = {
        (missing["passage_id"], s)
        for missing in feedback["missing-info"]
        if missing["error type"] == qa.MISSING[2]
        for s in missing["sentence_id"]
    }
    matched = [(sentences.match(piece), piece) for piece in cut(feedback["corrected-prediction"])]
    needed = {place for place, piece in matched if place and (place not in minor or piece in first)}
    if not needed:
        return None
    held = [set(map(sentences.match, cut(record[name]))) for name in qa.PREDICTIONS]
    return np.array([len(needed & places) / len(needed) for places in held])


def verdicts(values: np.ndarray | None) -> list[int] | None:
    """Four values as six verdicts in the schema's form: 1 where the first is higher, 2, 0 for equal."""
    if values is None:
        return None
    return [0 if values[a] == values[b] else 1 if values[a] > values[b] else 2 for a, b in qa.PAIRS]


# --- the model -----------------------------------------------------------------------------------


class _Row(NamedTuple):
    context: list[int]
    response: list[int]
    owner: np.ndarray  # (response tokens without the end token,) the segment of each
    segments: int
    question: int  # tokens up to the question's end
    pieces: tuple[tuple[int, ...], ...] = ()  # the passages' sentences, each read by itself


class FineGrainedModel(reward_models.RewardModel):
    """A logit for each segment of a response, higher is better: R1, R2, R3 or the preference model.

    `unit`: segments as `Segmenter` cuts them.  `context=False` leaves the passages out of the prompt (R1).
    `relations`: also the 20 numbers of `_relations`, without which a frozen encoder sees little.
    `apart`: question and answer are read together and each sentence of the passages by itself, so that none
    is cut; segments then meet the passages in their relations alone.
    `mean`, `std`: of the scores, for normalising rewards; `fit_normaliser` measures them and `save` keeps
    them.  A prompt too long loses its end; `truncated` counts it, and segments cut off or without a token.
    """

    def __init__(
        self, backbone, tokenizer, *, unit: str, context: bool = True, relations: bool = True,
        apart: bool = False, **options
    ):  # fmt: skip
        super().__init__(backbone, tokenizer, **options)
        if apart and not relations:
            raise ValueError(
                "passages that are read apart are seen by relations alone; relations=False."
            )
        self.segmenter, self.context, self.relations = Segmenter(unit), context, relations
        self.apart = apart
        self.truncated["segments"] = 0
        marks = (
            (tokenizer.cls_token_id, tokenizer.bos_token_id),
            (
                tokenizer.sep_token_id,
                tokenizer.eos_token_id,
            ),
        )
        self._marks = [[t for t in pair if t is not None][:1] for pair in marks]
        self._add_head(backbone.config.hidden_size + RELATIONS * relations, 1)
        self.register_buffer("normaliser", torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.to(backbone.device)

    @property
    def mean(self) -> float:
        return float(self.normaliser[0])

    @property
    def std(self) -> float:
        return float(self.normaliser[1])

    def settings(self) -> dict[str, object]:
        own = {"unit": self.segmenter.unit, "context": self.context, "relations": self.relations}
        own["apart"] = self.apart
        inherited = super().settings()
        return own | {name: inherited[name] for name in ("max_length", "padding_side")}

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[_Row]:
        """Token ids of each row, [CLS] prompt [SEP] | response [SEP], and the segment of each token."""
        check_texts(prompts), check_texts(responses)
        rows = [self._row(*both) for both in zip(prompts, responses, strict=True)]
        if not (self.apart and self.context):
            return rows
        pieces = {prompt: self._pieces(prompt) for prompt in dict.fromkeys(prompts)}
        return [row._replace(pieces=pieces[p]) for row, p in zip(rows, prompts, strict=True)]

    def _pieces(self, prompt: str) -> tuple[tuple[int, ...], ...]:
        """Token ids of each sentence of the passages, at most `max_length` with the marks around them."""
        room = self.max_length - sum(map(len, self._marks))
        sentences = Segmenter("sentence").texts(prompt.partition(" context: ")[2])
        ids = [encoding.bare_ids(self.tokenizer, sentence) for sentence in sentences]
        self.truncated["prompts"] += any(len(piece) > room for piece in ids)
        return tuple(tuple(piece[:room]) for piece in ids if piece)

    def _row(self, prompt: str, response: str) -> _Row:
        tokenizer = self.tokenizer
        question = prompt.partition(" context: ")[0]
        whole = self.context and not self.apart
        before = encoding.bare_ids(tokenizer, prompt if whole else question)
        ids, places = encoding.token_places(tokenizer, response)
        start, stop = self._marks
        marks = len(start) + 2 * len(stop)
        after = ids[: self.max_length - marks]
        room = self.max_length - marks - len(after)
        self.truncated["responses"] += len(ids) > len(after)
        self.truncated["prompts"] += len(before) > room
        ends = [end for _, end in self.segmenter.spans(response)]
        last = [max(start, end - 1) for start, end in places[: len(after)]]
        owner = np.searchsorted(ends, last, side="right") if ends else np.zeros(0, dtype=int)
        self.truncated["segments"] += len(ends) - len(set(owner))
        asked = min(room, len(encoding.bare_ids(tokenizer, question)))
        return _Row(
            start + before[:room] + stop, after + stop, owner, len(ends), len(start) + asked
        )

    def batch(self, rows: Sequence[_Row]) -> dict[str, Sequence[_Row]]:
        """What `forward` takes."""
        return {"rows": rows}

    def forward(self, rows: Sequence[_Row]) -> SequenceClassifierOutput:
        """.logits (segments of all rows, 1)."""
        return SequenceClassifierOutput(logits=self.read(torch.cat(self._features(rows))))

    def _features(self, rows: Sequence[_Row], read: dict | None = None) -> list[torch.Tensor]:
        """(segments, width) of each row; NaN for a segment without a token.  `read`: as in `features`."""
        inputs = super().batch([(row.context, row.response) for row in rows])
        hidden = self.hidden(**inputs)
        padding = (inputs["attention_mask"].argmax(1)).tolist()
        read = self._read_apart(rows, {} if read is None else read)
        features = []
        for states, ids, p, row in zip(hidden, inputs["input_ids"], padding, rows, strict=True):
            beside = [read[piece] for piece in row.pieces]
            features.append(_segment_features(states[p:], ids[p:], row, self.relations, beside))
        return features

    def _read_apart(self, rows: Sequence[_Row], read: dict) -> dict[tuple[int, ...], torch.Tensor]:
        """`read` with the states (tokens, width) of each sentence that rows have beside them."""
        wanted = dict.fromkeys(piece for row in rows for piece in row.pieces)
        pieces = [piece for piece in wanted if piece not in read]
        start, stop = self._marks
        for places in encoding.token_batches([len(piece) for piece in pieces], 8192):
            inputs = super().batch([([*start, *pieces[i], *stop], []) for i in places])
            padding = inputs["attention_mask"].argmax(1) + len(start)
            for i, states, p in zip(places, self.hidden(**inputs), padding.tolist(), strict=True):
                read[pieces[i]] = states[p : p + len(pieces[i])]
        return read

    @torch.no_grad()
    def features(
        self, prompts: Sequence[str], responses: Sequence[str], *, tokens_per_batch: int = 8192,
        read: dict[tuple[int, ...], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Features (segments, width) of each response on the CPU; warns of what was cut.

        `read`: states of passages' sentences by their token ids, from a model on the same encoder; what is
        missing in it is put there (for passages read apart).
        """
        before = dict(self.truncated)
        rows = self.encode(prompts, responses)
        cut = {k: v - before[k] for k, v in self.truncated.items() if v > before[k]}
        if cut:
            counts = ", ".join(f"{count} {name}" for name, count in cut.items())
            warnings.warn(f"cut to {self.max_length} tokens: {counts}.", stacklevel=2)
        results: list[torch.Tensor] = [None] * len(rows)
        bar = runtime.progress(total=len(rows), label="segment features", unit="text")
        lengths = [len(row.context) + len(row.response) for row in rows]
        # answers to one prompt side by side, so that its passages are read once
        shared = reward_models.number_prompts(prompts) if self.apart else None
        with models.fast_float32(self):
            for places in encoding.token_batches(lengths, tokens_per_batch, together=shared):
                features = self._features([rows[i] for i in places], read)
                for i, row in zip(places, features, strict=True):
                    results[i] = row.float().cpu()
                bar.update(len(places))
        bar.close()
        return results

    def score_segments(self, prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        """A logit for each segment of each response, (segments,); "" has none, (0,)."""
        return self.score_features(self.features(prompts, responses))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """(rows,) logits of a sequence model; an empty response scores the mean.  ValueError for others."""
        if self.segmenter.unit != "sequence":
            raise ValueError(
                f"a model of the unit {self.segmenter.unit!r} has a score for each segment. "
                "Try score_segments."
            )
        scores = self.score_segments(prompts, responses)
        return np.array([row[0] if len(row) else self.mean for row in scores])

    def signs(self, prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        """Right (1) or wrong (-1) for each segment: the paper's R1 and R2, to be weighted."""
        return [np.where(row > 0, 1.0, -1.0) for row in self.score_segments(prompts, responses)]

    @torch.inference_mode()
    def score_features(self, features: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """`score_segments` from features computed before; without a token a segment scores the mean."""
        device = self.head.weight.device
        logits = [self.read(x.to(device))[:, 0].cpu().double().numpy() for x in features]
        return [np.where(np.isnan(row), self.mean, row) for row in logits]

    def fit_normaliser(self, scores: Sequence[np.ndarray]) -> None:
        """Mean and deviation of these scores (of training texts), stored with the model.

        Where all scores are alike the deviation counts as 1.
        """
        values = np.concatenate([np.ravel(row) for row in scores])
        std = stats.spread(values, precision=np.float32) or 1.0
        self.normaliser.copy_(torch.tensor([values.mean(), std], dtype=torch.float64))


def _segment_features(hidden, ids, row: _Row, relations: bool, beside=()) -> torch.Tensor:
    """(segments, width): mean state of each segment's tokens, and its relations.

    `beside`: states of the row's `pieces`; they take the place of passages in the context.
    """
    if beside:
        n, passages = len(row.context), [t for piece in row.pieces for t in piece]
        hidden = torch.cat([hidden[:n], *beside, hidden[n:]])
        ids = torch.cat([ids[:n], ids.new_tensor(passages), ids[n:]])
        row = row._replace(context=[*row.context, *passages])
    owner = torch.as_tensor(row.owner, device=hidden.device)
    numbers = torch.arange(row.segments, device=hidden.device)
    member = (owner[:, None] == numbers).to(hidden.dtype)  # (tokens, segments)
    count = member.sum(0)[:, None]
    end = len(row.context) + len(owner)
    states = member.T @ hidden[len(row.context) : end] / count  # 0 / 0: no token, NaN
    if not relations:
        return states
    if len(owner) == 0:
        return torch.cat([states, states.new_full((row.segments, RELATIONS), torch.nan)], 1)
    return torch.cat([states, _relations(hidden[:end], ids[:end], row, member, count)], 1)


def _relations(hidden, ids, row: _Row, member, count) -> torch.Tensor:
    """(segments, 20): how far a segment's tokens are found elsewhere, and the reverse; length and place.

    For each token of the segment the largest likeness (cosine of states; equal tokens) to a token of the
    question, of the passages, of the answer before the segment: mean and least over the segment.  Then how
    far question and passages are found in the segment, its share of the tokens, and its place.
    """
    start, n = len(row.context), len(ids)
    where = torch.arange(n, device=hidden.device)
    owner = torch.as_tensor(row.owner, device=hidden.device)
    before = where.new_full((n,), row.segments)
    before[start:] = owner
    question = where < row.question
    passages = (where >= row.question) & (where < start)
    earlier = before[None, :] < owner[:, None]
    units = normalize(hidden, dim=-1)
    absent = (1 - member)[..., None] * 9.0  # lifts other segments' tokens above any likeness
    columns = []
    for like in (units[start:] @ units.T, (ids[start:, None] == ids[None, :]).to(hidden)):
        for region in (question[None], passages[None], earlier):
            best = like.masked_fill(~region, 0).clamp(min=0).amax(1)  # (tokens,)
            columns += [member.T @ best / count[:, 0], (best[:, None] + absent[..., 0]).amin(0)]
        for region in (question, passages):
            near = like[:, region].clamp(min=0)
            if near.shape[1] == 0:
                columns.append(torch.zeros_like(count[:, 0]))
                continue
            columns.append(torch.stack([(near * m[:, None]).amax(0).mean() for m in member.T]))
    place = torch.arange(row.segments, device=hidden.device).to(hidden)
    columns += [count[:, 0].log1p(), place.log1p(), place / row.segments]
    columns.append((place == row.segments - 1).to(hidden))
    return torch.stack(columns, 1)


def load(folder: Path | str) -> FineGrainedModel:
    """What `FineGrainedModel.save` wrote, its normaliser too."""
    return reward_models.load(folder, FineGrainedModel)


def load_all(folder: Path | str) -> dict[str, FineGrainedModel]:
    """R1, R2 and R3 by name, from the folders of these names in `folder`.

    Raises ValueError where one is missing or judges other segments than its name says.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in REWARDS if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} has no folder {', '.join(missing)}; needed are {', '.join(REWARDS)}. Notebook 41 "
            "keeps them in runs/<scale>/41_fine_grained_reward_models/models."
        )
    loaded = {name: load(folder / name) for name in REWARDS}
    for name, category in REWARDS.items():
        unit = loaded[name].segmenter.unit
        if unit != UNITS[category]:
            raise ValueError(
                f"{folder / name} judges the unit {unit!r}; {name} judges {UNITS[category]!r}. Were the "
                "folders renamed?"
            )
    return loaded


# --- training ------------------------------------------------------------------------------------


def segment_rewards(
    trained: Mapping[str, FineGrainedModel], weights: Mapping[str, float],
    shown: Callable[[str], str] = lambda prompt: prompt,
) -> list[rewards.SegmentReward]:  # fmt: skip
    """The paper's rewards, each paid where its segment ends: of the models that have a weight, in its order.

    R1 and R2 pay the sign of each segment's score, R3 and the preference model the standardised score of the
    answer.  `shown`: the policy's prompt -> the prompt that the reward models read.
    """

    def part(name: str, weight: float) -> rewards.SegmentReward:
        model, signs = trained[name], name in ("R1", "R2")
        score = model.signs if signs else model.score_segments
        scale = {} if signs else {"mean": model.mean, "std": model.std}

        def read(prompts, responses):
            return score([shown(prompt) for prompt in prompts], responses)

        return rewards.SegmentReward(name, model.segmenter, read, weight, **scale)

    return [part(*item) for item in weights.items()]


def fit(
    model: FineGrainedModel, feedback: Feedback, config: TrainConfig, *,
    features: Sequence[torch.Tensor] | None = None, balance: bool = False,
    validate: Callable[[], float] | None = None, folder: Path | str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train in place on labels (cross-entropy) or pairs (Bradley-Terry), then fit the normaliser; history.

    `features`, one tensor a row from `model.features`, trains the head alone.  `balance` weighs errors and
    the rest alike in all.  `validate` and `folder`: as `reward_models.train` takes them.  Rows
    that teach nothing (empty, no known label) are left out; ValueError where none remains.
    """
    keep = _usable(model, feedback, features)
    if not keep.any():
        raise ValueError("no row teaches anything: no known label, or no decided pair.")
    part, flat, loss = subset(feedback, keep), None, None
    features = None if features is None else [x for x, k in zip(features, keep, strict=True) if k]
    if features is not None:
        flat = torch.cat(list(features))
    if feedback.pairs is None:
        if flat is not None:
            known = ~(np.isnan(part.labels) | flat.isnan().any(1).numpy())
            flat = flat[known]
            part = replace(part, labels=part.labels[known], row=part.row[known])
        wrong, fine = np.nansum(part.labels), np.nansum(1 - part.labels)
        weight = wrong / fine if balance and wrong and fine else 1.0
        loss = functools.partial(_segment_loss, weight=weight)
    history = reward_models.train(
        model, part, config, features=flat, batch_loss=loss, validate=validate, folder=folder
    )
    model.fit_normaliser(model.score_features(features) if features else score_all(model, part))
    return history


def score_all(model: FineGrainedModel, feedback: Feedback) -> list[np.ndarray]:
    """`score_segments` of every row; several processes share the rows."""
    share = processes.share(len(feedback.responses))
    texts = (feedback.prompts[share], feedback.responses[share])
    return processes.joined(model.score_segments(*texts))


def _usable(model: FineGrainedModel, feedback: Feedback, features) -> np.ndarray:
    """(rows,) whether a row teaches something, and has a segment and features to learn it by."""
    keep = np.array([bool(model.segmenter.spans(text)) for text in feedback.responses], dtype=bool)
    if features is not None and feedback.pairs is not None:
        keep &= np.array([len(x) == 1 and not bool(x.isnan().any()) for x in features])
    return keep & teaches(feedback)


def _segment_loss(
    model, feedback: SegmentFeedback, groups, encoded, features, weight: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of the known segments of some questions, for `reward_models.train`."""
    rows = np.flatnonzero(np.isin(feedback.group, groups))
    places = np.flatnonzero(np.isin(feedback.row, rows))
    if features is None:
        logits = model(**model.batch([encoded[i] for i in rows])).logits[:, 0]
    else:
        logits = model.read(features[places].to(model.head.weight.device))[:, 0]
    labels = torch.as_tensor(feedback.labels[places]).to(logits)
    known = ~(labels.isnan() | logits.isnan())
    weight = torch.tensor(weight).to(logits)
    return binary_cross_entropy_with_logits(logits[known], 1 - labels[known], pos_weight=weight)


def question_folds(feedback: Feedback, k: int = 5, seed: int = 0) -> np.ndarray:
    """(rows,) fold 0 to k - 1 of each row; the rows of one question share a fold."""
    _, group = np.unique(feedback.group, return_inverse=True)
    return (np.random.default_rng(seed).permutation(group.max() + 1) % k)[group]


def out_of_fold(
    model: FineGrainedModel, feedback: Feedback, folds: np.ndarray, config: TrainConfig, *,
    features: Sequence[torch.Tensor] | None = None, balance: bool = False,
    folder: Path | str | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Scores (segments,) of each row by a model trained, from the same start, on the other folds.

    Where the other folds teach nothing, the model stays untrained.  `folder`: a folder for each fold in it
    holds its `history.csv`.
    """
    fresh = model.trained_state()
    results = [None] * len(folds)
    for fold in np.unique(folds):
        model.load_state_dict(fresh, strict=False)
        place = None if folder is None else Path(folder) / f"fold-{fold}"
        options = {"features": features, "balance": balance, "folder": place}
        scores = score_the_rest(model, feedback, folds != fold, config, **options)
        for i, row in zip(np.flatnonzero(folds == fold), scores, strict=True):
            results[i] = row
    model.load_state_dict(fresh, strict=False)
    return results


def score_the_rest(
    model: FineGrainedModel, feedback: Feedback, train: np.ndarray, config: TrainConfig, *,
    features: Sequence[torch.Tensor] | None = None, balance: bool = False,
    folder: Path | str | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Train in place on the rows where `train` (rows,) is true; scores (segments,) of each other row.

    Where the training rows teach nothing, the model stays as it is.
    """
    part, test = subset(feedback, train), np.flatnonzero(~train)
    chosen = None
    if features is not None:
        chosen = [x for x, kept_row in zip(features, train, strict=True) if kept_row]
    if _usable(model, part, chosen).any():
        fit(model, part, config, features=chosen, balance=balance, folder=folder)
    if features is not None:
        return model.score_features([features[i] for i in test])
    return model.score_segments(
        [feedback.prompts[i] for i in test], [feedback.responses[i] for i in test]
    )


# --- a stand-in where no people's feedback is at hand --------------------------------------------


def constructed_records(articles: Sequence[tuple[str, str]], seed: int = 0) -> list[dict]:
    """Records in the qa-feedback schema made of (title, text) of real articles, their errors put in by rule.

    The question asks about an article; passages are it and another.  Answers hold its first three sentences:
    some left out, some with a number or name changed; sentences of the other article and repetitions are
    put in.  The preference counts errors and missing sentences.  Nobody judged them.
    """
    cut, rng, made = Segmenter("sentence").texts, np.random.default_rng(seed), []
    for i, (title, text) in enumerate(articles):
        other, foreign = articles[i - 1][0], cut(articles[i - 1][1])
        sentences, drawn = cut(text), []
        for _ in qa.PREDICTIONS:
            drawn.append(_constructed_answer(sentences[:3], foreign, rng))
        costs = -np.array([len(errors) + len(missing) for _, errors, missing in drawn])
        _, errors, missing = drawn[0]
        feedback = {"errors": errors, "corrected-prediction": " ".join(sentences[:3])}
        feedback["missing-info"] = [
            {"error type": "Missing-Answer", "passage_id": 1, "sentence_id": [k + 1]}
            for k in missing
        ]
        answers = dict(zip(qa.PREDICTIONS, [answer for answer, *_ in drawn], strict=True))
        record = {"question": f"What is there to know about {title}?"}
        record |= {"passages": [[title, *sentences], [other, *foreign]]}
        record |= {"gold": " ".join(sentences[:3]), **answers, "feedback": feedback}
        made.append(qa.check_record(record | {"preference": verdicts(costs)}, title))
    return made


def _constructed_answer(sentences, foreign, rng) -> tuple[str, list[dict], list[int]]:
    """An answer, its errors in the schema's form, and the numbers of the sentences left out."""
    pieces, missing = (
        [],
        [],
    )  # (sentence, error type, explanation, words that are wrong or None for all)
    for k, sentence in enumerate(sentences):
        draw = rng.random()
        changed = _change_a_word(sentence, foreign, rng) if draw < 0.3 else None
        if 0.3 <= draw < 0.5 and k + 1 < len(sentences) + bool(pieces):
            missing.append(k)
        elif changed:
            source = json.dumps({"passage_id": 1, "sentence_id": [k + 1]})
            pieces.append((changed[0], "Wrong-Grounding", source, changed[1]))
        else:
            pieces.append((sentence, None, "", None))
        if rng.random() < 0.3:
            pieces.append((str(rng.choice(foreign)), "Irrelevant", "", None))
        elif pieces and rng.random() < 0.1:
            pieces.append((pieces[-1][0], "Redundant", pieces[-1][0], None))
    text, errors = "", []
    for sentence, kind, explanation, place in pieces:
        start = len(text) + bool(text)
        text = f"{text} {sentence}".lstrip()
        if kind:
            a, b = place or (0, len(sentence))
            span = {"start": start + a, "end": start + b}
            errors.append({"error type": kind, "explanation": explanation, **span})
    return text, errors, missing


def _change_a_word(sentence: str, foreign: Sequence[str], rng):
    """The sentence with a number or a name changed, and the word's place; None where it has neither."""
    words = qa.word_spans(sentence)[1:]
    numbers = [w for w in words if re.search(r"\d", sentence[slice(*w)])]
    names = [w for w in words if sentence[w[0]].isupper()]
    spare = [word for text in foreign for word in re.findall(r"(?<=\s)[A-Z]\w+", text)]
    if numbers:
        start, end = numbers[rng.integers(len(numbers))]
        new = re.sub(r"\d", lambda d: str((int(d[0]) + 1) % 10), sentence[start:end])
    elif names and spare:
        start, end = names[rng.integers(len(names))]
        new = str(rng.choice(spare)) + re.search(r"\W*$", sentence[start:end])[0]
    else:
        return None
    return f"{sentence[:start]}{new}{sentence[end:]}", (start, start + len(new))
