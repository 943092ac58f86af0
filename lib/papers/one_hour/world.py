"""The ground of notebook 90: questions of `fine_grained.toy`, and a first policy that can also rewrite.

Every arm starts from one model.  In its pretraining it wrote noisy answers, and it rewrote answers by a
sentence that names one flaw, as ILF asks of its model:

    colour red, metal iron, city oslo? metal city: metal tin. ! metal is wrong :   ->   metal iron.

Quality is complete x faithful, by the world's truth.  A clause is right if it was asked for, has the value of
the facts and was not said before; complete is right clauses / asked facts, faithful right clauses / clauses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import logprobs, models, sft
from lib.papers.fine_grained import toy

FLAWS = ("wrong", "missing", "not asked", "said twice")
NO_FLAW = "all is right"
LEVELS = (
    "excellent",
    "good",
    "fair",
    "poor",
    "bad",
)  # for ALT, best first; new to the first policy
LEVEL_PREFIX = "an {} answer : "


# --- the first policy ----------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every word of the world: of its facts, of feedback, of ALT's labels."""
    facts = [
        *toy.MARKS,
        *toy.ATTRIBUTES,
        *(x for values in toy.ATTRIBUTES.values() for x in values),
    ]
    said = " ".join([*FLAWS, NO_FLAW, *LEVELS, "an answer !"])
    return [*facts, *sorted({*said.split()})]


def refinement_prompt(prompt: str, answer: str, feedback: str) -> str:
    """What the policy reads when it rewrites an answer."""
    return f"{prompt} {answer} ! {feedback} :"


def clauses_of(text: str) -> list[str]:
    """The clauses of an answer with their marks: "metal iron," "city rome."."""
    return toy.Segmenter("clause").texts(text)


def name_of(clause: str) -> str:
    """What a clause speaks of: its first word; "" for an empty one."""
    return (clause.split() or [""])[0].strip(",.")


def mended(question: toy.Question, answer: str, feedback: str) -> str:
    """The answer without the flaw that the feedback names; the rest stays as it is."""
    name, _, flaw = feedback.partition(" is ")
    clauses = clauses_of(answer)
    if flaw == "missing":
        return " ".join([*clauses[:-1], clauses[-1][:-1] + ",", f"{name} {question.facts[name]}."])
    places = [i for i, clause in enumerate(clauses) if clause.split()[0] == name]
    if flaw == "wrong":
        mark = clauses[places[-1]][-1]
        clauses[places[-1]] = f"{name} {question.facts[name]}{mark}"
    elif flaw in ("not asked", "said twice") and len(clauses) > 1:
        del clauses[places[-1]]
        clauses[-1] = clauses[-1][:-1] + "."
    return " ".join(clauses)


def flaws_of(prompt: str, answer: str, errors: toy.Errors) -> list[str]:
    """A sentence for each flaw that somebody sees who sees these errors; `NO_FLAW` where there is none."""
    names = [name_of(clause) for clause in clauses_of(answer)]
    clauses = list(zip(names, errors.relevant, errors.true, strict=True))
    right = {name for name, relevant, true in clauses if relevant and true}
    wrong = {name for name, relevant, true in clauses if relevant and not true}
    sentences = [f"{name} is wrong" for name, relevant, true in clauses if relevant and not true]
    asked = toy.read(prompt).asked
    for name in [name for name, relevant, _ in clauses if not relevant]:
        sentences.append(f"{name} is {'said twice' if name in asked else 'not asked'}")
    sentences += [f"{name} is missing" for name in asked if name not in right | wrong]
    known = [text for text in sentences if text.split()[0] in toy.ATTRIBUTES]
    return known or [NO_FLAW]


def pretraining_rows(
    tokenizer, questions: Sequence[toy.Question], rewritten: int, seed: int
) -> list[dict]:
    """A noisy answer to each question, and of the first `rewritten` also a rewriting by one true flaw."""
    rng = np.random.default_rng(seed)
    prompts = [question.prompt for question in questions]
    answers = toy.demonstrate(questions, seed, right=0.8)
    drafts = toy.demonstrate(questions[:rewritten], seed + 1000, right=0.8)
    drafts = [_repeated(draft, rng) for draft in drafts]
    asked, targets = [], []
    for question, draft in zip(questions, drafts, strict=False):
        sentences = flaws_of(question.prompt, draft, toy.judge(question.prompt, draft))
        sentence = str(rng.choice(sentences))
        asked.append(refinement_prompt(question.prompt, draft, sentence))
        targets.append(mended(question, draft, sentence))
    return sft.encode_completions(tokenizer, [*prompts, *asked], [*answers, *targets])


def _repeated(draft: str, rng: np.random.Generator, share: float = 0.4) -> str:
    """The draft, of a share of them with one clause said again at the end: sampled answers do that."""
    again = str(rng.choice(clauses_of(draft)))
    return f"{draft[:-1]}, {again[:-1]}." if rng.random() < share else draft


def pretrain(
    questions: Sequence[toy.Question], rewritten: int, seed: int, *, epochs: int, **sizes
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    """The first policy, its tokenizer and its last loss.  `sizes`: see `models.build_tiny_model`."""
    model, tokenizer = models.build_tiny_model(words=vocabulary(), seed=seed, **sizes)
    rows = pretraining_rows(tokenizer, questions, rewritten, seed)
    history = sft.train_sft(
        model, tokenizer, rows, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=20,
        num_train_epochs=epochs, per_device_train_batch_size=16, seed=seed,
    )  # fmt: skip
    first, _ = models.build_tiny_model(words=vocabulary(), seed=seed, **sizes)
    first.load_state_dict(model.state_dict())  # without what the trainer hung on
    return first, tokenizer, float(history.loss.iloc[-5:].mean())


# --- the judge that pays nobody ------------------------------------------------------------------


class Grade(NamedTuple):
    """What an answer is worth, to whom sees these errors."""

    complete: float  # right clauses / asked facts
    faithful: float  # right clauses / clauses; 0 for an empty answer

    @property
    def quality(self) -> float:
        return self.complete * self.faithful


def grade(errors: toy.Errors) -> Grade:
    """The grade of an answer with these errors.  Eyes that err may see more right clauses than were asked."""
    right = int((errors.relevant & errors.true).sum())
    return Grade(min(1.0, right / errors.asked), right / max(len(errors.true), 1))


def measure(first, tokenizer, prompts: Sequence[str], answers: Sequence[str]) -> pd.DataFrame:
    """One row an answer: quality, complete, faithful, tokens, and log_ppl under the first policy.

    log_ppl: minus the mean log-probability of its tokens and end, in nats.
    """
    grades = [grade(toy.judge(*pair)) for pair in zip(prompts, answers, strict=True)]
    ids = [row["input_ids"] for row in sft.encode_completions(tokenizer, prompts, answers)]
    sizes = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    rows = [(row[:n], row[n:]) for row, n in zip(ids, sizes, strict=True)]
    log_probs = logprobs.token_log_probs(first, *zip(*rows, strict=True))
    return pd.DataFrame(
        {
            "prompt_index": range(len(prompts)),
            "quality": [g.quality for g in grades],
            "complete": [g.complete for g in grades],
            "faithful": [g.faithful for g in grades],
            "tokens": [len(answer) for _, answer in rows],
            "log_ppl": [-float(row.mean()) for row in log_probs],
        }
    )
