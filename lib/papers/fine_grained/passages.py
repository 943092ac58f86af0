"""Learned dense rewards on real text (notebook 44): questions about Wikipedia leads, errors put in by rule.

Answers are those of `models.constructed_records`, so that reward models learn without anybody's annotations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib import data, generation, ppo, reward_models, rewards, runtime, sft, stats
from lib import models as policies
from lib.annotator import Rubric
from lib.papers.fine_grained import models
from lib.papers.fine_grained import schema as qa
from lib.reward_models import TrainConfig
from lib.rewards import RewardFunction
from lib.segments import Segmenter

LONGEST = {
    "demo": (80, 50),
    "gpu": (80, 50),
    "full": (300, 150),
}  # words of a lead, of three sentences
LONGFORMER = "allenai/longformer-base-4096"
HUB = "HuggingFaceTB/SmolLM2"
SETTINGS = {  # smoke, demo, gpu, full, paper
    "model": ("tiny", "policy", f"{HUB}-360M-Instruct", f"{HUB}-1.7B", "T5-large, 738M"),
    "encoder": ("tiny-encoder-decoder", "encoder", "encoder", LONGFORMER, "Longformer-base, 149M"),
    "keep_layers": (2, 3, 3, 12, 12),
    "reward_articles": (10, 240, 240, 2000, "2,853 annotated by people"),
    "reward_test": (4, 80, 80, 500, 500),
    "sft_articles": (4, 128, 256, 1000, 1000),
    "questions": (4, 200, 400, 3000, 3853),
    "n_test": (4, 48, 100, 500, 948),
    "samples": (2, 2, 2, 4, 1),
    "max_new_tokens": (12, 72, 96, 200, 200),
    "temperature": (0.7, 0.7, 0.7, 0.7, "0.7, top-k 20"),
    "train_layers": (1, 4, 8, 24, "all"),
    "sft_layers": (1, 8, 16, 24, "all"),
    "sft_rate": (1e-3, 3e-4, 1e-4, 2e-5, 5e-5),
    "steps": (2, 2, 60, 400, 1250),
    "prompts": (4, 16, 16, 32, "16, 4 samples each"),
    "ppo_epochs": (2, 2, 2, 4, 4),
    "learning_rate": (1e-3, 1e-4, 5e-5, 1e-5, 1e-5),
    "lam": (0.95, 0.95, 0.95, 0.95, "0.95 fine-grained, 0.99 holistic"),
    "kl_coef": (0.05, 0.05, 0.05, 0.1, "0.3 fine-grained, 0.2 holistic"),
}
ARMS = {  # where the same total is paid
    "dense": lambda reward: reward,
    "holistic": rewards.at_end,
    "holistic, lambda 1": rewards.at_end,
    "shuffled": rewards.shuffled,
}
PARTS = ["reward_articles", "reward_test", "sft_articles", "questions", "n_test"]
WEIGHTS = {"R1": 0.3, "R2": 0.5, "R3": 0.3}  # the paper's
JUDGED = ["score", "coverage", "support", "repetition", "words"]


def articles(scale: str) -> list[tuple[str, str]]:
    """(title, text) pairs in a fixed order, of a length that fits the scale; smoke: passages of our own."""
    if scale == "smoke":
        path = runtime.project_root() / "data" / "samples" / "passages.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [(line["title"], line["post"]) for line in lines]
    cut, (longest, said) = Segmenter("sentence").texts, LONGEST[scale]

    def fits(text: str) -> bool:
        words = [len(sentence.split()) for sentence in cut(text)[:3]]
        return len(words) == 3 and min(words) >= 5 and sum(words) <= said

    table = data.load_wikipedia().to_pandas()
    table = table[table.n_words <= longest].sample(frac=1, random_state=0)
    return [(row.title, row.text) for row in table.itertuples() if fits(row.text)]


@dataclass(frozen=True)
class Passages:
    """Records and prompts of each part, and what the judge reads for each prompt."""

    records: dict[str, list[dict]]
    prompts: dict[str, list[str]]
    posts: dict[str, str]


def split(pairs: Sequence[tuple[str, str]], counts: Mapping[str, int]) -> Passages:
    """The articles as records with one passage, dealt out to the parts in this order, none to two.

    Raises ValueError where there are too few.
    """
    if sum(counts.values()) > len(pairs):
        raise ValueError(
            f"{sum(counts.values())} articles are wanted and {len(pairs)} fit: too few articles. Lower "
            + ", ".join(counts)
        )
    records = models.constructed_records(pairs, seed=0)
    for record in records:
        record["passages"] = record["passages"][:1]
    asked = [qa.prompt(r["question"], qa.passages_of(r), "") for r in records]
    posts = {prompt: text for prompt, (_, text) in zip(asked, pairs, strict=True)}
    parts, prompts, start = {}, {}, 0
    for name, count in counts.items():
        parts[name] = records[start : start + count]
        prompts[name] = asked[start : start + count]
        start += count
    return Passages(parts, prompts, posts)


# --- reward models ---------------------------------------------------------------------------------


def measure_model(
    name: str, model, records: Sequence[dict], seed: int
) -> dict[str, stats.Interval]:
    """accuracy, and gain: accuracy minus that of the better constant answer (pairs: minus one half).

    Intervals over articles.
    """
    feedback = models.feedback_for(name, records)
    scores = model.score_segments(feedback.prompts, feedback.responses)
    if feedback.pairs is not None:
        better, worse = ([scores[i][0] for i in side] for side in feedback.pairs.T)
        right = (np.array(better) > np.array(worse)).astype(float)
        constant, article = np.full(len(right), 0.5), feedback.pairs[:, 0] // 4
    else:
        known = ~np.isnan(feedback.labels)
        wrong = feedback.labels[known] == 1
        right = ((np.concatenate(scores)[known] < 0) == wrong).astype(float)
        constant = (wrong == (wrong.mean() > 0.5)).astype(float)
        article = feedback.row[known]
    values = {"accuracy": right, "gain": right - constant}
    return {name: stats.bootstrap(x, clusters=article, seed=seed) for name, x in values.items()}


def learn(
    world: Passages, encoder: str, *, keep_layers: int, seed: int, folder: Path | None = None
) -> tuple[dict[str, models.FineGrainedModel], dict[str, models.FineGrainedModel]]:
    """R1, R2 and R3 learned, and the same with shuffled labels; heads on one frozen encoder.

    `folder` holds the histories.
    """
    backbone, tokenizer = reward_models.load_backbone(encoder, keep_layers=keep_layers)
    backbone.requires_grad_(False)
    config = TrainConfig(1e-2, epochs=40, weight_decay=0.1, prompts_per_batch=32, seed=seed)
    learned, control = {}, {}
    for name, category in models.REWARDS.items():
        feedback = models.feedback_for(name, world.records["reward_articles"])
        unit = models.UNITS[category]
        for kind, trained in (("shuffled", control), ("learned", learned)):
            model = models.FineGrainedModel(backbone, tokenizer, unit=unit, max_length=512)
            if kind == "shuffled":
                features = model.features(feedback.prompts, feedback.responses)
            labels = models.shuffled(feedback, seed) if kind == "shuffled" else feedback
            place = folder and folder / f"{name}-{kind}"
            models.fit(model, labels, config, features=features, folder=place)
            trained[name] = model
    return learned, control


def dense_reward(trained: Mapping[str, models.FineGrainedModel], tokenizer) -> RewardFunction:
    """R1 and R2 pay their signs, R3 its standardised score, each weighted as in the paper.

    The policy's prompt ends in " answer:", which the reward models do not see.
    """

    def shown(prompt: str) -> str:
        return prompt.removesuffix(" answer:")

    weights = {name: WEIGHTS[name] for name in trained}
    return rewards.compose(models.segment_rewards(trained, weights, shown), tokenizer)


# --- training and measuring ------------------------------------------------------------------------


def fine_tune(policy, tokenizer, world: Passages, settings: Mapping, seed: int) -> None:
    """The first fine-tuning, in place, on spoiled answers: the policy then makes every kind of error."""
    policies.set_trainable(policy, "top", layers=settings["sft_layers"])
    spoiled = [f" {record['prediction 1']}" for record in world.records["sft_articles"]]
    sft.train_sft(
        policy,
        tokenizer,
        sft.encode_completions(tokenizer, world.prompts["sft_articles"], spoiled),
        learning_rate=settings["sft_rate"],
        num_train_epochs=1,
        per_device_train_batch_size=4,
        max_length=512,
        seed=seed,
    )


def ppo_config(settings: Mapping, arm: str, seed: int) -> ppo.PPOConfig:
    """The settings of an arm; one whose name ends in "lambda 1" has that, in the place of its own."""
    return ppo.PPOConfig(
        steps=settings["steps"],
        prompts_per_step=settings["prompts"],
        samples_per_prompt=2,
        train="top",
        layers=settings["train_layers"],
        epochs=settings["ppo_epochs"],
        learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coef"],
        lam=1.0 if arm.endswith("lambda 1") else settings["lam"],
        value_clip=5.0,  # in units of reward
        seed=seed,
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
    )


def describe_answers(
    samples: generation.Samples, reward: RewardFunction, posts: Mapping[str, str]
) -> pd.DataFrame:
    """One row an answer: the judge's parts, the learned rewards and their total, tokens, prompt_index."""
    judged = Rubric().judge_all([posts[prompt] for prompt in samples.prompts], samples.texts)
    table = pd.DataFrame({part: [getattr(j, part) for j in judged] for part in JUDGED})
    _, sums = rewards.place_rewards(reward(samples), samples)
    table = table.assign(**sums, total=sum(sums.values()))
    table["tokens"] = [len(ids) for ids in samples.response_ids]
    return table.assign(prompt_index=list(samples.prompt_index))


