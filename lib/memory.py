"""The memory of a run before it runs: what each stage holds, and how many rows fit.

A model is built on the meta device, where tensors have a shape and no bytes, and its real forward pass is
run there: what autograd keeps for the backward pass is counted, so a model of any class is measured as it
is, with what `models.set_trainable` froze.  In bytes, of one process; what the CUDA context, fragmentation
and libraries take (about 1 GB) comes on top.  `tests/test_memory.py` holds it against measured peaks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
import psutil
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from lib import hub, models

ADAM = 8  # bytes a trained parameter: two moments, float32
GRADIENT = 4
LOGIT = 12  # bytes a logit at the backward pass: its log-softmax, the gradient of that, its own gradient
CONDITION_LOGIT = 52  # the same with entropy and KL over all tokens, and the reference's (measured)
TRL_LOGIT = 24  # TRL's loss has copies of the logits besides, and what it logs of them (measured)
SPARE = 0.1  # of the memory that is free, for fragmentation

# the papers' and the course's models, so that a plan needs no network: class, and what is not its default
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Stage:
    """What one stage holds at its peak, in bytes by what holds them."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def skeleton(model: str | PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A language model, or encoder, without weights, on the meta device.

    Of a name that is not in SHAPES the configuration is fetched.
    """
    config = model
    if isinstance(model, str):
        config = _config_of(model)
    family = AutoModel
    if config.is_encoder_decoder:
        family = AutoModelForSeq2SeqLM
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        outline = family.from_config(config, dtype=dtype).eval()
    outline.tie_weights()
    return outline


def _config_of(name: str) -> PretrainedConfig:
    if name in models.TINY_MODELS:
        return models.build_tiny_model(name)[0].config
    if name in SHAPES:
        shape = dict(SHAPES[name])
        return AutoConfig.for_model(shape.pop("class"), **shape)
    return hub.read_config(hub.resolve_model(name, weights=False))


def bytes_of(model: torch.nn.Module, trained: bool = False) -> int:
    """Of the weights, tied ones once; `trained`: of those that train."""
    weights = {p: None for p in model.parameters() if p.requires_grad or not trained}
    return sum(p.numel() * p.element_size() for p in weights)


# --- what a pass keeps ---------------------------------------------------------------------------


def kept_by(model: PreTrainedModel, rows: int, tokens: int, prompt: int = 0) -> int:
    """Bytes that autograd keeps of a forward pass up to the last states, (rows, tokens).

    Of an encoder-decoder `tokens` are the decoder's and `prompt` those of the encoder.
    """
    try:
        return _kept(model, _inputs(model, rows, tokens, prompt))
    except RuntimeError:  # some classes look at their mask, which has no values here
        pass
    try:
        return _kept(model, _inputs(model, rows, tokens, prompt, square=True))
    except (RuntimeError, IndexError):
        return _kept_by_layers(model, rows, tokens)


def _inputs(model, rows: int, tokens: int, prompt: int, square: bool = False) -> dict:
    def ids(length: int, role: str = "") -> dict:
        shape = (rows, 1, length, length) if square else (rows, length)
        mask = torch.ones(shape, dtype=torch.bool if square else torch.long, device=model.device)
        read = torch.zeros(rows, length, dtype=torch.long, device=model.device)
        return {f"{role}input_ids": read, f"{role}attention_mask": mask}

    if not model.config.is_encoder_decoder:
        return ids(tokens)
    inputs = ids(prompt) | ids(tokens, "decoder_")
    if square:  # the decoder reads the encoder's mask as well, for each of its own tokens
        inputs["attention_mask"] = inputs["attention_mask"][:, :, :1]
    return inputs


def _kept(model: PreTrainedModel, inputs: dict) -> int:
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.Tensor] = {}  # by storage: views and copies of a reference are one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            storages[storage] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, mock.patch("torch.nn.functional.scaled_dot_product_attention", _attend):
        model.base_model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


class _Attention(torch.autograd.Function):
    """What the fused attention of a device keeps; without values torch would keep every weight as well."""

    @staticmethod
    def forward(context, query, key, value):
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError("lib.memory runs forward passes only")


def _attend(query, key, value, *_, **__) -> torch.Tensor:
    return _Attention.apply(query, key, value)


def _kept_by_layers(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """The same from real models of one and of two layers, for a class that cannot run without values."""
    sizes = []
    for layers in (1, 2):
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = layers
        if isinstance(getattr(config, "attention_window", None), list):
            config.attention_window = config.attention_window[:layers]
        small = type(model)(config).to(model.dtype)
        sizes.append(_kept(small, _inputs(small, 1, tokens, 0)))
    one, two = sizes
    return rows * (one + (model.config.num_hidden_layers - 1) * (two - one))


def cache_of(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens a row (a decoder's own, and those of its encoder)."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = width or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = len(models.decoder_layers(model))
    return 2 * layers * rows * tokens * shared * width * _element(model)


def _element(model: PreTrainedModel) -> int:
    return next(model.parameters()).element_size()


# --- stages --------------------------------------------------------------------------------------


def sampling(model: PreTrainedModel, rows: int, prompt: int, response: int) -> Stage:
    """`generation.sample` of `rows` responses at once."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    layers = len(models.decoder_layers(model))
    read = (1, prompt) if model.config.is_encoder_decoder else (prompt,)
    states = kept_by(skeleton(model.config, model.dtype), rows, *read)
    return Stage(
        "sampling",
        {
            "weights": bytes_of(model),
            "keys and values": cache_of(model, rows, prompt + response),
            # while the prompts are read; half of what a layer would keep stands at once (measured)
            "a layer's states": states // layers // 2,
            "logits": 3 * 4 * rows * vocabulary,  # as they come, filtered, as probabilities
        },
    )


