"""What is only about speed: faster ways to the same numbers, most of them for processors with bfloat16 units.

Nothing needs this file.  A function that `runtime.accelerated` marks has a namesake here, which is called in
its place with the plain one as first argument, and falls back on it wherever it does not apply.  With
LIB_PLAIN=1, or without the file, the plain ones run.  A trick stands here for a gain of at least 1.15.
Measured, where nothing else is said, on an AMD EPYC with AVX512_BF16, SmolLM2-135M, one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lib import generation, int8, logprobs, runtime

PACKED_BYTES = 2**30
NOTHING_AFTER = {"attr": "none", "scalars": [], "algorithm": ""}  # no activation fused to a product
# values of a matrix (measured: oneDNN is the faster one from 128 x 512, the slower below 64 x 128)
LARGE = 2**17
# architectures whose attention takes the samples' keys beside their prompt's (tested for each)
SHARED_PROMPT = ("llama", "mistral", "qwen2", "qwen3")
# top-p looks at this many tokens first (measured: with 256 every second row needs a full sort)
FIRST_CANDIDATES = 2048
# encoders whose classification head reads their first token (tested for each)
FIRST_TOKEN = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
VOCABULARY_AT_ONCE = 2048  # words whose logits stand in memory (measured: 8192 is slower)


# --- weights in the dtype and layout that products are fastest in ----------------------------------


@contextlib.contextmanager
def for_sampling(plain, model: PreTrainedModel) -> Iterator[None]:
    """What `set_trainable` raised to float32 has its frozen trunk's dtype; weights are packed (`packed`).

    Measured, 16 rows, top layers raised: 1.34 times the tokens/s.
    """
    raised, low = _above_trunk(model)
    before = [parameter.data for parameter in raised]
    try:
        for parameter in raised:
            parameter.data = parameter.data.to(low)
        with packed(model):
            yield
    finally:
        for parameter, data in zip(raised, before, strict=True):
            parameter.data = data


def _above_trunk(model) -> tuple[list[torch.nn.Parameter], torch.dtype | None]:
    """Parameters in float32 over a frozen trunk in another dtype, and that dtype; none where all is one."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    low = {p.dtype for p in floating if not p.requires_grad} - {torch.float32}
    if len(low) != 1 or model.config.is_encoder_decoder or int8.is_eight_bit(model):
        return [], None
    return [p for p in floating if p.dtype == torch.float32], low.pop()


@contextlib.contextmanager
def packed(model: torch.nn.Module) -> Iterator[None]:
    """Within: linear maps in bfloat16 on a CPU have their weights in the layout oneDNN computes in, which
    `linear` makes anew at each call.  Same numbers, no gradients.

    Measured: 1.15 times the tokens/s with 16 rows (1.03 to 1.1 with 128), 1.14 times the texts/s.  The layout
    is a second copy of the weights: not for models of more than PACKED_BYTES.
    """
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and _can_pack(m)]
    if sum(module.weight.nbytes for module in linear) > PACKED_BYTES:
        linear = []
    try:
        for module in linear:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            product = torch.ops.mkldnn._linear_pointwise  # not there in every build of torch
            module.forward = partial(product, W=weight, B=module.bias, **NOTHING_AFTER)
        yield
    finally:
        for module in linear:
            module.__dict__.pop("forward", None)


def _can_pack(module: torch.nn.Linear) -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ours = "forward" not in vars(module) and module.weight.device.type == "cpu"
    usable = ours and module.weight.dtype == torch.bfloat16
    return known and usable and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def fast_float32(plain, model: torch.nn.Module) -> Iterator[None]:
    """Float32 products by oneDNN, where that is faster here and as exact (`medium_is_exact`).

    Measured: PPO's update and forward in 0.87 of the time; elsewhere 0.6.  Not for small models, whose
    products take longer so.
    """
    sizes = (p.numel() for p in model.parameters() if p.dtype == torch.float32 and p.dim() == 2)
    wanted = max(sizes, default=0) >= LARGE and next(model.parameters()).device.type == "cpu"
    with medium_precision() if wanted and medium_is_exact() else plain(model):
        yield


