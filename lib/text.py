"""Texts by counting: words, n-grams, repetition, scripts, and the fluency panel."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np


def check_texts(texts: Sequence[str]) -> None:
    """Raise ValueError that names the first entry that is not a string."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of strings.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(
                f"texts[{index}] is {kind}, not a string; drop or fill such rows first."
            )


def is_empty(text: str) -> bool:
    """True for a text without a visible character: white space, or marks of no width (U+200B), alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


# --- fluency -------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words: runs of letters and digits, with inner apostrophes."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The text's runs of n words."""
    tokens = words(text)
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Unique n-grams / all n-grams, pooled over the texts; NaN where there is none.

    Falls as more text is pooled: compare equal amounts of text only.
    """
    grams = [gram for text in texts for gram in word_ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def distinct_n_by_prompt(groups: Sequence[Sequence[str]], n: int) -> float:
    """Unique n-grams / all *words*, pooled over one prompt's texts, then averaged over prompts.

    The definition of ALT and Quark's toxicity task; prompts without a word are left out.
    """
    counts = [
        (
            len({gram for text in texts for gram in word_ngrams(text, n)}),
            sum(len(words(t)) for t in texts),
        )
        for texts in groups
    ]
    shares = [unique / total for unique, total in counts if total]
    return float(np.mean(shares)) if shares else float("nan")


def script_share(texts: Sequence[str]) -> np.ndarray:
    """Share of each text's letters that are not Latin, float64 (n,); 0 for a text without letters."""

    def share(text: str) -> float:
        letters = [] if text.isascii() else [c for c in text if c.isalpha()]
        return float(np.mean(["LATIN" not in unicodedata.name(c, "") for c in letters] or [0.0]))

    return np.array([share(text) for text in texts])


def repetition_share(text: str, n: int = 3) -> float:
    """Share of a text's word n-grams that occurred before in it; NaN where it has none."""
    return 1 - distinct_n([text], n)


def fluency_panel(texts: Sequence[str]) -> dict[str, float]:
    """Does it still read like text?  What a falling toxicity score must be shown beside.

    distinct_1..3 (pooled), empty_share, non_latin_share (texts with > 20% non-Latin letters, our
    rule for RewardLM's drift into other scripts), mean_words, repetition (mean share of repeated 3-grams), n.
    """
    check_texts(texts)
    if not len(texts):
        raise ValueError("texts is empty; the fluency panel needs at least one text.")
    repeated = [share for share in map(repetition_share, texts) if not np.isnan(share)]
    return {
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "empty_share": float(np.mean([is_empty(text) for text in texts])),
        "non_latin_share": float((script_share(texts) > 0.2).mean()),
        "mean_words": float(np.mean([len(words(text)) for text in texts])),
        "repetition": float(np.mean(repeated)) if repeated else float("nan"),
        "n": len(texts),
    }
