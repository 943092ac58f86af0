"""Segments of a response, and the token at which each ends: where dense rewards are paid.

Wu et al. (NeurIPS 2023, section 2) cut a response into sub-sentences, sentences, or not at all, one unit for
each reward model, and pay a segment's reward at its last token.  Sub-sentences: inside a sentence a new
piece may start after a word that ends in , ; ! or ? while more than five words follow; a piece shorter than
five words joins the piece before it.

Simplified: sentences come from a rule (full stops with a list of abbreviations, line breaks), not from a
parser.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

UNITS = ("sub_sentence", "sentence", "sequence")
SHORTEST = 5  # words: what is shorter joins its neighbour, as in the reference
BREAKS = ",;!?"
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』”’)]*|\n")
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘«]*\Z")
_TITLES = re.compile(
    r"(mrs?|ms|dr|prof|st|jr|sr|vs|mt|gen|col|capt|lt|sgt|rev|hon|gov|sen|rep|messrs|approx|cf|viz)",
    re.I,
)
_NUMBERED = re.compile(
    r"(nos?|vol|pp?|fig|sec|ch|art|ca?|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)", re.I
)


@dataclass(frozen=True)
class Segmenter:
    """Cuts a text into segments of one `unit`: "sub_sentence", "sentence" or "sequence" (all of it).

    Raises ValueError for another name.
    """

    unit: str

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; allowed: {', '.join(UNITS)}.")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the segments: they partition the text, white space leads the next segment.

        "" has none; a text of white space is one segment.
        """
        if self.unit == "sequence" or not text.strip():
            return [(0, len(text))] if text else []
        spans = _partition(_sentence_ends(text), text)
        if self.unit == "sentence":
            return spans
        return _partition([end for span in spans for end in _piece_ends(text, *span)], text)

    def texts(self, text: str) -> list[str]:
        """The segments themselves, without white space around them."""
        return [text[start:end].strip() for start, end in self.spans(text)]

    def token_ends(
        self, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]
    ) -> np.ndarray:
        """(segments,) index into a response's generated ids of each segment's last token.

        The text is the ids' decoding without special tokens (as in `generation.Samples.texts`).  Segments
        that end inside one token share it; whatever follows the last segment's text (the end token) belongs
        to that segment, so it ends at the last id.  No text, no segments: shape (0,).
        """
        ids, places = list(map(int, token_ids)), []
        covered = _coverage(tokenizer, ids)
        spans = self.spans(tokenizer.decode(ids, skip_special_tokens=True))
        for _, end in spans[:-1]:
            places.append(bisect.bisect_left(range(len(ids)), end, key=covered))
        return np.array(places + [len(ids) - 1] * bool(spans), dtype=int)


def _coverage(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Callable[[int], int]:
    """For a token's index, how many characters of the whole text stand once it is decoded.

    Growing prefixes of the ids are decoded, never text tokenised anew.  A character split over several
    tokens counts with the one that completes it; one that cannot be decoded, with the one that begins it.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)

    @functools.cache
    def covered(index: int) -> int:
        prefix = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
        return len(os.path.commonprefix([prefix, text]))

    return covered


def _partition(ends: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Segments between the ends of their last words; what follows the last one joins it."""
    ends = sorted({len(text[:end].rstrip()) for end in ends} - {0, len(text.rstrip())})
    return list(itertools.pairwise([0, *ends, len(text)]))


def _piece_ends(text: str, start: int, end: int) -> list[int]:
    """Ends of the sub-sentences of the sentence text[start:end]."""
    words = [word.span() for word in re.compile(r"\S+").finditer(text, start, end)]
    starts = [0]  # word numbers
    for i in range(1, len(words) - SHORTEST):
        if text[words[i - 1][1] - 1] not in BREAKS:
            continue
        if i - starts[-1] >= SHORTEST:
            starts.append(i)
        elif len(starts) > 1:  # the piece is short: it joins the one before, and a new one starts
            starts[-1] = i
    return [words[i - 1][1] for i in [*starts[1:], len(words)]]


def _sentence_ends(text: str) -> list[int]:
    return [stop.end() for stop in _END.finditer(text) if _ends_sentence(text, stop)]


def _ends_sentence(text: str, stop: re.Match) -> bool:
    """Whether a stop is the end of a sentence: not after an abbreviation, an initial, a list's number."""
    if stop.group()[0] in "\n。！？":
        return True
    following = text[stop.end() :].lstrip()[:1]
    if following.islower():
        return False
    if stop.group() != ".":
        return True
    line = text.rfind("\n", 0, stop.start()) + 1
    before = text[max(line, stop.start() - 40) : stop.start()]
    word = _LAST_WORD.search(before).group()
    if word.isdigit() and before.strip() == word:  # "1. First point"
        return False
    initial = len(word) == 1 and word.isupper() and word != "I"
    dotted = re.fullmatch(r"(\w\.)+\w", word) is not None  # U.S., e.g.
    numbered = _NUMBERED.fullmatch(word) and following.isdigit()
    return not (initial or dotted or numbered or _TITLES.fullmatch(word))
