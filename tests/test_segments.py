"""Segments partition every text, and each ends at the token that writes its last character."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.segments import UNITS, Segmenter

PARTS = st.sampled_from(
    [
        *("Mr. Smith", "e.g. this", "the U.S. and", "No. 5", "J. R.", "1. First.", " ", ",", "."),
        *("\n- one\n- two\n", "\n\n", "x = f(a, b); return", "    if a.b:\n", "# done! ", "..."),
        *(
            "Ünïcödé, ja",
            "第一。第二！",
            "👩\u200d👩\u200d👧 ok?",
            "\u00a0",
            "\u2028",
            "e\u0301",
            "?!",
        ),
        *(", and then he came back to us again", "He said \u201cNo!\u201d Then"),
    ]
)
TEXTS = st.one_of(st.text(), st.lists(PARTS).map("".join), st.lists(PARTS).map(" ".join))
TEXTS_OF_WORDS = st.lists(st.sampled_from(["a", "bc,", "d;", "e.", "F", "g!"]), min_size=1)


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level pieces with some merges, as GPT-2 and Llama 3 have them; <eos> is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(["He came. He saw, and then, . He?! , and"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def piece_bytes(tokenizer, token: int) -> bytes:
    """The bytes a byte-level token writes, read off its name."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    table = {chr(b): b for b in shown}
    hidden = [b for b in range(256) if b not in shown]
    table |= {chr(256 + i): b for i, b in enumerate(hidden)}
    assert sorted(table) == names
    name = tokenizer.convert_ids_to_tokens(token)
    return b"" if name == "<eos>" else bytes(table[c] for c in name)


def ends_by_bytes(tokenizer, ids, spans, text) -> list[int]:
    """The oracle: the token whose bytes reach the segment's last byte."""
    written = np.cumsum([len(piece_bytes(tokenizer, i)) for i in ids])
    wanted = [len(text[:end].encode()) for _, end in spans]
    return [int(np.argmax(written >= w)) for w in wanted[:-1]] + [len(ids) - 1] * bool(spans)


