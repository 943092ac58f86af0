"""Where rewards are paid: on any token, on segments, or on whole responses; and the shuffled control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lib import generation, segments, stats
from lib.text import is_empty, repetition_share, script_share

RewardFunction = Callable[[generation.Samples], object]  # returns what `place_rewards` takes


def place_rewards(
    given: object, samples: generation.Samples
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """What a reward function returned, as per-token rewards (batch, time) and each component's row sums.

    Given: one number a row (paid at its last real token), one array a row (a number for each response
    token), or a dict of named components, each one of these; everything is added up.  A response without a
    token has no place for a reward: nothing is paid, and its sums are 0.  Raises ValueError for missing
    rows, arrays of another length than the response, and non-finite rewards.
    """
    parts = given if isinstance(given, dict) else {"reward": given}
    lengths = [len(ids) for ids in samples.response_ids]
    total, sums = torch.zeros(len(lengths), max(lengths, default=0)), {}
    for name, rows in parts.items():
        if len(rows) != len(lengths):
            raise ValueError(f"reward {name!r} has {len(rows)} rows for {len(lengths)} samples.")
        sums[name] = np.zeros(len(lengths))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row = np.asarray(row, dtype=np.float64)
            if row.shape not in ((), (length,)) or not np.isfinite(row).all():
                raise ValueError(
                    f"reward {name!r} of sample {i} is {row}; give one finite number, or one for each "
                    f"of its {length} response tokens."
                )
            if not length:
                continue
            where = slice(length - 1, length) if row.shape == () else slice(0, length)
            total[i, where] += torch.from_numpy(np.atleast_1d(row)).float()
            sums[name][i] = row.sum()
    return total, sums


def segment_rewards(ends: Sequence[int], values: Sequence[float], length: int) -> np.ndarray:
    """(length,) with each segment's reward at its last token; rewards that meet there are added.

    Raises ValueError for an end outside the response.
    """
    if any(not 0 <= end < length for end in ends):
        raise ValueError(f"a segment end of {list(ends)} is outside the {length} response tokens.")
    row = np.zeros(length)
    np.add.at(row, np.asarray(ends, dtype=int), np.asarray(values, dtype=float))
    return row


# --- several reward models, each with its own segments -------------------------------------------


@dataclass(frozen=True)
class SegmentReward:
    """One reward model of fine-grained RLHF (Wu et al. 2023, section 2): weight (score - mean) / std.

    `score(prompts, responses)` gives an array for each response, one score for each of its segments as
    `segmenter` cuts it.  Raises ValueError for a deviation that is not above 0.
    """

    name: str
    segmenter: segments.Segmenter
    score: Callable[[Sequence[str], Sequence[str]], Sequence[np.ndarray]]
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std of {self.name!r} is {self.std!r}; it must be above 0.")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        """Each response's segment rewards, (segments,)."""
        found = self.score(prompts, responses)
        return [
            self.weight * (np.asarray(row, dtype=float) - self.mean) / self.std for row in found
        ]

    def fitted(self, prompts: Sequence[str], responses: Sequence[str]) -> SegmentReward:
        """The same with mean and deviation measured on these responses: computed, never typed by hand.

        Where all scores are alike the deviation counts as 1, and such scores pay nothing.
        """
        found = np.concatenate(self.score(prompts, responses))
        std = stats.spread(found, precision=np.float32) or 1.0
        return replace(self, mean=float(found.mean()), std=std)


def compose(parts: Sequence[SegmentReward], tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
    """A dense reward for `ppo.train_ppo`: a component for each part, paid at its segments' last tokens.

    r_t = sum_k sum_j [t = T_j^k] w_k R_k(x, y, j)   (Wu et al. 2023, section 2).  Raises ValueError for two
    parts of one name, and where scores and segments of a response differ in number.
    """
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"names must differ; given: {[part.name for part in parts]}.")

    def row(part: SegmentReward, ids: list[int], values: np.ndarray) -> np.ndarray:
        ends = part.segmenter.token_ends(tokenizer, ids)
        if len(ends) != len(values):
            raise ValueError(
                f"reward {part.name!r} gives {len(values)} scores for a response of {len(ends)} "
                f"segments: {tokenizer.decode(ids)[:80]!r}. Score and segmenter must cut alike."
            )
        return segment_rewards(ends, values, len(ids))

    def dense(samples: generation.Samples) -> dict[str, list[np.ndarray]]:
        scored = {part: part(samples.prompts, samples.texts) for part in parts}
        return {
            part.name: [row(part, *both) for both in zip(samples.response_ids, values, strict=True)]
            for part, values in scored.items()
        }

    return dense


def at_end(reward_fn: RewardFunction) -> RewardFunction:
    """The same totals, component by component, paid at the last token: holistic, density taken away."""
    return lambda samples: place_rewards(reward_fn(samples), samples)[1]


def shuffled(reward_fn: RewardFunction) -> RewardFunction:
    """The control: `reward_fn`'s totals dealt out at random within the batch, so they tell nothing.

    Draws from numpy's global generator, which `train_ppo` seeds at every step.
    """

    def control(samples: generation.Samples) -> dict[str, np.ndarray]:
        _, sums = place_rewards(reward_fn(samples), samples)
        order = np.random.permutation(len(samples))
        return {name: values[order] for name, values in sums.items()}

    return control


def fault_penalties(samples: generation.Samples, penalty: float = 4.0) -> dict[str, np.ndarray]:
    """-penalty x (empty, share of repeated word 3-grams, share of non-Latin letters), each (rows,)."""
    repetition = [repetition_share(text) for text in samples.texts]
    faults = {
        "empty": np.array([is_empty(text) for text in samples.texts], dtype=float),
        "repetition": np.nan_to_num(repetition),
        "non_latin": script_share(samples.texts),
    }
    return {name: -penalty * share for name, share in faults.items()}
