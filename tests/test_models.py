"""Tiny models need no download and are the same every time; loading checks names."""

import pytest
import torch

from lib import hub, int8, models, reward_models
from lib.course import assets


def test_tiny_models_are_reproducible_and_leave_the_global_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, _ = models.build_tiny_model("tiny")
    assert torch.equal(torch.rand(1), expected)
    second, _ = models.build_tiny_model("tiny")
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_tiny_tokenizer_round_trip_and_chat():
    _, tokenizer = models.build_tiny_model("tiny", words=["you", "are", "kind", "."])
    ids = tokenizer("you are kind .")["input_ids"]
    assert tokenizer.decode(ids) == "you are kind ."
    assert tokenizer("unknown")["input_ids"] == [tokenizer.unk_token_id]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "you are"}], tokenize=False, add_generation_prompt=True
    )
    names = tokenizer.convert_ids_to_tokens(tokenizer(chat)["input_ids"])
    assert names == ["<user>", "you", "are", "<assistant>"]


def test_sample_words_cover_the_sample_texts():
    words = models.sample_words()
    assert len(words) > 100
    assert all(word.strip() == word and word for word in words)


@pytest.mark.parametrize("name", models.TINY_MODELS)
def test_load_policy_gives_eval_mode_and_left_padding(name):
    model, tokenizer = models.load_policy(name)
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert models.count_parameters(model)["total"] < 300_000


def test_an_asset_is_not_downloaded_to_check_its_name(monkeypatch):
    """At demo an annotator's replies are stored: naming it must not fetch its 1.6 GB."""
    monkeypatch.setattr(assets, "fetch", lambda name: 1 / 0)
    assert [models.check_name(name) for name in hub.MODEL_ASSETS] == [*hub.MODEL_ASSETS]
    with pytest.raises(ValueError, match="has no revisions"):
        models.check_name("policy@main")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown tiny model 'small'"):
        models.build_tiny_model("small")
    with pytest.raises(ValueError, match="policy"):
        models.load_policy("no-such-model")


def test_policy_loads_and_speaks(policy):
    model, tokenizer = policy
    assert models.count_parameters(model)["total"] == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    best = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


# --- 8 bits --------------------------------------------------------------------------------------


def saved(tiny, folder):
    model, tokenizer = tiny
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("load", [models.load_policy, reward_models.load_backbone])
def test_eight_bits_need_bitsandbytes(load, tiny, tmp_path, monkeypatch):
    """And say so before a model is downloaded."""
    folder = saved(tiny, tmp_path)
    monkeypatch.setattr(int8.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(models.hub, "resolve_model")
    with pytest.raises(
        ValueError, match="eight_bit=True needs bitsandbytes, which is not installed"
    ):
        load(folder, eight_bit=True)


def test_a_model_in_eight_bits_trains_adapters_only(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, _ = models.load_policy(saved(tiny, tmp_path), eight_bit=True)
    assert models.is_eight_bit(model)
    with pytest.raises(
        ValueError, match="train is 'top'; a model in 8 bits trains with 'lora' only"
    ):
        models.set_trainable(model, "top", layers=1)
    models.set_trainable(model, "lora", layers=1)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and d == torch.float32 for n, d in trained.items())
