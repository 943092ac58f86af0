"""Learning from labels that are conditions: Quark and ALT as settings of one loop.

sample -> feedback -> pool -> train -> evaluate.  Every response gets a label, a quantile of its reward
(Quark, Lu et al. 2022) or words (ALT, "Towards Aligning Language Models with Textual Feedback", 2024);
the model learns to write the response given label and prompt, and is asked for the best label later.

A condition is always built from the *stored* raw prompt, so taking it off needs no splitting of text.
New tokens are rows of the input embedding only: they cannot be sampled, no prompt can spell them, and
the vocabulary of the policy stays that of the reference, which sees the raw prompt.

Random numbers depend on (seed, stage, iteration) and on contents, so a killed run needs no generator
state and the order in which samples arrive does not matter.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch.nn.functional import cross_entropy, embedding
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, generation, losses, models, rubric, runtime, scoring
from lib import feedback as llm

STYLES = ("none", "text", "separator", "token")
STAGES = ("sample", "feedback", "pool", "train", "evaluate")
DECODING = ("max_new_tokens", "temperature", "top_k", "top_p")
MAY_BE_ZERO = {"beta", "alpha", "top_k", "warmup_steps", "per_label", "prompts_per_iteration"}
MAY_BE_ZERO |= {"checkpoint_every", "seed", "token_learning_rate"}
ALLOWED = {"direction": ("forward", "reverse"), "normalise": ("token", "sequence")}
ALLOWED["balance"] = ("pool", "prompt")

Label = int | tuple[int, ...]  # 0 is best
Condition = tuple[str, ...]  # () is no condition
Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # prompts, responses -> scores
Feedback = Callable[[Sequence[str], Sequence[str]], list[dict]]  # -> score, feedback, attributes


@dataclass(frozen=True)
class Item:
    """One sample with its feedback, as the pool keeps it; what could not be had is None."""

    prompt: str  # raw: without any condition
    response: str
    response_ids: tuple[int, ...]
    finished: bool  # ended by itself, so its end token may be learned
    round: int
    score: float | None = None
    feedback: str | None = None
    attributes: Mapping[str, float] = field(default_factory=dict)
    analysis: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of the content: what order and random choice go by."""
        return runtime.content_hash(*(getattr(self, part.name) for part in fields(self)))


# --- labels --------------------------------------------------------------------------------------


