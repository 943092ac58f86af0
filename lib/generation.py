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

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import pandas as pd
import torch
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lib import encoding, models, runtime

ROWS_PER_BATCH = {"cpu": 128, "mps": 128, "cuda": 512}
# rows are dropped when fewer than this share still run (dropping copies the cache)
KEEP_SHARE = 0.75
# top-p looks at this many tokens first (measured: with 256 every second row needs a full sort)
FIRST_CANDIDATES = 2048
DRAWN_AT_ONCE = 16  # rows (measured: drawing 128 rows at once takes three times as long)
PROMPT_TOKENS = 1024  # encoded at once, padding included
BLOCK = 256  # probabilities that are summed before a token is looked for among them
# architectures whose attention takes the samples' keys beside their prompt's (tested for each)
SHARED_PROMPT = ("llama", "mistral", "qwen2", "qwen3")


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
        for name, given, good, allowed in checks:
            if not good:
                raise ValueError(f"{name} is {given!r}; it must be {allowed}.")


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
    how = Decoding(**decoding)
    models.check_policy(model.config)
    if n < 1:
        raise ValueError(f"n is {n!r}; at least one sample per prompt is drawn.")
    started = time.perf_counter()
    prompt_ids = encode_prompts(model, tokenizer, prompts, how.max_new_tokens)
    if noise is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(prompt_ids) * n, how.max_new_tokens, generator=generator)
    rows: list[_Row | None] = [None] * (len(prompt_ids) * n)
    rows_per_batch = rows_per_batch or ROWS_PER_BATCH.get(model.device.type, 128)
    bar = runtime.progress(total=len(rows), label=label, unit="sample")
    with models.for_sampling(model):
        lengths = [len(ids) for ids in prompt_ids]
        at_once = max(1, rows_per_batch // n)
        for batch in encoding.token_batches(lengths, math.inf, rows=at_once):
            for first in range(0, n, rows_per_batch):  # one part, unless n is larger than a batch
                part = range(first, min(n, first + rows_per_batch))
                places = [index * n + j for index in batch for j in part]
                ids = [prompt_ids[i] for i in batch]
                drawn = _sample_batch(model, tokenizer, ids, len(part), noise[places], how)
                for place, row in zip(places, drawn, strict=True):
                    rows[place] = row
                bar.update(len(places))
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
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = encoding.encode(tokenizer, prompt).prompt
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
    logits: torch.Tensor, noise: torch.Tensor, how: Decoding
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row by inverse-CDF sampling.

    logits (rows, vocabulary), noise (rows,) uniform in [0, 1) -> tokens (rows,), their log-probability
    under the sampling distribution (rows,), and under the plain model (rows,).  On a CPU a few rows at a
    time, so that what is as long as the vocabulary fits the cache.
    """
    if logits.device.type == "cpu" and not runtime.plain_mode():
        parts = zip(logits.split(DRAWN_AT_ONCE), noise.split(DRAWN_AT_ONCE), strict=True)
        parts = [_draw(*part, how) for part in parts]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))
    return _draw(logits, noise, how)


def _draw(logits: torch.Tensor, noise: torch.Tensor, how: Decoding) -> tuple[torch.Tensor, ...]:
    """`draw_tokens` of all rows at once."""
    logits, log_normaliser = logits.float(), None
    if how.temperature == 0:
        tokens = logits.argmax(-1)
        sampling = logits.new_zeros(len(logits))
    elif how.top_k == 0 and how.top_p == 1:
        warm = how.temperature != 1
        scaled = logits / how.temperature if warm else logits
        peak = scaled.amax(-1, keepdim=True)
        mass = (scaled - peak).exp_()
        tokens = _invert_cdf(mass, noise)
        total = peak[:, 0] + mass.sum(-1).log()
        sampling = scaled.gather(-1, tokens[:, None])[:, 0] - total
        log_normaliser = None if warm else total
    else:
        tokens, sampling = _draw_filtered(logits / how.temperature, noise, how, FIRST_CANDIDATES)
    if log_normaliser is None:
        log_normaliser = logits.logsumexp(-1)
    return tokens, sampling, logits.gather(-1, tokens[:, None])[:, 0] - log_normaliser


def _invert_cdf(mass: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index at which the cumulative mass (rows, tokens) passes noise x total; never one without mass.

    Sums of blocks first, then one block's running sum: over a vocabulary's length that is slow.
    """
    noise, size = noise.to(mass), mass.shape[-1]
    if runtime.plain_mode() or size <= BLOCK:
        return _passes(mass, noise * mass.sum(-1))
    if size % BLOCK:
        mass = torch.nn.functional.pad(mass, (0, -size % BLOCK))
    blocks = mass.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1)
    ends = sums.cumsum(-1)
    target = noise * ends[:, -1]
    block = _passes(sums, target)
    line = torch.arange(len(mass), device=mass.device)
    before = ends[line, block] - sums[line, block]
    return block * BLOCK + _passes(blocks[line, block], target - before)


