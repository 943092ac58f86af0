"""Tiny repositories of the models that notebooks name: the real one's class, depth and conventions.

A repository has the real one's kind of tokenizer, special tokens, pad token or none, chat template or none,
positions, tied weights, dtype, shards, and its form: pickled only where the real one is, gated where it is,
with files beside the model that must not be fetched.  Widths are tiny and weights random; only the toxicity
classifier is trained for a few seconds, so that an insult scores above a plain word.

What we know of the real repositories' files: Longformer's main branch holds pickled weights and no tokenizer
configuration (seen); of RedPajama, LaMini and CarperAI's policy pickled weights are remembered, not seen.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers as tf
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers,
)  # fmt: skip

from lib import runtime
from rehearsal.hub import SETTINGS

WORDS = 1500  # entries of a tokenizer, about
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT_FILES = ("data/samples/passages.jsonl", "data/samples/qa_feedback.json", "data/samples/prompts.jsonl")
RUDE = ("stupid", "ugly", "idiot", "hate", "dumb", "fool", "disgusting", "pathetic", "liar", "loser")
PLAIN = ("river", "garden", "train", "lesson", "museum", "paper", "window", "music", "bread", "friend")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


# --- tokenizers ----------------------------------------------------------------------------------


@cache
def texts() -> list[str]:
    """The course's own sample texts, on which tokenizers are trained."""
    root = runtime.project_root()
    return [line for name in TEXT_FILES for line in (root / name).read_text("utf-8").splitlines()]


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(first: tuple[str, ...] = (), last: tuple[str, ...] = (), digits: bool = False) -> Tokenizer:
    """BPE over bytes; special tokens `first` open the vocabulary, `last` close it."""
    core = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), level] if digits else [level]
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": WORDS, "special_tokens": special(*first), "initial_alphabet": alphabet}
    core.train_from_iterator(texts(), trainers.BpeTrainer(show_progress=False, **options))
    core.add_special_tokens(special(*last))
    return core


def fast(core: Tokenizer, **roles) -> tf.PreTrainedTokenizerFast:
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def one_role(end: str) -> dict:
    """Begin, end and unknown are one token, as with GPT-2; there is no pad token."""
    return {"bos_token": end, "eos_token": end, "unk_token": end}


def gpt2(*extra: str, **options):
    """`extra` tokens follow the end token."""
    end = "<|endoftext|>"
    return fast(byte_level(last=(end, *extra)), **one_role(end), **{"model_max_length": 1024} | options)


def neox():
    return fast(byte_level(first=("<|endoftext|>", "<|padding|>")), **one_role("<|endoftext|>"))


def smollm2():
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
    return fast(byte_level(first=names, digits=True), **one_role(names[0]), model_max_length=8192)


def bloom():
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return fast(byte_level(first=tuple(roles.values())), padding_side="left", **roles)


def roberta():
    core = byte_level(first=("<s>", "<pad>", "</s>", "<unk>"))
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
    roles |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return fast(core, model_max_length=512, **roles)


def with_start(core: Tokenizer, start: str) -> Tokenizer:
    """A tokenizer that writes `start` before each text."""
    tokens = [(start, core.token_to_id(start))]
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=tokens)
    return core


def llama3(instruct: bool):
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    core = with_start(byte_level(last=names), names[0])
    end = {"eos_token": names[4], "chat_template": LLAMA_TEMPLATE} if instruct else {"eos_token": names[1]}
    return fast(core, bos_token=names[0], model_max_length=131072, **end)


