"""Reward models: one score for a prompt and a response, learned from ratings or from rankings.

Bansal, Dang and Grover (ICLR 2024, "sparse feedback") train two.  From ratings s in 1..7: the logit z
of (s - 1) / 6, loss mean (t - sigmoid(z))^2.  From rankings: Bradley-Terry, loss mean of
-log sigmoid(z_preferred - z_rejected), all pairs of a prompt in one batch, "equal" left out.  Either
then picks the best of n responses by z.

A model is a backbone (encoder or decoder), pooling over the response's tokens, and a linear head.  With
a frozen backbone the pooled features are computed once and the head trains in a second.

Simplified: a prompt too long loses its beginning, never the response (the reference cuts the end, and with
it responses).  Training goes prompt by prompt, so a response in several pairs is encoded once;
`trl.RewardTrainer` takes loose pairs (20 sequences for the 10 pairs of 5 responses), has no rating loss and
leaves out long examples.  Several processes take a share of each batch's prompts (`processes`).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from lib import (
    adapters,
    cards,
    classifiers,
    encoding,
    hub,
    int8,
    logprobs,
    losses,
    models,
    preferences,
    processes,
    runtime,
    training,
)
from lib.text import check_texts

POOLINGS = ("mean", "last")
MAX_LENGTH = 512  # tokens, as in the reference
HISTORY = ["step", "epoch", "loss", "learning_rate", "grad_norm"]
KIND, WEIGHTS = "reward model", "reward_model.safetensors"
OLD_CARD = "reward_model.json"  # of folders that an earlier version wrote


# --- the model -----------------------------------------------------------------------------------


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    keep_layers: int | None = None,
    eight_bit: bool = False,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A network without its output layer, in eval mode, and its tokenizer; names as in `models.load_policy`.

    "encoder" is the offline sentence encoder.  Of an encoder-decoder the encoder is taken.
    `keep_layers`: only the lowest layers (features from the middle are cheaper, and often better).
    `eight_bit`: a causal model's linear weights in 8 bits, to train with LoRA (needs bitsandbytes).
    A policy that was kept as adapters gives its body with them in its weights.
    """
    if eight_bit:  # before anything is downloaded
        int8.check_installed()
    if name in models.TINY_MODELS:
        model, words = models.build_tiny_model(name)
        model, revision = model.base_model, None
    else:
        folder = hub.resolve_model(name)
        revision = hub.commit_of(folder)
        if eight_bit or adapters.is_folder(folder):
            dtype = dtype if eight_bit else dtype or torch.float32
            options = {"dtype": dtype, "tokenizer": tokenizer, "eight_bit": eight_bit}
            policy, words = models.load_policy(name, **options)
            model = _body_of(policy)
        else:
            options = {"dtype": dtype or torch.float32, "use_safetensors": True, **hub.SAFE}
            model = AutoModel.from_pretrained(folder, config=hub.read_config(folder), **options)
            words = models.load_tokenizer(tokenizer or folder)
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    if keep_layers is not None:
        _keep_lowest(model, keep_layers)
    model = model if eight_bit else model.to(runtime.get_device())
    origin = {"name": models.own_name(name), "revision": revision, "tokenizer": tokenizer}
    origin |= {"keep_layers": keep_layers, "eight_bit": eight_bit or None}
    models.remember_origin(model, **origin, dtype=str(model.dtype).removeprefix("torch."))
    return model.eval(), words


def _body_of(policy: PreTrainedModel) -> PreTrainedModel:
    """A policy without its output layer, and its adapters, where it has any, in the weights."""
    body = policy.base_model
    if not models.is_eight_bit(policy):
        adapters.merge(policy)
        return body
    for name in ("is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer"):
        setattr(body, name, getattr(policy, name, None))  # peft asks the model it is given
    return body


def _keep_lowest(model: PreTrainedModel, layers: int) -> None:
    """Drop all but the lowest layers, in place, and from what the configuration says of each."""
    stack = models.decoder_layers(model)
    for name in ("layer_types", "attention_layers"):
        kinds = getattr(model.config, name, None)
        if isinstance(kinds, list) and len(kinds) == len(stack):
            setattr(model.config, name, kinds[:layers])
    del stack[layers:]
    model.config.num_hidden_layers = layers


