"""Tiny repositories: the classes and conventions of the real ones, and the library loads them."""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lib import classifiers, generation, models, reward_models
from rehearsal import models as tiny
from rehearsal.hub import Hub

TRLX = "CarperAI/openai_summarize_tldr_rm_checkpoint"
BUILT = (
    "openai-community/gpt2-large",
    "bigscience/bloomz-3b",
    "allenai/longformer-base-4096",
    "google-t5/t5-large",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "EleutherAI/gpt-j-6b",
    TRLX,
)
ODD = "Ünïcode ☃, {braces} and 12345 numbers;  two  spaces"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny.build(folder, BUILT)
    return folder


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    server = Hub(root)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    yield server
    server.close()


def files(root, name):
    return {
        p.relative_to(root / "models" / name).as_posix()
        for p in (root / "models" / name).rglob("*")
    }


def test_forms_are_those_of_the_real_repositories(root):
    longformer = files(root, "allenai/longformer-base-4096")
    assert "pytorch_model.bin" in longformer and "tokenizer_config.json" not in longformer
    assert not [name for name in longformer if name.endswith(".safetensors")]
    mistral = files(root, "mistralai/Mistral-7B-Instruct-v0.1")
    assert len([name for name in mistral if name.endswith(".safetensors")]) >= 2
    assert "model.safetensors.index.json" in mistral
    assert files(root, TRLX) == {".hub.json", "pytorch_model.bin"}


def test_special_tokens_and_templates_are_those_of_the_real_ones(root):
    def tokenizer(name):
        return AutoTokenizer.from_pretrained(root / "models" / name)

    plain = tokenizer("openai-community/gpt2-large")
    assert plain.pad_token is None and plain.chat_template is None
    assert plain.eos_token_id == len(plain) - 1  # the end closes the vocabulary
    assert tokenizer("bigscience/bloomz-3b").pad_token_id == 3
    assert tokenizer("google-t5/t5-large")("a")["input_ids"][-1] == 1
    base, chat = (tokenizer(f"meta-llama/Llama-3.1-8B{kind}") for kind in ("", "-Instruct"))
    assert base.chat_template is None and base.eos_token == "<|end_of_text|>"
    assert chat.eos_token == "<|eot_id|>" and chat("a")["input_ids"][0] == chat.bos_token_id
    mistral = tokenizer("mistralai/Mistral-7B-Instruct-v0.1")
    asked = [{"role": "user", "content": "Hi"}]
    assert mistral.apply_chat_template(asked, tokenize=False) == "<s>[INST] Hi [/INST]"
    with pytest.raises(Exception, match="Only user and assistant roles"):
        mistral.apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)


def test_byte_tokenizers_lose_nothing_and_t5_loses_what_the_real_one_loses(root):
    for name in ("openai-community/gpt2-large", "mistralai/Mistral-7B-Instruct-v0.1"):
        tokenizer = AutoTokenizer.from_pretrained(root / "models" / name)
        ids = tokenizer(ODD, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == ODD, name
    tokenizer = AutoTokenizer.from_pretrained(root / "models" / "google-t5/t5-large")
    assert tokenizer.unk_token_id in tokenizer("{braces}")["input_ids"]


def test_depth_is_that_of_the_real_models(root):
    depths = {
        "openai-community/gpt2-large": 36,
        "google-t5/t5-large": 24,
        "bigscience/bloomz-3b": 30,
    }
    depths |= {"allenai/longformer-base-4096": 12, "meta-llama/Llama-3.1-8B": 32}
    for name, depth in depths.items():
        assert AutoConfig.from_pretrained(root / "models" / name).num_hidden_layers == depth, name


def test_the_library_loads_policies_encoders_and_the_trlx_reward_model(hub):
    for name in ("mistralai/Mistral-7B-Instruct-v0.1", "google-t5/t5-large"):
        policy, tokenizer = models.load_policy(name, dtype=torch.float32)
        samples = generation.sample(policy, tokenizer, ["Hello there"], max_new_tokens=3, seed=0)
        assert len(samples.texts) == 1
    backbone, _ = reward_models.load_backbone("allenai/longformer-base-4096")
    assert backbone.config.model_type == "longformer"
    model, _ = classifiers.load_classifier(TRLX)
    assert type(model).__name__ == "GPTJForSequenceClassification"
    repositories = tiny.KNOWN["repositories"].values()
    unwanted = {file for known in repositories for file in known.get("beside", ())}
    assert not [file for file in hub.files if file.split("/", 2)[2] in unwanted]


def test_what_is_built_is_not_built_again(root):
    path = root / "models" / "openai-community/gpt2-large" / "config.json"
    before = path.stat().st_mtime_ns
    tiny.build(root, ["openai-community/gpt2-large"])
    assert path.stat().st_mtime_ns == before
    (path.parent / ".hub.json").write_text('{"gated": false, "source": "older"}')
    tiny.build(root, ["openai-community/gpt2-large"])
    assert path.stat().st_mtime_ns != before