def fine_tuning(model: PreTrainedModel, rows: int, tokens: int, prompt: int = 0) -> Stage:
    """`sft.train_sft` with batches of `rows`; of an encoder-decoder `prompt` tokens go to the encoder."""
    each = LOGIT if model.config.is_encoder_decoder else TRL_LOGIT
    logits = each * rows * tokens * model.get_output_embeddings().weight.shape[0]
    return _training("fine-tuning", model, kept_by(model, rows, tokens, prompt), logits)


def reward_model(backbone: PreTrainedModel, rows: int, tokens: int) -> Stage:
    """`reward_models.train` with `rows` texts a batch."""
    return _training("reward model", backbone, kept_by(backbone, rows, tokens), 0)


def _training(name: str, model, states: int, logits: int) -> Stage:
    trained = bytes_of(model, trained=True)
    return Stage(
        name,
        {
            "weights": bytes_of(model),
            "gradients": trained // 4 * GRADIENT,
            "Adam": trained // 4 * ADAM,
            "activations and logits": states + logits,
        },
    )


def ppo(
    policy: PreTrainedModel,
    rows: int,
    prompt: int,
    response: int,
    *,
    episodes: int,
    value_model: PreTrainedModel | None = None,
) -> Stage:
    """`ppo.train_ppo`, whose passes take `rows` rows (forward_rows) of the `episodes` of a step.

    The reference is a copy of what trains.  Sampling takes all episodes at once, and its cache is gone when
    the update begins, so the larger of the two counts.
    """
    both = [policy, *([value_model] if value_model is not None else [])]
    trained = sum(bytes_of(model, trained=True) for model in both)
    states = sum(_kept_of_episode(model, rows, prompt, response) for model in both)
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    update = states + LOGIT * rows * response * vocabulary
    drawn = sampling(policy, episodes, prompt, response)
    return Stage(
        "PPO",
        {
            "weights": sum(bytes_of(model) for model in both),
            "reference": bytes_of(policy, trained=True),
            "gradients": trained // 4 * GRADIENT,
            "Adam": trained // 4 * ADAM,
            "activations and logits, or cache": max(update, drawn.total - drawn.parts["weights"]),
        },
    )


def conditioning(
    policy: PreTrainedModel, rows: int, prompt: int, response: int, *, drawn: int
) -> Stage:
    """The conditioning loop of Quark and ALT, whose passes take `rows` rows (forward_rows) of a batch.

    `prompt` counts the condition's tokens too.  The reference is a copy of what trains; `drawn` responses
    are sampled at once, before the updates.
    """
    trained = bytes_of(policy, trained=True)
    logits = rows * response * policy.get_output_embeddings().weight.shape[0]
    update = _kept_of_episode(policy, rows, prompt, response) + CONDITION_LOGIT * logits
    sampled = sampling(policy, drawn, prompt, response)
    return Stage(
        "conditioning",
        {
            "weights": bytes_of(policy),
            "reference": trained,
            "gradients": trained // 4 * GRADIENT,
            "Adam": trained // 4 * ADAM,
            "activations and logits, or cache": max(
                update, sampled.total - sampled.parts["weights"]
            ),
        },
    )


def _kept_of_episode(model, rows: int, prompt: int, response: int) -> int:
    if model.config.is_encoder_decoder:
        return kept_by(model, rows, response, prompt)
    return kept_by(model, rows, prompt + response)


def in_eight_bits(stage: Stage, model: PreTrainedModel) -> Stage:
    """The stage of a model whose layers' frozen linear maps are held in 8 bits (`models.load_policy`)."""
    layers = models.decoder_layers(model).modules()
    # each once: adapters wrap a map and show its weight as theirs
    maps = {m.weight for m in layers if hasattr(m, "in_features") or hasattr(m, "nf")}
    frozen = [weight for weight in maps if not weight.requires_grad]
    saved = sum(weight.numel() * (weight.element_size() - 1) for weight in frozen)
    return Stage(stage.name, stage.parts | {"weights": stage.parts["weights"] - saved})


# --- what fits -----------------------------------------------------------------------------------


def free(device: torch.device | str) -> int:
    """Bytes that a run may take on a device, a tenth left to fragmentation."""
    device = torch.device(device)
    if device.type == "cuda":
        return int((1 - SPARE) * torch.cuda.mem_get_info(device)[0])
    return int((1 - SPARE) * psutil.virtual_memory().available)


def rows_that_fit(stage: Callable[[int], Stage], limit: int, most: int) -> int:
    """The most rows, `most` halved as often as needed, whose stage stays within `limit` bytes.

    Raises ValueError where not even one row does; it says what is needed and by what.
    """
    rows = most
    while stage(rows).total > limit:
        if rows == 1:
            least = stage(1)
            biggest = max(least.parts, key=least.parts.get)
            raise ValueError(
                f"{least.name} needs {least.total / 1e9:.1f} GB with one row at a time, {limit / 1e9:.1f} GB "
                f"are free; most of it is {biggest} ({least.parts[biggest] / 1e9:.1f} GB). Take a smaller "
                'model, or train less of it (train="lora" or "top").'
            )
        rows = -(-rows // 2)
    return rows


def table(*stages: Stage) -> pd.DataFrame:
    """One row a stage, GB by what holds them, the peak last."""
    rows = [{"stage": s.name} | s.parts | {"peak": s.total} for s in stages]
    frame = pd.DataFrame(rows).set_index("stage")
    frame = frame[[*[c for c in frame if c != "peak"], "peak"]]
    return (frame / 1e9).round(2).rename(columns=lambda name: f"{name}, GB")
