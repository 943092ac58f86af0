"""The arms of notebook 90: a kind of feedback, and what learns from it; each from the same first policy.

`Ground` holds what all arms share; `Ground.run` spends the minutes, trains, and measures answers to the test
questions.  After the feedback no arm may sample more than `steps` x `episodes` answers nor take gradients of
more than `ppo_epochs` times as many; best of n trains nothing and samples n answers to each test question.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import generation, ppo, rewards, sft
from lib.chat import ChatClient
from lib.papers.alt import conditions, critics, labels, loop
from lib.papers.fine_grained import toy_arms, toy_models
from lib.papers.one_hour import annotator, eyes, learners, world
from lib.rewards import RewardFunction

DECAY = {"ratings": 1.0, "rankings": 1.0}  # of the reward models' heads, chosen with best of n
BETA = 0.05  # the price of KL for PPO on spans, whose own setting is a weight
WORDS = (0.5, 0.5, 0.5)  # weights of what words speak of: true, asked, complete
REFERENCE = 1000  # answers of the pool on which rewards are standardised
DPO_BETA = 0.1
REFINEMENTS = 5  # of which one is imitated, as in ILF


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    annotator: str = eyes.SIMULATED  # or a model's name
    error: float = 0.1  # how often the simulated one misjudges a clause
    seconds: dict[str, float] = field(default_factory=lambda: dict(annotator.SECONDS))  # an item
    best_of: int = 16
    steps: int = 100  # of PPO
    episodes: int = 64
    ppo_epochs: int = 2
    minibatch: int = 32
    learning_rate: float = 1e-3
    max_new_tokens: int = 32

    @property
    def samples(self) -> int:
        """The most answers that an arm samples while it learns."""
        return self.steps * self.episodes

    @property
    def passes(self) -> int:
        """The most answers of which an arm takes gradients, repeated ones counted each time."""
        return self.samples * self.ppo_epochs


class Prompts(NamedTuple):
    """Questions apart from one another."""

    test: list[str]
    annotated: list[str]  # whose answers the annotator sees
    train: list[str]  # whose answers only reward models see


@dataclass(eq=False)
class Ground:
    """The first policy, its questions, and answers to them that no arm changes."""

    first: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    settings: Settings
    seed: int
    client: ChatClient | None = None  # of the endpoint where the annotator is asked, if it is there

    def sample(self, policy, prompts: Sequence, n: int, key: int) -> generation.Samples:
        """n answers of a policy to each prompt."""
        length = {"max_new_tokens": self.settings.max_new_tokens}
        return generation.sample(
            policy, self.tokenizer, prompts, n=n, seed=1000 * self.seed + key, **length
        )

    @functools.cached_property
    def eyes(self) -> eyes.Eyes:
        """The annotator."""
        return eyes.of(self.settings.annotator, self.settings.error, self.seed, self.client)

    @functools.cached_property
    def pool(self) -> generation.Samples:
        """Two answers to each annotated question: what the annotator may see."""
        return self.sample(self.first, self.prompts.annotated, 2, 1)

    @functools.cached_property
    def reference(self) -> generation.Samples:
        """The pool's first answers: learned rewards have mean 0 and deviation 1 on them."""
        return self.pool.rows(range(min(REFERENCE, len(self.pool))))

    @functools.cached_property
    def candidates(self) -> generation.Samples:
        """n answers to each test question, from which best of n chooses."""
        return self.sample(self.first, self.prompts.test, self.settings.best_of, 2)

    @functools.cached_property
    def candidate_features(self) -> toy_models.Features:
        return self.see(self.candidates.prompts, self.candidates.texts)

    def see(self, prompts: Sequence[str], answers: Sequence[str]) -> toy_models.Features:
        """What the first policy sees of the answers' segments; three rewards of one batch need one pass."""
        return self._seen(tuple(prompts), tuple(answers))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a ground lives as long as its notebook)
    def _seen(self, prompts: tuple, answers: tuple) -> toy_models.Features:
        return toy_models.segment_features(self.first, self.tokenizer, prompts, answers)

    def buy(self, kind: str, minutes: float) -> annotator.Bought:
        """What the minutes buy of a kind."""
        items = annotator.items_of(kind, minutes, self.settings.seconds)
        return annotator.buy(kind, items, self.pool, self.eyes)

    def estimate(self, minutes: float) -> dict:
        """`ChatClient.estimate` of all that the endpoint is asked for so many minutes of every kind.

        Known answers and the example included: nobody is asked what the endpoint will be.
        """
        nobody, s = eyes.Nobody(self.client.model), self.settings
        model = eyes.of(s.annotator, s.error, self.seed, nobody)
        annotator.telling_example(self.pool, model)
        for kind in s.seconds:
            items = annotator.items_of(kind, minutes, s.seconds)
            annotator.buy(kind, items, self.pool, model)
        return self.client.estimate(nobody.requests)

    def policy(self) -> PreTrainedModel:
        """A new copy of the first policy."""
        return copy.deepcopy(self.first)

    def run(self, name: str, minutes: float, knob: float | None = None) -> Result:
        """Spend the minutes on an arm's kind, train, and answer the test questions.

        `knob`: another value of the arm's own setting, as it is tuned.
        """
        arm = ARMS[name]
        bought = self.buy(arm.kind, minutes)
        answers, used = arm.learn(self, bought, arm.knob if knob is None else knob)
        return Result(answers, bought, used)

    def measure(self, answers: Sequence[str]) -> pd.DataFrame:
        """`world.measure` of one answer to each test question."""
        return world.measure(self.first, self.tokenizer, self.prompts.test, answers)

    def best(self, scores: np.ndarray) -> list[str]:
        """The candidate of the highest score, of each test question; `scores` (candidates,)."""
        n = self.settings.best_of
        places = np.asarray(scores).reshape(-1, n).argmax(1)
        return [self.candidates.texts[n * i + place] for i, place in enumerate(places)]

    def without_feedback(self) -> dict[str, list[str]]:
        """What no feedback was bought for: the first policy, best of n by its likelihood; and the simulated
        annotator choosing best of n itself, whose minutes are not counted (a model's would take hours).
        """
        drawn, n = self.candidates, self.settings.best_of
        likely = np.array([row.mean() for row in drawn.model_log_probs])
        free = {"first policy": drawn.texts[::n], "nothing, best of n": self.best(likely)}
        if self.settings.annotator == eyes.SIMULATED:
            seen = annotator.quality_seen(drawn.prompts, drawn.texts, self.eyes, "ceiling")
            free["annotator, best of n"] = self.best(seen)
        return free


