"""Sampling that keeps what learning from feedback needs: tokens, texts and log-probabilities.

Each prompt is encoded once and its cache shared by the prompt's n samples; finished rows leave the
batch.  Every sampled token comes with two log-probabilities: under the distribution it was drawn
from (after temperature, top-k and top-p) and under the plain model (T = 1, no filter).  PPO ratios
taken over the second while sampling from a filtered first are off-policy; both are kept so that a
notebook can say which it uses.

Random numbers are drawn per row and step before sampling starts, so a prompt's samples do not
depend on how prompts are batched (up to rounding).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from lib import encoding, models, runtime

ROWS_PER_BATCH = {"cpu": 128, "mps": 128, "cuda": 512}
# rows are dropped when fewer than this share still run (dropping copies the cache)
KEEP_SHARE = 0.75


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn.  temperature 0 is greedy; top_k 0 and top_p 1 mean no filter."""

    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        checks = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise ValueError(f"{name} is {value!r}; it must be {allowed}.")


def decoding_of(config: object) -> dict:
    """The fields of `Decoding` as a trainer's config has them, for `sample`."""
    return {field.name: getattr(config, field.name) for field in fields(Decoding)}


@dataclass
class Samples:
    """Sampled continuations, one entry per row; rows of one prompt stand together, in prompt order."""

    prompts: list[str]
    prompt_index: list[int]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # no padding; ends with the end token where the row finished
    texts: list[str]
    log_probs: list[np.ndarray]  # under the distribution sampled from, (response tokens,)
    model_log_probs: list[np.ndarray]  # under the plain model, (response tokens,)
    finished: list[bool]  # ended by itself within max_new_tokens
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def tokens(self) -> int:
        """Sampled tokens in all."""
        return sum(map(len, self.response_ids))

    def rows(self, numbers: Sequence[int]) -> Samples:
        """Some of the rows, in this order."""
        columns = [field.name for field in fields(self) if field.name != "seconds"]
        return Samples(*([getattr(self, name)[i] for i in numbers] for name in columns))

    def to_frame(self) -> pd.DataFrame:
        """One row per sample: prompt_index, prompt, text, response_tokens, finished, log_prob (sum)."""
        return pd.DataFrame(
            {
                "prompt_index": self.prompt_index,
                "prompt": self.prompts,
                "text": self.texts,
                "response_tokens": [len(ids) for ids in self.response_ids],
                "finished": self.finished,
                "log_prob": [float(lp.sum()) for lp in self.model_log_probs],
            }
        )

    def padded(self, values: str, fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """A field as a right-padded tensor (rows, time) and its mask (1 = real token)."""
        rows = [torch.as_tensor(np.asarray(row)) for row in getattr(self, values)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        lengths = torch.tensor([len(row) for row in rows])
        return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(torch.float32)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    n: int = 1,
    seed: int = 0,
    noise: torch.Tensor | None = None,
    rows_per_batch: int | None = None,
    label: str = "sampling",
    **decoding,
) -> Samples:
    """Draw n continuations of each prompt; see `Decoding` for max_new_tokens, temperature, top_k, top_p.

    Prompts are texts or token ids.  `noise`, uniform (rows, max_new_tokens), takes the place of `seed`
    where several processes share one batch.  Decoder-only and encoder-decoder.  With temperature 0 the
    tokens equal those of `transformers.generate(do_sample=False)`.  Raises ValueError for n < 1, bad
    decoding settings, an empty prompt without a start token, or a prompt too long for the model.
    """
    settings = Decoding(**decoding)
    models.check_policy(model.config)
    if n < 1:
        raise ValueError(f"n is {n!r}; at least one sample per prompt is drawn.")
    started = time.perf_counter()
    prompt_ids = encode_prompts(model, tokenizer, prompts, settings.max_new_tokens)
    if noise is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(prompt_ids) * n, settings.max_new_tokens, generator=generator)
    rows: list[_Row | None] = [None] * (len(prompt_ids) * n)
    rows_per_batch = rows_per_batch or ROWS_PER_BATCH.get(model.device.type, 128)
    # a row that ends early counts as all of its tokens
    total = len(rows) * settings.max_new_tokens
    bar = runtime.progress(total=total, label=label, unit="token")
    draw = partial(_sample_batch, model, tokenizer, decoding=settings, advanced=bar.update)
    with models.for_sampling(model):
        lengths = [len(ids) for ids in prompt_ids]
        at_once = max(1, rows_per_batch // n)
        for batch in encoding.token_batches(lengths, math.inf, rows=at_once):
            for first in range(0, n, rows_per_batch):  # one part, unless n is larger than a batch
                part = range(first, min(n, first + rows_per_batch))
                places = [index * n + j for index in batch for j in part]
                ids = [prompt_ids[i] for i in batch]
                drawn = draw(ids, len(part), noise[places])
                for place, row in zip(places, drawn, strict=True):
                    rows[place] = row
    bar.close()
    return _collect(tokenizer, prompts, prompt_ids, n, rows, time.perf_counter() - started)


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of each prompt (`encoding.encode`), checked against the model's length."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; it must be a list. Try [prompt].")
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = encoding.encode(tokenizer, prompt).prompt
        elif not hasattr(prompt, "__len__"):
            raise ValueError(f"prompt {index} is {prompt!r}; give a text or its token ids.")
        else:
            ids = encoding.one_start(tokenizer, prompt)
        if not ids:
            raise ValueError(f"prompt {index} is empty and this tokenizer has no start token.")
        if limit and not model.config.is_encoder_decoder and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with {max_new_tokens} new ones that is over "
                f"the model's {limit}. Shorten the prompt or lower max_new_tokens."
            )
        encoded.append(ids)
    return encoded


