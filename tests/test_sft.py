"""Supervised fine-tuning: which tokens carry loss, what truncation does, learning, resuming."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from lib import models, policy, sft

WORDS = ["a", "b", "c", "d", "yes", "no", "."]


@pytest.fixture(scope="module")
def toy():
    return models.build_tiny_model("tiny", words=WORDS)


@pytest.fixture(scope="module")
def toy_seq2seq():
    return models.build_tiny_model("tiny-encoder-decoder", words=WORDS)


def marked(tokenizer, row):
    """The row's tokens, those with loss in brackets."""
    shown = sft.loss_tokens(tokenizer, row).itertuples()
    return " ".join(f"[{r.token}]" if r.loss else r.token for r in shown)


def test_loss_falls_on_the_completion_and_one_end_token(toy):
    tokenizer = toy[1]
    rows = sft.encode_completions(tokenizer, ["a b", "c"], ["yes .", "no <eos>"])
    assert marked(tokenizer, rows[0]) == "a b [yes] [.] [<eos>]"
    assert marked(tokenizer, rows[1]) == "c [no] [<eos>]"  # not a second end token
    assert [label for label in rows[0]["labels"] if label != sft.NO_LOSS] == rows[0]["input_ids"][
        2:
    ]


def test_loss_falls_on_every_turn_of_the_assistant(toy):
    tokenizer = toy[1]
    turns = [("user", "a b"), ("assistant", "yes ."), ("user", "c"), ("assistant", "no")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    row = sft.encode_conversations(tokenizer, [conversation])[0]
    expected = "<user> a b <assistant> [yes] [.] <user> c <assistant> [no] [<eos>]"
    assert marked(tokenizer, row) == expected
    open_ended = sft.encode_conversations(tokenizer, [conversation[:3]])[0]
    assert marked(tokenizer, open_ended) == "<user> a b <assistant> [yes] [.] <user> c"


def test_end_of_turn_token_of_chatml_carries_loss_and_is_not_doubled():
    """With a tokenizer that keeps blanks and line ends: the one after the end token has no loss."""
    pieces = ["<pad>", "<eos>", "user", "assistant", "a", "yes", "no", " ", "\n", ":"]
    core = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    core.pre_tokenizer = Split(Regex("[ \n:]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "yes no"), ("user", "a"), ("assistant", "no")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    table = sft.loss_tokens(tokenizer, sft.encode_conversations(tokenizer, [conversation])[0])
    assert "".join(table["token"]) == tokenizer.apply_chat_template(conversation, tokenize=False)
    spoken = ["yes", " ", "no", "<eos>", "no", "<eos>"]
    assert table[table["loss"]]["token"].tolist() == spoken


def test_turns_that_cannot_be_located_are_refused(toy):
    tokenizer = copy.deepcopy(toy[1])
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match="conversation 0: the assistant's turn 0"):
        sft.encode_conversations(tokenizer, [conversation[::-1]])
    tokenizer.chat_template = "{{ messages | length }} a {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="only appends as turns are added"):
        sft.encode_conversations(tokenizer, [conversation])


def test_the_trainer_sees_these_labels(toy, tmp_path):
    """What SFTTrainer feeds the model is our rows, padded without loss: nothing added, nothing lost."""
    model, tokenizer = toy
    rows = sft.encode_completions(tokenizer, ["a b c", "d"], ["yes", "no ."])
    dataset, truncated = sft._cut(model, rows, max_length=512)
    trainer = sft._trainer(
        model, tokenizer, dataset, None, output_dir=str(tmp_path), save_strategy="no"
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    pad = tokenizer.pad_token_id
    second = rows[1]["input_ids"]
    assert truncated == 0
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"], second + [pad] * (5 - len(second))]
    assert batch["labels"].tolist()[1] == rows[1]["labels"] + [sft.NO_LOSS] * (5 - len(second))


def test_loss_is_the_mean_over_completion_tokens(toy):
    model, tokenizer = copy.deepcopy(toy[0]), toy[1]
    rows = sft.encode_completions(tokenizer, ["a b"], ["yes ."])
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)
    expected = -sum(log_probs[0, t - 1, ids[0, t]].item() for t in (2, 3, 4)) / 3
    history = sft.train_sft(model, tokenizer, rows, max_steps=1, learning_rate=1e-3)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-4)


def test_the_fast_path_gives_the_plain_losses_and_leaves_the_model_as_it_was(monkeypatch):
    prompts, answers = ["a b c d a b", "c", "d d"], ["yes", "no . yes", "."]
    losses = {}
    for plain in ("1", "0"):
        monkeypatch.setenv("LIB_PLAIN", plain)
        model, tokenizer = models.build_tiny_model("tiny", words=WORDS, seed=1)
        frozen = models.set_trainable(model, "top", layers=1)
        before = model.forward
        rows = sft.encode_completions(tokenizer, prompts, answers)
        history = sft.train_sft(model, tokenizer, rows, num_train_epochs=3, learning_rate=1e-2)
        losses[plain] = history.loss.to_numpy()
        assert model.forward == before
        ids = torch.tensor([[1, 2, 3]])
        logits, _ = policy.SharedTrunkPolicy(model, frozen)(
            policy.TokenBatch(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
        )
        assert logits.shape == (3, len(tokenizer))
    assert losses["0"] == pytest.approx(losses["1"], abs=1e-4)


def test_a_frozen_trunk_keeps_its_dtype(toy):
    model = copy.deepcopy(toy[0]).to(torch.bfloat16)
    models.set_trainable(model, "top", layers=1)
    rows = sft.encode_completions(toy[1], ["a b", "c"], ["yes", "no"])
    history = sft.train_sft(model, toy[1], rows, num_train_epochs=20, learning_rate=1e-2)
    dtypes = [next(layer.parameters()).dtype for layer in models.decoder_layers(model)]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_truncation_is_counted_and_silent_examples_are_refused(toy):
    model, tokenizer = copy.deepcopy(toy[0]), toy[1]
    rows = sft.encode_completions(tokenizer, ["a b", "c"], ["yes no .", "no"])
    history = sft.train_sft(model, tokenizer, rows, max_length=4, max_steps=1)
    assert history.attrs["truncated"] == 1
    with pytest.raises(
        ValueError, match="1 of 2 examples .first: number 0. have no token with loss"
    ):
        sft.train_sft(model, tokenizer, rows, max_length=2, max_steps=1)


def test_a_decoder_learns_its_completions(toy):
    model, tokenizer = copy.deepcopy(toy[0]), toy[1]
    rows = sft.encode_completions(tokenizer, ["a", "b"] * 8, ["yes .", "no ."] * 8)
    history = sft.train_sft(
        model, tokenizer, rows, held_out=rows[:2], num_train_epochs=10, learning_rate=1e-2
    )
    assert history["held_out_loss"].dropna().iloc[-1] < 0.1 < history["loss"][0]
    assert not model.training
    with torch.no_grad():
        answer = model(torch.tensor([tokenizer("b")["input_ids"]])).logits[0, -1].argmax()
    assert tokenizer.decode([answer]) == "no"


def test_an_encoder_decoder_learns_its_completions(toy_seq2seq):
    model, tokenizer = copy.deepcopy(toy_seq2seq[0]), toy_seq2seq[1]
    rows = sft.encode_completions(tokenizer, ["a", "b"] * 8, ["yes .", "no ."] * 8)
    history = sft.train_sft(model, tokenizer, rows, num_train_epochs=15, learning_rate=1e-2)
    assert history["loss"].iloc[-1] < 0.2 < history["loss"][0]


def train_toy(folder, train="all"):
    """Eight steps on sixteen rows, with a checkpoint every second step."""
    model, tokenizer = models.build_tiny_model("tiny", words=["a", "b", "yes", "no"])
    models.set_trainable(model, train, layers=1)
    prompts, answers = ["a", "b", "a b", "b a"] * 4, ["yes", "no", "no", "yes"] * 4
    rows = sft.encode_completions(tokenizer, prompts, answers)
    settings = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    return sft.train_sft(model, tokenizer, rows, folder=folder, save_steps=2, **settings)


KILLED_RUN = """
import os, signal, sys
from transformers import Trainer
from tests import test_sft

step = Trainer.training_step
def killing_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = killing_step
test_sft.train_toy(*sys.argv[1:])
"""


@pytest.mark.parametrize("train", ["all", "lora"])  # transformers alone cannot read adapters back
def test_a_killed_run_continues_to_the_same_history(tmp_path, train):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed"), train]
    killed = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed" / "checkpoint-4").exists()
    resumed, whole = (train_toy(tmp_path / name, train) for name in ("killed", "whole"))
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-5)
    on_disk = pd.read_csv(tmp_path / "killed" / "history.csv")
    on_disk = on_disk.reindex(columns=list(resumed))
    pd.testing.assert_frame_equal(on_disk, resumed, check_dtype=False)
    assert len(whole) == 8


def test_a_folder_of_another_run_is_refused(toy, tmp_path):
    model, tokenizer = copy.deepcopy(toy[0]), toy[1]
    rows = sft.encode_completions(tokenizer, ["a"], ["yes"])
    sft.train_sft(model, tokenizer, rows, folder=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        sft.train_sft(model, tokenizer, rows, folder=tmp_path, max_steps=2)


def test_the_precision_of_a_trainer_ends_with_it(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    Accelerator(cpu=True)
    with sft.own_precision():
        AcceleratorState._reset_state()
        inner = Accelerator(cpu=True, mixed_precision="bf16")
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        assert inner.mixed_precision == "bf16"
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert Accelerator(cpu=True).mixed_precision == "no"
