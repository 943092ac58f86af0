"""Supervised fine-tuning through `trl.SFTTrainer`, with tokenisation and loss masks made here.

Loss falls on completions, or on the assistant's turns of a conversation, and on the end token, once.
Prompt and completion are tokenised apart, as when sampling.  Sequences longer than `max_length` lose
their end (and with it the end token); how many did is in `history.attrs["truncated"]`.
Encoder-decoder models, which SFTTrainer does not take, go through its parent, `transformers.Trainer`.
Several processes (`processes`) make the optimizer steps that one makes: `per_device_train_batch_size` is that
of one process, and they divide it, or the accumulation, among them; each holds the model whole, or in shards
(`shards`).  Simplified: dropout differs, where a
model has it.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pandas as pd
import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import adapters, data, encoding, models, processes, runtime, shards, training

NO_LOSS = -100  # label of a token without loss
PLAIN = {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
# saves memory for time; TRL switches it on, and transformers is renaming it
_RENAMED = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
PLAIN["activation_checkpointing" if _RENAMED else "gradient_checkpointing"] = False
COLUMNS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "held_out_loss"]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    model: PreTrainedModel | None = None,
) -> list[dict]:
    """Rows of input_ids and labels: the prompt without loss, the completion and one end token with.

    A completion that ends with an end token gets no other; give the `model` where it has several.  Raises
    ValueError for a tokenizer and model without any.
    """
    ends = _ends(tokenizer, model)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = encoding.encode(tokenizer, prompt, completion)
        after = encoding.with_end(after, ends)
        rows.append({"input_ids": before + after, "labels": [NO_LOSS] * len(before) + after})
    return rows


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict]],
    *,
    model: PreTrainedModel | None = None,
) -> list[dict]:
    """Rows of input_ids and labels: loss on what the assistant says and on the end of its turns.

    A conversation is a list of {"role", "content"}, written as `data.apply_template` asks: in the chat
    template, or "tagged" where the tokenizer has none.  `model`: as in `encode_completions`.  Raises
    ValueError where the turns cannot be told apart, because it starts with the assistant or the chat
    template does not write turn by turn.
    """
    ends, rows = _ends(tokenizer, model), []
    first = encoding.start_ids(tokenizer) if encoding.writes_start(tokenizer) else []
    for number, messages in enumerate(conversations):
        text, spans = _assistant_spans(tokenizer, messages, number)
        ids, places = encoding.token_places(tokenizer, text)
        spoken = [any(a <= start < b for a, b in spans) for start, _ in places]
        labels = [token if said else NO_LOSS for token, said in zip(ids, spoken, strict=True)]
        said = [token for token in labels if token != NO_LOSS]
        if messages[-1]["role"] == "assistant" and not encoding.is_finished(said, ends):
            ids, labels = [*ids, ends[0]], [*labels, ends[0]]
        if ids[: len(first)] != first:  # this chat template leaves it to the tokenizer
            ids, labels = first + ids, [NO_LOSS] * len(first) + labels
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _ends(tokenizer, model) -> list[int]:
    ends = encoding.end_tokens(tokenizer, model)
    if not ends:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end token, so nothing would teach the model to stop. Set "
            "tokenizer.eos_token, or give a model whose generation_config has eos_token_id."
        )
    return ends


def _assistant_spans(tokenizer, messages, number) -> tuple[str, list[tuple[int, int]]]:
    text, spans = data.write_turns(messages, tokenizer), []
    for turn in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        before = data.write_turns(messages[:turn], tokenizer, answer_next=True) if turn else None
        upto = data.write_turns(messages[: turn + 1], tokenizer)
        if before is None or not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                f"conversation {number}: the assistant's turn {turn} cannot be located. Start with "
                "another role, and use a chat template that only appends as turns are added."
            )
        spans.append((len(before), len(upto.rstrip())))
    return text, spans


def loss_tokens(tokenizer: PreTrainedTokenizerBase, row: dict) -> pd.DataFrame:
    """The tokens of an encoded row and whether each carries loss: look at it before training."""
    tokens = [tokenizer.decode([token]) for token in row["input_ids"]]
    return pd.DataFrame({"token": tokens, "loss": [label != NO_LOSS for label in row["labels"]]})


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    *,
    held_out: list[dict] | None = None,
    folder: Path | str | None = None,
    max_length: int = 512,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **arguments,
) -> pd.DataFrame:
    """Train `model` in place (float32; autocast to 16 bits on CUDA) and return its history (`COLUMNS`).

    `rows` come from `encode_completions` or `encode_conversations`; `arguments` are those of
    `transformers.TrainingArguments`, such as learning_rate or num_train_epochs.  Checkpoints go to
    `folder`, from which a killed run continues; ValueError where it belongs to another run.  `callbacks`
    are transformers' own, such as one that looks at the model after each epoch.
    A trunk that `models.set_trainable` froze keeps its dtype.
    """
    models.check_policy(model.config)
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        models.to_dtype(model, torch.float32)
    train, truncated = _cut(model, rows, max_length)
    test = _cut(model, held_out, max_length)[0] if held_out else None
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(folder or scratch)
        training.claim_folder(output, "SFT", rows, held_out, max_length, arguments)
        processes.wait()
        saving = {"save_strategy": "steps" if folder else "no", "save_steps": 50}
        arguments = {**saving, **arguments, "output_dir": str(output)}

        def attempt(rows_at_once: int) -> Recorder:
            recorder = Recorder("SFT", folder, arguments, _log_row)
            size = divided(arguments, rows_at_once, processes.world())
            with shards.of(model) as trained:
                _train(trained, tokenizer, train, test, recorder, callbacks, arguments | size)
            return recorder

        recorder = _with_less_at_once(attempt, model, arguments)
    model.eval()
    history = recorder.history.frame().reindex(columns=COLUMNS)
    history.attrs["truncated"] = truncated
    return history


def _train(model, tokenizer, train, test, recorder, callbacks, arguments: dict) -> None:
    """One call of the trainer, from the newest whole checkpoint in its folder."""
    # the file that is written last
    whole = Path(arguments["output_dir"]).glob("checkpoint-*/trainer_state.json")
    last = max(whole, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    processes.wait()
    with (
        _own_forward(model),
        own_precision(),
        logits_where_loss_falls(),
        models.fast_float32(model),
    ):
        trainer = _trainer(model, tokenizer, train, test, **arguments)
        shards.check(trainer, callbacks)
        for callback in (recorder, *callbacks):
            trainer.add_callback(callback)
        train_in_float32(model)
        trainer.train(resume_from_checkpoint=last and str(last.parent))


SIZE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def batch_of(arguments: dict) -> tuple[int, int]:
    """(rows at once, how often they are accumulated) of an optimizer step of one process."""
    defaults = transformers.TrainingArguments
    return tuple(arguments.get(name, getattr(defaults, name)) for name in (SIZE, ACCUMULATION))


def divided(arguments: dict, rows_at_once: int, world: int = 1) -> dict[str, int]:
    """The batch of one process as each of `world` processes takes it: at most `rows_at_once` rows at once.

    Raises ValueError where the rows of an optimizer step cannot be divided.
    """
    rows, times = batch_of(arguments)
    total = rows * times
    if total % world:
        raise ValueError(
            f"{SIZE} x {ACCUMULATION} = {total} rows an optimizer step are not divided by {world} processes; "
            "choose a number that is."
        )
    share = total // world
    largest = max(n for n in range(1, min(rows_at_once, share) + 1) if share % n == 0)
    return {SIZE: largest, ACCUMULATION: share // largest}


def _with_less_at_once(attempt: Callable[[int], Recorder], model, arguments: dict) -> Recorder:
    """Train; anew, or from the last checkpoint, with half the rows at once while a GPU's memory is short."""
    rows, _ = batch_of(arguments)
    if model.device.type != "cuda" or not processes.alone():
        return attempt(rows)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = training.Best()
    start.offer(0, 0.0, trained)

    def again(rows_at_once: int) -> Recorder:
        training.copy_weights(start.weights, trained)
        return attempt(rows_at_once)

    return training.RowsAtOnce(rows).run(again)