def ten_words(table: pd.DataFrame, a: str, b: str, seed: int) -> stats.Interval:
    """Reward of ten words, b - a: a ratio of sums, with an interval over articles."""
    both = table[table.arm.isin([a, b])]
    sums = both.pivot_table(index="prompt_index", columns="arm", values=["total", "words"])
    sides = tuple(sums[column][arm] for arm in (b, a) for column in ("total", "words"))

    def difference(total, words, total_a, words_a):
        return 10 * (total.sum() / words.sum() - total_a.sum() / words_a.sum())

    return stats.bootstrap(sides, difference, seed=seed)


def train_arm(
    arm: str, start, tokenizer, prompts: Sequence[str], reward: RewardFunction, settings: Mapping,
    seed: int, folder: Path,
):  # fmt: skip
    """A policy that PPO trained from `start`'s weights, and its history without the columns of speed.

    `reward`: the dense one; the arm's name (of `ARMS`) says where it is paid.
    """
    policy, _ = policies.load_policy(settings.get("start_from") or settings["model"])
    policy.load_state_dict(start.state_dict())
    paid = ARMS[arm](reward)
    config = ppo_config(settings, arm, seed)
    key = runtime.content_hash(vars(config), dict(settings), arm)[:12]
    log = ppo.train_ppo(policy, tokenizer, prompts, paid, config, folder=folder / f"ppo-{key}")
    log = log.drop(columns=[x for x in log if x.startswith(("tokens_", "seconds_"))])
    return policy, log.assign(arm=arm, seed=seed)


def measure_models(
    trained: Mapping[str, Mapping], records: Sequence[dict], seed: int
) -> pd.DataFrame:
    """Kind -> name -> model as a table: group (name), condition (kind), measure, value, low, high, n."""
    rows = []
    for kind, named in trained.items():
        for name, model in named.items():
            for measure, x in measure_model(name, model, records, seed).items():
                row = {"group": name, "condition": kind, "measure": measure}
                rows.append(row | x._asdict())
    return pd.DataFrame(rows)