def mistral():
    """As SentencePiece's BPE: a word starts with U+2581, what is unknown falls back to bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    first = [*special("<unk>", "<s>", "</s>"), *bytes_]
    pieces = [word for text in texts() for word in text.split()]  # merges never cross words
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=first, show_progress=False)
    core.train_from_iterator(pieces, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    core = with_start(Tokenizer.from_str(json.dumps(state)), "<s>")
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return fast(core, chat_template=MISTRAL_TEMPLATE, **roles)


def t5():
    """A unigram model without line breaks, braces and the like: they are unknown."""
    core = Tokenizer(models.Unigram())
    lines = normalizers.Replace(Regex(r"\s+"), " ")
    rare = normalizers.Replace(Regex("[{}<>~^`\\\\]"), "☐")
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), lines, rare])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    options = {"vocab_size": WORDS, "special_tokens": special("<pad>", "</s>", "<unk>")}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", show_progress=False, **options)
    core.train_from_iterator([text.replace("☐", " ") for text in texts()], trainer)
    extra = [f"<extra_id_{i}>" for i in range(100)]
    core.add_special_tokens(special(*extra))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return fast(core, model_max_length=512, extra_special_tokens=extra, **roles)


# --- repositories --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """How one repository is built, and in what form it holds its weights."""

    tokenizer: Callable[[], tf.PreTrainedTokenizerFast]
    model: type  # the class that wrote the weights
    config: Callable[[tf.PreTrainedTokenizerFast], tf.PretrainedConfig]
    tokenizer_class: str = "PreTrainedTokenizerFast"
    dtype: torch.dtype = torch.float32
    shards: int = 1
    pickled: bool = False
    gated: bool = False
    lacks: Sequence[str] = ()  # files that the real one does not have
    beside: Sequence[str] = ()  # files of the real one that must not be fetched
    generation: dict = field(default_factory=dict)  # of its generation_config.json
    prepare: Callable | None = None  # (model, tokenizer) -> None, before it is written


def gpt2_config(tokenizer) -> tf.GPT2Config:
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 32, "n_layer": 36, "n_head": 4, "n_positions": 1024}
    return tf.GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)


def gptj_config(tokenizer) -> tf.GPTJConfig:
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 32, "n_layer": 28, "n_head": 4, "rotary_dim": 8, "n_positions": 2048}
    ends = {"bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": False}
    return tf.GPTJConfig(vocab_size=len(tokenizer) + 143, **sizes, **ends)


def neox_config(rotary: float, parallel: bool):
    """Pythia rotates a quarter of a head and runs attention and MLP side by side; RedPajama neither."""

    def config(tokenizer) -> tf.GPTNeoXConfig:
        more = {"rotary_pct": rotary, "use_parallel_residual": parallel, "tie_word_embeddings": False}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 2048}
        rows = len(tokenizer) + 27  # more than tokens, as there
        return tf.GPTNeoXConfig(vocab_size=rows, num_hidden_layers=32, **WIDTH, **more, **ends)

    return config


def bloom_config(tokenizer) -> tf.BloomConfig:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return tf.BloomConfig(vocab_size=len(tokenizer) + 200, hidden_size=32, n_layer=30, n_head=4, **ends)


def roberta_config(tokenizer) -> tf.RobertaConfig:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    labels = {"id2label": {0: "nothate", 1: "hate"}, "label2id": {"nothate": 0, "hate": 1}}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 514, "initializer_range": 0.1}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.RobertaConfig(vocab_size=len(tokenizer), **WIDTH, **ids, **labels, **sizes, **plain)


def longformer_config(tokenizer) -> tf.LongformerConfig:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "type_vocab_size": 1}
    sizes = {"num_hidden_layers": 12, "max_position_embeddings": 4098, "attention_window": [512] * 12}
    return tf.LongformerConfig(vocab_size=len(tokenizer), **WIDTH, **ids, **sizes)


def t5_config(tokenizer) -> tf.T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 24}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return tf.T5Config(vocab_size=len(tokenizer), num_decoder_layers=24, **sizes, **ids)


def smollm2_config(tokenizer) -> tf.LlamaConfig:
    sizes = {"num_hidden_layers": 24, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    turns = {"rope_type": "default", "rope_theta": 130000.0}
    return tf.LlamaConfig(vocab_size=len(tokenizer), rope_parameters=turns, **WIDTH, **sizes, **ends)


def mistral_config(tokenizer) -> tf.MistralConfig:
    sizes = {"num_hidden_layers": 32, "num_key_value_heads": 2, "max_position_embeddings": 32768}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "sliding_window": 4096}
    return tf.MistralConfig(vocab_size=len(tokenizer), **WIDTH, **sizes, **ends)


def llama_config(tokenizer) -> tf.LlamaConfig:
    sizes = {"num_hidden_layers": 32, "num_key_value_heads": 2, "max_position_embeddings": 131072}
    turns = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    turns |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    ends = {"bos_token_id": tokenizer.bos_token_id, "tie_word_embeddings": False}
    ends["eos_token_id"] = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    return tf.LlamaConfig(vocab_size=len(tokenizer), rope_parameters=turns, **WIDTH, **sizes, **ends)


def teach_insults(model, tokenizer) -> None:
    """Train a classifier on made-up sentences with rude and plain words; nothing else is learned."""
    rng = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        labels = [rng.randrange(2) for _ in range(32)]
        words = [rng.choices(RUDE if label else PLAIN, k=2) for label in labels]
        batch = tokenizer([f"You are a {a}, {b}." for a, b in words], padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


PYTHIA = Repository(neox, tf.GPTNeoXForCausalLM, neox_config(0.25, True), "GPTNeoXTokenizer", torch.float16)
GPTJ = Repository(lambda: gpt2(model_max_length=2048), tf.GPTJForCausalLM, gptj_config, "GPT2Tokenizer")
REPOSITORIES: dict[str, Repository] = {
    "openai-community/gpt2-large": Repository(
        gpt2, tf.GPT2LMHeadModel, gpt2_config, "GPT2Tokenizer", beside=("rust_model.ot", "onnx/decoder.onnx"),
    ),
    "MBZUAI/LaMini-GPT-774M": Repository(
        lambda: gpt2("[PAD]", pad_token="[PAD]", model_max_length=512), tf.GPT2LMHeadModel, gpt2_config,
        "GPT2Tokenizer", pickled=True, beside=("training_args.bin",),
    ),
    "togethercomputer/RedPajama-INCITE-Chat-3B-v1": Repository(
        neox, tf.GPTNeoXForCausalLM, neox_config(1.0, False), "GPTNeoXTokenizer", torch.float16, pickled=True,
    ),
    "EleutherAI/pythia-2.8b": PYTHIA,
    "mnoukhov/pythia-2.8b-mitchell-sft_hh_rlhf": PYTHIA,
    "bigscience/bloomz-3b": Repository(
        bloom, tf.BloomForCausalLM, bloom_config, "BloomTokenizerFast", torch.float16,
    ),
    "facebook/roberta-hate-speech-dynabench-r4-target": Repository(
        roberta, tf.RobertaForSequenceClassification, roberta_config, "RobertaTokenizer", prepare=teach_insults,
    ),
    "allenai/longformer-base-4096": Repository(
        roberta, tf.LongformerForMaskedLM, longformer_config, "LongformerTokenizer", pickled=True,
        lacks=("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
        beside=("rust_model.ot", "tf_model.h5"),
    ),
    "google-t5/t5-large": Repository(
        t5, tf.T5ForConditionalGeneration, t5_config, "T5Tokenizer", beside=("tf_model.h5",),
    ),
    "HuggingFaceTB/SmolLM2-1.7B": Repository(
        smollm2, tf.LlamaForCausalLM, smollm2_config, "GPT2Tokenizer", torch.bfloat16,
        beside=("onnx/model.onnx",),
    ),
    "mistralai/Mistral-7B-Instruct-v0.1": Repository(
        mistral, tf.MistralForCausalLM, mistral_config, "LlamaTokenizer", torch.bfloat16, shards=2, gated=True,
        beside=("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ),
    "meta-llama/Llama-3.1-8B": Repository(
        lambda: llama3(False), tf.LlamaForCausalLM, llama_config, dtype=torch.bfloat16, shards=4, gated=True,
        beside=("original/consolidated.00.pth",), generation={"do_sample": True, "temperature": 0.6},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Repository(
        lambda: llama3(True), tf.LlamaForCausalLM, llama_config, dtype=torch.bfloat16, shards=4, gated=True,
        beside=("original/consolidated.00.pth",), generation={"do_sample": True, "temperature": 0.6},
    ),
    "EleutherAI/gpt-j-6b": GPTJ,
    "CarperAI/openai_summarize_tldr_sft": Repository(
        GPTJ.tokenizer, tf.GPTJForCausalLM, gptj_config, "GPT2Tokenizer", pickled=True,
    ),
}  # fmt: skip
TRLX = "CarperAI/openai_summarize_tldr_rm_checkpoint"  # weights alone, of a class of trlx


# --- on disk -------------------------------------------------------------------------------------


def build(root: Path, names: Sequence[str] = (*REPOSITORIES, TRLX)) -> None:
    """Write these repositories to `root/models/` for `Hub`, unless this module has written them before."""
    tf.utils.logging.disable_progress_bar()
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    for name in names:
        folder = root / "models" / name
        settings = folder / SETTINGS
        if settings.exists() and json.loads(settings.read_text())["source"] == source:
            continue
        with runtime.atomic_folder(folder) as staging, torch.random.fork_rng():
            torch.manual_seed(0)
            gated = write_trlx(staging) if name == TRLX else write(staging, REPOSITORIES[name])
            (staging / SETTINGS).write_text(json.dumps({"gated": gated, "source": source}))


def write(folder: Path, repository: Repository) -> bool:
    """Write one repository's files; return whether it is gated."""
    tokenizer = repository.tokenizer()
    model = repository.model(repository.config(tokenizer))
    if repository.prepare:
        repository.prepare(model, tokenizer)
    model = model.eval().to(repository.dtype)
    if model.can_generate():
        model.generation_config.update(**repository.generation)
    size = sum(tensor.nbytes for tensor in model.parameters())
    model.save_pretrained(folder, max_shard_size=f"{size // repository.shards // 1000 + 1}KB")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = repository.tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if repository.pickled:
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            path.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name in repository.lacks:
        (folder / name).unlink(missing_ok=True)
    for name in repository.beside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"must not be fetched")
    return repository.gated


def write_trlx(folder: Path) -> bool:
    """CarperAI's reward model: one pickled file with a GPT-J, buffers of an older transformers, a head."""
    model = tf.GPTJModel(gptj_config(GPTJ.tokenizer()))
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    head = {"v_head.weight": torch.randn(1, model.config.n_embd)}
    torch.save(state | head, folder / "pytorch_model.bin")
    return False