class Recorder(transformers.TrainerCallback):
    """Hands what a transformers or TRL trainer logs to `training.History`, as it logs it.

    `row_of(logged)` makes a row of the whole log so far, or None.
    """

    def __init__(self, what, folder, settings, row_of):
        self.what = what
        self.folder = folder
        self.settings = settings
        self.row_of = row_of
        self.history = None

    def on_train_begin(self, args, state, control, **_):
        self.history = training.History(self.what, self.folder, self.settings)
        for last in range(1, len(state.log_history) + 1):  # of the run that this one continues
            self._add(state.log_history[:last])

    def on_log(self, args, state, control, **_):
        self._add(state.log_history)

    def on_train_end(self, args, state, control, **_):
        self.history.close()

    def _add(self, logged: list[dict]) -> None:
        row = self.row_of(logged)
        if row is not None:
            self.history.add(row)


def _log_row(logged: list[dict]) -> dict | None:
    """A row of `COLUMNS` from the newest entry of a trainer's log."""
    entry = dict(logged[-1])
    if "eval_loss" in entry:
        entry["held_out_loss"] = entry.pop("eval_loss")
    if not {"loss", "held_out_loss"} & set(entry):  # the summary at the end
        return None
    return {name: entry[name] for name in COLUMNS if name in entry}


