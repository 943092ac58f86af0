"""Arms of notebook 51 on a real model: what each learns from, and what is measured of it.

The first iteration's samples come from the untrained policy.  For the course's policy they stand in a
file (`write_pool`), so that a local annotator's critiques of them can be stored, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import models, runtime, tables, training
from lib.judge import LocalAnnotator
from lib.papers.alt import conditions, critics, labels, loop, mood, trials
from lib.rewards import Judge

HELD_OUT, TRAIN = 100, 90  # openers; twenty and eighteen topics
ARMS = ("ALT", "Quark", "cloning", "reversed", "shuffled", "critic", "shuffled critic")
POOL = {"samples_per_prompt": 8, "max_new_tokens": 16}  # how the file's samples were drawn
POOL_SEED = 51
CRITIC = "qwen-0.5b"  # the annotator whose critiques are stored
CRITIC_WORDS = 12
CRITIQUE = (
    "Say in one short sentence of at most ten words how pleasant or unpleasant this text is, and what "
    "makes it so. Do not quote it.\n\nText: {}"
)
MOOD = "How does the text feel?"
MOODS = ("pleasant", "unpleasant")
EXEMPLARS = {"best": "pool", "worst": "pool, worst", "settings": {"exemplar": "pool"}}


# --- the samples of the untrained policy ---------------------------------------------------------


def pool_file() -> Path:
    """Where the untrained policy's samples stand."""
    folder = runtime.project_root() / "data" / "results" / "51_alt_on_a_real_model"
    return folder / "pool.jsonl.gz"


def write_pool() -> Path:
    """Sample the untrained policy on all training openers and write the items; return the path."""
    policy, tokenizer = models.load_policy("policy")
    config = loop.ConditioningConfig(**POOL, train="top", layers=1, seed=POOL_SEED)
    learner = loop.make_learner(policy, tokenizer, config)
    prompts = mood.openers()[HELD_OUT : HELD_OUT + TRAIN]
    feedback = critics.scored(mood.count_words)  # which is not asked here
    task = loop.Task(
        prompts, feedback, labels.Quantiles(mood.TAGS), conditions.Conditioner(tokenizer)
    )
    items = loop.sample_items(learner, task, labels.DataPool(task.labeller), 1)
    items = sorted(items, key=lambda item: (prompts.index(item.prompt), item.key))
    return tables.write_packed(map(asdict, items), pool_file())


def read_pool(prompts: Sequence[str] | None = None) -> list[labels.Item]:
    """The stored items, of some prompts or of all."""
    items = [labels.to_item(row) for row in tables.read_packed(pool_file())]
    return items if prompts is None else [item for item in items if item.prompt in set(prompts)]


def choose_openers(openers: Sequence[str], n: int, seed: int) -> list[str]:
    """n of the openers, drawn by the training seed: each seed learns from samples of its own openers."""
    generator = np.random.default_rng(training.seed_for(seed, "openers"))
    places = generator.permutation(len(openers))[:n]
    return [openers[place] for place in sorted(places)]


# --- feedback in words ---------------------------------------------------------------------------


def tidy(text: str | None) -> str | None:
    """The first line of a critique without quotes, at most `CRITIC_WORDS` words; None where none is left.

    What is longer ends with its last whole sentence, if there is one.
    """
    lines = [line.strip(" \"'*") for line in (text or "").splitlines() if line.strip(" \"'*")]
    if not lines:
        return None
    every = lines[0].split()
    part = every[:CRITIC_WORDS]
    if len(every) > CRITIC_WORDS or lines[0][-1] not in ".!?":
        ends = [k for k, word in enumerate(part, 1) if word[-1] in ".!?"]
        part = part[: ends[-1]] if ends else part
    return " ".join(part)


def local_critic(annotator: LocalAnnotator) -> critics.Feedback:
    """A critique in the annotator's own words, and a score from 0 to 3 (ALT_LMU).

    The score is the quarter of log P(pleasant) - log P(unpleasant) among the samples asked about; it
    balances the pool and says which critiques are exemplars.  What is missing has neither.
    """

    def ask(prompts: Sequence[str], responses: Sequence[str]) -> list[dict]:
        texts = [mood.as_text(*pair) for pair in zip(prompts, responses, strict=True)]
        written = annotator.write([CRITIQUE.format(text) for text in texts], max_new_tokens=24)
        sentences = [tidy(reply[0][0]) if reply else None for reply in written]
        shares = annotator.classify(texts, MOOD, MOODS)
        odds = np.log(shares[:, 0]) - np.log(shares[:, 1])
        usable = [k for k, text in enumerate(sentences) if text and np.isfinite(odds[k])]
        rows: list[dict] = [{"score": None, "feedback": None} for _ in texts]
        quarters = labels.quantile_labels(odds[usable].tolist(), 4) if usable else []
        for k, quarter in zip(usable, quarters, strict=True):
            rows[k] = {"score": float(3 - quarter), "feedback": sentences[k]}
        return rows

    return ask


