"""The policy whose answers people mark: its questions, what it learns from, and what it has learned.

Wu et al. fine-tune T5-large on 1,000 questions (prompt: question and passages, target: the reference answer)
and draw four answers a question for the annotators.

Simplified: decoder-only models are fine-tuned too; their prompts end in "answer:".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import data, logprobs, sft
from lib.papers.fine_grained import schema

Question = tuple[str, list[tuple[str, str]], str]  # question, (title, text) of passages, answer
# a first sentence that says what its subject is
_DEFINITION = re.compile(r"[A-Z][^.!?]{30,200} (?:is|was|are|were) [^.!?]{20,200}[.]")


def from_file(
    path: Path | str, *, tokenizer: PreTrainedTokenizerBase, max_prompt: int | None, seed: int = 0
) -> list[Question]:
    """Questions of a file of `schema.load_questions` with their first answer, in a seeded order.

    `max_prompt`: only those whose whole prompt is within so many tokens; ValueError where none is.
    """
    rows = [
        (r["question"], schema.passages_of(r), r["answer"][0]) for r in schema.load_questions(path)
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    rows = [rows[i] for i in order]
    if max_prompt is None:
        return rows
    prompts = [schema.prompt(question, passages, "") for question, passages, _ in rows]
    sizes = [schema.prompt_size(tokenizer, prompt) for prompt in prompts]
    fit = [row for row, size in zip(rows, sizes, strict=True) if size <= max_prompt]
    if not fit:
        raise ValueError(f"{path}: no prompt is within {max_prompt} tokens. Try a larger SCALE.")
    return fit


def wikipedia_pairs(n: int, *, words: tuple[int, int], seed: int = 0) -> list[Question]:
    """*What is X?*, two leads in random order, and the first sentence of the right one, n times.

    `words`: leads are longer than the first and shorter than the second number.  Raises ValueError where
    there are too few of them.
    """
    low, high = words
    leads = data.load_wikipedia().shuffle(seed=seed)
    fit = [lead for lead in leads if low < lead["n_words"] < high]
    fit = [(lead, match[0]) for lead in fit if (match := _DEFINITION.match(lead["text"]))]
    if len(fit) < 2 * n:
        raise ValueError(
            f"{n} questions need {2 * n} leads; {len(fit)} have {low} to {high} words."
        )
    rng, pairs = np.random.default_rng(seed), []
    for (asked, answer), (other, _) in zip(fit[:n], fit[n : 2 * n], strict=True):
        passages = [(lead["title"], lead["text"]) for lead in (asked, other)]
        order = rng.permutation(2)
        pairs.append((f"What is {asked['title']}?", [passages[i] for i in order], answer))
    return pairs


def train_and_held_out(
    counts: tuple[int, int], *, files: Sequence[Path | str], own: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase, max_prompt: int | None, words: tuple[int, int], seed: int = 0,
) -> list[list[Question]]:  # fmt: skip
    """Questions to train on and held-out ones, at most so many: of two files, else of `own` records, else
    of Wikipedia's leads.

    files, max_prompt: see `from_file`; ValueError for one file alone.  own: feedback records, of which the
    reference answers are taken.  words: see `wikipedia_pairs`.
    """
    if any(files):
        if not all(files):
            raise ValueError(f"{' '.join(map(str, files))}: give both files, or neither of them.")
        options = {"tokenizer": tokenizer, "max_prompt": max_prompt, "seed": seed}
        return [from_file(path, **options)[:n] for path, n in zip(files, counts, strict=True)]
    rows = [(r["question"], schema.passages_of(r), r["gold"]) for r in own]
    rows = rows or wikipedia_pairs(sum(counts), words=words, seed=seed)
    return [rows[: counts[0]], rows[counts[0] : sum(counts)]]


def fitted_prompts(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question],
    max_prompt: int,
) -> list[str]:  # fmt: skip
    """The prompts as this policy reads them, in at most `max_prompt` tokens; a decoder's end in "answer:"."""
    end = None if policy.config.is_encoder_decoder else ""
    fit = schema.fit_prompt
    return [fit(tokenizer, q, p, end, max_tokens=max_prompt) for q, p, _ in questions]


def encode(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *,
    max_prompt: int, max_answer: int,
) -> list[dict]:  # fmt: skip
    """Rows of `sft.encode_completions`: no loss on the prompt, loss on at most `max_answer` answer tokens."""
    prompts = fitted_prompts(policy, tokenizer, questions, max_prompt)
    space = "" if policy.config.is_encoder_decoder else " "
    answers = [space + answer for *_, answer in questions]
    rows = sft.encode_completions(tokenizer, prompts, answers, model=policy)
    return [cut_answer(row, max_answer) for row in rows]


def cut_answer(row: dict, max_answer: int) -> dict:
    """The row with at most `max_answer` tokens of its answer, the end token among them."""
    keep = row["labels"].count(sft.NO_LOSS) + max_answer
    return {name: ids[:keep] for name, ids in row.items()}


def token_losses(policy: PreTrainedModel, rows: Sequence[dict]) -> list[np.ndarray]:
    """-log p of each token that carries loss, (tokens,) a row; their mean is the row's loss."""
    starts = [row["labels"].count(sft.NO_LOSS) for row in rows]
    prompts = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]
    answers = [row["input_ids"][start:] for row, start in zip(rows, starts, strict=True)]
    return [-row for row in logprobs.token_log_probs(policy, prompts, answers)]