class Used(NamedTuple):
    """What an arm took while it learned."""

    samples: int = 0
    passes: int = 0


class Result(NamedTuple):
    """What an arm gives: an answer to each test question, what was bought, what it took."""

    answers: list[str]
    bought: annotator.Bought
    used: Used


# --- reward models and who obeys them ------------------------------------------------------------


def scorer_of(ground: Ground, bought: annotator.Bought, decay: float) -> learners.Scorer:
    """The whole-answer reward model of ratings or rankings; all answers alike where no pair was decided."""
    if not bought.prompts:
        return learners.indifferent(learners.whole_features(ground.candidate_features))
    better = learners.whole_features(ground.see(bought.prompts, bought.answers))
    if bought.kind == "ratings":
        return learners.learn_from_ratings(better, bought.values, decay)
    worse = learners.whole_features(ground.see(bought.prompts, bought.rejected))
    return learners.learn_from_pairs(better, worse, decay)


def dense_of(ground: Ground, bought: annotator.Bought, weights: Sequence[float]) -> RewardFunction:
    """R1, R2, R3 learned from the marks, or three rewards learned from where words point."""
    features = ground.see(bought.prompts, bought.answers)
    if bought.kind == "words":
        return learners.reward_from_words(
            features, bought, ground.see, ground.tokenizer, ground.reference, weights
        )
    models = toy_models.learn(features, bought.marks, len(bought.answers))
    scores = toy_models.scores_of(models, ground.first, ground.tokenizer)
    return toy_arms.dense_reward(ground.tokenizer, ground.reference, weights, scores=scores)


def weights_of(kind: str, knob: float) -> tuple[float, float, float]:
    """Of R1, R2, R3; the knob of spans is that of R1.

    A true clause that nobody asked for earns R2's weight and costs R1's: padding pays unless R1 weighs more.
    """
    return (knob, 0.5, 0.5) if kind == "spans" else WORDS


def reward_of(
    ground: Ground, bought: annotator.Bought, place: str, knob: float = 1.0
) -> RewardFunction:
    """What PPO is paid: a whole answer's score at its end, or parts at their own places ("dense")."""
    if bought.kind in DECAY:
        scorer = scorer_of(ground, bought, DECAY[bought.kind])
        return learners.reward_of(scorer, ground.see, ground.tokenizer, ground.reference)
    dense = dense_of(ground, bought, weights_of(bought.kind, knob))
    return toy_arms.PLACES[place](dense)


