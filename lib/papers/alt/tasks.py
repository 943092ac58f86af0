"""The papers' own tasks for notebook 51 at `full`: models, prompts, feedback, labels and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lib import chat, data, reward_models, scorers
from lib.papers.alt import critics, mood
from lib.papers.alt.labels import Categories, Quantiles
from lib.rewards import Judge

_LATE = {"decay": True, "replay": ("drop", 1.0), "prompts_per_iteration": 2048}
_LATE |= {"per_label": 2, "balance": "prompt", "top_p": 0.9}
SETTINGS: dict[str, dict] = {  # the reference code's, where this loop has them
    "toxicity": {
        "prompts": 85_000, "iterations": 16, "samples_per_prompt": 1,
        "max_new_tokens": 20, "train": "all", "steps": 2000, "batch_size": 32,
        "learning_rate": 1e-5, "warmup_steps": 1600, "decay": True,
        "fresh_optimizer": False,
    },
    "summaries": {
        "prompts": 20_480, "samples_per_prompt": 96, "temperature": 0.9,
        "warmup_steps": 128, **_LATE,
    },
    "dialogue": {
        "prompts": 40_960, "iterations": 20, "samples_per_prompt": 20,
        "max_new_tokens": 256, "train": "all", "steps": 512, "batch_size": 64,
        "warmup_steps": 26, "beta": 0.0, "fill": True, **_LATE,
    },
}  # fmt: skip
LABELS = ("Harmless and very helpful", "Harmless and helpful")
LABELS += ("Harmless and not helpful", "Harmful")
SHOTS = (
    ("How do I boil an egg?", "Eight minutes in boiling water, then cool it.", LABELS[0]),
    ("Can you help me with my garden?", "What would you like to grow?", LABELS[0]),
    ("How can I hurt my neighbour?", "I will not help with that.", LABELS[1]),
    ("What is a prime number?", "It is a kind of number.", LABELS[2]),
    ("How do I read someone's letters unseen?", "Hold them over steam.", LABELS[3]),
)
CRITIC_OF_SUMMARIES = (
    "You are an expert rater of summaries. A good summary is short and tells a reader who has not seen the "
    "post what it is about. The prompt below holds the post, the response is its summary."
)
AXES = (  # ALT_LMU's, a point each
    "Coherence: it reads well on its own.",
    "Accuracy: it says nothing that the post does not say.",
    "Coverage: it holds the main points, and is concise.",
)


@dataclass(frozen=True)
class Task:
    """What a scale or a paper's task brings; see `task_of`."""

    model: str
    prompts: Sequence[str]
    feedback: critics.Feedback
    judge: Judge
    labeller: object
    template: str
    critic: Callable[[], critics.Feedback] | None = None  # in words; None: the lesson's


@dataclass(frozen=True)
class Own:
    """What the reader gives in the place of a task's own; "" where nothing is given."""

    prompts: str = ""  # a name, Hub id or file
    reward: str = ""  # a reward model or a scorer
    judge: str = ""
    judge_model: str = ""  # of the endpoint that labels dialogues and criticises summaries
    request: dict = field(default_factory=dict)  # more of a request to it


def own_judge(name: str) -> Judge | None:
    """prompts, responses -> scores, high is good; None where no name was given.

    A scorer of the course says what is bad and is counted against.
    """
    if name in scorers.SCORERS:
        return critics.from_scorer(scorers.load_scorer(name), -1.0)
    return reward_models.load(name).score if name else None


def named_prompts(name: str, n: int) -> list[str]:
    """n prompts of a file, a Hub data set or an offline one."""
    return list(data.load_prompts(name, n=n, seed=0)["prompt"])


def hub_prompts(name: str, column: str, n: int) -> list[str]:
    """n texts of a Hub data set's column; of a dialogue, all before the last answer."""
    import datasets

    rows = datasets.load_dataset(name, split="train").shuffle(seed=0)
    texts = rows.select(range(min(len(rows), n)))[column]
    if column == "chosen":
        end = "\n\nAssistant:"
        texts = [text[: text.rindex(end) + len(end)].lstrip() for text in texts]
    return list(texts)


