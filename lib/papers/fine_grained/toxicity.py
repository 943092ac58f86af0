"""Detoxification with dense rewards (Wu et al. 2023, section 3): each segment pays for its own toxicity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib import scorers, segments


class ToxicityDrops:
    """`SegmentReward.score` of detoxification (section 3): toxicity(y_1..y_j-1) - toxicity(y_1..y_j).

    The drops of a response telescope to toxicity("") - toxicity(y), the holistic reward up to a constant.
    Toxicity is the scorer's probability, or with `logit` its log-odds held within +-6.  `start` is
    toxicity(""), in the same unit; None stands for a probability of 0, which in log-odds is -6: far below
    usual texts, so that every first segment is charged.  Where a prefix has no score (NaN), it counts as
    the one before.
    """

    def __init__(
        self,
        scorer: scorers.Scorer,
        segmenter: segments.Segmenter,
        logit: bool = False,
        start: float | None = None,
    ):
        self.scorer, self.segmenter, self.logit = scorer, segmenter, logit
        self.start = float(self._measured(np.zeros(1))[0]) if start is None else start
        self.calls = 0  # texts scored so far

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        """(segments,) drops of each response; prompts are not scored."""
        ends = [[end for _, end in self.segmenter.spans(text)] for text in responses]
        prefixes = [t[:end] for t, row in zip(responses, ends, strict=True) for end in row]
        self.calls += len(prefixes)
        scores = self.scorer.score(prefixes) if prefixes else np.zeros(0)
        parts = np.split(self._measured(scores), np.cumsum([len(row) for row in ends])[:-1])
        return [-np.diff(_filled(np.append(self.start, part))) for part in parts]

    def _measured(self, scores: np.ndarray) -> np.ndarray:
        return scorers.log_odds(scores) if self.logit else scores


def _filled(values: np.ndarray) -> np.ndarray:
    """Values, (n,), with every NaN after the first replaced by the value before it."""
    known = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[known]