# --- drawing one token ---------------------------------------------------------------------------


def draw_tokens(
    logits: torch.Tensor, noise: torch.Tensor, decoding: Decoding
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row by inverse-CDF sampling.

    logits (rows, vocabulary), noise (rows,) uniform in [0, 1) -> tokens (rows,), their log-probability
    under the sampling distribution (rows,), and under the plain model (rows,).
    """
    logits = logits.float()
    plain = logits.log_softmax(-1)
    if decoding.temperature == 0:
        tokens = logits.argmax(-1)
        drawn_with = torch.zeros_like(noise)  # log 1: nothing else could have been drawn
        return tokens, drawn_with, _at(plain, tokens)
    heated = plain
    if decoding.temperature != 1:
        heated = (logits / decoding.temperature).log_softmax(-1)
    if decoding.top_k == 0 and decoding.top_p == 1:
        tokens = invert_cdf(heated.exp(), noise)
        return tokens, _at(heated, tokens), _at(plain, tokens)
    tokens, drawn_with = draw_filtered(heated, noise, decoding)
    return tokens, drawn_with, _at(plain, tokens)


def _at(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each row's value at its token, (rows,)."""
    return values.gather(-1, tokens[:, None])[:, 0]


def invert_cdf(mass: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index (rows,) at which the cumulative mass (rows, tokens) passes noise x total.

    Never one without mass: where rounding leads past the end, the last that has some.
    """
    cumulative = mass.cumsum(-1)
    target = noise.to(mass)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    index = torch.minimum(index, last)[:, 0]
    return index.clamp(max=mass.shape[-1] - 1)  # NaN leads past every end


@runtime.accelerated
def draw_filtered(
    log_probs: torch.Tensor, noise: torch.Tensor, decoding: Decoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows,) among those that top-k and top-p keep, and their log-probabilities there."""
    likely, tokens = keep_likely(*log_probs.sort(-1, descending=True), decoding)
    return draw_ranked(likely, tokens, noise)


def keep_likely(
    ranked: torch.Tensor, tokens: torch.Tensor, decoding: Decoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities in falling order, -inf where top-k or top-p drops a token, and the tokens.

    top-k first, then top-p: the smallest set of likeliest tokens whose share of the (top-k) probability
    reaches top_p (Holtzman et al. 2020).
    """
    if decoding.top_k:
        ranked, tokens = ranked[:, : decoding.top_k], tokens[:, : decoding.top_k]
        ranked = ranked.log_softmax(-1)
    before = ranked.exp().cumsum(-1) - ranked.exp()  # the share of likelier tokens
    if decoding.top_p < 1:
        ranked = ranked.masked_fill(before >= decoding.top_p, float("-inf"))
    return ranked, tokens


def draw_ranked(
    ranked: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the tokens of each row, and its log-probability among them."""
    ranked = ranked.log_softmax(-1)
    ranks = invert_cdf(ranked.exp(), noise)
    return _at(tokens, ranks), _at(ranked, ranks)


# --- one batch -----------------------------------------------------------------------------------


@dataclass
class _Row:
    """One row while it is being sampled."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    model_log_probs: list[float] = field(default_factory=list)
    finished: bool = False


@torch.inference_mode()
def _sample_batch(model, tokenizer, prompt_ids, n, noise, *, decoding, advanced) -> list[_Row]:
    """Stages: 1 encode prompts, 2 draw a token per running row, 3 drop finished rows, 4 step the model."""
    # 1 each prompt goes through the model once, however many samples it gets
    state = encode_batch(model, encoding.pad_id(tokenizer), prompt_ids, n)
    ends = torch.tensor(encoding.end_tokens(tokenizer, model), dtype=torch.long)
    rows = [_Row() for _ in range(len(prompt_ids) * n)]
    running = torch.arange(len(rows))  # which row each line of the batch is
    for step in range(decoding.max_new_tokens):
        # 2 a token for each line, with both of its log-probabilities
        drawn = draw_tokens(state.logits, noise[running, step].to(model.device), decoding)
        tokens, sampling, plain = (x.cpu() for x in drawn)
        if plain.isnan().any():
            raise FloatingPointError(
                f"token {step}: the model's probabilities are not numbers (NaN). Its weights diverged, or "
                f"{model.dtype} is too narrow for it: try a lower learning rate, or another dtype."
            )
        done = torch.isin(tokens, ends)
        for line, row in enumerate(running.tolist()):
            if not rows[row].finished:
                rows[row].tokens.append(int(tokens[line]))
                rows[row].log_probs.append(float(sampling[line]))
                rows[row].model_log_probs.append(float(plain[line]))
                rows[row].finished = bool(done[line])
        advanced(len(rows))
        alive = torch.tensor([not rows[row].finished for row in running.tolist()])
        if step + 1 == decoding.max_new_tokens or not alive.any():
            break
        # 3 finished rows leave, but not one at a time: leaving copies the others' cache
        if alive.float().mean() < KEEP_SHARE:
            keep = alive.nonzero()[:, 0]
            state.select(keep.to(model.device))
            running, tokens = running[keep], tokens[keep]
        # 4 the model reads the new tokens
        state.advance(tokens.to(model.device))
    advanced(len(rows) * (decoding.max_new_tokens - step - 1))
    return rows


@runtime.accelerated
def encode_batch(
    model: PreTrainedModel, pad: int, prompt_ids: list[list[int]], n: int
) -> DecoderState | EncoderDecoderState:
    """The state from which n samples of each prompt are drawn, prompts encoded."""
    kind = EncoderDecoderState if model.config.is_encoder_decoder else DecoderState
    return kind(model, pad, prompt_ids, n)


class DecoderState:
    """Cache, mask and next-token logits of a decoder-only batch; prompts are left-padded."""

    def __init__(self, model, pad, prompt_ids, n):
        self.model = model
        ids, self.mask = (x.to(model.device) for x in encoding.pad_rows(prompt_ids, pad, "left"))
        self.cache = None
        self._forward(ids)
        self._repeat(n)

    def _forward(self, ids) -> None:
        inputs = encoding.decoder_inputs(self.model, ids, self.mask, self.cache, use_cache=True)
        output = self.model(**inputs, logits_to_keep=1)
        self.cache = encoding.cache_of(output)
        self.logits = output.logits[:, -1]

    def _repeat(self, n: int) -> None:
        """Each prompt's cache n times over, once for each sample."""
        if n > 1:
            self.cache.batch_repeat_interleave(n)
            self.mask = self.mask.repeat_interleave(n, 0)
            self.logits = self.logits.repeat_interleave(n, 0)

    def select(self, keep: torch.Tensor) -> None:
        """Go on with these lines only."""
        self.cache.batch_select_indices(keep)
        self.mask = self.mask[keep]

    def advance(self, tokens: torch.Tensor) -> None:
        """Read one new token a line."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], -1)
        self._forward(tokens[:, None])


class EncoderDecoderState:
    """Encoder states (computed once per prompt), decoder cache and logits of a batch."""

    def __init__(self, model, pad, prompt_ids, n):
        self.model = model
        ids, mask = (x.to(model.device) for x in encoding.pad_rows(prompt_ids, pad, "right"))
        states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        self.states = states.repeat_interleave(n, 0)
        self.mask = mask.repeat_interleave(n, 0)
        self.cache = None
        start = model.config.decoder_start_token_id
        self.advance(torch.full((len(self.states),), start, device=model.device))

    def select(self, keep: torch.Tensor) -> None:
        """Go on with these lines only."""
        self.cache.batch_select_indices(keep)
        self.states = self.states[keep]
        self.mask = self.mask[keep]

    def advance(self, tokens: torch.Tensor) -> None:
        """Read one new token a line."""
        output = self.model(
            encoder_outputs=BaseModelOutput(self.states),
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            use_cache=True,
            **{encoding.cache_argument(self.model): self.cache},
        )
        self.cache = encoding.cache_of(output)
        self.logits = output.logits[:, -1]


def _collect(tokenizer, prompts, prompt_ids, n, rows: list[_Row], seconds: float) -> Samples:
    shown = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
    texts = [tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows]
    places = [i for i in range(len(prompt_ids)) for _ in range(n)]
    return Samples(
        prompts=[shown[i] for i in places],
        prompt_index=places,
        prompt_ids=[prompt_ids[i] for i in places],
        response_ids=[row.tokens for row in rows],
        texts=texts,
        log_probs=[np.array(row.log_probs, dtype=np.float32) for row in rows],
        model_log_probs=[np.array(row.model_log_probs, dtype=np.float32) for row in rows],
        finished=[row.finished for row in rows],
        seconds=seconds,
    )