@contextlib.contextmanager
def _own_forward(model):
    """Take off the `forward` that TRL and accelerate hang on the model while they train it."""
    own = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


@contextlib.contextmanager
def own_precision():
    """Within: a trainer may set accelerate's precision, which holds for the process; after: as before.

    Otherwise a PPO run that follows a trainer in bfloat16 would compute in it.
    """
    name, state = "ACCELERATE_MIXED_PRECISION", AcceleratorState._shared_state
    before, chosen = dict(state), os.environ.get(name)
    try:
        yield
    finally:
        state.clear()
        state.update(before)
        os.environ.pop(name, None)
        if chosen is not None:
            os.environ[name] = chosen


@runtime.accelerated
@contextlib.contextmanager
def logits_where_loss_falls():
    """Within: TRL computes the logits that its loss needs, and here those of prompts too (`lib.fast`)."""
    yield


def _cut(model, rows, max_length) -> tuple[list[dict], int]:
    """The rows as the trainer takes them, and how many lost their end."""
    cut = [{name: ids[:max_length] for name, ids in row.items()} for row in rows]
    silent = [i for i, row in enumerate(cut) if all(label == NO_LOSS for label in row["labels"])]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(rows)} examples (first: number {silent[0]}) have no token with loss "
            f"within max_length {max_length}. Raise it, or leave out what has no answer to learn."
        )
    if model.config.is_encoder_decoder:  # prompt to the encoder, completion to the decoder
        for row in cut:
            prompt = row["labels"].count(NO_LOSS)
            row.update(input_ids=row["input_ids"][:prompt], labels=row["labels"][prompt:])
    truncated = sum(len(row["input_ids"]) > max_length for row in rows)
    return cut, truncated


