"""The Hub on loopback, asked by the Hub's own clients."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub as hf
import pytest
import requests
from huggingface_hub import errors

from rehearsal.hub import Hub, Revision

WEIGHTS = bytes(range(256)) * 8


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves one open model with a second revision, a gated model and a data set."""
    model = tmp_path / "root" / "models" / "some" / "model"
    for folder in (model, model.with_name("model@refs%2Fpr%2F1"), model.with_name("secret")):
        (folder / "onnx").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"folder": folder.name}))
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "onnx" / "model.onnx").write_bytes(b"1")
    (model.with_name("secret") / ".hub.json").write_text('{"gated": true}')
    rows = tmp_path / "root" / "datasets" / "some" / "rows"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server = Hub(tmp_path / "root")
    yield server
    server.close()


def download(hub, tmp_path, name, **options):
    options |= {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    return hf.hf_hub_download(name, options.pop("file", "config.json"), **options)


def test_a_snapshot_has_the_files_asked_for_under_their_commit(hub, tmp_path):
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "ignore_patterns": ["*/*"]}
    folder = tmp_path / "cache" / hf.snapshot_download("some/model", **options)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == Revision(hub.root / "models" / "some" / "model").commit
    assert "some/model/onnx/model.onnx" not in hub.files
    before = len(hub.files)
    hf.snapshot_download("some/model", **options)  # nothing changed: nothing is fetched
    assert len(hub.files) == before


def test_a_revision_is_named_or_given_by_its_commit(hub, tmp_path):
    path = download(hub, tmp_path, "some/model", revision="refs/pr/1")
    assert "refs%2Fpr%2F1" in Path(path).read_text()
    commit = Revision(hub.root / "models" / "some" / "model@refs%2Fpr%2F1").commit
    assert download(hub, tmp_path, "some/model", revision=commit) == path
    with pytest.raises(errors.RevisionNotFoundError):
        download(hub, tmp_path, "some/model", revision="v9")


def test_changed_files_are_another_commit(hub):
    folder = hub.root / "models" / "some" / "model"
    before = Revision(folder).commit
    (folder / "config.json").write_text('{"changed": true}')
    assert Revision(folder).commit != before


def test_a_gated_model_wants_the_token(hub, tmp_path):
    for token in (False, "hf_wrong"):
        with pytest.raises(errors.GatedRepoError):
            download(hub, tmp_path, "some/secret", token=token)
    file = "model.safetensors"  # the token goes along to the second address
    path = download(hub, tmp_path, "some/secret", file=file, token=hub.token)
    assert Path(path).read_bytes() == WEIGHTS


def test_what_is_not_there_is_refused_as_the_hub_refuses(hub, tmp_path):
    with pytest.raises(errors.RepositoryNotFoundError):
        download(hub, tmp_path, "some/absent")
    with pytest.raises(errors.EntryNotFoundError):
        download(hub, tmp_path, "some/model", file="absent.json")
    assert not hf.HfApi(hub.url).file_exists("some/model", "absent.json")


def test_large_files_redirect_and_both_kinds_are_served_from_a_byte_on(hub):
    address = f"{hub.url}/some/model/resolve/main/model.safetensors"
    first = requests.head(address)
    assert first.status_code == 302 and first.headers["X-Linked-Size"] == str(len(WEIGHTS))
    rest = requests.get(address, headers={"Range": "bytes=2000-"})
    assert rest.status_code == 206 and rest.content == WEIGHTS[2000:]
    assert requests.get(address, headers={"Range": "bytes=2048-"}).status_code == 416
    small = requests.get(
        f"{hub.url}/some/model/resolve/main/config.json", headers={"Range": "bytes=1-3"}
    )
    assert small.content == b'"fo' and small.headers["Content-Range"].startswith("bytes 1-3/")


def test_a_tree_lists_files_and_folders(hub):
    tree = list(hf.HfApi(hub.url).list_repo_tree("some/model", recursive=True))
    assert {entry.path for entry in tree} == {
        "config.json",
        "model.safetensors",
        "onnx",
        "onnx/model.onnx",
    }
    top = hf.HfApi(hub.url).list_repo_tree("some/model")
    assert {entry.path for entry in top} == {"config.json", "model.safetensors", "onnx"}
    assert hf.HfApi(hub.url).list_repo_refs("some/model").branches[0].name == "main"


def test_datasets_loads_a_table(hub, tmp_path):
    code = "import datasets; print(datasets.load_dataset('some/rows', split='train')['prompt'][:])"
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['one', 'two']", done.stderr