@contextlib.contextmanager
def medium_precision() -> Iterator[None]:
    """Within: torch's float32 precision "medium", process-wide."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def medium_is_exact() -> bool:
    """Whether float32 products at "medium" precision are worth asking for: as exact here, and faster.

    There torch asks oneDNN in the place of MKL, which is slow on processors of AMD (by 1.2 to 2.2), so only
    those come into question.  Where oneDNN rounds to bfloat16, products are not exact: their error says so.
    """
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, by its owner: left as it is
        return False
    if not torch.backends.mkldnn.is_available() or "AuthenticAMD" not in runtime.cpu_info():
        return False
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(512, 512, generator=generator)
    right = torch.randn(512, 512, generator=generator)
    exact = left.double() @ right.double()
    plain_error = (left @ right - exact).abs().mean()
    with medium_precision():
        medium_error = (left @ right - exact).abs().mean()
    return bool(medium_error < 2 * plain_error)


# --- sampling: a prompt's keys and values stored once for its samples ------------------------------


def encode_batch(plain, model: PreTrainedModel, pad: int, prompt_ids: list[list[int]], n: int):
    """`generation.encode_batch`, with prompts stored once where the architecture is known.

    Measured on CPUs only (128 rows: 1.2 to 1.4 times the tokens/s), so elsewhere they are repeated.
    """
    known = model.config.model_type in SHARED_PROMPT and model.device.type == "cpu"
    layers = DynamicCache(config=model.config).layers if known else []
    if n > 1 and layers and all(type(layer) is DynamicLayer for layer in layers):
        return SharedPrompts(model, pad, prompt_ids, n)
    return plain(model, pad, prompt_ids, n)


class SharedPrompts(generation.DecoderState):
    """A batch whose cache holds each prompt's keys and values once, and the samples' own beside them."""

    def _repeat(self, n: int) -> None:
        self.n = n
        self.padding = self.mask == 0  # (prompts, longest prompt)
        self.place = torch.arange(n * len(self.mask))  # of each line: prompt x n + sample
        layers = self.cache.layers
        self.cache.layers = [_SharedLayer(layer.keys, layer.values, self) for layer in layers]
        self.mask = self.mask.repeat_interleave(n, 0)
        self.logits = self.logits.repeat_interleave(n, 0)
        self.configs = attention_configs(self.model)

    def select(self, keep: torch.Tensor) -> None:
        super().select(keep)
        self.place = self.place[keep]

    def advance(self, tokens: torch.Tensor) -> None:
        with attending(self.configs, "shared_prompt"):  # which needs no mask
            super().advance(tokens)

    def gather(self, lines: torch.Tensor) -> torch.Tensor:
        """(lines, groups, heads, width) -> (prompts, groups, n x heads, width); absent lines are 0."""
        every = lines.new_zeros(len(self.padding) * self.n, *lines.shape[1:])
        every[self.place] = lines
        return every.unflatten(0, (-1, self.n)).transpose(1, 2).flatten(2, 3)

    def scatter(self, prompts: torch.Tensor) -> torch.Tensor:
        """The reverse of `gather`."""
        every = prompts.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)
        return every[self.place]


class _SharedLayer(DynamicLayer):
    """A cache layer of `SharedPrompts`.

    `update` gives itself in the place of keys and values, for `_shared_attention`, which reads both parts.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, state: SharedPrompts):
        super().__init__()
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self.prompt_keys, self.prompt_values, self.state = keys, values, state
        lines = len(state.place)
        self.keys, self.values = (
            x.new_empty(lines, x.shape[1], 0, x.shape[3]) for x in (keys, values)
        )

    def update(self, key_states, value_states, *args, **kwargs):
        super().update(key_states, value_states)
        return self, self

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2] + self.keys.shape[-2]


def _shared_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of one new token a line to its prompt, stored once, and to its own tokens before.

    The prompt's part is one matrix product for all samples of a prompt, in the place of one for each.
    """
    layer, state = key, key.state
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, layer.prompt_keys.shape[1], -1, width)
    seen = (state.gather(grouped) @ layer.prompt_keys.mT).float()
    seen = seen.masked_fill_(state.padding[:, None, None], float("-inf"))
    scores = torch.cat([state.scatter(seen), (grouped @ layer.keys.mT).float()], -1)
    weights = (scores * scaling).softmax(-1).to(query.dtype)
    longest = layer.prompt_keys.shape[-2]
    out = state.scatter(state.gather(weights[..., :longest]) @ layer.prompt_values)
    out = out + weights[..., longest:] @ layer.values
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("shared_prompt", _shared_attention)


@contextlib.contextmanager
def attending(configs: Sequence, name: str) -> Iterator[None]:
    """Within: attention layers with these configurations use the implementation `name`."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def attention_configs(model: PreTrainedModel) -> list:
    """The configurations that the model's attention layers read, each once."""
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    return list({id(layer.config): layer.config for layer in layers}.values())