def word_critic() -> critics.Feedback:
    """A critic that needs no model, for `smoke`: what it says depends on the words it counts."""
    axes = (
        critics.Axis(mood.count_words, 0.5, 1, ("pleasant words",), ("no pleasant words",)),
        critics.Axis(mood.count_words, -0.5, 1, ("nothing bad",), ("bad words",)),
        critics.Axis(
            lambda prompts, responses: [len(text.split()) for text in responses],
            5, 99, ("long enough",), ("too short",),
        ),
    )  # fmt: skip
    return critics.axes_critic(axes)


def make_critiques(_: str) -> list[Path]:
    """The annotator's critiques and scores of the stored samples, as replies; samples are made if missing."""
    written = [] if pool_file().exists() else [write_pool()]
    annotator = LocalAnnotator(CRITIC, ask=True)
    items = read_pool()
    local_critic(annotator)([item.prompt for item in items], [item.response for item in items])
    return [*written, annotator.export("critiques")]


def find_critic(
    stored: bool, smoke: bool, wanted: bool, own: Callable[[], critics.Feedback] | None = None
) -> critics.Feedback | None:
    """The critic of a run, or None where there is none (of stored samples: no stored critiques).

    stored: the samples are those of `read_pool`; wanted: an arm with critiques runs live; own: makes the
    critic of a task that has another than the local one.
    """
    if smoke:
        return word_critic()
    if not stored:
        make = own or (lambda: local_critic(LocalAnnotator(CRITIC)))
        return make() if wanted else None
    annotator = LocalAnnotator(CRITIC, ask=False)
    if (annotator.folder / f"{annotator.file}.critiques.jsonl.gz").exists():
        return local_critic(annotator)
    print(f"no critiques of {CRITIC} are stored: the arms with critiques do not run")
    print("(python -m lib replies critiques makes them)")
    return None


def tiny_policy() -> tuple:
    """A random model that knows the words of the openers, for `smoke`."""
    rest = "was and the Feedback Input , . :"
    known = " ".join([*mood.openers(), *mood.PLEASANT, *mood.UNPLEASANT, rest])
    vocabulary = sorted({*known.replace(",", " ").split(), ",", "."})
    return models.build_tiny_model("tiny", words=vocabulary)


# --- the arms ------------------------------------------------------------------------------------


def negated(feedback: critics.Feedback) -> critics.Feedback:
    """The sign test: every score turned round, so the best label goes to the worst samples."""

    def ask(prompts: Sequence[str], responses: Sequence[str]) -> list[dict]:
        rows = feedback(prompts, responses)
        for row in rows:
            if row.get("score") is not None:
                row["score"] = -row["score"]
        return rows

    return ask


def arms(
    feedback: critics.Feedback,
    labeller,
    template: str,
    critic: critics.Feedback | None = None,
    seed: int = 0,
) -> dict[str, trials.Arm]:
    """The arms that learn, by name; those with critiques only where there is a critic.

    `reversed` and Quark need a labeller with tags.
    """
    tags = labeller.tags
    ends = {"template": template, "tokens": tags, "best": tags[0], "worst": tags[-1]}
    cloning = {"settings": {"only": (0,)}, "best": trials.NO_REQUEST, "worst": trials.NO_REQUEST}
    every = {
        "ALT": trials.Arm(feedback, labeller, "text", **ends),
        "Quark": trials.Arm(feedback, labeller, "token", **ends),
        "cloning": trials.Arm(feedback, labeller, "none", template, **cloning),
        "reversed": trials.Arm(negated(feedback), labeller, "text", **ends),
        "shuffled": trials.Arm(critics.shuffled(feedback, seed), labeller, "text", **ends),
    }
    if critic:
        mute = critics.shuffled(critic, seed)
        words = {"style": "text", "template": template, **EXEMPLARS}
        every["critic"] = trials.Arm(critic, labels.FreeText(), **words)
        every["shuffled critic"] = trials.Arm(mute, labels.FreeText(), **words)
    return every