def _passes(mass: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index at which the running sum of each row passes its target; rounding leads to the last with mass."""
    found = torch.searchsorted(mass.cumsum(-1), target[:, None], right=True)[:, 0]
    if (found == mass.shape[-1]).any():  # the target was rounded up to the total
        found = torch.minimum(found, (mass > 0).to(torch.int16).cumsum(-1).argmax(-1))
    return found


def _draw_filtered(scaled, noise, how: Decoding, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities after top-k and top-p; rows whose nucleus is wider are sorted in full."""
    values, candidates, covered = _filtered(scaled, how.top_k, how.top_p, width)
    ranks = _invert_cdf(values.softmax(-1), noise)[:, None]
    tokens = candidates.gather(-1, ranks)[:, 0]
    log_probs = values.log_softmax(-1).gather(-1, ranks)[:, 0]
    if not covered.all():
        wide = (~covered).nonzero()[:, 0]
        tokens[wide], log_probs[wide] = _draw_filtered(
            scaled[wide], noise[wide], how, scaled.shape[-1]
        )
    return tokens, log_probs


def _filtered(
    logits: torch.Tensor, top_k: int, top_p: float, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `width` likeliest tokens of each row, top-k and top-p applied.

    Returns scaled logits in falling order (-inf where dropped), token ids, and whether the kept set
    lies within `width`.  top-k first, then top-p: the smallest set of likeliest tokens whose share of
    the (top-k) probability reaches top_p (Holtzman et al. 2020).
    """
    width = min(top_k or width, logits.shape[-1])
    values, candidates = logits.topk(width)
    total = values.logsumexp(-1) if top_k else logits.logsumexp(-1)
    share = (values - total[:, None]).exp()
    covered = torch.full_like(total, top_k > 0 or width == logits.shape[-1], dtype=torch.bool)
    if top_p == 1:
        return values, candidates, covered
    cumulative = share.cumsum(-1)
    values = values.masked_fill(cumulative - share >= top_p, float("-inf"))
    return values, candidates, covered | (cumulative[:, -1] >= top_p)


# --- one batch -----------------------------------------------------------------------------------


@dataclass
class _Row:
    """One row while it is being sampled."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    model_log_probs: list[float] = field(default_factory=list)
    finished: bool = False


@torch.inference_mode()
def _sample_batch(model, tokenizer, prompt_ids, n, noise, how) -> list[_Row]:
    """Stages: 1 encode prompts, 2 draw a token per running row, 3 drop finished rows, 4 step the model."""
    decoder = _EncoderDecoder if model.config.is_encoder_decoder else _DecoderOnly
    state = decoder(model, encoding.pad_id(tokenizer), prompt_ids, n, how.max_new_tokens)
    ends = torch.tensor(encoding.end_tokens(tokenizer, model), dtype=torch.long)
    rows = [_Row() for _ in range(len(prompt_ids) * n)]
    running = torch.arange(len(rows))  # which row each line of the batch is
    for step in range(how.max_new_tokens):
        tokens, sampling, plain = (
            x.cpu() for x in draw_tokens(state.logits, noise[running, step].to(model.device), how)
        )
        done = torch.isin(tokens, ends)
        for line, row in enumerate(running.tolist()):
            if not rows[row].finished:
                rows[row].tokens.append(int(tokens[line]))
                rows[row].log_probs.append(float(sampling[line]))
                rows[row].model_log_probs.append(float(plain[line]))
                rows[row].finished = bool(done[line])
        alive = torch.tensor([not rows[row].finished for row in running.tolist()])
        if step + 1 == how.max_new_tokens or not alive.any():
            break
        if not runtime.plain_mode() and alive.float().mean() < KEEP_SHARE:
            keep = alive.nonzero()[:, 0]
            state.select(keep.to(model.device))
            running, tokens = running[keep], tokens[keep]
        state.advance(tokens.to(model.device))
    return rows


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come: written in place, where its parent would copy
    all keys and values at each step (measured: two thirds of the time)."""

    @classmethod
    def of(cls, layer: DynamicLayer, n: int, more: int) -> _RoomyLayer:
        """`layer` with its rows repeated n times and room for `more` tokens."""
        roomy = cls()
        roomy.is_initialized, roomy.dtype, roomy.device = True, layer.dtype, layer.device
        roomy.length, roomy.room = layer.keys.shape[-2], []
        for held in (layer.keys, layer.values):
            rows, heads, length, width = held.shape
            room = held.new_empty(rows, n, heads, length + more, width)
            room[..., :length, :] = held[:, None]
            roomy.room.append(room.flatten(0, 1))
        return roomy._shown()

    def _shown(self):
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)
        return self

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.length + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = new
        self.length = end
        self._shown()
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.room = [room.index_select(0, indices) for room in self.room]
        self._shown()


def _make_room(cache, n: int, more: int) -> None:
    """Repeat a prompt's cache for its n samples, with room for `more` tokens where layers only grow."""
    growing = getattr(cache, "self_attention_cache", cache)
    if runtime.plain_mode() or any(type(layer) is not DynamicLayer for layer in growing.layers):
        if n > 1:
            cache.batch_repeat_interleave(n)
        return
    growing.layers = [_RoomyLayer.of(layer, n, more) for layer in growing.layers]


@dataclass
class _Lines:
    """Which prompt each line of a batch belongs to, for attention to prompts that are stored once."""

    n: int
    padding: torch.Tensor  # (prompts, longest prompt) True where there is none
    place: torch.Tensor | None = None  # (lines,) prompt x n + sample; None: all are there

    def gather(self, lines: torch.Tensor) -> torch.Tensor:
        """(lines, groups, heads, width) -> (prompts, groups, n x heads, width); absent lines are 0."""
        if self.place is not None:
            there = lines.new_zeros(len(self.padding) * self.n, *lines.shape[1:])
            lines = there.index_copy_(0, self.place, lines)
        return lines.unflatten(0, (-1, self.n)).transpose(1, 2).flatten(2, 3)

    def scatter(self, prompts: torch.Tensor) -> torch.Tensor:
        """The reverse of `gather`."""
        lines = prompts.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)
        return lines if self.place is None else lines[self.place]

    def select(self, keep: torch.Tensor) -> None:
        self.place = keep if self.place is None else self.place[keep]


class _SharedLayer(DynamicLayer):
    """A cache layer that holds a prompt's keys and values once for its n samples, and room for theirs.

    `update` gives itself in the place of keys and values, for `_shared_attention`, which reads both parts.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, lines: _Lines, more: int):
        super().__init__()
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self.lines, self.used, self.prompts = lines, 0, (keys, values)
        rows, heads = keys.shape[0] * lines.n, keys.shape[1]
        self.room = [held.new_empty(rows, heads, more, held.shape[-1]) for held in self.prompts]

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """query k^T over the samples' own tokens, (lines, groups, heads, used).

        A product with all of the room needs no copy of its used part (measured: half the time).
        """
        keys = self.room[0]
        if 3 * self.used < keys.shape[-2]:
            keys = keys[:, :, : self.used]
        return (query @ keys.mT)[..., : self.used]

    def read(self, weights: torch.Tensor) -> torch.Tensor:
        """weights v over the samples' own tokens, (lines, groups, heads, width)."""
        return weights @ self.room[1][:, :, : self.used]

    def update(self, key_states, value_states, *args, **kwargs):
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.used : self.used + 1] = new
        self.used += 1
        return self, self

    def get_seq_length(self) -> int:
        return self.prompts[0].shape[-2] + self.used

    def batch_select_indices(self, indices):
        self.room = [room.index_select(0, indices) for room in self.room]


