"""Short reviews of things, whose mood a word count judges exactly: the invented world of notebook 50.

A prompt names a thing, a response says how it was:

    the lamp from the shop   ->   was bright and new . the handle was solid .

Two in five texts of the corpus open with a heading, "a very positive review .", so that the words of ALT's
labels mean something to the model before it is aligned; Quark's tokens mean nothing, by design.  The form
"feedback : very positive . input :" never occurs, nor does any word of the critic.

Simplified: 60 things, 30 adjectives, a word a token; the reward is a count, the critic a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import models, runtime, sft
from lib.papers.alt import critics

TAGS = ("very positive", "positive", "neutral", "negative", "very negative")  # best first
PREFIX = "feedback : {} . input : "
_LISTS = (
    "superb lovely bright solid clever warm elegant charming tidy fresh",
    "awful ugly dull flimsy silly cold clumsy dreary dirty stale",
    "plain green wooden usual small round grey simple average new",
    "handle colour shape cover price sound smell edge",
    """lamp chair kettle radio jacket tent bike novel film hotel song garden bridge soup cake train phone
    clock mirror carpet camera guitar boat stove ladder bottle basket hammer pillow candle drawer fence
    wallet helmet kite teapot violin sofa ticket blanket shelf pencil curtain wagon flute barrel scarf
    lantern puzzle bench saddle trumpet cupboard rug sledge anchor compass vase broom cabin""",
)
GOOD, BAD, PLAIN, DETAILS, THINGS = (tuple(words.split()) for words in _LISTS)
PLACES = ("", "from the shop", "we bought", "in the house", "of my friend")
# shares of good, plain and bad adjectives in a review of each mood, and how common the mood is
ADJECTIVES = (
    (0.85, 0.15, 0.0),
    (0.55, 0.3, 0.15),
    (0.2, 0.6, 0.2),
    (0.15, 0.3, 0.55),
    (0.0, 0.15, 0.85),
)
MOODS = (0.1, 0.2, 0.4, 0.2, 0.1)
SIZES = {1: "short ", 3: "long "}  # sentences -> what a heading may say of them
CRITIC = "kind praising harsh gloomy brief compact wordy lengthy detailed precise vague thin but"
FORMS = "a review . the was and feedback quality : , input short long 0 1 2 3 4"


# --- the corpus ----------------------------------------------------------------------------------


class Split(NamedTuple):
    """Prompts for training, for choosing weights, and for measuring; no thing is in two of them."""

    train: list[str]
    validation: list[str]
    test: list[str]


def split(train: int = 30, validation: int = 10, test: int = 20) -> Split:
    """Five prompts for each of so many things.  ValueError for more things than there are."""
    if train + validation + test > len(THINGS) or min(train, validation, test) < 1:
        raise ValueError(
            f"{train} + {validation} + {test} things; allowed: at least 1 of each, {len(THINGS)} in all."
        )
    ends = np.cumsum([train, validation, test])
    parts = np.split(np.array(THINGS[: ends[-1]]), ends[:-1])
    return Split(*(prompts_of(part) for part in parts))


def prompts_of(things: Sequence[str]) -> list[str]:
    """The prompts about these things, each with every place."""
    return [f"the {thing} {place}".strip() for thing in things for place in PLACES]


def review(rng: np.random.Generator, mood: int) -> str:
    """One to three sentences, "was bright and new . the handle was solid ."; mood 0 is the best."""
    sentences = []
    for number in range(rng.integers(1, 4)):
        sides = rng.choice(3, p=ADJECTIVES[mood], size=rng.integers(1, 3))
        adjectives = " and ".join(rng.choice((GOOD, PLAIN, BAD)[side]) for side in sides)
        subject = f"the {rng.choice(DETAILS)} " if number else ""
        sentences.append(f"{subject}was {adjectives} .")
    return " ".join(sentences)


def corpus(n: int, seed: int, headings: float = 0.4) -> list[str]:
    """n texts; a share of them opens with a heading that names the mood and, half of the time, the size."""
    rng = np.random.default_rng(seed)
    prompts = prompts_of(THINGS)
    texts = []
    for _ in range(n):
        mood = rng.choice(len(TAGS), p=MOODS)
        text = review(rng, mood)
        size = SIZES.get(text.count(" ."), "") if rng.random() < 0.5 else ""
        heading = f"a {size}{TAGS[mood]} review . " if rng.random() < headings else ""
        texts.append(f"{heading}{rng.choice(prompts)} {text}")
    return texts


def vocabulary() -> list[str]:
    """Every word of the world, the critic's included."""
    words = [*GOOD, *BAD, *PLAIN, *DETAILS, *THINGS]
    phrases = [*PLACES, *TAGS, CRITIC, FORMS]
    return sorted({*words, *" ".join(phrases).split()})


def base_model(
    seed: int, steps: int, headings: float = 0.4
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    """A two-layer decoder trained for `steps` batches of 64 texts, its tokenizer, and its last loss."""
    model, tokenizer = models.build_tiny_model("tiny", words=vocabulary(), seed=seed)
    texts = corpus(64 * steps, seed, headings)
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = {"per_device_train_batch_size": 64, "learning_rate": 5e-3, "num_train_epochs": 1}
    history = sft.train_sft(model, tokenizer, rows, seed=seed, **options)
    plain, _ = models.build_tiny_model("tiny", words=vocabulary(), seed=seed)
    plain.load_state_dict(model.state_dict())  # without what the trainer hung on
    return plain, tokenizer, float(history["loss"].iloc[-1])


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A kept policy of this world and its tokenizer.  ValueError for a model that does not know its words."""
    policy, tokenizer = models.load_policy(name, dtype=torch.float32)
    if tokenizer.get_vocab() != models.tiny_tokenizer(vocabulary()).get_vocab():
        raise ValueError(
            f"{name} has other tokens than the words of this world. Give a policy that was trained in it: "
            "notebook 50 keeps one in runs/<scale>/50_quark_and_alt/models/ALT."
        )
    return policy, tokenizer


# --- feedback ------------------------------------------------------------------------------------


def mood(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward and the judge: (good - bad) / (good + bad + 1) of each response, in (-1, 1).

    The labels' own words are on neither list: repeating "positive" earns nothing.
    """
    scores = []
    for text in responses:
        words = text.split()
        good = sum(word in GOOD for word in words)
        bad = sum(word in BAD for word in words)
        scores.append((good - bad) / (good + bad + 1))
    return scores


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """-1 for each word."""
    return [-float(len(text.split())) for text in responses]


def details(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How many words name a part of the thing."""
    return [float(sum(word in DETAILS for word in text.split())) for text in responses]


def critic(seed: int) -> critics.Feedback:
    """Sentences such as "kind and detailed but wordy": mood, length, detail, and a point for each."""
    axes = [
        critics.Axis(mood, 0.3, 1, ("kind", "praising"), ("harsh", "gloomy")),
        critics.Axis(brevity, -12, -1, ("brief", "compact"), ("wordy", "lengthy")),
        critics.Axis(details, 1, 9, ("detailed", "precise"), ("vague", "thin")),
    ]
    return critics.axes_critic(axes, seed=seed)


def offset_of(prompt: str) -> float:
    """A prompt's own level, as from N(0, 1): the same in every run."""
    draw = int(runtime.content_hash("offset", prompt)[:8], 16)
    return float(np.random.default_rng(draw).standard_normal())


def biased_mood(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The mood plus the prompt's own level: a reward that says more of the prompt than of the response."""
    scores = mood(prompts, responses)
    return [score + offset_of(prompt) for prompt, score in zip(prompts, scores, strict=True)]
