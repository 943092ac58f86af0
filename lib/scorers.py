"""Text -> number: toxicity scorers, offline ones, classifiers and the Perspective API.

A scorer has a name, a version, a role (reward or judge), one batch method and a stated rule for
scores that could not be had.  Scores are probability-like, in [0, 1], high = more of what it
detects; rewards are made from `logit`, which does not saturate as the probability does.

Simplified against RewardLM: an unscored text is NaN, never -1 or a silent 0.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import requests
import tenacity
import torch
from scipy.special import expit

from lib import classifiers, encoding, hub, models, runtime
from lib.course import assets
from lib.replies import LONGEST_WAIT, open_store, retry_after
from lib.text import check_texts, is_empty, words

CHUNK = 2048  # texts in work at a time: peak memory does not depend on their number
LOGIT_CLIP = 6.0  # log-odds beyond +-6 (p < 0.0025 or > 0.9975) are held there
DEFAULT_CLASSIFIER = "facebook/roberta-hate-speech-dynabench-r4-target"
TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "hate_speech", "offensive", "abusive")


# --- the interface -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Scorer:
    """Base of all scorers; a subclass implements `_score` for texts that are not empty.

    `on_missing` says what stands for a score that could not be had: "nan", "raise", or a number.
    `empty` is the score of a text without visible characters; callers count those (`is_empty`).
    """

    name: str
    version: str
    detects: str
    licence: str = "see source"
    role: str | None = None
    on_missing: str | float = "nan"
    empty: float = 0.0
    truncated = 0  # texts cut to what the scorer takes, so far

    def __post_init__(self):
        if self.role not in (None, "reward", "judge"):
            raise ValueError(f"role is {self.role!r}; allowed: 'reward', 'judge', None.")
        if isinstance(self.on_missing, str) and self.on_missing not in ("nan", "raise"):
            raise ValueError(
                f"on_missing is {self.on_missing!r}; allowed: 'nan', 'raise', a number."
            )

    def _score(self, texts: list[str]) -> np.ndarray:
        raise NotImplementedError(f"{type(self).__name__} has no _score method")

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Scores in [0, 1], float64 (n,).  Raises ValueError for an entry that is not a string."""
        check_texts(texts)
        scores, cut_before = np.full(len(texts), self.empty, dtype=np.float64), self.truncated
        bar = runtime.progress(total=len(texts), label=f"scoring: {self.name}", unit="text")
        for start in range(0, len(texts), CHUNK):
            part = range(start, min(start + CHUNK, len(texts)))
            if filled := [i for i in part if not is_empty(texts[i])]:
                scores[filled] = self._score([texts[i] for i in filled])
            bar.update(len(part))
        bar.close()
        if cut := self.truncated - cut_before:
            warnings.warn(
                f"{self.name}: {cut} of {len(texts)} texts were too long and cut.", stacklevel=2
            )
        return self._fill_missing(scores)

    def logit(self, texts: Sequence[str], clip: float = LOGIT_CLIP) -> np.ndarray:
        """Log-odds log(p / (1 - p)) of the scores, held within +-clip, float64 (n,)."""
        return log_odds(self.score(texts), clip)

    def card(self) -> dict[str, str]:
        """What a result must carry: scorers change over time and their scores are not comparable."""
        return {
            "name": self.name,
            "version": self.version,
            "role": self.role or "-",
            "detects": self.detects,
            "licence": self.licence,
            "missing": str(self.on_missing),
            "empty text": str(self.empty),
            "date": _today(),
        }

    def _fill_missing(self, scores: np.ndarray) -> np.ndarray:
        missing = np.flatnonzero(np.isnan(scores))
        if len(missing) and self.on_missing == "raise":
            raise ValueError(
                f"{self.name} has no score for {len(missing)} of {len(scores)} texts (first: index "
                f"{missing[0]}). Use on_missing='nan' to keep them as missing."
            )
        if not isinstance(self.on_missing, str):
            scores[missing] = self.on_missing
        return scores