def _shared_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of one new token a line to its prompt, stored once, and to its own tokens before.

    The prompt's part is one matrix product for all samples of a prompt (measured on a CPU, 16 prompts of up
    to 174 tokens, 8 samples: a tenth of the time of attention over repeated caches).
    """
    layer, lines = key, key.lines
    prompt_keys, prompt_values = layer.prompts
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, prompt_keys.shape[1], -1, width)
    seen = lines.gather(grouped) @ prompt_keys.mT
    seen = seen.float().masked_fill_(lines.padding[:, None, None], float("-inf"))
    scores = torch.cat([lines.scatter(seen), layer.scores(grouped).float()], -1)
    weights = (scores * scaling).softmax(-1).to(query.dtype)
    longest = prompt_keys.shape[-2]
    out = lines.scatter(lines.gather(weights[..., :longest]) @ prompt_values)
    out = out + layer.read(weights[..., longest:])
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("shared_prompt", _shared_attention)


class _DecoderOnly:
    """Cache, mask and next-token logits of a decoder-only batch; prompts are left-padded."""

    def __init__(self, model, pad_id, prompt_ids, n, new_tokens):
        self.model = model
        ids, mask = (x.to(model.device) for x in encoding.pad_rows(prompt_ids, pad_id, "left"))
        if runtime.plain_mode():
            ids, mask, n = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0), 1
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.mask, self.cache, self.lines, self.configs = mask, None, None, []
        if self._can_share():
            self._encode_once(ids, n, new_tokens)
            self.configs = models.attention_configs(model)
        else:
            self._forward(ids)
            _make_room(self.cache, n, new_tokens)
        if n > 1:
            self.mask = self.mask.repeat_interleave(n, 0)
            self.logits = self.logits.repeat_interleave(n, 0)

    def _can_share(self) -> bool:
        """Whether prompts may be stored once.  Measured on CPUs only, so elsewhere they are not."""
        known = self.model.config.model_type in SHARED_PROMPT and self.model.device.type == "cpu"
        layers = DynamicCache(config=self.model.config).layers
        plain = len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)
        return known and plain and not runtime.plain_mode()

    def _encode_once(self, ids, n, new_tokens):
        """Prompts of like length together, so that little padding is computed; then one shared cache."""
        mask, longest, order, logits, parts = self.mask, ids.shape[1], [], [], []
        for batch in encoding.token_batches(mask.sum(1).tolist(), PROMPT_TOKENS):
            width = int(mask[batch].sum(1).max())
            self.mask, self.cache = mask[batch, -width:], None
            self._forward(ids[batch, -width:])
            order += batch
            logits.append(self.logits)
            held = ((layer.keys, layer.values) for layer in self.cache.layers)
            left = (0, 0, longest - width, 0)
            parts.append([[torch.nn.functional.pad(x, left) for x in both] for both in held])
        back = torch.tensor(order, device=ids.device).argsort()
        self.mask, self.logits, self.lines = mask, torch.cat(logits)[back], _Lines(n, mask == 0)
        self.cache.layers = [
            _SharedLayer(*(torch.cat(x)[back] for x in zip(*layer, strict=True)), self.lines, new_tokens)
            for layer in zip(*parts, strict=True)
        ]  # fmt: skip

    def _forward(self, ids):
        extra = {}
        if self.takes_positions:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1, **extra,
        )  # fmt: skip
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]

    def select(self, keep):
        self.cache.batch_select_indices(keep)
        self.mask = self.mask[keep]
        if self.lines:
            self.lines.select(keep)

    def advance(self, tokens):
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], -1)
        with models.attending(self.configs, "shared_prompt"):  # which needs no mask
            self._forward(tokens[:, None])


class _EncoderDecoder:
    """Encoder states (computed once per prompt), decoder cache and logits of a batch."""

    def __init__(self, model, pad_id, prompt_ids, n, new_tokens):
        self.model = model
        ids, self.mask = (
            x.to(model.device) for x in encoding.pad_rows(prompt_ids, pad_id, "right")
        )
        states = model.get_encoder()(input_ids=ids, attention_mask=self.mask).last_hidden_state
        self.states, self.mask = states.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0)
        self.cache = None
        start = model.config.decoder_start_token_id
        self.advance(torch.full((len(self.states),), start, device=model.device))
        _make_room(self.cache, 1, new_tokens)

    def select(self, keep):
        self.cache.batch_select_indices(keep)
        self.states, self.mask = self.states[keep], self.mask[keep]

    def advance(self, tokens):
        out = self.model(
            encoder_outputs=BaseModelOutput(self.states), attention_mask=self.mask,
            decoder_input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]


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
