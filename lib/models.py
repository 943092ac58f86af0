"""Policies: load any causal or encoder-decoder language model, or build a tiny one without a download.

A model's name is an offline asset ("policy"), a folder, a Hub id ("namespace/name"), or "tiny" /
"tiny-encoder-decoder": two-layer models with random weights over a word-level vocabulary made of
the words in `data/samples/`.  Sampling from a tiny model gives word salad in which every word is
about equally likely, so scores vary and training has something to change.

Never loads remote code or pickled weights.
"""

from __future__ import annotations

import json
import re

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lib import assets, runtime

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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in eval mode (dropout off) and its left-padding tokenizer.

    `dtype` defaults to what sampling is fastest in here (`runtime.inference_dtype`); tiny models
    are always float32.  Raises ValueError for an unknown name, AssetError where it cannot be had.
    """
    device = device or runtime.get_device()
    if name in TINY_MODELS:
        model, tokenizer = build_tiny_model(name)
    else:
        path = assets.resolve_model(name, revision=revision)
        config = AutoConfig.from_pretrained(path)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        dtype = dtype or runtime.inference_dtype(device)
        model = family.from_pretrained(path, dtype=dtype, use_safetensors=True)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(path))
    return model.to(device).eval(), tokenizer


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
    name: str = "tiny", *, words: list[str] | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A two-layer model with random float32 weights (about 0.1M parameters) and its tokenizer."""
    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; allowed: {', '.join(TINY_MODELS)}")
    tokenizer = tiny_tokenizer(words)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "tiny":
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=512, bos_token_id=None, **special,
                )
            )  # fmt: skip
        else:
            model = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2,
                    num_heads=4, dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id,
                    **special,
                )
            )  # fmt: skip
    return model.eval(), tokenizer