class _Inputs:
    """What a backbone takes besides token ids and their mask."""

    def __init__(self, backbone: PreTrainedModel):
        accepted = inspect.signature(backbone.forward).parameters
        own_positions = models.counts_from_two(backbone.config)
        self.positions = "position_ids" in accepted and not own_positions
        self.global_attention = "global_attention_mask" in accepted  # Longformer
        self.segments = getattr(backbone.config, "type_vocab_size", 0) > 1
        self.causal = self.positions and encoding.cache_argument(backbone) in accepted

    def extra(self, mask: torch.Tensor, response_mask: torch.Tensor | None) -> dict:
        """Arguments for rows with these masks, (rows, time) each."""
        extra = {}
        if self.positions:  # of real tokens alone: padding may stand on either side
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.segments and response_mask is not None:
            extra["token_type_ids"] = response_mask
        if self.global_attention:  # some token must see all: the first
            extra["global_attention_mask"] = torch.zeros_like(mask)
            extra["global_attention_mask"][:, 0] = 1
        return extra


class RewardModel(torch.nn.Module):
    """Backbone, pooling over response tokens ("mean", or the "last" one), linear head of `outputs` logits.

    The head works on centred and scaled features (`fit_scale`) and starts at 0: before training all
    responses score alike.  `truncated` counts prompts cut on the left and responses cut on the right,
    which happens only to a response that alone is longer than `max_length`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = "mean",
        outputs: int = 1,
        max_length: int = MAX_LENGTH,
        padding_side: str = "right",
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; allowed: {', '.join(POOLINGS)}.")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.padding_side = padding_side
        self.truncated = {"prompts": 0, "responses": 0}
        self.config = backbone.config
        self.max_length = min(max_length, models.longest_text(self.config, max_length))
        self._inputs = _Inputs(backbone)
        # [CLS] prompt [SEP] response [SEP]
        self._pair = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        self._causal = self._inputs.causal and not self._pair
        width = models.state_width(backbone)
        self._add_head(width, outputs)
        self.to(backbone.device)

    def _add_head(self, width: int, outputs: int) -> None:
        self.head = torch.nn.Linear(width, outputs)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[list, list]]:
        """Token ids (context, response) of each row, cut to `max_length`; the response keeps its place.

        Encoders: [CLS] prompt [SEP] | response [SEP].  Decoders: prompt | response and end token.
        """
        check_texts(prompts), check_texts(responses)
        tokenizer = self.tokenizer
        start, middle, ends = _special_ids(tokenizer, self._pair)
        room = self.max_length - len(start) - len(middle) - bool(ends)
        known: dict[str, list[int]] = {}  # a prompt stands in many rows
        rows = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if prompt not in known:
                known[prompt] = _prompt_ids(tokenizer, prompt, self._pair)
            before = known[prompt]
            after = encoding.bare_ids(tokenizer, response)
            self.truncated["responses"] += len(after) > room
            after = after[:room]
            self.truncated["prompts"] += len(before) + len(after) > room
            before = before[max(0, len(before) + len(after) - room) :]
            after = encoding.with_end(after, ends)
            if not after:
                raise ValueError(
                    f"response {number} is empty and {type(tokenizer).__name__} has no end token, so there "
                    "is nothing to read. Set tokenizer.eos_token, or leave empty responses out."
                )
            rows.append((start + before + middle, after))
        return rows

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor | None = None,
        **_,
    ) -> SequenceClassifierOutput:
        """Token ids and masks (rows, time) -> .logits (rows, outputs).

        `response_mask` marks the tokens to pool over; without it (as TRL calls) only "last" can pool.
        """
        hidden = self.hidden(input_ids, attention_mask, response_mask)
        pooled = pool(hidden, attention_mask, response_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.read(pooled))

    def hidden(self, input_ids, attention_mask, response_mask=None) -> torch.Tensor:
        """Last hidden states (rows, time, width), whichever side is padded."""
        extra = self._inputs.extra(attention_mask, response_mask)
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return out.last_hidden_state

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (rows, width) -> logits (rows, outputs), float32."""
        with torch.autocast(features.device.type, enabled=False):  # 16 bits would tie near scores
            return self.head((features.float() - self.centre) / self.scale)

    def fit_scale(self, features: torch.Tensor) -> None:
        """Centre and scale of the features, from training rows; 1 where a feature does not vary."""
        self.centre.copy_(features.mean(0))
        if len(features) < 2:
            self.scale.fill_(1.0)
            return
        std = features.std(0)
        varies = std > losses.rounding(features, dim=0)
        self.scale.copy_(torch.where(varies, std, 1.0))

    def batch(self, rows: Sequence[tuple[list, list]]) -> dict[str, torch.Tensor]:
        """Encoded rows as input_ids, attention_mask and response_mask, each (rows, time)."""
        pad, side = encoding.pad_id(self.tokenizer), self.padding_side
        ids, mask = encoding.pad_rows([a + b for a, b in rows], pad, side)
        inside, _ = encoding.pad_rows([[0] * len(a) + [1] * len(b) for a, b in rows], 0, side)
        tensors = {"input_ids": ids, "attention_mask": mask, "response_mask": inside}
        return {name: x.to(self.head.weight.device) for name, x in tensors.items()}

    @torch.no_grad()  # not inference mode: a head trains on what it returns
    def features(
        self, prompts: Sequence[str], responses: Sequence[str], *, tokens_per_batch: int = 8192
    ) -> torch.Tensor:
        """Pooled features, float32 (rows, width) on the CPU, batched by length; warns of what was cut."""
        before = dict(self.truncated)
        rows = self.encode(prompts, responses)
        if cut := {k: v - before[k] for k, v in self.truncated.items() if v > before[k]}:
            counts = ", ".join(f"{count} {name}" for name, count in cut.items())
            warnings.warn(
                f"cut to {self.max_length} tokens: {counts} of {len(rows)}.", stacklevel=2
            )
        pooled = torch.empty(len(rows), self.centre.shape[0])
        bar = runtime.progress(total=len(rows), label="reward features", unit="text")
        with models.fast_float32(self):
            for places, features in self._pooled_batches(rows, tokens_per_batch):
                pooled[places] = features.float().cpu()
                bar.update(len(places))
        bar.close()
        return pooled

    def _pooled_batches(self, rows, budget: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Row numbers and pooled features; a decoder reads each prompt once for all of its responses."""
        if self._causal:
            contexts, responses = zip(*rows, strict=True) if rows else ((), ())
            batches = logprobs.response_states(self.backbone, contexts, responses, budget)
            for places, states in batches:
                mean = self.pooling == "mean"
                yield places, torch.stack([x.float().mean(0) if mean else x[-1] for x in states])
            return
        lengths = [len(before) + len(after) for before, after in rows]
        for places in encoding.token_batches(lengths, budget):
            batch = self.batch([rows[i] for i in places])
            masks = batch["attention_mask"], batch["response_mask"]
            yield places, pool(self.hidden(**batch), *masks, self.pooling)

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Logits of each row, float64 (rows,), or (rows, outputs) where the head has several."""
        return self.score_features(self.features(prompts, responses))

    @torch.inference_mode()
    def score_features(self, features: torch.Tensor) -> np.ndarray:
        """`score` from features computed before."""
        logits = self.read(features.to(self.head.weight.device)).cpu().numpy().astype(np.float64)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def trained_state(self) -> dict[str, torch.Tensor]:
        """A copy of head, scale and every trained weight; `load_state_dict(state, strict=False)` sets it."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        state = self.state_dict().items()
        return {
            n: x.cpu().clone() for n, x in state if n in trained or not n.startswith("backbone.")
        }

    def settings(self) -> dict[str, object]:
        """Arguments that build this model again on its backbone."""
        settings = {"pooling": self.pooling, "outputs": self.head.out_features}
        return settings | {"max_length": self.max_length, "padding_side": self.padding_side}

    def save(self, folder: Path | str, name: str | None = None, **settings) -> Path:
        """Keep the model in `folder` by `models.save`; `name` of the backbone and settings go on its card."""
        card = {"settings": {"backbone": name, **settings}}
        return models.save(self, self.tokenizer, folder, card=card)

    def write(self, folder: Path, place: Path) -> dict:
        """Write what `models.save` keeps: head and scale, and of the backbone what was trained.

        A backbone as it was loaded is named only, one with adapters has them written, another is written
        whole, each as plain transformers and peft read it.
        """
        state = {n: x.contiguous() for n, x in self.state_dict().items() if "backbone." not in n}
        save_file(state, folder / WEIGHTS)
        origin = models.origin_of(self.backbone)
        facts = {"class": type(self).__name__, "module": type(self).__module__}
        facts |= {"model": self.settings(), "base": origin, "training": "head"}
        named = bool(origin.get("name")) and models.is_unchanged(self.backbone)
        if adapters.adapted_layers(self.backbone) or not named:
            facts |= models.write_policy(self.backbone, folder, place)
        return facts | {"kind": KIND}


class FeatureStore:
    """Features of a model's frozen backbone, each (prompt, response) computed once."""

    def __init__(self, model: RewardModel):
        self.model, self.rows, self.known = model, torch.empty(0, len(model.centre)), {}

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Features (rows, width), for `train` and `RewardModel.score_features`."""
        wanted = list(zip(prompts, responses, strict=True))
        if new := [key for key in dict.fromkeys(wanted) if key not in self.known]:
            self.known |= {key: len(self.rows) + i for i, key in enumerate(new)}
            features = self.model.features([p for p, _ in new], [r for _, r in new])
            self.rows = torch.cat([self.rows, features])
        return self.rows[[self.known[key] for key in wanted]]


def load(
    name: Path | str,
    kind: type[RewardModel] | None = None,
    *,
    label: str | None = None,
    tokenizer: str | None = None,
    template: Callable[[str, str], str] | None = None,
) -> RewardModel | classifiers.ClassifierReward:
    """A reward model that was kept, or another's: a sequence classifier from a folder or the Hub.

    What has `.score(prompts, responses) -> (rows,)`.  A kept one comes as the `kind` it was saved as.  Of a
    classifier with several labels `label` says which one pays (also in the name: `name@revision#label`);
    `tokenizer` and `template` are for classifiers, see `classifiers`.  Raises ValueError for what is no
    reward model and where files do not belong together, AssetError where the model cannot be had.
    """
    wanted = hub.parse_name(name)
    folder = hub.resolve_model(name)
    card = cards.read(folder)
    if card.get("kind") == KIND:
        return _load_kept(folder, card, kind or RewardModel)
    if (folder / OLD_CARD).exists():
        raise ValueError(
            f"{folder} was written by an earlier version. Save it again by models.save."
        )
    model, words = classifiers.load_classifier(name, tokenizer=tokenizer)
    return classifiers.ClassifierReward(
        model, words, label=label or wanted.label, template=template
    )


def _load_kept(folder: Path, card: dict, kind: type[RewardModel]) -> RewardModel:
    if card["class"] != kind.__name__:
        raise ValueError(
            f"{folder} holds a {card['class']}, not a {kind.__name__}. Load it by {card['module']}.load."
        )
    backbone = _load_kept_backbone(folder, card)
    if card["training"] == "lora":
        adapters.attach(backbone, folder)
    model = kind(backbone, models.load_tokenizer(folder), **card["model"])
    state = load_file(folder / WEIGHTS)
    expected = {name for name in model.state_dict() if "backbone." not in name}
    if set(state) != expected:
        differing = sorted(set(state) ^ expected)[0]
        raise ValueError(f"{folder}: weights that the card does not explain, first {differing!r}.")
    model.load_state_dict(state, strict=False)
    return model.eval()


def _load_kept_backbone(folder: Path, card: dict) -> PreTrainedModel:
    """The backbone of a kept reward model, without adapters."""
    if card["training"] == "weights":
        return _read_backbone(folder)
    if (folder / models.BASE).is_dir():
        return _read_backbone(folder / models.BASE)
    origin = dict(card["base"])
    name, revision = origin.pop("name"), origin.pop("revision", None)
    dtype = getattr(torch, origin.pop("dtype"))
    return load_backbone(f"{name}@{revision}" if revision else name, dtype=dtype, **origin)[0]


def _read_backbone(folder: Path) -> PreTrainedModel:
    """A backbone that was written whole; of an encoder-decoder its encoder alone, which has its own class."""
    config = hub.read_config(folder)
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config, **hub.SAFE)
    family = type(skeleton)
    if family.__name__ not in config.architectures:
        family = type(skeleton.get_encoder())
    model = family.from_pretrained(folder, use_safetensors=True, dtype="auto", **hub.SAFE)
    return model.to(runtime.get_device()).eval()


def _special_ids(tokenizer, pair: bool) -> tuple[list[int], list[int], list[int]]:
    """Tokens before a prompt, between prompt and response, and those of which one ends a response."""
    if pair:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id], [tokenizer.sep_token_id]
    return encoding.start_ids(tokenizer), [], encoding.end_tokens(tokenizer)


def _prompt_ids(tokenizer, prompt: str, pair: bool) -> list[int]:
    """A prompt's tokens after those that stand before every row, cut or not."""
    if pair:
        return encoding.bare_ids(tokenizer, prompt)
    start = encoding.start_ids(tokenizer)
    ids = encoding.encode(tokenizer, prompt).prompt
    return ids[len(start) :] if ids[: len(start)] == start else ids


def pool(
    hidden: torch.Tensor, mask: torch.Tensor, response_mask: torch.Tensor | None, pooling: str
) -> torch.Tensor:
    """Hidden states (rows, time, width) -> (rows, width): mean over response tokens, or the last token's."""
    if pooling == "last":
        return classifiers.last_real(hidden, mask)
    if response_mask is None:
        raise ValueError("pooling 'mean' needs the response's mask. Try pooling='last'.")
    weight = response_mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


# --- feedback as training data -------------------------------------------------------------------


@dataclass
class Feedback:
    """Distinct (prompt, response) rows and what is known of them; `group` numbers the prompts.

    `targets`: (rows,) in [0, 1], or None; `pairs`: (pairs, 2) row numbers, preferred first, or None.
    """

    prompts: list[str]
    responses: list[str]
    group: np.ndarray
    targets: np.ndarray | None = None
    pairs: np.ndarray | None = None


def from_ratings(
    ratings: pd.DataFrame, template: Callable[[str, str], str] = preferences.alpaca_prompt
) -> Feedback:
    """A ratings table as training data: t = (score - 1) / 6, first rating of a response.

    `template(instruction, input)` gives the prompt.  Rows without a score are left out.  ValueError for a
    score outside 1-7, and where no row is left.
    """
    table = preferences.first_of_each(preferences.judged(ratings))
    if table.empty:
        raise ValueError("no row has a score: there is nothing to learn from these ratings.")
    targets = losses.rating_target(torch.tensor(table["score"].to_numpy(dtype=np.float32)))
    prompts = [template(*row) for row in zip(table["instruction"], table["input"], strict=True)]
    return Feedback(prompts, list(table["response"]), number_prompts(prompts), targets.numpy())


def from_rankings(
    rankings: pd.DataFrame, template: Callable[[str, str], str] = preferences.alpaca_prompt
) -> Feedback:
    """A rankings table as training data: every decided pair once, without exact duplicates.

    "equal" and pairs without a verdict are left out.  Raises ValueError where no pair is left.
    """
    table = preferences.decided(rankings)[preferences.RANKING].drop_duplicates()
    if table.empty:
        raise ValueError(
            "every verdict is 'equal' or missing: there is nothing to learn from these rankings."
        )
    known: dict[tuple[str, str], int] = {}
    pairs = []
    for row in table.itertuples():
        prompt = template(row.instruction, row.input)
        pair = [known.setdefault((prompt, r), len(known)) for r in (row.response1, row.response2)]
        pairs.append(pair if row.verdict == "(a)" else pair[::-1])
    prompts, responses = ([key[side] for key in known] for side in (0, 1))
    return Feedback(prompts, responses, number_prompts(prompts), pairs=np.array(pairs))


def number_prompts(prompts: Sequence[str]) -> np.ndarray:
    """(rows,) a number for each distinct prompt, counted from 0 in order of appearance."""
    return pd.factorize(np.array(prompts, dtype=object))[0]


def shuffled(feedback: Feedback, seed: int = 0) -> Feedback:
    """The control: targets dealt out anew among all rows, or each pair turned round by a coin."""
    rng = np.random.default_rng(seed)
    control = Feedback(**vars(feedback))
    if feedback.targets is not None:
        control.targets = rng.permutation(feedback.targets)
    if feedback.pairs is not None:
        turn = rng.random(len(feedback.pairs)) < 0.5
        control.pairs = np.where(turn[:, None], feedback.pairs[:, ::-1], feedback.pairs)
    return control


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How a reward model trains: AdamW, linear warm-up and decay, batches of whole prompts."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    epochs: int = 20
    prompts_per_batch: int = 8
    warmup: float = 0.1  # share of the steps
    seed: int = 0
    prompts_in_memory: int | None = None  # of a batch, read at once; None: all
    validate_every: int = 0  # steps; 0: at the end of each epoch


def train(
    model: RewardModel,
    feedback: Feedback,
    config: TrainConfig = TrainConfig(),
    *,
    features: torch.Tensor | None = None,
    batch_loss: Callable | None = None,
    validate: Callable[[], float] | None = None,
    folder: Path | str | None = None,
) -> pd.DataFrame:
    """Train in place on targets (squared error) or pairs (Bradley-Terry); history: step, epoch, loss, ....

    Trains the head and whatever of the backbone requires gradients (`models.set_trainable`; or freeze it).
    `features`, (rows, width) from `model.features`, trains the head alone, and sets its centre and scale.
    `batch_loss(model, feedback, groups, encoded, features)` takes the place of these losses.  `folder` holds
    the history as it comes (`training.History`).  `validate()`, the higher the better, chooses the weights
    that the model ends with (column `validation`); with it and a folder, a killed run goes on from its last
    validation.  Raises ValueError for feedback of both kinds or none, and FloatingPointError, naming step
    and batch, where the loss is not finite.
    """
    if batch_loss is None and (feedback.targets is None) == (feedback.pairs is None):
        raise ValueError("feedback needs targets or pairs, not both. Train one model on each.")
    if features is not None:
        model.fit_scale(features.to(model.centre))
    trained = model.head.parameters() if features is not None else model.parameters()
    trained = [p for p in trained if p.requires_grad]
    groups = np.unique(feedback.group)
    batches = -(-len(groups) // config.prompts_per_batch)
    if folder and validate:
        _claim(folder, feedback, config)
    encoded = None if features is not None else model.encode(feedback.prompts, feedback.responses)
    accelerator = processes.begin(model.head.weight.device)
    loss = _Loss(model, feedback, encoded, features, batch_loss or _batch_loss)
    loss = accelerator.prepare_model(loss, device_placement=False)  # DDP, where there are several
    run = _Training(model, trained, config, batches, validate, folder)
    at_once = training.RowsAtOnce(config.prompts_in_memory or config.prompts_per_batch)
    rng = np.random.default_rng(config.seed)
    with models.fast_float32(model):
        for epoch in range(config.epochs):
            order = rng.permutation(groups)
            for batch in range(batches):
                if epoch * batches + batch < run.done:  # before this run was killed
                    continue
                chosen = order[batch::batches]
                attempt = partial(_backward, loss, run.optimiser, feedback, chosen, accelerator)
                run.step(at_once.run(attempt), chosen)
    return run.close()


def _claim(folder: Path | str, feedback: Feedback, config: TrainConfig) -> None:
    known = [feedback.targets, feedback.pairs, getattr(feedback, "labels", None)]
    known = [np.asarray(values).tolist() for values in known]
    key = (vars(config), feedback.prompts, feedback.responses, known)
    training.claim_folder(folder, "reward model", *key)


class _Loss(torch.nn.Module):
    """The mean loss of some prompts as a forward pass, which is what DDP wraps."""

    def __init__(self, model: RewardModel, feedback, encoded, features, batch_loss: Callable):
        super().__init__()
        self.model = model
        self.data = (feedback, encoded, features)
        self.batch_loss = batch_loss

    def forward(self, groups: np.ndarray) -> torch.Tensor:
        feedback, encoded, features = self.data
        return self.batch_loss(self.model, feedback, groups, encoded, features)


def _backward(
    loss: torch.nn.Module, optimiser, feedback, chosen, accelerator, prompts_at_once: int
) -> float:
    """Gradients of a batch's mean loss, so many prompts at a time as memory holds; the loss."""
    optimiser.zero_grad()  # of an attempt for which memory was too small
    mine = chosen[processes.share(len(chosen))]
    parts = [mine[i : i + prompts_at_once] for i in range(0, len(mine), prompts_at_once)]
    counted = [(part, _count_taught(feedback, part)) for part in parts]
    # the mean of a part that teaches nothing would be 0 / 0
    counted = [(part, count) for part, count in counted if count]
    if not counted:  # DDP wants a gradient of every process, if only of 0
        taught = [group for group in chosen if _count_taught(feedback, group)]
        counted = [(np.array(taught[:1] or chosen[:1]), 0)]
    whole = max(1, _count_taught(feedback, chosen))
    total = 0.0
    for part, count in processes.passes(counted, loss, accelerator):
        mean = count / whole * loss(part)
        (mean * processes.world()).backward()  # DDP averages over processes; we want the sum
        total += mean.item()
    return sum(processes.joined([total]))


def _count_taught(feedback: Feedback, groups: np.ndarray) -> int:
    """Targets, pairs or known labels of some prompts: what their mean loss is a mean over."""
    if feedback.pairs is not None:
        return int(np.isin(feedback.group[feedback.pairs[:, 0]], groups).sum())
    labels = getattr(feedback, "labels", None)
    if labels is not None:
        known = feedback.row[~np.isnan(labels)]
        return int(np.isin(feedback.group[known], groups).sum())
    return int(np.isin(feedback.group, groups).sum())


class _Training:
    """What stands around the steps of `train`: optimiser, history, the best weights, checkpoints."""

    def __init__(self, model, trained, config, batches, validate, folder):
        self.model, self.trained, self.validate = model, trained, validate
        self.batches = batches
        self.total = batches * config.epochs
        self.every = config.validate_every or batches
        self.optimiser, self.schedule = _optimiser(trained, config, self.total)
        self.optimiser.zero_grad()
        self.best = training.Best()
        self.done = 0
        self.folder = Path(folder) if folder and validate else None
        checkpoint = training.load_checkpoint(self.folder) if self.folder else None
        rows = self._restore(checkpoint) if checkpoint else []
        self.history = training.History(
            "reward model", folder, vars(config), rows, writes=folder is not None
        )
        self.bar = runtime.progress(total=self.total, label="training a reward model", unit="step")
        self.bar.update(self.done)

    def step(self, loss: float, prompts: np.ndarray) -> None:
        """Change the weights by the gradients of one batch."""
        self.done += 1
        _check_finite(loss, f"step {self.done} of {self.total}, prompts {prompts.tolist()}")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        rate = self.schedule.get_last_lr()[0]
        values = (self.done, self.done / self.batches, loss, rate, norm.item())
        row = dict(zip(HISTORY, values, strict=True))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        validated = self.done % self.every == 0 or self.done == self.total
        if self.validate and validated:
            row["validation"] = processes.once(float, self.validate())
            self.best.offer(self.done, row["validation"], self.model.trained_state())
        self.history.add(row)
        if self.folder and validated:
            self._save()
        self.bar.update()

    def _save(self) -> None:
        state = {"rows": self.history.rows, "best": [self.best.step, self.best.value]}
        state["schedule"] = self.schedule.last_epoch
        tensors = {"weights": self.model.trained_state(), "best": self.best.weights}
        optimiser = self.optimiser.state_dict()
        if processes.is_main():
            training.save_checkpoint(self.folder, self.done, state, tensors, optimiser)
        processes.wait()

    def _restore(self, checkpoint: training.Checkpoint) -> list[dict]:
        self.model.load_state_dict(checkpoint.tensors["weights"], strict=False)
        self.optimiser.load_state_dict(checkpoint.optimizer)
        self.schedule.last_epoch = checkpoint.state["schedule"]
        self.schedule._last_lr = [group["lr"] for group in self.optimiser.param_groups]
        self.done = checkpoint.step
        self.best = training.Best(*checkpoint.state["best"], checkpoint.tensors["best"])
        return checkpoint.state["rows"]

    def close(self) -> pd.DataFrame:
        """The best weights into the model, and the history."""
        if self.best.step is not None:
            self.model.load_state_dict(self.best.weights, strict=False)
        self.bar.close()
        self.history.close()
        columns = [*HISTORY, "validation"] if self.validate else HISTORY
        return pd.DataFrame(self.history.rows, columns=columns)


def _optimiser(trained: list[torch.nn.Parameter], config: TrainConfig, total: int):
    """AdamW, and its learning rate: a linear rise, then a linear fall to 0 at step `total`."""
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimiser = torch.optim.AdamW(trained, **settings)
    warmup = round(config.warmup * total)
    return optimiser, transformers.get_linear_schedule_with_warmup(optimiser, warmup, total)


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at {where}. Lower learning_rate.")


def _batch_loss(model, feedback, groups, encoded, features) -> torch.Tensor:
    """Loss of the rows of some prompts; each response goes through the backbone once."""
    rows = np.flatnonzero(np.isin(feedback.group, groups))
    device = model.head.weight.device
    if features is not None:
        logits = model.read(features[rows].to(device))[:, 0]
    else:
        logits = model(**model.batch([encoded[i] for i in rows])).logits[:, 0]
    if feedback.targets is not None:
        return losses.regression_loss(logits, torch.as_tensor(feedback.targets[rows]).to(logits))
    pairs = feedback.pairs[np.isin(feedback.group[feedback.pairs[:, 0]], groups)]
    left, right = torch.as_tensor(np.searchsorted(rows, pairs), device=device).T
    return losses.pairwise_loss(logits[left], logits[right])