def draw_filtered(plain, log_probs, noise, decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """`generation.draw_filtered`, which sorts only those rows in full whose nucleus is wide.

    Measured, 128 rows, top-p 0.95: 1.25 times the tokens/s.
    """
    width = FIRST_CANDIDATES
    if log_probs.shape[-1] <= width:
        return plain(log_probs, noise, decoding)
    ranked, tokens = log_probs.topk(width)
    enough = ranked.exp().sum(-1) >= decoding.top_p
    if decoding.top_k:
        enough = torch.full_like(enough, decoding.top_k <= width)
    likely, tokens = generation.keep_likely(ranked, tokens, decoding)
    drawn, drawn_with = generation.draw_ranked(likely, tokens, noise)
    wide = (~enough).nonzero()[:, 0]
    if len(wide):
        drawn[wide], drawn_with[wide] = plain(log_probs[wide], noise[wide], decoding)
    return drawn, drawn_with


# --- scoring texts ---------------------------------------------------------------------------------


@contextlib.contextmanager
def for_scoring(plain, model: PreTrainedModel, batches: int) -> Iterator[None]:
    """Packed weights; and where the head reads the first token, no more than that in the last layer.

    Same numbers; of six layers' products a seventh is not made.  Measured, 400 texts: 1.30 times the texts/s.
    """
    config = model.config
    encodes = config.model_type in FIRST_TOKEN and not getattr(config, "is_decoder", False)
    known = encodes and config._attn_implementation in ("sdpa", "eager")
    layer = model.base_model.encoder.layer[-1] if known else None
    if layer is not None:
        layer.forward = partial(_first_position, layer)
    try:
        # packing a small number of batches takes longer than it saves
        with packed(model) if batches > 2 else contextlib.nullcontext():
            yield
    finally:
        if layer is not None:
            del layer.forward


def _first_position(layer, hidden, mask=None, *_, **__) -> torch.Tensor:
    """A layer's output at the first position, (texts, 1, width), from all of its input."""
    own, first = layer.attention.self, hidden[:, :1]
    seen = ((own.query, first), (own.key, hidden), (own.value, hidden))
    heads = (f(x).unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2) for f, x in seen)
    if mask is not None:
        mask = mask[:, None, None].bool() if mask.dim() == 2 else mask[:, :, :1]
    out = scaled_dot_product_attention(*heads, attn_mask=mask, scale=own.scaling)
    return layer.feed_forward_chunk(layer.attention.output(out.transpose(1, 2).flatten(2), first))


# --- fine-tuning -----------------------------------------------------------------------------------


@contextlib.contextmanager
def logits_where_loss_falls(plain) -> Iterator[None]:
    """Without Triton, TRL also computes the logits of prompt tokens and then masks them: not here.

    Measured, prompts of 120 tokens, answers of 30, top layers: training in 0.45 of the time.
    """
    import trl.trainer.utils as trl_utils

    asked = getattr(trl_utils, "_use_triton", None)
    if asked is None:  # another release of TRL: slower, the same
        yield
        return
    trl_utils._use_triton = lambda device: True  # read there only to decide on the masking
    try:
        yield
    finally:
        trl_utils._use_triton = asked


# --- PPO: log-probabilities from hidden states ------------------------------------------------------


def read_responses(plain, learner, tokens, reference: bool, entropy: bool):
    """`ppo.read_responses` without ever having all logits in memory (`chosen_log_probs`)."""
    if not _reads_states(learner.policy):
        return plain(learner, tokens, reference, entropy)
    states, values = learner.network(tokens, reference, False)
    weight = learner.policy.get_output_embeddings().weight
    chosen = tokens.response_ids[tokens.places]
    log_probs, spread = chosen_log_probs(
        states, weight, chosen, learner.config.temperature, entropy
    )
    return log_probs, values, spread


def _reads_states(policy: PreTrainedModel) -> bool:
    """Whether logits are no more than a fixed matrix times what the output layer reads, on a CPU."""
    head = policy.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    fixed = not head.weight.requires_grad and head.weight.dtype == torch.float32
    fixed = fixed and not logprobs.changes_logits(policy)
    return fixed and head.weight.device.type == "cpu"


def chosen_log_probs(
    states: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, temperature=1.0, entropy=False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(chosen) and, where asked, the entropy of p = softmax(weight h / temperature), (tokens,) each.

    states h (tokens, width), weight (vocabulary, width), chosen (tokens,).  The logits never stand in
    memory: the vocabulary goes by in blocks that fit a cache, and with them what the gradient needs,
    d log p(y) / d h = (w_y - sum_v p_v w_v) / temperature.  None flows to `weight` or from the entropy.
    Measured, 256 tokens over 49,152 words: 0.75 of the time with the gradient, 0.5 with entropies.
    """
    log_probs, spread = _ChosenLogProbs.apply(states / temperature, weight, chosen, entropy)
    return log_probs, spread if entropy else None


class _ChosenLogProbs(torch.autograd.Function):
    """`chosen_log_probs` at temperature 1: sums of exp(z - peak), rescaled whenever the peak rises."""

    @staticmethod
    def forward(ctx, states, weight, chosen, entropy):
        total, spread = torch.zeros(2, len(states), 1, dtype=states.dtype, device=states.device)
        peak, mean = torch.full_like(total, torch.finfo(total.dtype).min), torch.zeros_like(states)
        for block in weight.split(VOCABULARY_AT_ONCE):
            logits = states @ block.T
            higher = torch.maximum(peak, logits.amax(1, keepdim=True))
            logits -= higher
            mass = logits.exp()
            keep = (peak - higher).exp()
            if entropy:  # sum_v exp(z_v - peak) (z_v - peak)
                moved = torch.where(total > 0, (peak - higher) * total, 0)
                spread = keep * (spread + moved) + logits.mul_(mass).sum(1, keepdim=True)
            total = keep * total + mass.sum(1, keepdim=True)
            if ctx.needs_input_grad[0]:
                mean.mul_(keep).addmm_(mass, block)
            peak = higher
        own = weight[chosen]
        log_probs = (states * own).sum(1) - (peak + total.log())[:, 0]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(own - mean / total)
        entropies = (total.log() - spread / total)[:, 0]
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        return grad[:, None] * ctx.saved_tensors[0], None, None, None