def quantile_labels(
    scores: Sequence[float], k: int, *, ties: str = "split", keys: Sequence[str] | None = None
) -> list[int]:
    """Label 0 (best) to k - 1 of each score: floor(n / k) to each, the remainder to the worst.

    ties "split": equal scores fall apart by `keys` (default: position), so sizes are exact.  "share":
    they get one label, that of their mean rank, and sizes are only about equal.  Fewer than k scores
    are all remainder.  Raises ValueError for other values of ties, and k < 2.
    """
    if ties not in ("split", "share") or k < 2:
        raise ValueError(f"ties is {ties!r}, k is {k}; allowed: 'split' or 'share', k >= 2.")
    size = len(scores) // k
    if size == 0:
        return [k - 1] * len(scores)
    ranks = rankdata(-np.asarray(scores, dtype=np.float64), method="average") - 1
    if ties == "split":
        order = keys if keys is not None else range(len(scores))
        places = sorted(range(len(scores)), key=lambda i: (-scores[i], order[i]))
        ranks = np.empty(len(scores))
        ranks[places] = np.arange(len(scores))
    return [min(int(rank // size), k - 1) for rank in ranks]


@dataclass(frozen=True)
class _Tagged:
    """A labeller with a fixed tag for each label, best first."""

    tags: tuple[str, ...]

    def labels(self) -> list[Label]:
        return list(range(len(self.tags)))

    def condition(self, item: Item | None, label: int) -> Condition:
        return (self.tags[label],)


@dataclass(frozen=True)
class Quantiles(_Tagged):
    """Quantiles of a score: tags[0] names the best.  `within`: "pool" (global) or "prompt" (local)."""

    of: str = "score"  # or the name of an attribute
    within: str = "pool"
    ties: str = "split"

    def __post_init__(self):
        if self.within not in ("pool", "prompt"):
            raise ValueError(f"within is {self.within!r}; allowed: 'pool', 'prompt'.")

    def usable(self, item: Item) -> bool:
        return _known(self._value(item))

    def __call__(self, items: Sequence[Item]) -> list[int]:
        found = [0] * len(items)
        for places in _groups(items, self.within).values():
            scores, keys = [self._value(items[i]) for i in places], [items[i].key for i in places]
            made = quantile_labels(scores, len(self.tags), ties=self.ties, keys=keys)
            for place, label in zip(places, made, strict=True):
                found[place] = label
        return found

    def _value(self, item: Item) -> float | None:
        return item.score if self.of == "score" else item.attributes.get(self.of)


@dataclass(frozen=True)
class Categories(_Tagged):
    """The label is a name in the feedback, up to case, quotes and what follows it (`parse_category`)."""

    def usable(self, item: Item) -> bool:
        return parse_category(item.feedback, self.tags) is not None

    def __call__(self, items: Sequence[Item]) -> list[int]:
        return [self.tags.index(parse_category(item.feedback, self.tags)) for item in items]


@dataclass(frozen=True)
class FreeText:
    """The condition is the item's own feedback sentence; a whole-number score only balances the pool."""

    best: int = 3
    worst: int = 0

    def labels(self) -> list[Label]:
        return list(range(self.best - self.worst + 1))

    def usable(self, item: Item) -> bool:
        scored = _known(item.score) and self.worst <= item.score <= self.best
        return bool(item.feedback) and scored and item.score == int(item.score)

    def __call__(self, items: Sequence[Item]) -> list[int]:
        return [self.best - int(item.score) for item in items]

    def condition(self, item: Item | None, label: int) -> Condition:
        if item is None:
            raise ValueError("free text has no fixed tag; name an exemplar sentence, or 'pool'.")
        return (item.feedback,)


@dataclass(frozen=True)
class Product:
    """Several labellers at once: the label is a tuple, the condition their tags together."""

    parts: tuple

    def labels(self) -> list[Label]:
        return list(itertools.product(*(part.labels() for part in self.parts)))

    def usable(self, item: Item) -> bool:
        return all(part.usable(item) for part in self.parts)

    def __call__(self, items: Sequence[Item]) -> list[tuple]:
        return list(zip(*(part(items) for part in self.parts), strict=True))

    def condition(self, item: Item | None, label: tuple) -> Condition:
        pairs = zip(self.parts, label, strict=True)
        return sum((part.condition(item, one) for part, one in pairs), ())


def _known(value) -> bool:
    return value is not None and bool(np.isfinite(value))


def _groups(items: Sequence[Item], within: str) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for place, item in enumerate(items):
        groups[item.prompt if within == "prompt" else ""].append(place)
    return groups


# --- the pool ------------------------------------------------------------------------------------


class DataPool:
    """All samples with feedback, labelled afresh from what is in the pool, in an order of its own.

    replay: ("keep",), ("drop", share) or ("window", rounds), applied to older items before a round is
    added.  "drop" keeps int(n (1 - share)) of each prompt and label (1 clears the pool: on-policy).
    Items stand by round and content, so neither labels nor choices depend on the order of arrival.
    `missing` counts per round what had no label.  ValueError for other policies.
    """

    def __init__(self, labeller, replay: tuple = ("keep",)):
        kind, value = (*replay, 0)[:2]
        good = {"keep": True, "drop": 0 <= value <= 1, "window": value >= 1}
        if not good.get(kind, False):
            raise ValueError(
                f"replay is {replay!r}; allowed: ('keep',), ('drop', 0 to 1), ('window', >= 1)."
            )
        self.labeller, self.replay = labeller, (kind, value)
        self.items: list[Item] = []
        self.missing: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.items)

    def add(self, items: Sequence[Item]) -> None:
        """Add one round, after the replay policy; items without a label are counted, not kept."""
        usable = [item for item in items if self.labeller.usable(item)]
        for item in items:
            self.missing[item.round] += not self.labeller.usable(item)
        newest = max((item.round for item in items), default=0)
        self.items = sorted(self._kept(newest) + usable, key=lambda item: (item.round, item.key))

    def _kept(self, newest: int) -> list[Item]:
        kind, value = self.replay
        if kind == "window":
            return [item for item in self.items if item.round > newest - value]
        if kind == "keep" or not self.items:
            return self.items
        kept = []
        for places in self._by_label("prompt").values():
            stay = int(len(places) * (1 - value) + 1e-9)
            kept += [self.items[i] for i in self._shuffled(places, newest)[:stay]]
        return kept

    def labels(self) -> list[Label]:
        """The label of each item, in the pool's order."""
        return self.labeller(self.items) if self.items else []

    def condition(self, item: Item, label: Label) -> Condition:
        """What the model is told about this item."""
        return self.labeller.condition(item, label)

    def _by_label(self, within: str) -> dict[tuple[str, Label], list[int]]:
        groups, labels = defaultdict(list), self.labels()
        for group, places in _groups(self.items, within).items():
            for place in places:
                groups[group, labels[place]].append(place)
        return groups

    def _shuffled(self, places: Sequence[int], *seed) -> list[int]:
        return sorted(places, key=lambda i: runtime.content_hash(*seed, self.items[i].key))

    def select(
        self, per_label: int = 0, *, within: str = "pool", only: Sequence[Label] = (),
        without: Sequence[Label] = (), fill: bool = False, seed: int = 0,
    ) -> list[tuple[Item, Label]]:  # fmt: skip
        """A training set: `per_label` items of each label (0: all), in all or of each prompt.

        Chosen at random with finished responses first.  `only` and `without` name labels.  `fill`: a
        shortfall is made up from what is left of the group, whatever its label.
        """
        wanted = [x for x in (only or self.labeller.labels()) if x not in without]
        groups = self._by_label(within)
        taken: list[int] = []
        for group in dict.fromkeys(group for group, _ in groups):
            chosen, rest = [], []
            for label in wanted:
                places = self._shuffled(groups.get((group, label), []), seed)
                places.sort(key=lambda i: not self.items[i].finished)
                cut = per_label or len(places)
                chosen, rest = chosen + places[:cut], rest + places[cut:]
            if fill:
                rest = sorted(self._shuffled(rest, seed), key=lambda i: not self.items[i].finished)
                chosen += rest[: max(0, per_label * len(wanted) - len(chosen))]
            taken += chosen
        labels = self.labels()
        return [(self.items[i], labels[i]) for i in sorted(taken)]

    def counts(self) -> pd.DataFrame:
        """One row a label: n, prompts, mean score, mean tokens, share finished."""
        rows = [
            {"label": label, "prompt": item.prompt, "score": item.score, "finished": item.finished,
             "tokens": len(item.response_ids)}
            for item, label in zip(self.items, self.labels(), strict=True)
        ]  # fmt: skip
        columns = {"n": ("label", "size"), "prompts": ("prompt", "nunique")}
        columns |= {name: (name, "mean") for name in ("score", "tokens", "finished")}
        names = ["label", "prompt", "score", "finished", "tokens"]
        table = pd.DataFrame(rows, columns=names).astype({"score": float})
        return table.groupby("label").agg(**columns).reset_index()

    def save(self, path: Path | str) -> Path:
        """JSON lines: what is missing by round, then an item a line."""
        rows = [{"missing": dict(self.missing)}, *map(asdict, self.items)]
        return runtime.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def load(cls, path: Path | str, labeller, replay: tuple = ("keep",)) -> DataPool:
        """The pool that `save` wrote; labels are made anew by `labeller`."""
        head, *rows = _read_lines(path)
        pool = cls(labeller, replay)
        pool.items = [_item(row) for row in rows]
        pool.missing = Counter({int(name): n for name, n in head["missing"].items()})
        return pool


def _item(row: dict) -> Item:
    return Item(**{**row, "response_ids": tuple(row["response_ids"])})


def _read_lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# --- conditions ----------------------------------------------------------------------------------


class ExtendedEmbedding(torch.nn.Module):
    """An input embedding with further rows, ids from `len(base)` on; the output layer keeps its size."""

    def __init__(self, base: torch.nn.Embedding, extra: torch.Tensor):
        super().__init__()
        self.base, self.extra = base, torch.nn.Parameter(extra)

    @property
    def weight(self) -> torch.nn.Parameter:
        """The base rows, which the output layer may share."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) -> (batch, time, width)."""
        first = len(self.base.weight)
        old = self.base(ids.clamp(max=first - 1))
        new = embedding((ids - first).clamp(min=0), self.extra).to(old.dtype)
        return torch.where((ids < first)[..., None], old, new)


def add_tokens(
    model: PreTrainedModel, count: int, *, like: int | None = None, seed: int = 0
) -> int:
    """Give the model `count` new input tokens, in place; return the id of the first.

    Rows are drawn from a normal distribution with the mean and deviation of the old ones in each
    dimension (Quark), or are copies of the row `like` (ALT's separator starts as the end token).
    Raises ValueError where the model has new tokens already.
    """
    base = model.get_input_embeddings()
    if isinstance(base, ExtendedEmbedding):
        raise ValueError("this model has new tokens already; load it again, or add all at once.")
    old = base.weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, old.shape[1], generator=generator).to(old.device)
    rows = old.mean(0) + old.std(0) * noise if like is None else old[like].repeat(count, 1)
    model.set_input_embeddings(ExtendedEmbedding(base, rows))
    return len(old)


@dataclass(frozen=True)
class Built:
    """A conditioned prompt: token ids, of which ids[start:stop] are the condition."""

    prompt: str
    condition: Condition
    ids: list[int]
    start: int
    stop: int


class Conditioner:
    """Puts a condition before a raw prompt, and takes it off by what is stored.

    style "text": `template` with the tags joined by `join`, as plain words; "separator": the same and
    one new token; "token": one new token for each tag, from `tokens` (factored=False: for all tags of a
    condition, joined); "none": conditions are ignored.
    `first_id` comes from `add_tokens`.  Condition and prompt are tokenised apart; a start token stays
    in front.  Raises ValueError for unknown styles and tags, and new tokens without ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, style: str = "text", *,
        template: str = "Feedback: {} Input: ", join: str = ", and ",
        tokens: Sequence[str] = (), first_id: int | None = None, factored: bool = True,
    ):  # fmt: skip
        if style not in STYLES:
            raise ValueError(f"style is {style!r}; allowed: {', '.join(STYLES)}.")
        if style in ("separator", "token") and first_id is None:
            raise ValueError(f"style {style!r} needs first_id, which `add_tokens` returns.")
        self.tokenizer, self.style, self.template, self.join = tokenizer, style, template, join
        self.tokens, self.first_id, self.factored = tuple(tokens), first_id, factored

    @property
    def settings(self) -> tuple:
        """What tells two conditioners apart."""
        return self.style, self.template, self.join, self.tokens, self.first_id, self.factored

    def build(self, prompt: str, condition: Condition = ()) -> Built:
        """The prompt with the condition before it; () adds nothing."""
        raw = encoding.encode(self.tokenizer, prompt).prompt
        first = encoding.start_ids(self.tokenizer)
        start = len(first) if raw[: len(first)] == first else 0
        added = self._ids(condition) if condition and self.style != "none" else []
        ids = raw[:start] + added + raw[start:]
        return Built(prompt, tuple(condition), ids, start, start + len(added))

    @staticmethod
    def strip(built: Built) -> str:
        """The raw prompt, whatever words it and the condition are made of."""
        return built.prompt

    def raw_ids(self, built: Built) -> list[int]:
        """Token ids without the condition's span."""
        return built.ids[: built.start] + built.ids[built.stop :]

    def _ids(self, condition: Condition) -> list[int]:
        if self.style == "token":
            condition = condition if self.factored else (self.join.join(condition),)
            if unknown := [tag for tag in condition if tag not in self.tokens]:
                raise ValueError(f"no token for {unknown}; allowed: {', '.join(self.tokens)}.")
            return [self.first_id + self.tokens.index(tag) for tag in condition]
        text = self.template.format(self.join.join(condition))
        ids = encoding.bare_ids(self.tokenizer, text)
        return ids + [self.first_id] * (self.style == "separator")


# --- the loss ------------------------------------------------------------------------------------


def conditional_loss(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
    ref_logits: torch.Tensor | None = None, *, beta: float = 0.05, alpha: float = 0.06,
    direction: str = "forward", weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """loss = NLL + beta KL - alpha H over response tokens; also nll, kl and entropy, each a scalar.

    logits (batch, time, vocabulary) given feedback and prompt, ids and mask (batch, time); ref_logits
    (batch, time, V) given the prompt alone.  KL is over the first V tokens, so tokens the policy has
    in addition are left out of it and stay in NLL and H; direction as in `losses.kl_divergence`
    ("forward" = KL(reference || policy), the Quark paper's).  `weights`: see `token_weights`.
    """
    weights = token_weights(mask) if weights is None else weights

    def total(values):
        return (values.masked_fill(mask == 0, 0.0) * weights).sum()

    flat = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    parts = {"nll": total(flat.view_as(mask)), "entropy": total(losses.entropy(logits))}
    parts["kl"] = torch.full_like(parts["nll"], torch.nan)
    loss = parts["nll"] - alpha * parts["entropy"]
    if ref_logits is not None:
        shared = logits[..., : ref_logits.shape[-1]]
        parts["kl"] = total(losses.kl_divergence(shared, ref_logits, direction))
        loss = loss + beta * parts["kl"]
    return {"loss": loss, **parts}


def token_weights(mask: torch.Tensor, normalise: str = "token") -> torch.Tensor:
    """Weights (batch, time) that sum to 1: "token" is equal for all tokens, so long responses weigh
    more (the papers' way); "sequence" gives each response the same total.
    """
    if normalise == "token":
        return mask / mask.sum()
    if normalise == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / (mask.sum(1) > 0).sum()
    raise ValueError(f"normalise is {normalise!r}; allowed: 'token', 'sequence'.")


# --- feedback ------------------------------------------------------------------------------------


def scored(judge: Judge, **attributes: Judge) -> Feedback:
    """Feedback in numbers: a reward model's `score`, or any judge; further judges give attributes.

    NaN stands for a score that could not be had.
    """

    def ask(prompts, responses):
        columns = [fn(prompts, responses) for fn in (judge, *attributes.values())]
        rows = [list(map(_number, row)) for row in zip(*columns, strict=True)]
        return [
            {"score": row[0], "attributes": dict(zip(attributes, row[1:], strict=True))}
            for row in rows
        ]

    return ask


def _number(value) -> float | None:
    return float(value) if _known(value) else None


def from_scorer(scorer: scoring.Scorer, sign: float = 1.0) -> Judge:
    """A text scorer as a judge of the response alone: sign x clipped logit; -1 where high is bad."""
    return lambda prompts, responses: sign * scorer.logit(list(responses))


def without_words(judge: Judge, words: Sequence[str]) -> Judge:
    """The judge, blind to these words: parroting the condition earns nothing."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.I)

    def ask(prompts, responses):
        return judge(prompts, [" ".join(pattern.sub(" ", text).split()) for text in responses])

    return ask


def shuffled(feedback: Feedback, seed: int = 0) -> Feedback:
    """The control: a round's verdicts dealt out at random, so a label tells nothing of its response."""

    def ask(prompts, responses):
        found = feedback(prompts, responses)
        draw = int(runtime.content_hash(seed, list(prompts), list(responses))[:15], 16)
        return [found[i] for i in np.random.default_rng(draw).permutation(len(found))]

    return ask


def rubric_critic(
    annotator: rubric.SimulatedAnnotator, source_of: Callable[[str], str] = str, point: float = 0.5
) -> Feedback:
    """The rubric's critique, and a point each for form, accuracy and coverage: words without a network.

    `source_of` finds the passage in the prompt.  A part earns its point above `point`.
    """

    def ask(prompts, responses):
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            source = source_of(prompt)
            found = annotator.rubric.judge(source, response)
            parts = (1 - found.repetition) * found.length, found.support, found.coverage
            text = annotator.critique(source, response, name_facts=False) or "Nothing to criticise."
            rows.append({"score": float(sum(part > point for part in parts)), "feedback": text})
        return rows

    return ask


@dataclass(frozen=True)
class Axis:
    """One thing a critic looks at: met where low <= judge <= high, and what it then says."""

    judge: Judge
    low: float
    high: float
    good: tuple[str, ...]
    bad: tuple[str, ...]


def axes_critic(axes: Sequence[Axis], *, max_words: int = 10, seed: int = 0) -> Feedback:
    """A critic that works offline: praise, "but", blame, in at most `max_words` words; a point an axis.

    Wording varies with the response.  A response whose judge gives NaN gets no feedback.
    """

    def say(prompt, response, met):
        draw = int(runtime.content_hash(seed, prompt, response)[:8], 16)
        texts = [axis.good if ok else axis.bad for axis, ok in zip(axes, met, strict=True)]
        said = [some[draw % len(some)] for some in texts]
        praise = [text for text, ok in zip(said, met, strict=True) if ok]
        blame = [text for text, ok in zip(said, met, strict=True) if not ok]
        return " but ".join(" and ".join(part) for part in (praise, blame) if part)

    def ask(prompts, responses):
        values = np.array([axis.judge(prompts, responses) for axis in axes], dtype=float).T
        rows = []
        for prompt, response, row in zip(prompts, responses, values, strict=True):
            met = [axis.low <= value <= axis.high for axis, value in zip(axes, row, strict=True)]
            text = say(prompt, response, met)
            if len(text.split()) > max_words:
                raise ValueError(
                    f"feedback {text!r} is over {max_words} words; shorten the phrases."
                )
            known = {"score": float(sum(met)), "feedback": text}
            rows.append(dict.fromkeys(known) if np.isnan(row).any() else known)
        return rows

    return ask


def parse_category(text: str | None, names: Sequence[str]) -> str | None:
    """The name that the text's first line starts with (the longest), whatever case and quotes; or None.

    "harmful." is Harmful; "Feedback: 'Harmless and helpful'" is found; "not harmful" is nothing.
    """

    def plain(value: str) -> str:
        return " ".join(re.findall(r"[a-z0-9]+", value.lower()))

    first = next((line for line in (text or "").splitlines() if line.strip()), "")
    said = re.sub(r"^(feedback|label|answer) ", "", plain(first)) + " "
    found = [name for name in names if said.startswith(plain(name) + " ")]
    return max(found, key=len, default=None)


def parse_critique(text: str | None, best: int = 3, max_words: int = 10) -> dict | None:
    """analysis, feedback and score (0 to best) under their headings, or None where one is unusable."""
    pattern = r"analysis\W*:\s*(.+?)\s*feedback\W*:\s*(.+?)\s*score\W*:\W*(\d+)\b"
    found = re.search(pattern, text or "", re.I | re.S)
    if not found:
        return None
    analysis, said, score = found[1].strip(" *#\n"), found[2].strip(" *#\n\"'"), int(found[3])
    if not said or "\n" in said or len(said.split()) > max_words or score > best:
        return None
    return {"analysis": analysis, "feedback": said, "score": float(score)}


def llm_categories(
    client: llm.ChatClient, names: Sequence[str], examples: Sequence[tuple[str, str, str]], *,
    task: str = "Judge the last response to its prompt.", attempts: int = 2, **parameters,
) -> Feedback:  # fmt: skip
    """Feedback from fixed labels, best first, shown by examples (prompt, response, label) (ALT_LMC).

    What names no label is asked again, then missing.  ValueError where an example has another label.
    """
    if wrong := [label for _, _, label in examples if label not in names]:
        raise ValueError(f"examples have labels {wrong}; allowed: {', '.join(names)}.")
    shots = "\n\n".join(f"Prompt: {p}\nResponse: {r}\nFeedback: {f}" for p, r, f in examples)
    head = f"{task} Answer with one of: {'; '.join(names)}.\n\n{shots}\n\n"
    how = {"temperature": 0, "max_tokens": 12, **parameters}

    def parse(text):
        name = parse_category(text, names)
        return name and {"feedback": name, "score": float(len(names) - 1 - names.index(name))}

    def request(prompt, response, replicate):
        text = f"{head}Prompt: {prompt}\nResponse: {response}\nFeedback:"
        return llm.chat(text, replicate=replicate, **how)

    return _asked(client, request, parse, attempts)


def llm_critique(
    client: llm.ChatClient, task: str, axes: Sequence[str], *, attempts: int = 5,
    max_words: int = 10, **parameters,
) -> Feedback:  # fmt: skip
    """Analysis, a sentence of feedback and a point for each axis, in the model's own words (ALT_LMU).

    What misses a heading, or is too long, is asked again, then missing.
    """
    how = {"temperature": 0, "max_tokens": 300, **parameters}
    listed = "\n".join(f"{i}. {axis}" for i, axis in enumerate(axes, 1))
    asks = (
        f"{task} Look at:\n{listed}\n\nAnswer under three headings.\nAnalysis: what you find on each "
        f"point.\nFeedback: one sentence of at most {max_words} words, with strengths and weaknesses."
        f"\nScore: 0 to {len(axes)}, one point for each of the above that is met."
    )

    def request(prompt, response, replicate):
        text = f"{asks}\n\nPrompt:\n{prompt}\n\nResponse:\n{response}"
        return llm.chat(text, replicate=replicate, **how)

    return _asked(client, request, lambda t: parse_critique(t, len(axes), max_words), attempts)


def _asked(client, request: Callable, parse: Callable, attempts: int) -> Feedback:
    def ask(prompts, responses):
        pairs = list(zip(prompts, responses, strict=True))
        found: list[dict] = [{"score": None, "feedback": None}] * len(pairs)
        left = list(range(len(pairs)))
        for attempt in range(attempts):
            asked = [request(*pairs[i], attempt) for i in left]
            replies = client.ask(asked, on_error="keep") if asked else []
            parsed = {i: parse(reply.text) for i, reply in zip(left, replies, strict=True)}
            for i in left:
                found[i] = parsed[i] or found[i]
            left = [i for i in left if not parsed[i]]
        return found

    return ask


# --- the loop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditioningConfig:
    """Settings of `ConditionalTraining`; notebook 50 has the papers' values beside."""

    iterations: int = 4
    prompts_per_iteration: int = 0  # 0: all of them
    samples_per_prompt: int = 1
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    train: str = "all"  # see models.set_trainable
    layers: int = 2
    lora_rank: int = 8
    steps: int = 100  # optimizer steps of an iteration
    batch_size: int = 32
    forward_rows: int = 32  # rows in memory at once; bounds the logits kept
    learning_rate: float = 1e-3
    token_learning_rate: float = 0.0  # of the new tokens' rows; 0: the same
    warmup_steps: int = 0
    decay: bool = False  # linearly to 0, over an iteration if the optimizer is fresh, else over all
    fresh_optimizer: bool = True  # each iteration (TL;DR, HH); False: one for all (toxicity)
    max_grad_norm: float = 1.0
    beta: float = 0.05
    alpha: float = 0.06
    direction: str = "forward"
    normalise: str = "token"
    per_label: int = 0  # training items of each label; 0: all
    balance: str = "pool"  # or "prompt": per_label for each prompt
    fill: bool = False
    only: tuple = ()  # labels that train; filtered behaviour cloning is only=(0,) with style "none"
    without: tuple = ()
    replay: tuple = ("keep",)
    exemplar: str = "best"  # asked for from iteration 2: the best tag, "pool", or a fixed sentence
    eval_samples: int = 1
    checkpoint_every: int = 0  # optimizer steps; 0: at the end of an iteration's training
    seed: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            number = type(value) in (int, float)
            if number and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
                allowed = "at least" if name in MAY_BE_ZERO else "above"
                raise ValueError(f"{name} is {value!r}; it must be {allowed} 0.")
            if value not in (allowed := ALLOWED.get(name, (value,))):
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


class _Rows:
    """Training sequences as one `TokenBatch`; the frozen trunk's states are kept when first computed."""

    def __init__(self, tokens: models.TokenBatch):
        self.tokens = tokens
        self.known = torch.zeros(len(tokens.response_ids), dtype=torch.bool)

    def take(self, index: torch.Tensor) -> models.TokenBatch:
        part = self.tokens.rows(index)
        if not self.known[index].all():
            part.trunk = None
        return part

    def keep(self, index: torch.Tensor, part: models.TokenBatch) -> None:
        if part.trunk is None or self.known[index].all():
            return
        self.tokens.keep_trunk(index, part)
        self.known[index] = True


class ConditionalTraining:
    """One arm: `run` trains `policy` in place and returns its history, one row an iteration.

    Iteration 1 samples the reference without a condition; later ones ask for `config.exemplar`.
    After each, `held_out` prompts are sampled under every request of `requests` (name -> condition;
    default: none, and each label's tags) and scored by `judge`: `evaluation`, a row a sample.  With
    `folder`, every stage's outcome is kept and a killed run goes on from there, to the same pool and
    history; the folder must belong to the same settings (the feedback function is not compared).
    """

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str],
        feedback: Feedback, labeller, conditioner: Conditioner,
        config: ConditioningConfig | None = None, *, held_out: Sequence[str] = (),
        judge: Judge | None = None, requests: Mapping[str, Condition] | None = None,
        folder: Path | str | None = None,
    ):  # fmt: skip
        self.policy, self.tokenizer, self.prompts = policy, tokenizer, list(prompts)
        self.feedback, self.labeller, self.conditioner = feedback, labeller, conditioner
        self.config, self.judge = config or ConditioningConfig(), judge
        self.held_out = list(held_out)
        self.requests = dict(_all_requests(labeller) if requests is None else requests)
        self._check()
        how = {"layers": self.config.layers, "lora_rank": self.config.lora_rank}
        frozen = models.set_trainable(policy, self.config.train, **how)
        embed = policy.get_input_embeddings()
        self.new_rows = [embed.extra] if isinstance(embed, ExtendedEmbedding) else []
        for rows in self.new_rows:
            rows.requires_grad_(True)
        self.network = models.SharedTrunkPolicy(policy, frozen)
        self.trunk = self.network.trunk_layers
        self.weights = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self.pool = DataPool(labeller, self.config.replay)
        self.history: list[dict] = []
        self.tables: list[pd.DataFrame] = []
        self.seconds: dict[str, float] = {}
        self.at, self.log, self.optimizer = (0, 0), [], None  # (iteration, step) of the weights
        self.folder = self._open(folder) if folder else None

    def _check(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to train on.")
        if self.held_out and self.judge is None:
            raise ValueError("held-out prompts need a judge to score their samples.")
        local, samples = getattr(self.labeller, "within", ""), self.config.samples_per_prompt
        if local == "prompt" and samples < len(self.labeller.tags):
            raise ValueError(
                f"{samples} samples a prompt cannot fill {len(self.labeller.tags)} quantiles within a "
                "prompt. Raise samples_per_prompt, or use fewer tags or within='pool'."
            )

    def run(self) -> pd.DataFrame:
        """Train to the end; see the class.  Raises FloatingPointError where a loss is not finite."""
        for iteration in range(len(self.history) + 1, self.config.iterations + 1):
            items = self._stage("sample", iteration, lambda n=iteration: self.sample(n))
            items = self._stage("feedback", iteration, lambda i=items: self.ask(i))
            self._fill_pool(iteration, [_item(row) for row in items])
            started = time.perf_counter()
            with models.fast_float32(self.network):
                self.train(iteration)
            self.seconds["train"] = time.perf_counter() - started
            rows = self._stage("evaluate", iteration, lambda n=iteration: self.evaluate(n))
            self._finish(iteration, rows)
        return pd.DataFrame(self.history)

    @property
    def evaluation(self) -> pd.DataFrame:
        """A row for each held-out sample: iteration and the columns of `measure`."""
        return pd.concat(self.tables, ignore_index=True) if self.tables else pd.DataFrame()

    # --- stages

    def sample(self, iteration: int) -> list[dict]:
        """Items without feedback; prompts go round in a new random order each time through."""
        config = self.config
        count = config.prompts_per_iteration or len(self.prompts)
        turn = range((iteration - 1) * count, iteration * count)
        prompts = [self.prompts[i] for i in self._laps(turn, len(self.prompts), "order")]
        asked = [()] * count if iteration == 1 else self.exemplars(count, iteration)
        built = [self.conditioner.build(p, c) for p, c in zip(prompts, asked, strict=True)]
        drawn = self._sample([b.ids for b in built], config.samples_per_prompt, "sample", iteration)
        return [
            asdict(Item(prompts[place], text, tuple(ids), finished, iteration))
            for place, text, ids, finished in zip(
                drawn.prompt_index, drawn.texts, drawn.response_ids, drawn.finished, strict=True
            )
        ]

    def exemplars(self, count: int, iteration: int) -> list[Condition]:
        """What sampling asks for: the best tag, a fixed sentence, or feedback of the best label there is."""
        if self.config.exemplar == "best":
            best = self.labeller.labels()[0]
            return [self.labeller.condition(None, best)] * count
        if self.config.exemplar != "pool":
            return [(self.config.exemplar,)] * count
        there = set(self.pool.labels())
        best = [label for label in self.labeller.labels() if label in there][:1]
        found = self.pool.select(only=best)
        draws = torch.randint(
            len(found), (count,), generator=self._generator("exemplar", iteration)
        )
        return [self.pool.condition(*found[i]) for i in draws.tolist()]

    def ask(self, items: list[dict]) -> list[dict]:
        """The items with feedback.  Raises ValueError where the provider returns another number."""
        prompts, responses = ([row[name] for row in items] for name in ("prompt", "response"))
        found = self.feedback(prompts, responses)
        if len(found) != len(items):
            raise ValueError(f"feedback gave {len(found)} verdicts for {len(items)} samples.")
        return [{**row, **verdict} for row, verdict in zip(items, found, strict=True)]

    def _fill_pool(self, iteration: int, items: list[Item]) -> None:
        path = self.folder and self.folder / f"{iteration:03d}-pool.jsonl"
        if path and path.exists():
            self.pool = DataPool.load(path, self.labeller, self.config.replay)
            return
        self.pool.add(items)
        if path:
            self.pool.save(path)

    def train(self, iteration: int) -> None:
        """The iteration's optimizer steps, from the checkpoint where it stands within them."""
        config, done = self.config, self.at[1] if self.at[0] == iteration else 0
        chosen = self.pool.select(
            config.per_label, within=config.balance, only=config.only, without=config.without,
            fill=config.fill, seed=self._seed("select", iteration),
        )  # fmt: skip
        if not chosen:
            raise ValueError(f"iteration {iteration}: no item of the pool was chosen to train on.")
        self.selected = len(chosen)
        if done == config.steps:
            return
        if done == 0:
            self.log = []
        if self.optimizer is None or (done == 0 and config.fresh_optimizer):
            self.optimizer = self._make_optimizer()
        rows = self._rows(chosen)
        for step in range(done, config.steps):
            self._step(iteration, step, *rows)
            every = config.checkpoint_every
            if step + 1 == config.steps or (every and (step + 1) % every == 0):
                self.at = (iteration, step + 1)
                self._save()

    def evaluate(self, iteration: int) -> list[dict]:
        """`measure` on the held-out prompts, as rows."""
        if not self.held_out:
            return []
        requests = self.requests
        if self.config.exemplar == "pool":
            drawn = self.exemplars(len(self.held_out), 0)
            requests = {**requests, "pool": drawn}
        return self.measure(requests).assign(iteration=iteration).to_dict("records")

    def measure(self, requests: Mapping[str, Condition | list[Condition]]) -> pd.DataFrame:
        """Samples of the held-out prompts under each request, now: a row a sample.

        Columns request, prompt_index, sample, prompt, text, score (the judge's), tokens, finished, nll
        (summed, under the reference and the raw prompt: exp(sum nll / sum tokens) is the perplexity).
        """
        tables, n = [], self.config.eval_samples
        for name, condition in requests.items():
            asked = condition if isinstance(condition, list) else [condition] * len(self.held_out)
            built = [
                self.conditioner.build(p, c) for p, c in zip(self.held_out, asked, strict=True)
            ]
            drawn = self._sample([b.ids for b in built], n, "held out")
            prompts = [self.held_out[i] for i in drawn.prompt_index]
            raw = [self.conditioner.raw_ids(built[i]) for i in drawn.prompt_index]
            columns = {
                "request": name, "prompt_index": drawn.prompt_index, "sample": [*range(n)] * len(built),
                "prompt": prompts, "text": drawn.texts,
                "score": np.asarray(self.judge(prompts, drawn.texts), dtype=float),
                "tokens": [len(ids) for ids in drawn.response_ids], "finished": drawn.finished,
                "nll": self._reference_nll(raw, drawn.response_ids),
            }  # fmt: skip
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def _finish(self, iteration: int, rows: list[dict]) -> None:
        """The iteration's row of history: what was sampled, learned and measured."""
        config = self.config
        means = pd.DataFrame(self.log).mean().to_dict()
        counts = self.pool.counts().set_index("label")["n"]
        newest = [item.score for item in self.pool.items if item.round == iteration]
        each = config.prompts_per_iteration or len(self.prompts)
        row = {
            "iteration": iteration, "scored": iteration * each * config.samples_per_prompt,
            "missing": self.pool.missing[iteration], "pool": len(self.pool),
            "smallest_label": int(counts.min()), "selected": self.selected,
            "steps": iteration * config.steps,
            "sampled_score": float(np.mean([s for s in newest if s is not None] or [np.nan])),
            **means, "direction": config.direction,
        }  # fmt: skip
        if rows:
            table = pd.DataFrame(rows)
            self.tables.append(table)
            scores = table.groupby("request", sort=False)["score"].mean()
            row |= {f"held_out/{name}": value for name, value in scores.items()}
        row |= {f"seconds_{stage}": self.seconds.get(stage, 0.0) for stage in STAGES}
        self.history.append(row)
        if self.folder:
            lines = "".join(json.dumps(row) + "\n" for row in self.history)
            runtime.write_atomic(self.folder / "history.jsonl", lines)

    # --- one optimizer step

    def _step(self, iteration: int, step: int, conditioned, raw, mask) -> None:
        config = self.config
        index = self._batch(iteration, step, len(mask))
        weights = token_weights(mask[index], config.normalise)
        sums: Counter[str] = Counter()
        for few in torch.arange(len(index)).split(config.forward_rows):
            places = index[few]
            parts = self._loss(conditioned, raw, mask[places], weights[few], places)
            parts["loss"].backward()
            sums.update({name: float(value.detach()) for name, value in parts.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), config.max_grad_norm)
        self.log.append({**sums, "grad_norm": float(norm)})
        if not np.isfinite([sums["loss"], float(norm)]).all():
            raise FloatingPointError(
                f"iteration {iteration}, step {step}: not finite: {self.log[-1]}. Lower learning_rate "
                "or max_grad_norm, or look at the pool."
            )
        done = step if config.fresh_optimizer else (iteration - 1) * config.steps + step
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._share(done)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, conditioned, raw, mask, weights, places) -> dict[str, torch.Tensor]:
        reference = None
        if self.config.beta:
            with torch.no_grad():
                reference = self._logits(raw, places, reference=True)
        logits = self._logits(conditioned, places)
        ids = conditioned.tokens.response_ids[places]
        how = {name: getattr(self.config, name) for name in ("beta", "alpha", "direction")}
        return conditional_loss(logits, ids, mask, reference, weights=weights, **how)

    def _logits(self, rows: _Rows, places: torch.Tensor, reference: bool = False) -> torch.Tensor:
        part = rows.take(places)
        # new rows train below the trunk, so a conditioned prompt's states change with them
        fixed = reference or not self.new_rows
        self.network.trunk_layers = self.trunk if fixed else []
        logits, _ = self.network(part, reference)
        if fixed:
            rows.keep(places, part)
        return part.spread(logits)

    def _share(self, done: int) -> float:
        """Of the peak learning rate, after `done` steps of this optimizer."""
        config = self.config
        total = config.steps * (1 if config.fresh_optimizer else config.iterations)
        rise = min(1.0, (done + 1) / max(1, config.warmup_steps))
        left = (total - done) / max(1, total - config.warmup_steps)
        return rise * (min(1.0, left) if config.decay else 1.0)

    def _batch(self, iteration: int, step: int, count: int) -> torch.Tensor:
        """Row numbers of one step: laps through the rows, each in a new random order."""
        turn = range(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        return torch.tensor(self._laps(turn, count, "mix", iteration))

    def _rows(self, chosen: list[tuple[Item, Label]]) -> tuple[_Rows, _Rows, torch.Tensor]:
        """Conditioned and raw sequences, and the response mask (rows, time)."""
        built = [
            self.conditioner.build(item.prompt, self.pool.condition(item, label))
            for item, label in chosen
        ]
        responses = [list(item.response_ids) for item, _ in chosen]
        conditioned, mask = self._tokens([b.ids for b in built], responses)
        raw, _ = self._tokens([self.conditioner.raw_ids(b) for b in built], responses)
        return _Rows(conditioned), _Rows(raw), mask

    def _tokens(self, prompts, responses) -> tuple[models.TokenBatch, torch.Tensor]:
        side = "right" if self.policy.config.is_encoder_decoder else "left"
        pad, device = encoding.pad_id(self.tokenizer), self.policy.device
        padded = encoding.pad_rows(prompts, pad, side)
        padded += encoding.pad_rows(responses, pad, "right")
        ids, seen, response, mask = (x.to(device) for x in padded)
        return models.TokenBatch(ids, seen, response, mask), mask.float()

    @torch.no_grad()
    def _reference_nll(self, prompts, responses) -> list[float]:
        found = []
        for start in range(0, len(prompts), self.config.forward_rows):
            part = slice(start, start + self.config.forward_rows)
            tokens, mask = self._tokens(prompts[part], responses[part])
            logits = self._logits(_Rows(tokens), torch.arange(len(mask)), reference=True)
            nll = cross_entropy(
                logits.flatten(0, 1), tokens.response_ids.flatten(), reduction="none"
            )
            found += (nll.view_as(mask) * mask).sum(1).tolist()
        return found

    def _sample(self, prompt_ids, n: int, *seed) -> generation.Samples:
        how = {name: getattr(self.config, name) for name in DECODING}
        return generation.sample(
            self.policy, self.tokenizer, prompt_ids, n=n, seed=self._seed(*seed), **how
        )

    # --- stages that were done

    def _stage(self, name: str, iteration: int, make: Callable[[], list[dict]]) -> list[dict]:
        path = self.folder and self.folder / f"{iteration:03d}-{name}.jsonl"
        started = time.perf_counter()
        if path and path.exists():
            return _read_lines(path)
        rows = make()
        if path:
            runtime.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.seconds[name] = time.perf_counter() - started
        return rows

    def _open(self, folder: Path | str) -> Path:
        start = [p.flatten()[:4].tolist() for p in self.weights.values()]
        settings = (asdict(self.config), repr(self.labeller), self.conditioner.settings)
        asked = (self.prompts, self.held_out, self.requests)
        folder = runtime.claim_folder(folder, "conditional training", *settings, *asked, start)
        if (folder / "checkpoint.pt").exists():
            self._load(folder / "checkpoint.pt")
        if (folder / "history.jsonl").exists():
            self.history = _read_lines(folder / "history.jsonl")
            done = [
                _read_lines(folder / f"{r['iteration']:03d}-evaluate.jsonl") for r in self.history
            ]
            self.tables = [pd.DataFrame(rows) for rows in done if rows]
            pool = folder / f"{len(self.history):03d}-pool.jsonl"
            self.pool = DataPool.load(pool, self.labeller, self.config.replay)
        return folder

    def _make_optimizer(self) -> torch.optim.AdamW:
        config, new = self.config, {id(p) for p in self.new_rows}
        groups = [{"params": [p for p in self.weights.values() if id(p) not in new]}]
        groups += [{"params": self.new_rows}] if new else []
        rates = (config.learning_rate, config.token_learning_rate or config.learning_rate)
        for group, rate in zip(groups, rates, strict=False):
            group["peak"] = group["lr"] = rate
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {"at": self.at, "log": self.log, "weights": self.weights}
        state |= {"optimizer": self.optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        runtime.write_atomic(self.folder / "checkpoint.pt", buffer.getvalue())

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.policy.device, weights_only=True)
        for name, parameter in self.weights.items():
            parameter.copy_(state["weights"][name])
        self.at, self.log = tuple(state["at"]), state["log"]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    # --- random numbers

    def _seed(self, *key) -> int:
        return int(runtime.content_hash(self.config.seed, *key)[:8], 16)

    def _generator(self, *key) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*key))

    def _laps(self, turn: range, count: int, *key) -> list[int]:
        """The turn-th of an endless sequence: 0 to count - 1 in a new random order each lap."""
        places = [divmod(i, count) for i in turn]
        orders = {
            lap: torch.randperm(count, generator=self._generator(*key, lap)).tolist()
            for lap in dict(places)
        }
        return [orders[lap][place] for lap, place in places]


def _all_requests(labeller) -> dict[str, Condition]:
    """No condition, and the tags of each label where it has tags."""
    found: dict[str, Condition] = {"none": ()}
    if isinstance(labeller, FreeText):
        return found
    for label in labeller.labels():
        condition = labeller.condition(None, label)
        found[", ".join(condition)] = condition
    return found
