"""Fine-tuning a model too large for one GPU: weights, gradients and Adam's state in shards (FSDP).

With `FEEDBACK_SHARDS=1` (`python -m lib run NOTEBOOK --processes 4 --shards`) each process holds a share of
what `sft.train_sft` trains, and fetches a layer's weights when it computes with it.  Afterwards every
process has the whole model again, to sample from, so one copy of the weights must fit beside nothing else.
PPO, RLOO and the conditioning loop sample from what they train, and keep it whole.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lib import processes

VARIABLE = "FEEDBACK_SHARDS"
# of transformers.TrainingArguments; a layer is a shard's unit, as the model's class says
ARGUMENTS = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def wanted() -> bool:
    """Whether trainings are in shards: several processes, and `FEEDBACK_SHARDS` set."""
    return os.environ.get(VARIABLE, "") not in ("", "0") and not processes.alone()


@contextlib.contextmanager
def of(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within: what to train in the place of `model`; after: `model` has its weights, whole, on every process.

    Where no shards are wanted it is the model itself.  Raises ValueError for weights in 8 bits, and for
    encoder-decoders, whose two halves share their embeddings.
    """
    if not wanted():
        yield model
        return
    if model.config.is_encoder_decoder or not all(
        p.is_floating_point() for p in model.parameters()
    ):
        raise ValueError(
            f"{VARIABLE} is set; allowed: decoders whose weights are in 16 or 32 bits, not encoder-decoders, "
            "and not 8 bits. Unset it."
        )
    device = model.device
    trained = copy.deepcopy(model.to("cpu"))  # whole in the host's memory, in shards on the GPUs
    yield trained
    with torch.no_grad():
        for whole, part in zip(model.parameters(), trained.parameters(), strict=True):
            whole.copy_(part.full_tensor() if isinstance(part, DTensor) else part)
    model.to(device)


def check(trainer, callbacks) -> None:
    """Raise ValueError where shards are wanted and a trainer makes none, or callbacks look at the model."""
    if not wanted():
        return
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            f"{VARIABLE} is set, and accelerate makes shards on GPUs only. Unset it: on a processor each "
            "process holds the model whole."
        )
    if callbacks:
        raise ValueError(
            f"{VARIABLE} is set, and this training looks at its model as it learns, which no process has "
            "whole. Train it without."
        )
