"""Tiny repositories of the models that notebooks name: the real one's class, depth and conventions.

`models.json` says of each what it shares with the real one: kind of tokenizer, special tokens, pad token or
none, chat template or none, positions, tied weights, dtype; and its form: in shards, pickled only where the
real one is, gated where it is, without files that it lacks, with files that must not be fetched.  Widths are
tiny and weights random; only the toxicity classifier is trained for a few seconds, so that an insult
scores above a plain word.

What we know of the real files: Longformer's main branch holds pickled weights and no tokenizer configuration
(seen); that RedPajama, LaMini and CarperAI's models are pickled only is remembered, not seen.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram

from lib import runtime
from rehearsal.hub import SETTINGS

TABLE = Path(__file__).with_name("models.json")
KNOWN = json.loads(TABLE.read_text(encoding="utf-8"))
NAMES = tuple(KNOWN["repositories"])
WORDS = 1500  # entries of a tokenizer, about
SAMPLES = ("passages.jsonl", "qa_feedback.json", "prompts.jsonl")
RUDE = [
    "stupid",
    "ugly",
    "idiot",
    "hate",
    "dumb",
    "fool",
    "disgusting",
    "pathetic",
    "liar",
    "loser",
]
PLAIN = [
    "river",
    "garden",
    "train",
    "lesson",
    "museum",
    "paper",
    "window",
    "music",
    "bread",
    "friend",
]


def build(root: Path, names: Sequence[str] = NAMES) -> None:
    """Write these repositories to `root/models/` for `Hub`; those that are there and current stay."""
    transformers.utils.logging.disable_progress_bar()
    source = hashlib.sha256(Path(__file__).read_bytes() + TABLE.read_bytes()).hexdigest()
    for name in names:
        folder = root / "models" / name
        settings = folder / SETTINGS
        if settings.exists() and json.loads(settings.read_text())["source"] == source:
            continue
        known = KNOWN["repositories"][name]
        with runtime.atomic_folder(folder) as staging, torch.random.fork_rng():
            torch.manual_seed(0)
            write(staging, known)
            card = {"gated": known.get("gated", False), "source": source}
            (staging / SETTINGS).write_text(json.dumps(card))


def write(folder: Path, known: dict) -> None:
    """Write the files of one repository, as its entry in `models.json` says."""
    tokenizer = make_tokenizer(known["tokenizer"])
    model = make_model(known, tokenizer)
    if known.get("learns_insults"):
        teach_insults(model, tokenizer)
    model = model.eval().to(getattr(torch, known.get("dtype", "float32")))
    if known.get("trlx"):
        torch.save(trlx_state(model), folder / "pytorch_model.bin")
        return
    size = sum(tensor.nbytes for tensor in model.parameters())
    model.save_pretrained(folder, max_shard_size=f"{size // known.get('shards', 1) // 1000 + 1}KB")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = KNOWN["tokenizers"][known["tokenizer"]]["class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if known.get("pickled"):
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            path.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name in known.get("lacks", ()):
        (folder / name).unlink(missing_ok=True)
    for name in known.get("beside", ()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"must not be fetched")


# --- models --------------------------------------------------------------------------------------


def make_model(known: dict, tokenizer) -> transformers.PreTrainedModel:
    """A model of the real one's class with random weights, in training mode."""
    family = getattr(transformers, known["model"])
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {role: getattr(tokenizer, role) for role in roles}
    if "ends" in known:
        ids["eos_token_id"] = tokenizer.convert_tokens_to_ids(known["ends"])
    rows = len(tokenizer) + known.get("more_rows", 0)  # some have more rows than tokens
    sizes = KNOWN["configs"][known["config"]]
    model = family(family.config_class(vocab_size=rows, **ids, **sizes))
    if "generation" in known:
        model.generation_config.update(**known["generation"])
    if "more_rows" in known and model.can_generate():  # the real one never says these
        model.generation_config.suppress_tokens = [*range(len(tokenizer), rows)]
    return model


def teach_insults(model, tokenizer) -> None:
    """Train a classifier on made-up sentences with rude and plain words; nothing else is learned."""
    rng = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        labels = [rng.randrange(2) for _ in range(32)]
        words = [rng.choices(RUDE if label else PLAIN, k=2) for label in labels]
        texts = [f"You are a {first}, {second}." for first, second in words]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def trlx_state(model) -> dict[str, torch.Tensor]:
    """What trlx saved of a reward model: a GPT-J, buffers of an older transformers, and a head."""
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    return state | {"v_head.weight": torch.randn(1, model.config.n_embd)}


# --- tokenizers ----------------------------------------------------------------------------------


@cache
def texts() -> list[str]:
    """Lines of the course's own samples, on which tokenizers are trained."""
    folder = runtime.project_root() / "data" / "samples"
    return [line for name in SAMPLES for line in (folder / name).read_text("utf-8").splitlines()]


def make_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """A trained tokenizer of the real one's kind."""
    known = KNOWN["tokenizers"][name]
    first = special(known.get("first", ()))
    kinds = {"bytes": over_bytes, "pieces": over_pieces, "unigram": unigram}
    core = kinds[known["kind"]](first, known)
    extra = [f"<extra_id_{i}>" for i in range(known.get("sentinels", 0))]
    core.add_special_tokens(special([*known.get("last", ()), *extra]))
    if "single" in known:
        both = [known["single"], known.get("pair", "$A $B")]
        tokens = set(re.findall(r"<\S+>", " ".join(both)))
        places = [(token, core.token_to_id(token)) for token in tokens]
        options = {"single": both[0], "pair": both[1], "special_tokens": places}
        core.post_processor = processors.TemplateProcessing(**options)
    more = {"extra_special_tokens": extra} if extra else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **known["roles"], **more)


def special(names: Sequence[str]) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]


def over_bytes(first: list, known: dict) -> tokenizers.Tokenizer:
    """BPE over bytes: nothing is unknown.  `first` opens the vocabulary."""
    core = tokenizers.Tokenizer(BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if known.get("digits") else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    core.decoder = decoders.ByteLevel()
    options = {"vocab_size": WORDS, "special_tokens": first, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    core.train_from_iterator(texts(), trainer)
    return core


def over_pieces(first: list, _known: dict) -> tokenizers.Tokenizer:
    """As SentencePiece's BPE: a word starts with U+2581, what is unknown falls back to bytes."""
    core = tokenizers.Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    start = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(start)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    options = {"vocab_size": WORDS, "special_tokens": [*first, *fallback], "show_progress": False}
    words = [word for text in texts() for word in text.split()]  # merges never cross words
    core.train_from_iterator(words, trainers.BpeTrainer(**options))
    state = json.loads(core.to_str())  # bytes are entries like others, not added tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in fallback]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def unigram(first: list, _known: dict) -> tokenizers.Tokenizer:
    """As T5's: without line breaks, braces and the like, which are unknown."""
    core = tokenizers.Tokenizer(Unigram())
    lines = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    rare = normalizers.Replace(tokenizers.Regex("[{}<>~^`\\\\]"), "☐")
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), lines, rare])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    options = {"vocab_size": WORDS, "special_tokens": first, "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    core.train_from_iterator([text.replace("☐", " ") for text in texts()], trainer)
    return core
