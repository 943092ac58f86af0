"""Names of models, and their files: folders, a Hub on loopback, pickled weights that run no code."""

import ast
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from transformers import AutoModelForCausalLM, PreTrainedModel

from lib import hub, models
from lib.course import assets
from lib.course.assets import AssetError
from rehearsal.hub import Hub, Revision


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the course's own."""
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path, cache, monkeypatch):
    """A Hub on loopback that serves the models in `tmp_path / "hub" / "models"`."""
    server = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


def write_model(folder: Path, seed: int = 0, pickled: bool = False) -> PreTrainedModel:
    """A tiny model with its tokenizer in `folder`, pickled as it was usual before safetensors."""
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def same_weights(left, right) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x.float(), y.float()) for (a, x), (b, y) in pairs)


# --- names ---------------------------------------------------------------------------------------


def test_a_name_holds_revision_and_label():
    assert hub.parse_name("a/b") == hub.ModelName("a/b")
    assert hub.parse_name("a/b@refs/pr/1") == hub.ModelName("a/b", "refs/pr/1")
    assert hub.parse_name("a/b@v1#not toxic") == hub.ModelName("a/b", "v1", "not toxic")
    assert hub.parse_name("a/b#x", revision="v1") == hub.ModelName("a/b", "v1", "x")
    with pytest.raises(ValueError, match="named 'a/b@v1' and revision is 'v2'"):
        hub.parse_name("a/b@v1", revision="v2")
    with pytest.raises(ValueError, match="no model is named"):
        hub.parse_name("")


def test_a_folder_with_such_signs_in_its_name_is_taken_whole(tmp_path):
    folder = tmp_path / "run@2#final"
    write_model(folder)
    assert hub.parse_name(folder).name == str(folder)
    assert hub.resolve_model(folder) == folder.resolve()
    assert hub.parse_name(f"{folder}#nice") == hub.ModelName(str(folder), None, "nice")


def test_resolve_model_takes_folders_and_refuses_other_names(tmp_path):
    assert hub.resolve_model(tmp_path) == tmp_path.resolve()
    for name in ("polcy", "a/b/c", "/no/such/folder", "../up"):
        with pytest.raises(ValueError, match="policy, encoder"):
            hub.resolve_model(name)
    with pytest.raises(ValueError, match="asset 'policy' has no revisions"):
        hub.resolve_model("policy@v1")


# --- the Hub -------------------------------------------------------------------------------------


def test_a_revision_is_loaded_wherever_a_model_is_named(served):
    write_model(served.root / "models" / "some" / "model", seed=0)
    other = write_model(served.root / "models" / "some" / "model@v1", seed=1)
    model, _ = models.load_policy("some/model@v1", dtype=torch.float32)
    assert same_weights(model, other)
    assert (
        models.origin_of(model)["revision"]
        == Revision(served.root / "models" / "some" / "model@v1").commit
    )
    again, _ = models.load_policy("some/model", revision="v1", dtype=torch.float32)
    assert same_weights(again, other)
    assert not same_weights(models.load_policy("some/model", dtype=torch.float32)[0], other)


def test_pickled_weights_are_fetched_only_where_there_are_no_others(served):
    write_model(served.root / "models" / "some" / "both")
    (served.root / "models" / "some" / "both" / "pytorch_model.bin").write_bytes(b"never fetched")
    expected = write_model(served.root / "models" / "some" / "pickled", pickled=True)
    models.load_policy("some/both")
    assert "some/both/pytorch_model.bin" not in served.files
    model, _ = models.load_policy("some/pickled", dtype=torch.float32)
    assert same_weights(model, expected)
    assert (
        models.origin_of(model)["revision"]
        == Revision(served.root / "models" / "some" / "pickled").commit
    )


def test_a_tokenizer_from_another_repository_comes_without_its_weights(served):
    bare = served.root / "models" / "some" / "bare"
    write_model(bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    write_model(served.root / "models" / "other" / "words")
    with pytest.raises(ValueError, match="some/bare.*no tokenizer.*tokenizer='namespace/name'"):
        models.load_policy("some/bare")
    _, tokenizer = models.load_policy("some/bare", tokenizer="other/words")
    assert tokenizer("the cat")["input_ids"] == [6, 8]
    assert "other/words/model.safetensors" not in served.files


def test_a_model_that_cannot_be_had_is_refused_in_words(served):
    empty = served.root / "models" / "some" / "empty"
    empty.mkdir(parents=True)
    (empty / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="no safetensors weights and no pytorch_model.bin"):
        hub.resolve_model("some/empty")
    with pytest.raises(AssetError, match="Check the name and the network") as caught:
        hub.resolve_model("some/absent")
    assert "\n" not in str(caught.value)


# --- pickled weights -----------------------------------------------------------------------------


class Evil:
    """What a pickle may do to who opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False])
def test_pickled_weights_are_converted_once(tmp_path, cache, modern):
    folder = tmp_path / "old"
    expected = write_model(folder)
    state = expected.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    first = hub.resolve_model(folder)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert first == hub.resolve_model(folder) and first.is_relative_to(cache)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert not [*first.glob("*.bin")]
    assert same_weights(AutoModelForCausalLM.from_pretrained(first, dtype="auto"), expected)
    assert same_weights(models.load_policy(str(folder), dtype=torch.float32)[0], expected)


def test_whoever_asks_at_once_converts_once(cache):
    made = []

    def make(staging):
        made.append(staging)
        time.sleep(0.05)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: hub.converted("x", make), range(4)))
    assert folders == {cache / "converted" / "x"} and len(made) == 1


def test_tied_weights_and_shards_are_converted(tmp_path, cache):
    model, tokenizer = models.build_tiny_model("tiny", words=WORDS, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = model.state_dict()
    names, places = [*state], {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / shard)
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again, _ = models.load_policy(str(tmp_path), dtype=torch.float32)
    assert same_weights(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, cache):
    folder, trace = tmp_path / "evil", tmp_path / "was run"
    write_model(folder)
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Evil(trace)}, file)
    with pytest.raises(AssetError, match="holds more than tensors.*run its author's code"):
        models.load_policy(str(folder))
    torch.save({"weight": Evil(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(AssetError, match="holds more than tensors"):
        models.load_policy(str(folder))
    assert not trace.exists()
    assert not [*(cache / "converted").glob("evil-*[!k]")]  # no half folder either


def test_what_is_no_state_of_a_model_is_refused(tmp_path, cache):
    for content in ([1, 2], {"epoch": 3}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(AssetError, match="holds no tensor by name"):
            hub.resolve_model(tmp_path)


def test_every_loader_forbids_remote_code():
    """Transformers asks on the terminal, or runs it, where `trust_remote_code` is left open."""
    root = Path(hub.__file__).parent
    open_calls = []
    for path in [*root.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                said = ast.unparse(node)
                if not any(word in said for word in ("SAFE", "options", "trust_remote_code=False")):
                    open_calls.append(f"{path.name}: {said}")
    allowed = ("PeftConfig.from_pretrained", "**source")  # no model's code; the course's own asset
    assert not [call for call in open_calls if not any(word in call for word in allowed)]


def test_assets_are_models_too(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / name)
    assert hub.resolve_model("encoder") == tmp_path / "encoder"
