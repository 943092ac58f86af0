"""Scores and critiques -> labels, and the pool of labelled samples that each iteration draws from."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from lib import runtime, training
from lib.answers import first_line

Label = int | tuple[int, ...]  # 0 is best
Condition = tuple[str, ...]  # () is no condition


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
        return is_number(self._value(item))

    def __call__(self, items: Sequence[Item]) -> list[int]:
        labels = [0] * len(items)
        for places in _groups(items, self.within).values():
            scores, keys = [self._value(items[i]) for i in places], [items[i].key for i in places]
            made = quantile_labels(scores, len(self.tags), ties=self.ties, keys=keys)
            for place, label in zip(places, made, strict=True):
                labels[place] = label
        return labels

    def _value(self, item: Item) -> float | None:
        return item.score if self.of == "score" else item.attributes.get(self.of)


def parse_category(text: str | None, names: Sequence[str]) -> str | None:
    """The name that the text's first line (after any reasoning) starts with, the longest; or None.

    Whatever case and quotes: "harmful." is Harmful; "Feedback: 'Harmless and helpful'" is found; "not
    harmful" is nothing.
    """

    def plain(value: str) -> str:
        return " ".join(re.findall(r"[a-z0-9]+", value.lower()))

    line = re.sub(r"^(feedback|label|answer) ", "", plain(first_line(text))) + " "
    matching = [name for name in names if line.startswith(plain(name) + " ")]
    return max(matching, key=len, default=None)


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
        scored = is_number(item.score) and self.worst <= item.score <= self.best
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


def is_number(value) -> bool:
    """Whether a score is there and finite."""
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
        staying = []
        for places in self._by_label("prompt").values():
            stay = int(len(places) * (1 - value) + 1e-9)
            staying += [self.items[i] for i in self._shuffled(places, newest)[:stay]]
        return staying

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
        return training.write_rows(path, rows)

    @classmethod
    def load(cls, path: Path | str, labeller, replay: tuple = ("keep",)) -> DataPool:
        """The pool that `save` wrote; labels are made anew by `labeller`."""
        head, *rows = training.read_rows(path)
        pool = cls(labeller, replay)
        pool.items = [to_item(row) for row in rows]
        pool.missing = Counter({int(name): n for name, n in head["missing"].items()})
        return pool


def to_item(row: dict) -> Item:
    """The item that a stored row describes."""
    return Item(**{**row, "response_ids": tuple(row["response_ids"])})