# --- the segments themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@given(text=TEXTS)
def test_segments_partition_the_text(unit, text):
    spans = Segmenter(unit).spans(text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(a < b for a, b in spans)
    assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
    if text.strip():
        assert all(text[a:b].strip() for a, b in spans)
    assert all(not text[b - 1].isspace() for _, b in spans[:-1])


@given(text=TEXTS)
def test_sub_sentences_lie_within_sentences(text):
    sentences = {end for _, end in Segmenter("sentence").spans(text)}
    assert sentences <= {end for _, end in Segmenter("sub_sentence").spans(text)}


@given(words=TEXTS_OF_WORDS)
def test_sub_sentence_rule_against_a_plain_reading_of_it(words):
    text = " ".join(words)
    expected = []
    for sentence in Segmenter("sentence").texts(text):
        pieces, piece, left = [], [], sentence.split()
        while left:  # word by word; a new piece may start where more than five words follow
            word = left.pop(0)
            if piece and piece[-1][-1] in ",;!?" and len(left) >= 5:
                if len(piece) >= 5:
                    pieces, piece = pieces + [piece], []
                elif pieces:
                    pieces[-1], piece = pieces[-1] + piece, []
            piece.append(word)
        expected += [" ".join(p) for p in pieces + [piece]]
    assert Segmenter("sub_sentence").texts(text) == expected


@pytest.mark.parametrize(
    "text, sentences",
    [
        (
            "Mr. J. R. Lee left the U.S. in 1990. He won!",
            ["Mr. J. R. Lee left the U.S. in 1990.", "He won!"],
        ),
        ("It grew, e.g. in No. 5. Then it fell.", ["It grew, e.g. in No. 5.", "Then it fell."]),
        ('He said "No!" Then he left.', ['He said "No!"', "Then he left."]),
        ("Two:\n1. First point.\n2. Second", ["Two:", "1. First point.", "2. Second"]),
        ("Version 2.5 of a.b is out. wait", ["Version 2.5 of a.b is out. wait"]),
        ("def f(x):\n    return x.y", ["def f(x):", "return x.y"]),
        ("第一。第二！好", ["第一。", "第二！", "好"]),
        ("Was it I. No... Perhaps.", ["Was it I.", "No...", "Perhaps."]),
    ],
)
def test_sentences_of_hard_texts(text, sentences):
    assert Segmenter("sentence").texts(text) == sentences


def test_short_pieces_join_the_one_before():
    first, second = "the oldest of the three brothers,", "who had never been there before,"
    tail = "came home late in the cold winter"
    cut = Segmenter("sub_sentence").texts
    assert cut(f"{first} {second} {tail}.") == [first, second, f"{tail}."]
    assert cut(f"{first} {second} he said, {tail}.") == [first, f"{second} he said,", f"{tail}."]
    assert cut(f"No, {first} {tail}.") == [f"No, {first}", f"{tail}."]
    assert cut(f"{first} at last.") == [f"{first} at last."]


def test_empty_and_blank_texts():
    for unit in UNITS:
        assert Segmenter(unit).spans("") == []
        assert Segmenter(unit).spans(" \n ") == [(0, 3)]


# --- the tokens they end at ----------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@given(text=TEXTS, finished=st.booleans(), kept=st.floats(0, 1))
@settings(max_examples=60)
def test_ends_are_where_the_bytes_say(byte_level, unit, text, finished, kept):
    ids = byte_level(text)["input_ids"]
    ids = ids if finished else ids[: round(len(ids) * kept)]  # cut anywhere, inside a character too
    ids = ids + [byte_level.eos_token_id] * finished
    text = byte_level.decode(ids, skip_special_tokens=True)
    found = Segmenter(unit).token_ends(byte_level, ids)
    spans = Segmenter(unit).spans(text)
    assert len(found) == len(spans) and (np.diff(found) >= 0).all()
    if "\ufffd" not in text:
        assert found.tolist() == ends_by_bytes(byte_level, ids, spans, text)


@given(ids=st.lists(st.integers(0, 299), max_size=60))
@settings(max_examples=60)
def test_any_ids_have_ends_in_order(byte_level, ids):
    """Sampled ids need not be what the tokenizer would write, nor valid UTF-8."""
    segmenter = Segmenter("sub_sentence")
    found = segmenter.token_ends(byte_level, ids)
    text = byte_level.decode(ids, skip_special_tokens=True)
    assert len(found) == len(segmenter.spans(text)) and (np.diff(found) >= 0).all()
    assert (found >= 0).all() and (found < max(1, len(ids))).all()
    assert len(found) == 0 or found[-1] == len(ids) - 1


def test_one_token_that_ends_two_segments_serves_both(byte_level):
    byte_level = byte_level.__class__(
        tokenizer_object=byte_level.backend_tokenizer, eos_token="<eos>"
    )
    byte_level.add_tokens(["!\nNo?\n"])
    ids = byte_level("Yes!\nNo?\nWhy", add_special_tokens=False)["input_ids"]
    found = Segmenter("sentence").token_ends(byte_level, ids)
    place = byte_level.convert_ids_to_tokens(ids).index("!\nNo?\n")
    assert found.tolist() == [place, place, len(ids) - 1]


def test_empty_responses_have_no_ends(byte_level, tiny):
    for ids in ([], [byte_level.eos_token_id]):
        for unit in UNITS:
            assert Segmenter(unit).token_ends(byte_level, ids).shape == (0,)
    _, words = tiny
    ids = words("the cat sat . the dog ran .", add_special_tokens=False)["input_ids"]
    assert Segmenter("sequence").token_ends(words, ids).tolist() == [len(ids) - 1]


def test_real_tokenizer_and_texts(policy):
    _, tokenizer = policy
    rng = random.Random(0)
    texts = [
        "He came, he saw and he did not win. \u201cWhy?\u201d we asked: 第一。 👩‍👧 e\u0301. The end\n- a\n"
    ]
    for text in texts * 20:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = rng.randint(1, len(ids))
        for unit in UNITS:
            segmenter, part = Segmenter(unit), ids[:cut]
            shown = tokenizer.decode(part, skip_special_tokens=True)
            ends = segmenter.token_ends(tokenizer, part)
            for (_, end), place in list(zip(segmenter.spans(shown), ends, strict=True))[:-1]:
                assert tokenizer.decode(part[: place + 1]).startswith(shown[:end])
                assert not tokenizer.decode(part[:place]).startswith(shown[:end])


# --- what is refused -----------------------------------------------------------------------------


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="unit is 'word'; allowed: sub_sentence"):
        Segmenter("word")
