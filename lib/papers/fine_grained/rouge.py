"""ROUGE-Lsum of answers against references (Lin 2004), as fine-grained RLHF measures them.

Words are lower-case letters and digits, those of more than three letters cut to their stem (Porter 1980).
For each sentence of the reference, the words that its longest common subsequences with the answer's sentences
cover are counted, each word of the answer once; F is the harmonic mean of the shares covered of both texts.

Simplified: sentences are cut by the rule of `segments`, where the reference code asks NLTK.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lib.segments import Segmenter

STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
}  # fmt: skip
STEP_3 = {
    "icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": "",
}  # fmt: skip
STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
    "ism", "ate", "iti", "ous", "ive", "ize",
)  # fmt: skip
IRREGULAR = {"dying": "die", "lying": "lie", "tying": "tie", "news": "news", "skies": "sky"}
IRREGULAR |= {"innings": "inning", "outings": "outing", "cannings": "canning"}
IRREGULAR |= {word: word for word in ("inning", "outing", "canning", "howe")}
IRREGULAR |= {word: word for word in ("proceed", "exceed", "succeed")}


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


# --- Porter's stemmer ----------------------------------------------------------------------------


@functools.cache
def stem(word: str) -> str:
    """The stem of a lower-case word; words of up to three letters stay as they are."""
    if len(word) <= 3:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and len(word) > 2 and not _is_vowel(word, len(word) - 2):
        word = word[:-1] + "i"
    word = _replace(word, STEP_2)
    if word.endswith("logi") and _measure(word[:-3]) > 0:
        word = word[:-1]
    word = _replace(word, STEP_3)
    return _last(word)


def _is_vowel(word: str, place: int) -> bool:
    letter = word[place]
    if letter == "y":
        return place > 0 and not _is_vowel(word, place - 1)
    return letter in "aeiou"


def _measure(word: str) -> int:
    """How often a vowel is followed by a consonant: Porter's m."""
    kinds = "".join("v" if _is_vowel(word, i) else "c" for i in range(len(word)))
    return len(re.findall("v+c+", kinds))


def _has_vowel(word: str) -> bool:
    return any(_is_vowel(word, i) for i in range(len(word)))


def _is_double(word: str) -> bool:
    """Whether the word ends in a doubled consonant."""
    doubled = len(word) > 1 and word[-1] == word[-2]
    return doubled and not _is_vowel(word, len(word) - 1)


def _is_short(word: str) -> bool:
    """Whether the word ends in consonant, vowel, consonant (not w, x, y)."""
    n = len(word)
    if n == 2:  # NLTK's: vowel, consonant
        return _is_vowel(word, 0) and not _is_vowel(word, 1)
    kinds = [_is_vowel(word, i) for i in range(n - 3, n)] if n > 2 else []
    return kinds == [False, True, False] and word[-1] not in "wxy"


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for ending, new in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            return word.removesuffix(ending) + new
    return word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        start = word.removesuffix(ending)
        if start == word or not _has_vowel(start):
            continue
        if start.endswith(("at", "bl", "iz")):
            return start + "e"
        if _is_double(start) and start[-1] not in "lsz":
            return start[:-1]
        if _measure(start) == 1 and _is_short(start):
            return start + "e"
        return start
    return word


def _replace(word: str, endings: dict[str, str]) -> str:
    """The longest of these endings replaced, where a syllable stands before it."""
    for ending in sorted(endings, key=len, reverse=True):
        if word.endswith(ending):
            start = word.removesuffix(ending)
            if _measure(start) == 0:
                return word
            changed = start + endings[ending]
            return _replace(changed, endings) if ending == "alli" else changed
    return word


def _last(word: str) -> str:
    """Endings behind two syllables, a last e, a doubled l."""
    for ending in sorted(STEP_4, key=len, reverse=True):
        if word.endswith(ending):
            start = word.removesuffix(ending)
            if _measure(start) > 1 and (ending != "ion" or start.endswith(("s", "t"))):
                word = start
            break
    if word.endswith("e"):
        start = word[:-1]
        if _measure(start) > 1 or (_measure(start) == 1 and not _is_short(start)):
            word = start
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word
