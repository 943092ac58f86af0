"""LoRA adapters (Hu et al. 2021) through transformers' own integration of peft, so that they can be kept.

Adapters that transformers knows of are saved by `save_pretrained` as `adapter_config.json` and
`adapter_model.safetensors`, and plain transformers and peft load them.  A weight W becomes
W + (alpha / rank) B A; here alpha = rank, no dropout, A random by a fixed seed and B = 0 at the start.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib import int8, runtime

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's name for the one adapter that a model has here
PREFIX = "base_model.model."  # of every name in peft's files


def is_folder(folder: Path) -> bool:
    """Whether a folder holds adapters without the model they belong to."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def adapted_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that carry an adapter, by name; none where there is no adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def lora_config(model: PreTrainedModel, layers: torch.nn.ModuleList, rank: int):
    """A `peft.LoraConfig` for every linear map of the given layers: alpha = rank, no dropout.

    Raises ValueError for a model that carries adapters already.
    """
    from peft import LoraConfig

    if adapted_layers(model):
        raise ValueError(
            "this model carries adapters already, of another size or in other layers. Load it again for a "
            "new run, or put them into its weights with adapters.merge(model)."
        )
    names = _linear_maps(model, layers)
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)


def _linear_maps(model: PreTrainedModel, layers: torch.nn.ModuleList) -> list[str]:
    """Names in `model` of the linear maps of `layers`; one that carries an adapter counts as one map."""
    inside, adapted = set(layers.modules()), adapted_layers(model)
    names = []
    for name, module in model.named_modules():
        part_of_adapter = any(name.startswith(f"{layer}.") for layer in adapted)
        linear = name in adapted or isinstance(module, (torch.nn.Linear, Conv1D))
        if module in inside and linear and not part_of_adapter:
            names.append(name)
    return names


def add(model: PreTrainedModel, layers: torch.nn.ModuleList, rank: int) -> None:
    """Let adapters of `rank` in `layers` train, and nothing else; those that are there already go on."""
    present = adapted_layers(model)
    ranks = {layer.r[NAME] for layer in present.values()}
    model.requires_grad_(False)
    if ranks == {rank} and set(present) == set(_linear_maps(model, layers)):
        for layer in present.values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        return
    config = lora_config(model, layers, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(config)


def attach(model: PreTrainedModel, folder: Path) -> None:
    """Put a folder's adapters on the model they were trained over, in float32, frozen.

    Raises ValueError where they do not fit this model, or are not LoRA's.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise ValueError(
            f"{folder} holds adapters of the kind {config.peft_type}; only LoRA's are loaded here. Merge "
            "them into their model with peft, save that, and load it."
        )
    # what trained whole, such as a classifier's head, is set by `load_state`
    config.modules_to_save = None
    try:
        model.add_adapter(config)
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"the adapters in {folder} do not fit {type(model).__name__} ({why}). Name the model they were "
            "trained over with base=..."
        ) from None
    for layer in adapted_layers(model).values():
        layer.lora_A.float()
        layer.lora_B.float()
    load_state(model, folder)
    model.requires_grad_(False)


def load_state(model: PreTrainedModel, folder: Path | str) -> None:
    """Set a model's adapters, and layers that trained whole beside them, to what a folder holds.

    Raises ValueError where names or sizes differ.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise ValueError(f"{folder} has {CONFIG} and no {WEIGHTS}: it is not whole. Save it again.")
    state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    whole = {name: state.pop(name) for name in [*state] if "lora_" not in name}
    try:
        outcome = set_peft_model_state_dict(model, state, adapter_name=NAME)
        unknown = model.load_state_dict(whole, strict=False).unexpected_keys
    except RuntimeError as error:  # another size
        differing = [str(error).splitlines()[-1].strip()]
    else:
        missing = [name for name in outcome.missing_keys if "lora_" in name]
        differing = [*outcome.unexpected_keys, *missing, *unknown]
    if differing:
        raise ValueError(
            f"the adapters in {folder} belong to another model than {type(model).__name__}: "
            f"{differing[0]}. Name the model they were trained over with base=..."
        )


def merge(model: PreTrainedModel) -> None:
    """Put the adapters into the weights they lie on, in place, so that anything can train next.

    Raises ValueError for a model in 8 bits, whose weights would be rounded again.
    """
    if int8.is_eight_bit(model):
        raise ValueError(
            "adapters over 8-bit weights are not merged: the sum would be rounded. Load the model with "
            "eight_bit=False first."
        )
    for name, layer in adapted_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of the model without its adapters, under the names it has without them."""
    state = model.state_dict()
    return {n.replace(".base_layer.", "."): x for n, x in state.items() if ".lora_" not in n}


def adopt(model: PreTrainedModel) -> None:
    """Tell transformers of adapters that a trainer put on `model` through peft, so that they are saved."""
    if adapted_layers(model):
        model._hf_peft_config_loaded = True


def rename_base(folder: Path, name: str) -> None:
    """Write into a saved adapter where plain peft finds the model it belongs to."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    runtime.write_atomic(folder / CONFIG, runtime.to_json(config))
