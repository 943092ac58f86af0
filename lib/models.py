"""Policies: load any causal or encoder-decoder language model, or build a tiny one without a download.

A model's name is an offline asset ("policy"), a folder, a Hub id ("namespace/name"), or "tiny" /
"tiny-encoder-decoder": two-layer models with random weights over a word-level vocabulary made of
the words in `data/samples/`.  Sampling from a tiny model gives word salad in which every word is
about equally likely, so scores vary and training has something to change.

Never loads remote code or pickled weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lib import runtime
from lib.course import assets

PACKED_BYTES = 2**30
# values of a matrix (measured: oneDNN is the faster one from 128 x 512, the slower below 64 x 128)
LARGE = 2**17
NOTHING_AFTER = {"attr": "none", "scalars": [], "algorithm": ""}  # no activation fused to a product
TINY_MODELS = ("tiny", "tiny-encoder-decoder")
TINY_SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
TINY_CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load_policy(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    revision: str | None = None,
    eight_bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in eval mode (dropout off) and its left-padding tokenizer.

    `dtype` defaults to what sampling is fastest in here (`runtime.inference_dtype`); tiny models
    are always float32.  `eight_bit`: linear weights in 8 bits (LLM.int8, by bitsandbytes); only LoRA
    can train such a model.  Raises ValueError for an unknown name or where bitsandbytes is missing,
    AssetError where the model cannot be had.
    """
    device = device or runtime.get_device()
    if name in TINY_MODELS:
        model, tokenizer = build_tiny_model(name)
    else:
        path = assets.resolve_model(name, revision=revision)
        config = AutoConfig.from_pretrained(path)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        dtype = dtype or runtime.inference_dtype(device)
        options = _eight_bit_options(device) if eight_bit else {}
        model = family.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(path))
    return (model if is_eight_bit(model) else model.to(device)).eval(), tokenizer


def has_eight_bit() -> bool:
    """Whether bitsandbytes is installed and a GPU is here (on a CPU 8 bits save memory, not time)."""
    return torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None


def is_eight_bit(model: PreTrainedModel) -> bool:
    """Whether the model's linear weights are held in 8 bits."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


def _eight_bit_options(device: torch.device) -> dict:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "eight_bit=True needs bitsandbytes, which is not installed. Try `pip install bitsandbytes`, "
            "or eight_bit=False."
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast, each time
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": quantization, "device_map": {"": device}}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Left padding (the last position is then the newest token) and a pad token where there is none."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Number of parameters, in all and trainable."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"total": sum(s for s, _ in sizes), "trainable": sum(s for s, needs in sizes if needs)}


# --- what trains, and the frozen trunk below it --------------------------------------------------


def set_trainable(
    model: PreTrainedModel, train: str = "top", *, layers: int = 2, lora_rank: int = 8
) -> int:
    """Choose what trains, in place; return how many of the lowest decoder layers stay frozen.

    "top": the `layers` uppermost decoder layers and the norm after them.  "lora": adapters of rank
    `lora_rank` (alpha = rank, no dropout) on every linear map of those layers.  "all": everything.
    What is not frozen trunk becomes float32; the trunk keeps its dtype, as does a model in 8 bits.
    ValueError for other names, numbers of layers, or an 8-bit model with anything but "lora".
    """
    stack = decoder_layers(model)
    if train not in ("top", "lora", "all"):
        raise ValueError(f"train is {train!r}; allowed: 'top', 'lora', 'all'.")
    if train != "all" and not 1 <= layers <= len(stack):
        raise ValueError(
            f"layers is {layers}; this model has {len(stack)}: give 1 to {len(stack)}."
        )
    if is_eight_bit(model) and train != "lora":
        raise ValueError(f"train is {train!r}; a model in 8 bits trains with 'lora' only.")
    frozen = 0 if train == "all" else len(stack) - layers
    _raise_above_trunk(model, stack, frozen)
    model.requires_grad_(train == "all")
    if train == "lora":
        _add_lora(model, stack[frozen:], lora_rank)
    elif train == "top":
        for module in [*stack[frozen:], *_norms_after(model, stack)]:
            module.requires_grad_(True)
    return frozen


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's layers, lowest first.  Raises ValueError where they cannot be found."""
    config = model.config
    depth = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    stacks = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    found = next((stack for stack in stacks if len(stack) == depth), None)
    if found is None:
        raise ValueError(f"no stack of {depth} decoder layers found in {type(model).__name__}.")
    return found


def _norms_after(model, stack) -> list[torch.nn.Module]:
    parent = next(m for m in model.get_decoder().modules() if stack in m.children())
    children = [*parent.children()]
    later = children[children.index(stack) + 1 :]
    return [module for module in later if "norm" in type(module).__name__.lower()]


def _raise_above_trunk(model, stack, frozen: int) -> None:
    if is_eight_bit(model):  # its weights stay as they are; the adapters are float32
        return
    trunk_dtype = next(stack[0].parameters()).dtype
    model.float()
    if frozen and trunk_dtype != torch.float32 and not model.config.is_encoder_decoder:
        stack[:frozen].to(trunk_dtype)
        for layer in stack:  # each computes in its own dtype, whatever the layer below hands up
            layer.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)


def _to_own_dtype(layer, args, kwargs):
    def cast(item):
        floating = isinstance(item, torch.Tensor) and item.is_floating_point()
        return item.to(dtype) if floating else item

    dtype = next(layer.parameters()).dtype
    return tree_map(cast, (args, kwargs))


