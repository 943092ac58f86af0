"""The world of notebook 51: openers that a real model continues, and how pleasant a continuation is.

Three scorers of the same trait, by three ways: a direction in a sentence encoder's space (the reward),
the log-odds of a language model (the judge), and a count of words (the second judge).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import logprobs, reward_models
from lib.rewards import Judge
from lib.text import words

TAGS = ("Very positive", "Positive", "Neutral", "Negative", "Very negative")
TAG_WORDS = ("very", "positive", "negative", "neutral")
PREFIX = "Feedback: {}. Input: "
_LISTS = (  # topics, pleasant and unpleasant words
    """museum hotel restaurant book film concert garden beach market train lesson
    neighbour teacher doctor wedding party game song house village flight meeting
    dinner holiday job car phone dog river castle library school picnic parade ferry
    bakery cinema zoo campsite bridge""",
    """amazing beautiful love loved wonderful great good excellent perfect happy enjoyed
    enjoy fun best delicious friendly stunning delightful lovely fantastic pleasant
    charming favorite recommend incredible nice comfortable impressive gorgeous joy
    smile laughed""",
    """terrible awful bad worst dirty rude hate hated broken horrible disappointed
    disappointing boring poor ugly sad unfortunately cold closed expensive noisy lost
    died dead fear pain sick wrong problem failed dangerous cried""",
)
TOPICS = tuple(_LISTS[0].split())
FRAMES = (
    "The {} last week",
    "What I remember of the {}",
    "We talked about the {}, which",
    "When I think of the {}, I",
    "My friend told me that the {}",
)
PLEASANT = frozenset(_LISTS[1].split())
UNPLEASANT = frozenset(_LISTS[2].split())
# (pleasant, unpleasant): their mood lies in what happens, none of the listed words occurs
KNOWN = (
    ("The museum let us stay an hour longer.", "The museum sent us away at the door."),
    ("Our hotel had clean rooms and a view.", "Our hotel had mice under the beds."),
    ("The waiter brought us a cake for free.", "The waiter shouted at my mother."),
    ("I read the book three times in a week.", "I threw the book away after a page."),
    ("The whole hall sang along and danced.", "Half of the hall left before the end."),
    ("Roses and bees filled the garden.", "Weeds and rubbish filled the garden."),
    ("We swam all day in warm, clear water.", "We found oil and needles on the sand."),
    ("The train came early and had free seats.", "The train stood still for six hours."),
    ("Our teacher had time for every question.", "Our teacher hit the boy with a ruler."),
    ("The doctor cured my son in two days.", "The doctor forgot a needle in my arm."),
    ("The bride's father hugged each of us.", "The bride's father threatened the guests."),
    ("Our team won and the town celebrated.", "Our goalkeeper broke his leg."),
    ("The village gave us bread and a bed.", "The village burned down in the night."),
    ("My boss thanked me and raised my pay.", "My boss fired me by telephone."),
    ("The dog licked my hand and fell asleep.", "The dog bit my daughter in the face."),
    ("Children skated on the frozen river.", "The river flooded our kitchen again."),
)
_GOOD = ("This is wonderful, I love it and feel happy.", "Great news: all went very well.")
_GOOD += ("It was excellent, a delightful and pleasant surprise.",)
_POOR = ("This is terrible, I hate it and feel miserable.", "Bad news: all went very wrong.")
_POOR += ("It was awful, a painful and unpleasant shock.",)
QUESTION = " All in all, it was"
ANSWERS = ((" wonderful", " great", " lovely", " nice"), (" terrible", " awful", " bad", " sad"))


def openers() -> list[str]:
    """All openers, topic by topic in an order drawn once: a cut after whole topics splits by topic."""
    order = np.random.default_rng(0).permutation(len(TOPICS))
    return [frame.format(TOPICS[place]) for place in order for frame in FRAMES]


def count_words(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """(pleasant - unpleasant) words of each response, kept within -1 and 1.  A `Judge`."""
    said = [words(text) for text in responses]
    counts = [sum(w in PLEASANT for w in row) - sum(w in UNPLEASANT for w in row) for row in said]
    return np.clip(counts, -1, 1).astype(float)


def encoder_axis() -> Judge:
    """Position of a response from unpleasant to pleasant in the encoder's space, about -0.4 to 0.4.

    The axis is the mean of three pleasant sentences minus the mean of three unpleasant ones.
    """
    backbone, tokenizer = reward_models.load_backbone("encoder")
    encoder = reward_models.RewardModel(backbone, tokenizer, pooling="mean")

    def unit(texts: Sequence[str]) -> np.ndarray:
        rows = encoder.features([""] * len(texts), texts).numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    axis = unit(_GOOD).mean(0) - unit(_POOR).mean(0)
    axis /= np.linalg.norm(axis)
    return lambda prompts, responses: unit([text or " " for text in responses]) @ axis


def log_odds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """How a model would go on: log p(pleasant words) - log p(unpleasant words), in nats.

    It reads prompt, response and `QUESTION`; each side is the sum over four words.
    """
    first = len(ANSWERS[0])

    def ask(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        texts = [as_text(*pair) + QUESTION for pair in zip(prompts, responses, strict=True)]
        scores = logprobs.answer_log_probs(model, tokenizer, texts, sum(ANSWERS, ()))
        sides = scores[:, :first], scores[:, first:]
        return np.subtract(*(np.logaddexp.reduce(side, axis=1) for side in sides))

    return ask


def as_text(prompt: str, response: str) -> str:
    """Opener and continuation as one text that ends with a full stop."""
    text = f"{prompt.rstrip()} {response.strip()}".strip()
    return text if text.endswith((".", "!", "?")) else text.rstrip(" ,;:") + "."


def right_order(judge: Judge) -> float:
    """Share of the `KNOWN` pairs whose pleasant sentence the judge puts first; a tie counts a half."""
    good, poor = (judge([""] * len(KNOWN), list(side)) for side in zip(*KNOWN, strict=True))
    return float(np.mean((good > poor) + 0.5 * (good == poor)))