def token_mean(
    outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of an encoder-decoder's labels (rows, time), over the count of the whole optimizer step.

    T5's own loss is the mean of a few rows, and transformers (5.23) adds these up as they accumulate.
    """
    logits = outputs.logits.float().flatten(0, 1)
    total = cross_entropy(logits, labels.flatten(), ignore_index=NO_LOSS, reduction="sum")
    return total / (num_items_in_batch or (labels != NO_LOSS).sum())


def silent(row: dict) -> dict:
    """The row without loss: what fills a batch and teaches nothing."""
    return row | {"labels": [NO_LOSS] * len(row["labels"])}


class EvenSampler(torch.utils.data.Sampler):
    """The order of one process, then the data set's last row, which is silent, up to a multiple."""

    def __init__(self, dataset: datasets.Dataset, multiple: int, data_seed: int | None = None):
        self.silent = len(dataset) - 1
        self.order = SeedableRandomSampler(range(self.silent), data_seed=data_seed)
        self.missing = -self.silent % multiple

    def __len__(self) -> int:
        return self.silent + self.missing

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [self.silent] * self.missing

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch comes next."""
        self.order.set_epoch(epoch)


class EpochsOrder(transformers.TrainerCallback):
    """Tells the sampler the epoch, also of a run that goes on within one.

    accelerate (1.15) tells it on one process only: several would begin again with the first epoch's order.
    """

    def __init__(self, sampler: EvenSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.set_epoch(math.floor(state.epoch + 1e-6))


def _trainer(model, tokenizer, train, test, **arguments):
    import trl

    runtime.quiet_libraries()
    device = runtime.get_device().type if shards.wanted() else model.device.type
    evaluate = "epoch" if test else "no"
    fixed = {**PLAIN, "save_total_limit": 2, "eval_strategy": evaluate, "use_cpu": device == "cpu"}
    fixed["bf16"] = device == "cuda" and runtime.cuda_has_bfloat16()
    fixed["fp16"] = device == "cuda" and not fixed["bf16"]
    fixed |= shards.ARGUMENTS if shards.wanted() else {}
    if not processes.alone():
        shortest = min(train, key=lambda row: len(row["input_ids"]))
        train = [*train, silent(shortest)]
    train = datasets.Dataset.from_list(train)
    test = datasets.Dataset.from_list(test) if test else None
    data = dict(model=model, processing_class=tokenizer, train_dataset=train, eval_dataset=test)
    if model.config.is_encoder_decoder:
        padding = copy.copy(
            tokenizer
        )  # on the right: the decoder reads what it is shown from its start
        padding.padding_side = "right"
        padding.pad_token_id = encoding.pad_id(tokenizer)
        collator = transformers.DataCollatorForSeq2Seq(padding, model)
        settings = transformers.TrainingArguments(**fixed, **arguments)
        data |= {"data_collator": collator, "compute_loss_func": token_mean}
        trainer = _own(transformers.Trainer)(args=settings, **data)
    else:
        settings = trl.SFTConfig(max_length=None, **fixed, **arguments)
        trainer = _own(trl.SFTTrainer)(args=settings, **data)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _own(trainer: type) -> type:
    """A trainer that reads back adapters, and makes on several processes the steps of one.

    transformers (5.23) writes checkpoints of adapters that it put on a model and cannot read them; its last
    batch of an epoch is filled with rows from the first, and its mean held-out loss counts them too.
    """

    class Trainer(trainer):
        def _load_from_checkpoint(self, checkpoint: str, model=None) -> None:
            if (Path(checkpoint) / adapters.WEIGHTS).exists():
                adapters.load_state(model or self.model, checkpoint)
            else:
                super()._load_from_checkpoint(checkpoint, model)

        def _get_train_sampler(self, dataset=None) -> torch.utils.data.Sampler | None:
            if processes.alone():
                return super()._get_train_sampler(dataset)
            together = self.args.train_batch_size * processes.world()
            sampler = EvenSampler(self.train_dataset, together, self.args.data_seed)
            self.add_callback(EpochsOrder(sampler))
            return sampler

        def get_eval_dataloader(self, dataset=None) -> torch.utils.data.DataLoader:
            if processes.alone():
                return super().get_eval_dataloader(dataset)
            # all rows on each process: the same batches, the same mean
            options = {"batch_size": self.args.eval_batch_size, "collate_fn": self.data_collator}
            return torch.utils.data.DataLoader(self.eval_dataset, **options)

    return Trainer


def train_in_float32(model: PreTrainedModel) -> None:
    """What trains of `model` becomes float32: TRL makes bfloat16 of it over 8-bit weights, too coarse for
    the small steps of fine-tuning."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