class Measured(NamedTuple):
    """A held-out measurement: `World.rows`, and the samples behind them."""

    scores: pd.DataFrame
    samples: pd.DataFrame


class Trained(NamedTuple):
    """What one arm left."""

    scores: pd.DataFrame
    samples: pd.DataFrame
    history: pd.DataFrame
    pool: labels.DataPool
    learner: loop.Learner


@dataclass
class World:
    """What all arms share: the model's name, prompts, judges, settings, and where runs are kept."""

    load: Callable  # () -> policy, tokenizer: a fresh copy for each arm
    train: Sequence[str]
    test: Sequence[str]
    judge: Judge
    settings: dict
    seed: int
    folder: Path
    second: Judge | None = None  # a second judge, which only reports
    first: Sequence[labels.Item] = field(default_factory=list)

    def start(self, arm: trials.Arm, name: str) -> tuple[loop.Learner, loop.Task, Path]:
        """A learner on a fresh model, its task, and the folder from which a killed run goes on."""
        policy, tokenizer = self.load()
        first = None
        if arm.style == "token":
            first = conditions.add_tokens(policy, len(arm.tokens), seed=self.seed)
        conditioner = conditions.Conditioner(
            tokenizer, arm.style, template=arm.template, tokens=arm.tokens, first_id=first
        )
        fields = {**self.settings, "forward_rows": 16, "seed": self.seed, **arm.settings}
        config = loop.ConditioningConfig(**fields)
        task = loop.Task(
            self.train,
            arm.feedback,
            arm.labeller,
            conditioner,
            held_out=self.test,
            judge=self.judge,
            requests=requests_of(arm),
            first=self.first,
        )
        key = runtime.content_hash(name, fields, self.train, self.test)[:12]
        return loop.make_learner(policy, tokenizer, config), task, self.folder / f"{name}-{key}"

    def rows(self, table: pd.DataFrame, arm: trials.Arm) -> pd.DataFrame:
        """`trials.rows_of` under the judge; reward_second and gap_second under the second one."""
        rows = trials.rows_of(table, arm)
        if self.second:
            again = table.assign(score=self.second(list(table["prompt"]), list(table["text"])))
            again = trials.rows_of(again, arm)
            rows["reward_second"], rows["gap_second"] = again["reward"], again["gap"]
        return rows

    def train_arm(self, arm: trials.Arm, name: str) -> Trained:
        """Train one arm, and measure it on the held-out prompts."""
        learner, task, folder = self.start(arm, name)
        result = loop.train(learner, task, folder=folder)
        table = result.evaluation
        last = table[table.iteration == learner.config.iterations]
        return Trained(self.rows(last, arm), last, result.history, result.pool, learner)

    def measure_untrained(self, all_arms: dict[str, trials.Arm]) -> dict[str, Measured]:
        """The model as it came: "base" is asked for nothing, "asking" for best and worst in words.

        "asking in critiques" is asked with the critic's exemplars, where there is a critic.
        """
        plain = all_arms["ALT"]
        learner, task, _ = self.start(plain, "untrained")
        requests = {trials.NO_REQUEST: (), **task.requests}
        table = loop.measure(learner, task, requests)
        bare = table[table.request == trials.NO_REQUEST]
        measured = {"base": Measured(self.rows(bare, all_arms["cloning"]), bare)}
        table = table[table.request != trials.NO_REQUEST]
        measured["asking"] = Measured(self.rows(table, plain), table)
        if critic := all_arms.get("critic"):
            learner, task, _ = self.start(critic, "untrained")
            pool = self.fill(critic, learner, task)
            table = pd.DataFrame(loop.evaluate(learner, task, pool, 1))
            measured["asking in critiques"] = Measured(self.rows(table, critic), table)
        runtime.free_memory(learner.policy)
        return measured

    def fill(self, arm: trials.Arm, learner: loop.Learner, task: loop.Task) -> labels.DataPool:
        """The pool of an untrained learner's first samples with the arm's feedback."""
        pool = labels.DataPool(arm.labeller)
        pool.add(loop.ask(arm.feedback, loop.sample_items(learner, task, pool, 1)))
        return pool


def requests_of(arm: trials.Arm) -> dict[str, labels.Condition]:
    """What an arm is asked for when it is measured: its best and worst; nothing, where it has no request."""
    if arm.style == "none":
        return {trials.NO_REQUEST: ()}
    if arm.best == "pool":
        return {}  # `loop.evaluate` adds exemplars of the pool
    return {arm.best: (arm.best,), arm.worst: (arm.worst,)}