def choose(ground: Ground, bought: annotator.Bought, knob: float) -> tuple[list[str], Used]:
    """Best of n by a reward model; the knob is its decay, or R1's weight where spans are summed up."""
    if bought.kind == "spans":
        reward = dense_of(ground, bought, weights_of("spans", knob))
        return ground.best(rewards.totals(reward(ground.candidates), ground.candidates)), Used()
    scorer = scorer_of(ground, bought, knob)
    return ground.best(scorer.score(ground.candidate_features)), Used()


def reinforce(
    ground: Ground, bought: annotator.Bought, knob: float, place: str = "at the end"
) -> tuple[list[str], Used]:
    """PPO on a learned reward; the knob is the price of KL, or R1's weight where spans pay."""
    reward, s = reward_of(ground, bought, place, knob), ground.settings
    beta = BETA if bought.kind == "spans" else knob
    config = ppo.PPOConfig(
        steps=s.steps, prompts_per_step=s.episodes, train="all", epochs=s.ppo_epochs,
        minibatch_size=s.minibatch, forward_rows=s.episodes, learning_rate=s.learning_rate,
        kl_coef=beta, lam=toy_models.PLACEMENTS[place], value_clip=5.0, seed=ground.seed,
        max_new_tokens=s.max_new_tokens,
    )  # fmt: skip
    policy = ground.policy()
    ppo.train_ppo(policy, ground.tokenizer, ground.prompts.train, reward, config)
    return ground.sample(policy, ground.prompts.test, 1, 3).texts, Used(s.samples, s.passes)