@contextlib.contextmanager
def for_sampling(model: PreTrainedModel) -> Iterator[None]:
    """Within: `model` samples as fast as it can; after: its weights as before.  LIB_PLAIN=1: no change.

    What `set_trainable` raised to float32 has its frozen trunk's dtype (measured on a CPU with bfloat16:
    1.5 times the tokens/s).  The output layer sees contiguous states: of others torch makes a product
    for each row, where the layer is frozen, and copies the vocabulary's matrix as often.  Weights are
    packed (`packed`).  No gradients.
    """
    if runtime.plain_mode():
        yield
        return
    raised, low = _above_trunk(model)
    kept, output = [parameter.data for parameter in raised], model.get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        for parameter in raised:
            parameter.data = parameter.data.to(low)
        with packed(model):
            yield
    finally:
        hook.remove()
        for parameter, data in zip(raised, kept, strict=True):
            parameter.data = data


@contextlib.contextmanager
def fast_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within: float32 products by oneDNN, where that is faster here and as exact (`runtime`).

    Measured: training SmolLM2's top layers in 0.6 of the time.  Not for small models, whose products
    take longer so.  LIB_PLAIN=1: no change.
    """
    sizes = (p.numel() for p in model.parameters() if p.dtype == torch.float32 and p.dim() == 2)
    wanted = max(sizes, default=0) >= LARGE and next(model.parameters()).device.type == "cpu"
    wanted = wanted and not runtime.plain_mode() and runtime.medium_is_exact()
    with runtime.medium_precision() if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def attending(configs: Sequence, how: str) -> Iterator[None]:
    """Within: attention layers with these configurations use the implementation `how` ("eager", ...)."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = how
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def attention_configs(model: PreTrainedModel) -> list:
    """The configurations that the model's attention layers read, each once."""
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    return list({id(layer.config): layer.config for layer in layers}.values())


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Within: linear maps in bfloat16 on a CPU have their weights in the layout oneDNN computes in, which
    `linear` makes anew at each call.  Same numbers, no gradients.  LIB_PLAIN=1: no change.

    Measured: 1.15 times the tokens/s in sampling 128 rows, 1.3 with 16, 1.2 in scoring texts.  The layout
    is a second copy of the weights: not for models of more than PACKED_BYTES.
    """
    linear = [] if runtime.plain_mode() else [*model.modules()]
    linear = [m for m in linear if type(m) is torch.nn.Linear and _can_pack(m)]
    if sum(m.weight.nbytes for m in linear) > PACKED_BYTES:
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


def _above_trunk(model) -> tuple[list[torch.nn.Parameter], torch.dtype | None]:
    """Parameters in float32 over a frozen trunk in another dtype, and that dtype; none where all is one."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    low = {p.dtype for p in floating if not p.requires_grad} - {torch.float32}
    if len(low) != 1 or model.config.is_encoder_decoder or is_eight_bit(model):
        return [], None
    return [p for p in floating if p.dtype == torch.float32], low.pop()


def lora_config(model: PreTrainedModel, layers: torch.nn.ModuleList, rank: int):
    """A `peft.LoraConfig` for every linear map of the given layers: alpha = rank, no dropout."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linear = {m for m in layers.modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    names = [name for name, module in model.named_modules() if module in linear]
    if any("lora_" in name for name in names):
        raise ValueError("this model carries adapters already; load it again for a new run.")
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)


def _add_lora(model, layers, rank: int) -> None:
    from peft import inject_adapter_in_model

    size = (len(layers), rank)
    if getattr(model, "adapter_size", None) == size:  # added by an earlier call: go on with them
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an adapter's first factor is random, its second zero
        inject_adapter_in_model(lora_config(model, layers, rank), model)
    model.adapter_size = size


# --- tiny models ---------------------------------------------------------------------------------


def sample_words() -> list[str]:
    """The words and punctuation of every text in `data/samples/`, sorted."""
    folder = runtime.project_root() / "data" / "samples"
    text = " ".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.json*")))
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    words = {w for s in strings for w in re.findall(r"\w+|[^\w\s]", json.loads(f'"{s}"'))}
    return sorted(words)


def tiny_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `words` (default: the sample texts' words); unknown words are <unk>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = sample_words() if words is None else words
    vocabulary = {word: i for i, word in enumerate([*TINY_SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = [AddedToken(token, special=True) for token in TINY_SPECIAL[3:]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=roles, chat_template=TINY_CHAT_TEMPLATE, model_max_length=512,
    )  # fmt: skip
    return prepare_tokenizer(tokenizer)


def build_tiny_model(
    name: str = "tiny", *, words: list[str] | None = None, seed: int = 0, **sizes
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A two-layer model with random float32 weights (about 0.1M parameters) and its tokenizer.

    `sizes` replace fields of the model's configuration, such as hidden_size.
    """
    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; allowed: {', '.join(TINY_MODELS)}")
    tokenizer = tiny_tokenizer(words)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "tiny":
            shape = dict(
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512,
            )  # fmt: skip
            shape |= {"vocab_size": len(tokenizer), "bos_token_id": None, **special, **sizes}
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            shape = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
            start = {"decoder_start_token_id": tokenizer.pad_token_id}
            shape |= {"vocab_size": len(tokenizer), **start, **special, **sizes}
            model = T5ForConditionalGeneration(T5Config(**shape))
    return model.eval(), tokenizer
