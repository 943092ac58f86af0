"""Policies: load any causal or encoder-decoder language model, or build a tiny one without a download.

A model's name is an offline asset ("policy"), a folder, a Hub id ("namespace/name"), or "tiny" /
"tiny-encoder-decoder": two-layer models with random weights over a word-level vocabulary made of
the words in `data/samples/`.  Sampling from a tiny model gives word salad in which every word is
about equally likely, so scores vary and training has something to change.

`save` keeps what was trained in a folder that `load_policy` and plain transformers or peft read.  Remote code
is never loaded, and pickled weights only as `hub` says.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_map
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lib import adapters, cards, hub, int8, runtime, values
from lib.int8 import is_eight_bit as is_eight_bit

POLICY, BASE = "policy", "base"  # the kind on a card; where a model without a name is kept
SAMPLED = 16  # values of each weight that tell whether it was trained
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
    tokenizer: str | None = None,
    base: str | None = None,
    eight_bit: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in eval mode (dropout off) and its left-padding tokenizer.

    `name` is also what `save` wrote, or a folder or Hub id of adapters: they come on the model they were
    trained over, which `base` names where it is not where it was.  `name@revision` is a revision of the Hub.
    `tokenizer`: where the tokenizer is, if not with the model.  `dtype` defaults to what sampling is fastest
    in here (`runtime.inference_dtype`); tiny models are always float32, adapters too.  `eight_bit`: linear
    weights in 8 bits (see `int8`), over which only LoRA can train; None: as the adapters were trained.
    Raises ValueError for an unknown name, for what is no language model or has no tokenizer, and where
    bitsandbytes is missing; AssetError where the model cannot be had.
    """
    device = device or runtime.get_device()
    if eight_bit:  # before anything is downloaded
        int8.check_installed()
    if name in TINY_MODELS:
        model, words = build_tiny_model(name)
        return model.to(device), words
    folder = hub.resolve_model(name, revision)
    card = _policy_card(folder, name)
    if adapters.is_folder(folder):
        place = {"dtype": dtype, "device": device, "eight_bit": eight_bit, "tokenizer": tokenizer}
        model, words = _load_over_base(folder, card, base, place)
    else:
        check_policy(hub.read_config(folder), name)
        words = load_tokenizer(tokenizer or folder)
        dtype = dtype or runtime.inference_dtype(device)
        model = _load_weights(folder, name, dtype, device, eight_bit)
        origin = {"name": own_name(name), "revision": hub.commit_of(folder), "tokenizer": tokenizer}
        remember_origin(model, **origin)
    value = values.read(folder, lambda own: _load_weights(own, own, torch.float32, device))
    if value is not None:
        model.value_function = value
    return model.eval(), words


def load_start(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A kept policy that goes on where another model's texts and `tokenizer` are in use.

    Raises ValueError where its tokens are others, and what `load_policy` raises.
    """
    policy, own = load_policy(name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{name} and the model beside it have other tokens. Give as that model the one that {name} was "
            "trained from."
        )
    return policy


def check_name(name: str) -> str:
    """`name`, if it names something that may be a policy, without loading its weights.

    An asset of the course is not downloaded for that: where its replies are stored, nobody loads it.
    Raises ValueError for an unknown name and for a kept reward model; AssetError where it cannot be had.
    """
    if name not in (*TINY_MODELS, *hub.MODEL_ASSETS):
        _policy_card(hub.resolve_model(name, weights=False), name)
    return name


def _policy_card(folder: Path, name: str) -> dict:
    """The card of a folder, {} without one; ValueError where it says that the folder holds no policy."""
    card = cards.read(folder)
    if card.get("kind", POLICY) != POLICY:
        raise ValueError(f"{name} holds a {card['kind']}. Load it with reward_models.load.")
    return card


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The left-padding tokenizer of a model, by the model's name.  ValueError where it has none."""
    if name in TINY_MODELS:
        return tiny_tokenizer()
    folder = hub.resolve_model(name, revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub.SAFE)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{hub.readable(folder)} has no tokenizer that can be loaded ({why}). Name the model whose "
            "tokenizer it uses: tokenizer='namespace/name'."
        ) from None
    return prepare_tokenizer(tokenizer)


