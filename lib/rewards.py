"""Where rewards are paid: on any token, on segments, or on whole responses; and the shuffled control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from lib import generation, processes, segments, stats
from lib.text import is_empty, repetition_share, script_share

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # prompts, responses -> scores
RewardFunction = Callable[[generation.Samples], object]  # returns what `as_components` takes


def from_judge(judge: Judge, name: str = "reward") -> RewardFunction:
    """A reward function that pays a judge's score of each prompt and response."""
    return lambda samples: {name: judge(samples.prompts, samples.texts)}


def as_components(returned: object, samples: generation.Samples) -> dict[str, list[np.ndarray]]:
    """What a reward function returned, as named components: a row for each sample, float64.

    `returned` is a number for each response, or for each response an array with a number for each of its
    tokens, or a dict (or table) of named components, each one of these; whatever holds them: lists, arrays,
    tensors, Series.  A matrix (rows, longest response) is cut to each response's length.  A row's shape is
    () or (response tokens,).  Raises ValueError that says which component and sample do not fit, and how.
    """
    named = isinstance(returned, (Mapping, pd.DataFrame))
    parts = dict(returned.items()) if named else {"reward": returned}
    if not parts:
        raise ValueError("the reward function returned no component; name at least one.")
    return {str(name): _rows(str(name), rows, samples) for name, rows in parts.items()}


def _rows(name: str, rows: object, samples: generation.Samples) -> list[np.ndarray]:
    """One component's rows."""
    rows = _as_array(rows)
    counted = hasattr(rows, "__len__") and not isinstance(rows, (str, bytes))
    if not counted or getattr(rows, "shape", None) == ():
        raise ValueError(
            f"reward {name!r} is {rows!r}; a reward function returns one number for each of its "
            f"{len(samples)} samples, one array of numbers for each, or a dict of such components. Does it "
            "end with `return`?"
        )
    lengths = [len(ids) for ids in samples.response_ids]
    if len(rows) != len(lengths):
        raise ValueError(f"reward {name!r} has {len(rows)} rows for {len(lengths)} samples.")
    if isinstance(rows, np.ndarray) and rows.shape[1:] == (max(lengths, default=0),):
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]  # padding cut off
    return [
        _row(name, i, row, length)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]


def _row(name: str, i: int, row: object, length: int) -> np.ndarray:
    try:
        numbers = np.asarray(_as_array(row), dtype=np.float64)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or numbers.shape not in ((), (length,)) or not np.isfinite(numbers).all():
        raise ValueError(
            f"reward {name!r} of sample {i} is {row}; give one finite number, or one for each "
            f"of its {length} response tokens."
        )
    return numbers


def _as_array(values: object) -> object:
    """Tensors (of any device and type) and pandas' columns as numpy arrays, iterators as lists."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    if isinstance(values, (pd.Series, pd.Index)):
        return values.to_numpy()
    return list(values) if isinstance(values, Iterator) else values


def place_rewards(
    returned: object, samples: generation.Samples
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """What a reward function returned, as per-token rewards (batch, time) and each component's row sums.

    A number for a response is paid at its last real token; components are added up.  A response without a
    token has no place for a reward: nothing is paid, and its sums are 0.  Takes and raises what
    `as_components` does.
    """
    components = as_components(returned, samples)
    lengths = [len(ids) for ids in samples.response_ids]
    total = torch.zeros(len(lengths), max(lengths, default=0))
    sums = {name: np.zeros(len(lengths)) for name in components}
    for name, rows in components.items():
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if not length:
                continue
            places = slice(length - 1, length) if row.ndim == 0 else slice(0, length)
            total[i, places] += torch.from_numpy(np.atleast_1d(row)).float()
            sums[name][i] = row.sum()
    return total, sums


def totals(returned: object, samples: generation.Samples) -> np.ndarray:
    """What each response is paid in all, (rows,)."""
    return sum(place_rewards(returned, samples)[1].values())


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
        scores = self.score(prompts, responses)
        return [
            self.weight * (np.asarray(row, dtype=float) - self.mean) / self.std for row in scores
        ]

    def fitted(self, prompts: Sequence[str], responses: Sequence[str]) -> SegmentReward:
        """The same with mean and deviation measured on these responses: computed, never typed by hand.

        Where all scores are alike the deviation counts as 1, and such scores pay nothing.  Raises ValueError
        for responses without a segment, and for scores that are not finite.
        """
        scores = np.concatenate(self.score(prompts, responses))
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(
                f"{self.name!r} gives {len(scores)} scores for {len(responses)} responses; its mean and "
                "deviation need one or more, all finite. Try more responses, or look at the scores."
            )
        std = stats.spread(scores, precision=np.float32) or 1.0
        return replace(self, mean=float(scores.mean()), std=std)


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

    Draws from numpy's global generator, which `train_ppo` seeds at every step.  On several processes the
    batch is that of all.
    """

    def control(samples: generation.Samples) -> dict[str, np.ndarray]:
        _, sums = place_rewards(reward_fn(samples), samples)
        everyone = {name: np.asarray(processes.joined(values)) for name, values in sums.items()}
        mine = processes.my_rows(len(samples))
        order = np.random.permutation(len(next(iter(everyone.values()))))[mine]
        return {name: values[order] for name, values in everyone.items()}

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
