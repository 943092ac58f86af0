"""ROUGE-Lsum of answers against references (Lin 2004), as fine-grained RLHF measures them.

Words are lower-case letters and digits, those of more than three letters cut to their stem (Porter 1980).
For each sentence of the reference, the words that its longest common subsequences with the answer's sentences
cover are counted, each word of the answer once; F is the harmonic mean of the shares covered of both texts.

Simplified: sentences are cut by the rule of `segments`, where the reference code asks NLTK.  (The counting is
ours because `rouge_score` comes as source alone, which not every machine can build.)
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from nltk.stem.porter import PorterStemmer

from lib.segments import Segmenter

STEMMER = PorterStemmer()


def rouge_lsum(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(texts,) F in per cent, of each text against the one of its references that it is nearest to."""
    rows = zip(texts, references, strict=True)
    return np.array([100 * max(_f(text, one) for one in several) for text, several in rows])


def _f(text: str, reference: str) -> float:
    ours, theirs = (_sentences(one) for one in (text, reference))
    sizes = [sum(map(len, sentences)) for sentences in (ours, theirs)]
    if min(sizes) == 0:
        return 0.0
    left = [Counter(word for words in side for word in words) for side in (ours, theirs)]
    hits = 0
    for sentence in theirs:
        covered = set()
        for other in ours:
            covered |= _common_places(sentence, other)
        for place in sorted(covered):
            word = sentence[place]
            if left[0][word] > 0 and left[1][word] > 0:
                hits += 1
                left[0][word] -= 1
                left[1][word] -= 1
    return 2 * hits / sum(sizes)  # of precision hits / sizes[0] and recall hits / sizes[1]


def _sentences(text: str) -> list[list[str]]:
    """The stems of each sentence's words."""
    cut = Segmenter("sentence").texts(text)
    return [[stem(word) for word in re.findall(r"[a-z0-9]+", one.lower())] for one in cut]


def _common_places(first: list[str], second: list[str]) -> set[int]:
    """Places in `first` of a longest common subsequence of both."""
    length = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, word in enumerate(first, 1):
        for j, other in enumerate(second, 1):
            longest = max(length[i - 1, j], length[i, j - 1])
            length[i, j] = length[i - 1, j - 1] + 1 if word == other else longest
    places, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif length[i, j - 1] > length[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return places


@functools.cache
def stem(word: str) -> str:
    """The stem of a lower-case word, as `rouge_score` takes it; three letters or fewer stay as they are."""
    return STEMMER.stem(word) if len(word) > 3 else word