def _load_weights(folder, name, dtype, device, eight_bit=False) -> PreTrainedModel:
    config = hub.read_config(folder)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = int8.loading_options(device) if eight_bit else {}
    options |= {"use_safetensors": True, "output_loading_info": True, **hub.SAFE}
    model, report = family.from_pretrained(folder, dtype=dtype, **options)
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        first = sorted(report["missing_keys"])[0]
        raise ValueError(
            f"{name} is no whole language model: {len(report['missing_keys'])} weights are missing, first "
            f"{first!r}. A classifier or reward model is loaded by reward_models.load or load_scorer."
        )
    if not eight_bit:
        return model.to(device)
    int8.compute_in_floats(model)
    return model


def _load_over_base(folder: Path, card: dict, base: str | None, place: dict):
    """The model that a folder's adapters were trained over, with them on it, and the folder's tokenizer."""
    with open(folder / adapters.CONFIG, encoding="utf-8") as file:
        config = json.load(file)
    if place["eight_bit"] is None:
        place["eight_bit"] = card.get("eight_bit")
    if place["tokenizer"] is None and [*folder.glob("tokenizer*")]:
        place["tokenizer"] = str(folder)
    base, revision = base or _base_of(folder, card, config), None
    if base == config["base_model_name_or_path"]:
        revision = config.get("revision")
    try:
        model, tokenizer = load_policy(base, revision=revision, **place)
    except ValueError as error:
        raise ValueError(
            f"the adapters in {folder} belong on the model {base!r}, which was not loaded: {error} Say "
            "where it is with base=..."
        ) from None
    if adapters.adapted_layers(model):
        adapters.merge(model)
    adapters.attach(model, folder)
    return model, tokenizer


def own_name(name: str) -> str:
    """The name by which a model is found again from any folder, without its revision."""
    name = hub.parse_name(name).name
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in hub.MODEL_ASSETS and folder.is_dir() else name


def _base_of(folder: Path, card: dict, config: dict) -> str:
    """Where the model is that a folder's adapters belong on, as far as the folder says."""
    if (folder / BASE).is_dir():
        return str(folder / BASE)
    origin = card.get("base") or {}
    name, revision = origin.get("name"), origin.get("revision")
    if name is None:
        return config["base_model_name_or_path"]
    return f"{name}@{revision}" if revision else name


def check_policy(config: PretrainedConfig, name: str = "this model") -> None:
    """Raise ValueError for a model that cannot continue a text: an encoder alone."""
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if fills_gaps and not writes:
        raise ValueError(
            f"{name} is an encoder ({config.model_type}): it reads texts and cannot write them, so it is no "
            "policy. Use it as a reward model (reward_models.load_backbone) or, where it has labels, as a "
            "scorer (load_scorer); a policy is a causal or encoder-decoder model such as GPT-2, Llama or T5."
        )


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
    What is not frozen trunk becomes float32; the trunk keeps its dtype, as do weights in 8 bits.  Adapters
    of an earlier training go on with "lora" of the same size; the others put them into the weights first.
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
    if train != "lora":
        adapters.merge(model)
    frozen = 0 if train == "all" else len(stack) - layers
    _raise_above_trunk(model, stack, frozen)
    if train == "lora":
        adapters.add(model, stack[frozen:], lora_rank)
        return frozen
    model.requires_grad_(train == "all")
    if train == "top":
        for module in [*stack[frozen:], *_norms_after(model, stack)]:
            module.requires_grad_(True)
    return frozen


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's layers, lowest first; an encoder's where there is no decoder.

    Raises ValueError where they cannot be found.
    """
    names = ("num_decoder_layers", "num_hidden_layers", "num_layers")
    depths = {getattr(model.config, name, None) for name in names} - {None}
    stacks = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    stack = next((stack for stack in stacks if len(stack) in depths), None)
    if stack is None:
        raise ValueError(f"no stack of {depths} decoder layers found in {type(model).__name__}.")
    return stack


def _norms_after(model, stack) -> list[torch.nn.Module]:
    """The norms beside the stack of layers, without those of embeddings, which come before it."""
    parent = next(m for m in model.get_decoder().modules() if stack in m.children())
    return [
        module
        for name, module in parent.named_children()
        if "norm" in type(module).__name__.lower() and "emb" not in name
    ]


def longest_text(config: PretrainedConfig, otherwise: int) -> int:
    """Tokens that a model can read; `otherwise` where its configuration names no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return otherwise
    return limit - (max(config.pad_token_id + 1, 2) if counts_from_two(config) else 0)


