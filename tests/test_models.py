"""Tiny models need no download and are the same every time; loading checks names."""

import copy

import pytest
import torch

from lib import int8, models, runtime


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


def test_sampling_takes_the_trunks_dtype_and_gives_the_weights_back(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    models.set_trainable(model, "top", layers=1)
    output, seen = model.get_output_embeddings(), []
    output.register_forward_hook(lambda *call: seen.append((call[1][0], call[2])))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    values = [p.detach().clone() for p in model.parameters()]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def logits():
        with torch.inference_mode():
            return model(input_ids=ids, logits_to_keep=1).logits

    plain = logits()
    with models.for_sampling(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        fast = logits()
    assert [call[1].dtype for call in seen] == [torch.float32, torch.bfloat16]
    assert [call[0].is_contiguous() for call in seen] == [False, True]
    bound = 2**-7 * plain.abs().max()  # two roundings of bfloat16
    torch.testing.assert_close(fast.float(), plain, atol=float(bound), rtol=0)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(map(torch.equal, values, model.parameters()))
    with pytest.raises(RuntimeError, match="in between"), models.for_sampling(model):
        raise RuntimeError("in between")
    assert all(map(torch.equal, values, model.parameters())) and not output._forward_pre_hooks
    monkeypatch.setenv("LIB_PLAIN", "1")
    with models.for_sampling(model):
        assert torch.equal(logits(), plain)


def test_packed_weights_give_the_same_numbers(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def packed():
        return sum("forward" in vars(module) for module in linear)

    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with models.packed(model):
            usable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            assert packed() == (len(linear) if usable else 0)
            assert torch.equal(model(input_ids=ids).logits, plain)
            with models.packed(model):
                pass  # an inner one takes nothing away
            assert packed() == (len(linear) if usable else 0)
    assert packed() == 0
    with pytest.raises(RuntimeError, match="in between"), models.packed(model):
        raise RuntimeError("in between")
    assert packed() == 0
    with monkeypatch.context() as without:  # a build of torch without oneDNN
        without.setattr(torch.ops, "mkldnn", object())
        with models.packed(model):
            assert packed() == 0
    high = copy.deepcopy(model).float()
    with models.packed(high):
        assert not any("forward" in vars(m) for m in high.modules())
    monkeypatch.setattr(models, "PACKED_BYTES", 100)
    with models.packed(model):
        assert packed() == 0
    monkeypatch.undo()
    monkeypatch.setenv("LIB_PLAIN", "1")
    with models.packed(model):
        assert packed() == 0


def test_eight_bits_need_bitsandbytes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(int8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="eight_bit=True needs bitsandbytes, which is not installed"
    ):
        models.load_policy(saved(tiny, tmp_path), eight_bit=True)
    assert not models.has_eight_bit()


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


def test_fast_float32_is_float32(monkeypatch):
    wide = torch.nn.Sequential(torch.nn.Linear(300, 600), torch.nn.GELU(), torch.nn.Linear(600, 7))
    inputs, found = torch.randn(50, 300), {}
    for plain in ("0", "1"):
        monkeypatch.setenv("LIB_PLAIN", plain)
        wide.zero_grad()
        with models.fast_float32(wide):
            used = torch.get_float32_matmul_precision()
            out = wide(inputs)
            out.square().sum().backward()
        assert used == ("medium" if plain == "0" and runtime.medium_is_exact() else "highest")
        assert torch.get_float32_matmul_precision() == "highest"
        found[plain] = [out.detach(), *(p.grad.clone() for p in wide.parameters())]
    for fast, slow in zip(found["0"], found["1"], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))


def test_fast_float32_leaves_small_models_and_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(runtime, "medium_is_exact", lambda: True)
    with models.fast_float32(models.build_tiny_model("tiny")[0]):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), models.fast_float32(torch.nn.Linear(400, 400)):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_asking_for_the_precision_draws_no_random_number():
    runtime.medium_is_exact.cache_clear()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    assert runtime.medium_is_exact() in (True, False) and torch.rand(1) == wanted