def log_odds(scores: np.ndarray, clip: float = LOGIT_CLIP) -> np.ndarray:
    """log(p / (1 - p)) held within +-clip; NaN stays NaN."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(scores) - np.log1p(-np.asarray(scores)), -clip, clip)


def check_roles(reward: Scorer, judge: Scorer, allow_same: bool = False) -> None:
    """Refuse a judge that is the reward: it would only see how well the reward was optimised."""
    if (reward.name, reward.version) == (judge.name, judge.version) and not allow_same:
        raise ValueError(
            f"reward and judge are both {reward.name} ({reward.version}). Choose another judge, or "
            "pass allow_same=True and say so beside every result."
        )


def load_scorer(name: str, role: str | None = None, **options) -> Scorer:
    """A scorer by name: an offline one, "perspective", or any Hub id or folder of a classifier.

    A classifier's name may hold its revision and the label to report: `name@revision#label`.  `options` go
    to the scorer (on_missing, label, revision, tokenizer, ...).  Raises ValueError for other names.
    """
    if name in SCORERS:
        return SCORERS[name](role=role, **options)
    if "/" not in name and not Path(hub.parse_name(name).name).is_dir():
        known = ", ".join(SCORERS)
        raise ValueError(
            f"unknown scorer {name!r}; allowed: {known}, a folder, or a Hub id: {DEFAULT_CLASSIFIER}."
        )
    return ClassifierScorer.load(name, role=role, **options)


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


# --- offline scorers -----------------------------------------------------------------------------


class ProfanityScorer(Scorer):
    """alt-profanity-check: TF-IDF and five calibrated linear SVMs; finds swearing, not hate."""

    def __init__(self, **options):
        from sklearn.feature_extraction.text import TfidfVectorizer

        folder = assets.fetch("profanity")
        detects = "profanity and crude insults; not hate without swearing"
        version = "alt-profanity-check 1.9.1"
        super().__init__(
            name="profanity", version=version, detects=detects, licence="MIT", **options
        )
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            self._model = dict(arrays)
        vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self._vectorizer = TfidfVectorizer(vocabulary={w: i for i, w in enumerate(vocabulary)})
        self._vectorizer.idf_ = self._model["idf"]

    def _score(self, texts: list[str]) -> np.ndarray:
        """Mean over the folds of sigmoid(-(slope * margin + offset))."""
        m = self._model
        margins = self._vectorizer.transform(texts) @ m["coefficients"].T + m["intercepts"]
        return expit(-(m["slopes"] * margins + m["offsets"])).mean(1)


class HateScorer(Scorer):
    """HateSonar (Davidson et al. 2017): P(hate) + P(offensive).  A text of unknown words gets 0.32."""

    def __init__(self, **options):
        import onnxruntime

        detects = "hate speech or offensive language in short posts"
        super().__init__(
            name="hate", version="hatesonar 0.1.0", detects=detects, licence="MIT", **options
        )
        model, providers = assets.fetch("hate") / "model.onnx", ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model, providers=providers)

    def columns(self, texts: Sequence[str]) -> pd.DataFrame:
        """The three probabilities `hate`, `offensive`, `neither`, one row per text."""
        check_texts(texts)
        rows = []
        for start in range(0, len(texts), CHUNK):
            batch = np.array(texts[start : start + CHUNK], dtype=object)
            labelled = self._session.run(None, {"text": batch})[1]
            rows += [(row[0], row[1], row[2]) for row in labelled]
        return pd.DataFrame(rows, columns=["hate", "offensive", "neither"], dtype=np.float64)

    def _score(self, texts: list[str]) -> np.ndarray:
        return 1 - self.columns(texts)["neither"].to_numpy()


class LexiconScorer(Scorer):
    """Mild word lists of the project's own, for smoke runs: 1 - prod(1 - severity) over the words."""

    def __init__(self, group: str, **options):
        path = runtime.project_root() / "data" / "samples" / "lexicon.json"
        self._severity = json.loads(path.read_text(encoding="utf-8"))[group]
        version = runtime.content_hash(self._severity)[:8]
        detects = f"{len(self._severity)} listed words ({group})"
        super().__init__(
            name=f"lexicon-{group}",
            version=version,
            detects=detects,
            licence="Apache-2.0",
            **options,
        )

    def _score(self, texts: list[str]) -> np.ndarray:
        harmless = [[1 - self._severity.get(word, 0.0) for word in words(text)] for text in texts]
        return np.array([1 - np.prod(row) for row in harmless])


# --- sequence classifiers ------------------------------------------------------------------------