def condition(
    ground: Ground, bought: annotator.Bought, learning_rate: float, style: str
) -> tuple[list[str], Used]:
    """Quark ("token") or ALT ("text"): fifths of the reward model's score as labels; then the best."""
    scorer = scorer_of(ground, bought, DECAY[bought.kind])
    policy, tags, s = ground.policy(), world.LEVELS, ground.settings
    first = conditions.add_tokens(policy, len(tags), seed=ground.seed) if style == "token" else None
    conditioner = conditions.Conditioner(
        ground.tokenizer, style, template=world.LEVEL_PREFIX, tokens=tags, first_id=first
    )
    iterations, each, batch = 3, 4, s.minibatch
    config = loop.ConditioningConfig(
        iterations=iterations, prompts_per_iteration=max(1, s.samples // iterations // each),
        samples_per_prompt=each, steps=max(1, s.passes // iterations // batch), batch_size=batch,
        forward_rows=s.episodes, learning_rate=learning_rate, max_new_tokens=s.max_new_tokens,
        seed=ground.seed,
    )  # fmt: skip
    feedback = critics.scored(lambda p, r: scorer.score(ground.see(p, r)))
    task = loop.Task(ground.prompts.train, feedback, labels.Quantiles(tags), conditioner)
    loop.train_conditional(policy, ground.tokenizer, task, config)
    asked = [conditioner.build(prompt, tags[:1]).ids for prompt in ground.prompts.test]
    used = Used(iterations * config.prompts_per_iteration * each, iterations * config.steps * batch)
    return ground.sample(policy, asked, 1, 3).texts, used


# --- without a reward model ----------------------------------------------------------------------


def imitate(ground: Ground, bought: annotator.Bought, passes: int) -> tuple[list[str], Used]:
    """Fine-tuning on demonstrations, or on refinements that followed the words; the knob is its epochs."""
    targets, samples = bought.answers, 0
    if bought.kind == "words":
        targets, samples = refine(ground, bought)
    policy = ground.policy()
    if not targets:
        return ground.sample(policy, ground.prompts.test, 1, 3).texts, Used(samples)
    epochs = max(1, min(int(passes), ground.settings.passes // len(targets)))
    sft.train_sft(
        policy, ground.tokenizer, sft.encode_completions(ground.tokenizer, bought.prompts, targets),
        learning_rate=ground.settings.learning_rate, num_train_epochs=epochs,
        per_device_train_batch_size=ground.settings.minibatch, seed=ground.seed,
    )  # fmt: skip
    used = Used(samples, epochs * len(targets))
    return ground.sample(policy, ground.prompts.test, 1, 3).texts, used


def refine(ground: Ground, bought: annotator.Bought) -> tuple[list[str], int]:
    """ILF: the first policy rewrites each answer by its sentence; of five, the likeliest that `follows`."""
    rows = list(zip(bought.prompts, bought.answers, bought.sentences, strict=True))
    asked = [world.refinement_prompt(*row) for row in rows]
    drawn = ground.sample(ground.first, asked, REFINEMENTS, 4)
    likely = [row.mean() for row in drawn.model_log_probs]
    targets = []
    for i, (_, answer, sentence) in enumerate(rows):
        numbers = range(REFINEMENTS * i, REFINEMENTS * (i + 1))
        following = [j for j in numbers if follows(answer, drawn.texts[j], sentence)]
        chosen = max(following or numbers, key=lambda j: likely[j])
        targets.append(drawn.texts[chosen])
    return targets, len(drawn)


def follows(answer: str, refinement: str, sentence: str) -> bool:
    """Whether a refinement did what the sentence asks, read off its words; no truth is needed for that."""
    name, _, flaw = sentence.partition(" is ")
    if sentence == world.NO_FLAW:
        return refinement == answer
    old, new = ([x.rstrip(" ,.") for x in world.clauses_of(text)] for text in (answer, refinement))
    before, after = ([x for x in clauses if x.split()[:1] == [name]] for clauses in (old, new))
    if flaw == "missing":
        return bool(after)
    if flaw == "wrong":
        return bool(after) and after != before
    return len(after) < len(before)


def prefer(
    ground: Ground, bought: annotator.Bought, learning_rate: float
) -> tuple[list[str], Used]:
    """DPO on the pairs, for at most ten epochs; the knob is its learning rate."""
    s, pairs = ground.settings, len(bought.answers)
    rounds = max(1, min(10, s.passes // (2 * max(pairs, 1))))
    policy = ground.policy()
    if pairs:
        learners.train_dpo(
            policy, ground.tokenizer, bought.prompts, bought.answers, bought.rejected, beta=DPO_BETA,
            passes=rounds, learning_rate=learning_rate, batch=s.minibatch // 2,
            seed=ground.seed,
        )  # fmt: skip
    used = Used(0, rounds * 2 * pairs)
    return ground.sample(policy, ground.prompts.test, 1, 3).texts, used


# --- the arms ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A kind of feedback, what learns from it, and its own setting: name, values tried, the one chosen."""

    kind: str
    learn: Callable[[Ground, annotator.Bought, float], tuple[list[str], Used]]
    setting: str
    tried: tuple[float, ...]
    knob: float


def label_of(arm: str, minutes: float) -> str:
    """The name of an arm at a budget; without minutes that of the arm alone."""
    return f"{arm}, {minutes:g} min" if minutes else arm


def first_texts(texts: pd.DataFrame, prompts: Sequence[str]) -> pd.DataFrame:
    """Each arm's texts at the first seed that has it, (arms, prompts).

    `texts`: columns arm, seed, prompt_index, text.
    """
    first = texts[texts.seed == texts.groupby("arm").seed.transform("min")]
    table = first.pivot_table("text", "arm", "prompt_index", aggfunc="first")
    return table.set_axis([prompts[int(i)] for i in table], axis=1)


_dense = functools.partial(reinforce, place="dense")
_quark = functools.partial(condition, style="token")
_alt = functools.partial(condition, style="text")
ARMS = {
    "demonstrations, SFT": Arm("demonstrations", imitate, "epochs", (10, 30, 100), 100),
    "ratings, best of n": Arm("ratings", choose, "decay", (0.1, 1.0), 1.0),
    "ratings, PPO": Arm("ratings", reinforce, "beta", (0.05, 0.3), 0.3),
    "ratings, Quark": Arm("ratings", _quark, "learning rate", (1e-3, 3e-3), 1e-3),
    "ratings, ALT": Arm("ratings", _alt, "learning rate", (1e-3, 3e-3), 3e-3),
    "rankings, best of n": Arm("rankings", choose, "decay", (0.1, 1.0), 1.0),
    "rankings, PPO": Arm("rankings", reinforce, "beta", (0.05, 0.3), 0.3),
    "rankings, DPO": Arm("rankings", prefer, "learning rate", (1e-4, 5e-4), 1e-4),
    "words, SFT": Arm("words", imitate, "epochs", (3, 10, 30), 10),
    "words, dense PPO": Arm("words", _dense, "beta", (0.05, 0.3), 0.3),
    "spans, best of n": Arm("spans", choose, "weight of R1", (0.5, 1.0), 1.0),
    "spans, dense PPO": Arm("spans", _dense, "weight of R1", (0.5, 1.0), 1.0),
    "spans, PPO": Arm("spans", reinforce, "weight of R1", (0.5, 1.0), 1.0),
}