def counts_from_two(config: PretrainedConfig) -> bool:
    """Whether a model counts its tokens' positions itself, from 2: the RoBERTa family."""
    return "roberta" in config.model_type or config.model_type == "longformer"


def state_width(model: PreTrainedModel) -> int:
    """Width of the states that a model's last layer hands on (OPT-350m's is not its hidden_size)."""
    return getattr(model.config, "word_embed_proj_dim", None) or model.config.hidden_size


def _raise_above_trunk(model, stack, frozen: int) -> None:
    trunk_dtype = _floating_dtype(stack[0])
    to_dtype(model, torch.float32)
    if frozen and trunk_dtype != torch.float32 and not model.config.is_encoder_decoder:
        to_dtype(stack[:frozen], trunk_dtype)
        for layer in stack:  # each computes in its own dtype, whatever the layer below hands up
            layer.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)


def to_dtype(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype of a module's floating weights in place; those in 8 bits stay as they are."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _floating_dtype(module: torch.nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _to_own_dtype(layer, args, kwargs):
    def cast(item):
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        if torch.finfo(item.dtype).min < torch.finfo(dtype).min:
            # masks hold the least float32, which would be -inf in bfloat16, and a row of it NaN
            item = item.clamp(min=torch.finfo(dtype).min)
        return item.to(dtype)

    dtype = _floating_dtype(layer)
    return tree_map(cast, (args, kwargs))


@runtime.accelerated
@contextlib.contextmanager
def for_sampling(model: PreTrainedModel) -> Iterator[None]:
    """Within: `model` samples as fast as it can (see `lib.fast`); after: its weights as before."""
    yield


@runtime.accelerated
@contextlib.contextmanager
def for_scoring(model: torch.nn.Module, batches: int) -> Iterator[None]:
    """Within: a classifier reads so many batches as fast as it can (see `lib.fast`); no gradients."""
    yield


@runtime.accelerated
@contextlib.contextmanager
def fast_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within: float32 products as fast as they are exact here (see `lib.fast`)."""
    yield


# --- what is kept ----------------------------------------------------------------------------------


def remember_origin(model: PreTrainedModel, **origin) -> None:
    """Note on a model just loaded what it was loaded from, and how its weights look.

    `origin`: the arguments that load it again (name, revision, ...).
    """
    model.loaded_from = {name: value for name, value in origin.items() if value is not None}
    model.loaded_from["weights"] = _weight_samples(model)


def origin_of(model: PreTrainedModel) -> dict:
    """What a model was loaded from, without the samples of its weights; {} where that is unknown."""
    origin = getattr(model, "loaded_from", {})
    return {name: value for name, value in origin.items() if name != "weights"}


def _weight_samples(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A few values of each weight, float32: enough to see whether it was trained."""
    samples = {}
    for name, weight in adapters.base_weights(model).items():
        if weight.is_floating_point() and weight.numel():
            step = max(1, weight.numel() // SAMPLED)
            samples[name] = weight.detach().flatten()[::step][:SAMPLED].float().cpu().clone()
    return samples


def is_unchanged(model: PreTrainedModel) -> bool:
    """Whether a model's weights, adapters aside, are those it was loaded with, in whatever dtype."""
    before = getattr(model, "loaded_from", {}).get("weights")
    now = _weight_samples(model)
    if before is None or set(now) != set(before):
        return False
    return all(
        any(
            torch.equal(now[name], values.to(getattr(torch, dtype)).float())
            for dtype in runtime.DTYPES
        )
        for name, values in before.items()
    )


def save(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    *,
    card: dict | None = None,
) -> Path:
    """Keep a trained model in `folder`, with its tokenizer and a card; return the folder.

    A policy whose layers trained is written whole, in safetensors; one with adapters as adapters, and the
    model under them beside it (in "base") where it has no name or was trained too; the value function that
    PPO trained with it too.  Reward models write themselves (their `write`).  `load_policy` and
    `reward_models.load` read the folder, plain transformers and peft the policies in it.  `card`: see
    `cards.describe`; what the model was trained from is added.  The folder appears whole or not at all, and
    takes the place of an older one.
    Raises ValueError for a model in 8 bits without adapters, in which nothing was trained.
    """
    facts = cards.describe(card)
    with runtime.atomic_folder(folder) as staging:
        write = getattr(model, "write", None) or partial(write_policy, model)
        facts = write(staging, Path(folder).absolute()) | facts
        tokenizer.save_pretrained(staging)
        cards.write(staging, facts)
    return Path(folder)


def write_policy(model: PreTrainedModel, folder: Path, place: Path) -> dict:
    """Write a model's weights into `folder`, which will stand at `place`; return what its card says of it."""
    facts = {"kind": POLICY, "base": origin_of(model), "eight_bit": is_eight_bit(model)}
    if hasattr(model, "value_function"):  # PPO trained it
        values.write(model.value_function, folder)
        facts["value_function"] = True
    if not adapters.adapted_layers(model):
        if is_eight_bit(model):
            raise ValueError(
                "a model in 8 bits without adapters holds nothing that was trained, so there is nothing to "
                "keep. Train it with models.set_trainable(model, 'lora') first."
            )
        model.save_pretrained(folder)
        return facts | {"training": "weights", "dtype": str(model.dtype)}
    adapters.adopt(model)
    model.save_pretrained(folder)
    adapters.rename_base(folder, _place_of_base(model, folder, place))
    return facts | {"training": "lora"}


def _place_of_base(model: PreTrainedModel, folder: Path, place: Path) -> str:
    """Where the model under the adapters is; it is written into `folder` where it is nowhere else."""
    name = origin_of(model).get("name")
    if name in hub.MODEL_ASSETS:
        name = str(hub.resolve_model(name))
    elsewhere = name not in (None, *TINY_MODELS, str(place))
    if elsewhere and (is_eight_bit(model) or is_unchanged(model)):
        return name
    if is_eight_bit(model):
        raise ValueError(
            "the model under these adapters is in 8 bits and was not loaded by models.load_policy, so "
            "nothing says where it is. Load it by its name, and train it so."
        )
    model._hf_peft_config_loaded = False  # or transformers would write the adapters alone
    try:
        model.save_pretrained(folder / BASE, state_dict=adapters.base_weights(model))
    finally:
        model._hf_peft_config_loaded = True
    return str(place / BASE)


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
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=roles,
        chat_template=TINY_CHAT_TEMPLATE,
        model_max_length=512,
    )
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
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
            )
            shape |= {"vocab_size": len(tokenizer), "bos_token_id": None, **special, **sizes}
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            shape = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
            start = {"decoder_start_token_id": tokenizer.pad_token_id}
            shape |= {"vocab_size": len(tokenizer), **start, **special, **sizes}
            model = T5ForConditionalGeneration(T5Config(**shape))
    return model.eval(), tokenizer