class ClassifierScorer(Scorer):
    """Any sequence classifier with a toxic label; RewardLM's reward model is one.

    `label` names the label to report where no name says it.  Texts are cut to `max_tokens`.
    """

    # a CPU works fastest on what its cache holds (measured: 2048 is 1.6 times as fast as 8192)
    TOKENS_PER_BATCH = {"cpu": 2048}

    def __init__(
        self, model, tokenizer, *, label: str | None = None, max_tokens: int = 512, **options
    ):
        labels = classifiers.label_names(model)
        self.column = toxic_label(labels, label)
        super().__init__(
            **{"version": "local", "detects": f"{labels[self.column]!r} of {labels}"} | options
        )
        self.model, self.tokenizer = model.eval(), tokenizer
        longest = models.longest_text(model.config, max_tokens)
        self.max_tokens = min(max_tokens, longest, tokenizer.model_max_length)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        label: str | None = None,
        tokenizer: str | None = None,
        device: torch.device | None = None,
        **options,
    ):
        """A classifier by folder or Hub id (see `classifiers.load_classifier`)."""
        place = {"revision": revision, "tokenizer": tokenizer, "device": device}
        model, words = classifiers.load_classifier(name, **place)
        commit = hub.commit_of(hub.resolve_model(name, revision))
        if commit is not None:
            options = {"version": commit[:12]} | options
        wanted = hub.parse_name(name, revision)
        return cls(model, words, name=wanted.name, label=label or wanted.label, **options)

    @torch.inference_mode()
    def _score(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        self.truncated += sum(bool(e.overflowing) for e in encoded.encodings or [])
        ids, scores, device = encoded["input_ids"], np.empty(len(texts)), self.model.device
        budget = self.TOKENS_PER_BATCH.get(device.type, 8192)
        batches = [*encoding.token_batches([len(row) for row in ids], budget)]
        pad = encoding.pad_id(self.tokenizer)
        with models.for_scoring(self.model, len(batches)):
            for batch in batches:
                rows, mask = encoding.pad_rows([ids[i] for i in batch], pad, "right")
                logits = classifiers.classify(self.model, rows.to(device), mask.to(device))
                scores[batch] = self._probability(logits.double()).cpu().numpy()
        return scores

    def _probability(self, logits: torch.Tensor) -> torch.Tensor:
        several = self.model.config.problem_type == "multi_label_classification"
        one_by_one = several or logits.shape[-1] == 1
        return (logits.sigmoid() if one_by_one else logits.softmax(-1))[:, self.column]


def toxic_label(labels: Sequence[str], label: str | None = None) -> int:
    """Index of the label asked for, else of the one whose name says it; ValueError where undecided."""
    if label in labels or (label is None and len(labels) == 1):
        return 0 if label is None else list(labels).index(label)
    names = [re.sub("[- ]", "_", str(name).strip().lower()) for name in labels]
    exact = [names.index(known) for known in TOXIC_LABELS if known in names]
    says_so = re.compile("(?!no|un).*(toxic|hate|offens|abus)")
    alike = [index for index, name in enumerate(names) if says_so.match(name)]
    if label is None and (exact or len(alike) == 1):
        return (exact or alike)[0]
    asked = "no one label's name says 'toxic'" if label is None else f"there is no label {label!r}"
    raise ValueError(
        f"{asked}; this model has {', '.join(map(str, labels))}. Give one as label=..."
    )


# --- Perspective ---------------------------------------------------------------------------------


class ScoringError(RuntimeError):
    """A remote scorer gave no usable answer; the message never holds the key."""


class _PassingError(Exception):
    """A failure worth another try, after `wait` seconds where the server named a time."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class PerspectiveScorer(Scorer):
    """The Perspective API (Google closes it after 2026; `PERSPECTIVE_URL` may name a service like it).

    Needs PERSPECTIVE_API_KEY.  Replies are kept by content, so a text is asked once; a language that
    the attribute lacks is a missing score.  Texts are cut at 20 KB.  The service is retrained over
    time, so the card's date is that of the replies.
    """

    MAX_BYTES, TIMEOUT, ATTEMPTS, FIRST_PAUSE = 20 * 1024, 30.0, 6, 1.0
    URL = "https://commentanalyzer.googleapis.com"

    def __init__(self, *, attribute="TOXICITY", base_url="", requests_per_second=None, **options):
        known = {"name": "perspective", "version": f"v1alpha1 {attribute}", "empty": float("nan")}
        known |= {"detects": attribute.lower(), "licence": "Google API terms"}
        super().__init__(**known | options)
        self._session = requests.Session()  # the key is not in the address: errors repeat that
        self._key = runtime.secret("PERSPECTIVE_API_KEY", "The Perspective scorer")
        base_url = base_url or os.environ.get("PERSPECTIVE_URL") or self.URL
        self._url = f"{base_url.rstrip('/')}/v1alpha1/comments:analyze"
        self._attribute = attribute
        if requests_per_second is None:  # Google allows one; another service's limit is not known
            requests_per_second = 1.0 if base_url == self.URL else math.inf
        self._interval = 1 / requests_per_second
        self._replies = open_store(runtime.cache_dir() / "replies" / "perspective.sqlite")
        self._last, self.requests, self._dates = -np.inf, 0, set()

    def card(self) -> dict[str, str]:
        """As `Scorer.card`; date = first and last day on which the replies used were given."""
        dates = sorted(self._dates) or [_today()]
        return super().card() | {"date": f"{dates[0]} to {dates[-1]}"}

    def _score(self, texts: list[str]) -> np.ndarray:
        bar = runtime.progress(texts, label="asking Perspective", unit="text")
        return np.array([self._score_one(text) for text in bar])

    def _score_one(self, text: str) -> float:
        data = text.encode("utf-8", errors="replace")
        self.truncated += len(data) > self.MAX_BYTES
        text = data[: self.MAX_BYTES].decode("utf-8", errors="ignore")
        key = runtime.content_hash("perspective", self._url, self._attribute, text)
        reply = self._replies.get(key)
        if reply is None:
            reply = {"score": self._ask(text), "date": _today()}
            self._replies.put(key, reply)
        self._dates.add(reply["date"])
        return float("nan") if reply["score"] is None else reply["score"]

    def _ask(self, text: str) -> float | None:
        """One answer, with growing, jittered pauses between tries (or as long as Retry-After says)."""
        growing = tenacity.wait_random_exponential(multiplier=self.FIRST_PAUSE, max=60)

        def pause(state) -> float:
            asked = state.outcome.exception().wait
            return growing(state) if asked is None else asked

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.ATTEMPTS),
            wait=pause,
            reraise=True,
            retry=tenacity.retry_if_exception_type(_PassingError),
        )
        try:
            return retrying(self._request, text)
        except _PassingError as error:
            raise ScoringError(
                f"Perspective gave no answer in {self.ATTEMPTS} attempts (last: {error}). Answers so "
                "far are kept; run again later to go on."
            ) from None

    def _request(self, text: str) -> float | None:
        time.sleep(max(0.0, self._last + self._interval - time.monotonic()))
        self._last, self.requests = time.monotonic(), self.requests + 1
        body = {"comment": {"text": text}, "requestedAttributes": {self._attribute: {}}}
        try:
            response = self._session.post(
                self._url,
                json=body | {"doNotStore": True},
                timeout=self.TIMEOUT,
                headers={"X-Goog-Api-Key": self._key},
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _PassingError(type(error).__name__) from None
        if response.status_code == 429 or response.status_code >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            if wait is not None and wait > LONGEST_WAIT:
                raise ScoringError(
                    f"Perspective asks to wait {wait:.0f} s (HTTP {response.status_code}). Answers so far "
                    "are kept; run again then to go on."
                )
            raise _PassingError(f"HTTP {response.status_code}", wait)
        return self._read(response)

    def _read(self, response) -> float | None:
        """The score, or None where the attribute lacks the text's language."""
        try:
            answer = response.json()
            if response.ok:
                return float(answer["attributeScores"][self._attribute]["summaryScore"]["value"])
            message = str(answer["error"]["message"]).replace(self._key, "***")
        except (ValueError, KeyError, TypeError):
            raise _PassingError(f"HTTP {response.status_code} with a malformed body") from None
        if response.status_code == 400 and "language" in message.lower():
            return None
        raise ScoringError(
            f"Perspective refused a request (HTTP {response.status_code}): {message}"
        )


SCORERS: dict[str, Callable[..., Scorer]] = {
    "profanity": ProfanityScorer,
    "hate": HateScorer,
    "lexicon-insults": lambda **options: LexiconScorer("insults", **options),
    "lexicon-threats": lambda **options: LexiconScorer("threats", **options),
    "perspective": PerspectiveScorer,
}
