"""ROUGE-Lsum of answers against references (Lin 2004), as fine-grained RLHF measures them.

`rouge_score` counts it, with Porter's stems.  Simplified: sentences are cut by the rule of `segments`, where
the reference code asks NLTK.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from lib.segments import Segmenter

NAME = "rougeLsum"


def rouge_lsum(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(texts,) F in per cent, of each text against the one of its references that it is nearest to."""
    scorer = RougeScorer([NAME], use_stemmer=True)
    rows = zip(texts, references, strict=True)
    best = [scorer.score_multi(list(map(_lines, each)), _lines(text)) for text, each in rows]
    return np.array([100 * scores[NAME].fmeasure for scores in best])


def _lines(text: str) -> str:
    """A sentence a line."""
    return "\n".join(Segmenter("sentence").texts(text))