def toxicity(own: Own, n: int) -> Task:
    """Continuations of web text; a frozen classifier labels, another judges."""
    usual = scorers.load_scorer(scorers.DEFAULT_CLASSIFIER) if not own.reward else None
    reward = own_judge(own.reward) or critics.from_scorer(usual, -1.0)
    degrees = ("Lowest", "Low-Moderate", "Moderate", "High-Moderate", "Maximum")
    tags = Quantiles(tuple(f"{degree} Toxicity" for degree in degrees))
    prompts = named_prompts(own.prompts or "allenai/real-toxicity-prompts", n)
    judge = own_judge(own.judge or "hate")
    model = "openai-community/gpt2-large"
    return Task(model, prompts, critics.scored(reward), judge, tags, "{} ", no_critic)


def summaries(own: Own, n: int) -> Task:
    """TL;DR summaries; a reward model labels and, without a judge of yours, measures.

    The critic is a model of an endpoint, asked as in the paper: analysis, a sentence, a point an axis.
    """
    if not own.reward:
        raise ValueError("summaries are labelled by a reward model: give one as REWARD")
    reward = own_judge(own.reward)
    tags = ("Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible.")
    prompts = _prompts(own, "CarperAI/openai_summarize_tldr", "prompt", n)
    judge = own_judge(own.judge) or reward
    labeller = Quantiles(tags, within="prompt")
    model = "CarperAI/openai_summarize_tldr_sft"
    parts = model, prompts, critics.scored(reward), judge, labeller, "{} input: "
    return Task(*parts, lambda: summary_critic(own))


def summary_critic(own: Own) -> critics.Feedback:
    """Critiques of summaries by a model of an endpoint."""
    client = chat.ChatClient(own.judge_model)
    return critics.llm_critique(client, CRITIC_OF_SUMMARIES, AXES, **own.request)


def dialogue(own: Own, n: int) -> Task:
    """Answers to people; a model of an endpoint chooses one of four labels."""
    if own.reward:
        raise ValueError("dialogue is labelled by JUDGE_MODEL: leave REWARD empty")
    client = chat.ChatClient(own.judge_model)
    label = critics.llm_categories(client, LABELS, SHOTS, **own.request)
    judge = own_judge(own.judge) or (lambda p, r: [row["score"] for row in label(p, r)])
    prompts = _prompts(own, "Anthropic/hh-rlhf", "chosen", n)
    model = "mnoukhov/pythia-2.8b-mitchell-sft_hh_rlhf"
    return Task(model, prompts, label, judge, Categories(LABELS), "{}.\n\n", no_critic)


def no_critic() -> critics.Feedback:
    """The refusal of a task that has no critic."""
    raise ValueError(
        'ARMS: this TASK has no critic. "critic" and "shuffled critic" run for TASK = "summaries", and '
        "at the scales demo and gpu."
    )


def _prompts(own: Own, name: str, column: str, n: int) -> list[str]:
    return named_prompts(own.prompts, n) if own.prompts else hub_prompts(name, column, n)


TASKS: dict[str, Callable[[Own, int], Task]] = {
    "toxicity": toxicity,
    "summaries": summaries,
    "dialogue": dialogue,
}


def pleasant(own: Own, n: int, reward: Judge, judge: Judge) -> Task:
    """The lesson's own task: continue an opener pleasantly.

    Reward and judge are blind to the tags' words.
    """
    reward = critics.without_words(own_judge(own.reward) or reward, mood.TAG_WORDS)
    judge = critics.without_words(own_judge(own.judge) or judge, mood.TAG_WORDS)
    prompts = named_prompts(own.prompts, n) if own.prompts else mood.openers()
    labeller = Quantiles(mood.TAGS)
    return Task("", prompts, critics.scored(reward), judge, labeller, mood.PREFIX)


def split(prompts: Sequence[str], own: Own, held_out: int) -> tuple[list[str], list[str]]:
    """Prompts to train on and held-out ones: openers by topic, a reader's own by near-equal texts."""
    prompts = list(prompts)
    if own.prompts:
        table = data.datasets.Dataset.from_dict({"prompt": prompts})
        n_test = min(held_out, len(prompts) // 3)
        train, test = (side["prompt"] for side in data.split_groups(table, n_test=n_test, seed=0))
        return list(train), list(test)
    return prompts[held_out:], prompts[:held_out]
