"""The value function that PPO trains beside a policy, as one thing that can be kept and go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

HEAD, MODEL = "value_head.safetensors", "value_model"  # a file and a folder beside the policy


@dataclass
class ValueFunction:
    """A head that reads values from the policy's states, or from those of a model of its own."""

    head: torch.nn.Module
    model: PreTrainedModel | None = None


def make_head(width: int) -> torch.nn.Module:
    """State (..., width) -> value (..., 1); starts at 0 everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [torch.nn.LayerNorm(width, elementwise_affine=False), torch.nn.Linear(width, width)]
        last = torch.nn.Linear(width, 1)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(*inner, torch.nn.GELU(), last)


def write(value: ValueFunction, folder: Path) -> None:
    """Write a value function into the folder of its policy."""
    save_file(value.head.state_dict(), folder / HEAD)
    if value.model is not None:
        value.model.save_pretrained(folder / MODEL)


def read(folder: Path, load_model: Callable[[Path], PreTrainedModel]) -> ValueFunction | None:
    """What `write` wrote, or None where a folder holds no value function; `load_model` loads its model."""
    if not (folder / HEAD).exists():
        return None
    state = load_file(folder / HEAD)
    head = make_head(state["1.weight"].shape[1])
    head.load_state_dict(state)
    return ValueFunction(head, load_model(folder / MODEL) if (folder / MODEL).is_dir() else None)
