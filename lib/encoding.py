"""Texts as token ids, defined once: a prompt, a prompt with its response, the end, padded rows, batches.

Whatever samples, trains, scores or conditions asks here, so that no model is trained or measured on other
ids than it is sampled with.  A prompt is a plain text, or one that `data.apply_template` made.  A start
token stands before it once where the tokenizer writes one, even where the chat template wrote one too.
"""

from __future__ import annotations

import functools
import inspect
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLOSING = ".,;:!?)]}%…'’”"  # no space stands before these,
OPENING = "([{\"'“‘"  # and none after these


# --- prompts and responses -----------------------------------------------------------------------


class Encoded(NamedTuple):
    """Token ids of a prompt, and of the response that follows it."""

    prompt: list[int]
    response: list[int]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str = "", *, joined: bool = False
) -> Encoded:
    """Token ids of a prompt with its special tokens, and of its response without any.

    The two are tokenised apart, as when sampling.  joined=True is for a response that was written in one
    go with the prompt: tokenised together, and split where the prompt's own tokens end, so that a token
    which joins the end of the one with the start of the other counts as response.  An empty prompt is the
    start token alone, or has no ids where the tokenizer has no such token.
    """
    before = one_start(tokenizer, tokenizer(prompt, verbose=False)["input_ids"])
    if not response or not joined:
        return Encoded(before, bare_ids(tokenizer, response))
    bare = bare_ids(tokenizer, prompt)
    lead = before[: len(before) - len(bare)]
    if lead + bare != before:  # the tokenizer closes a prompt with a token: nothing joins over it
        return Encoded(before, bare_ids(tokenizer, response))
    text = prompt + response
    if drops_leading_space(tokenizer):
        text = join_texts(prompt, response)
    whole = bare_ids(tokenizer, text)
    shared = count_shared([whole, bare])
    if not lead and not shared:
        lead = start_ids(tokenizer)
    return Encoded(lead + whole[:shared], whole[shared:])


def bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's own tokens, without those that a tokenizer writes around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_places(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """The text's own tokens, and (start, end) of the characters of each.

    A tokenizer that is no fast one does not say where its tokens stand: growing parts are decoded then.
    Of a letter in several tokens the last one has it, and the others none.  Raises ValueError where decoding
    does not give the text back (white space at its end aside).
    """
    if tokenizer.is_fast:
        options = {"add_special_tokens": False, "verbose": False}
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])
    ids = bare_ids(tokenizer, text)
    parts = (tokenizer.decode(ids[: n + 1]) for n in range(len(ids)))
    ends = [len(os.path.commonprefix([part, text])) for part in parts]
    if ids and text[ends[-1] :].strip():
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text, nor gives the text "
            f"back: {text[ends[-1] :][:40]!r} is lost. Try a model whose tokenizer is a fast one."
        )
    return ids, list(zip([0, *ends], ends, strict=False))


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, [] where this tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def one_start(tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids without a doubled start token: the chat template writes one, the tokenizer another."""
    start = start_ids(tokenizer)
    ids = list(ids) or start
    return ids[1:] if start and ids[:2] == start + start else ids


def writes_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts its start token before every text by itself."""
    start = start_ids(tokenizer)
    return bool(start) and tokenizer("a")["input_ids"][:1] == start


def count_shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at the start."""
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


# --- prompt and reply as one text ----------------------------------------------------------------


def join_texts(prompt: str, reply: str) -> str:
    """The prompt and the reply that continues it as one text, with the space between them put back.

    A reply that a sentencepiece tokenizer decodes, or that a chat endpoint sends, has lost it.  None is
    put where there is white space already, at punctuation, or in writing without spaces (Chinese).
    """
    if not prompt or not reply:
        return prompt + reply
    before, after = prompt[-1], reply[0]
    spaced = before.isspace() or after.isspace()
    marked = before in OPENING or after in CLOSING
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in (before, after))
    return prompt + reply if spaced or marked or wide else f"{prompt} {reply}"


def drops_leading_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding loses the space before a text (sentencepiece, words), though it keeps those inside."""

    def round_trip(text: str) -> str:
        return tokenizer.decode(bare_ids(tokenizer, text))

    return " " in round_trip("a a") and round_trip(" a") == round_trip("a")


# --- the end -------------------------------------------------------------------------------------


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> list[int]:
    """Every token that ends a text: the tokenizer's own first, then the model's further ones.

    A model may stop at several (end of turn and end of text); its generation_config names them.
    """
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    if not isinstance(configured, list | tuple):
        configured = [configured]
    ends = [tokenizer.eos_token_id, *configured]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def is_finished(ids: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether a response's last token is an end."""
    return len(ids) > 0 and int(ids[-1]) in ends


def with_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids and one end token: the first of `ends`, where none stands there yet and there is one."""
    if is_finished(ids, ends) or not ends:
        return list(ids)
    return [*ids, ends[0]]


# --- rows of a batch -----------------------------------------------------------------------------


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands in padding.  Masks decide, so without a pad token any other does: the end token, or 0."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, longest) padded on one side ("left" or "right"), and their mask (1 = real token)."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[line, place] = torch.tensor(row, dtype=torch.long)
        mask[line, place] = 1
    return ids, mask


def decoder_inputs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: object = None,
    *,
    use_cache: bool = False,
) -> dict:
    """Arguments with which a decoder-only model reads new ids (rows, time), after what the cache holds.

    mask (rows, cached + time) is 1 at real tokens.  Positions count those alone, so that padding on either
    side changes nothing.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, cache_argument(model): cache}
    inputs["use_cache"] = use_cache or cache is not None
    if "position_ids" in accepted(type(model)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -ids.shape[1] :]
    return inputs


@functools.cache
def accepted(kind: type) -> frozenset[str]:
    """Names of the arguments that models of this class take."""
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: PreTrainedModel) -> str:
    """What this model calls its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    The old name is still taken, with a warning, until 5.40; signatures and outputs have lost it already.
    """
    return "cache" if "cache" in accepted(type(model)) else "past_key_values"


def cache_of(output: object) -> object:
    """The cache in a model's output, None where it has none; for both names see `cache_argument`."""
    return output.get("cache", output.get("past_key_values"))


def token_batches(
    lengths: Sequence[int],
    budget: float,
    *,
    rows: int | None = None,
    together: Sequence | None = None,
) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, with rows x longest <= budget tokens.

    A row that is longer alone makes a batch.  `rows`: at most so many in a batch.  `together`: a key for
    each row; rows with equal keys stand side by side, in the order of their keys.
    """
    keys = [0] * len(lengths) if together is None else together
    order = sorted(range(len(lengths)), key=lambda i: (keys[i], -lengths[i], i))
    batch: list[int] = []
    longest = 1
    for i in order:
        longest = max(longest, lengths[i])
        full = len(batch) == rows or longest * (len(batch) + 1) > budget
        if batch and full:
            yield batch
            batch = []
            longest = max(1, lengths[i])
        batch.append(i)
    if batch:
        yield batch
