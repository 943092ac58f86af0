"""Short trainings of each kind for tests/test_processes.py: in its process, and launched in two.

Every one has a batch that two processes cannot halve: an odd number of rows, of prompts, or of one alone.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import save_file

from lib import models, ppo, processes, reward_models, rewards, rloo, sft
from lib.papers.alt import conditions, critics, labels, loop
from lib.papers.fine_grained import models as fine_grained

WORDS = ["a", "b", "c", "d", "yes", "no", "."]
PROMPTS = [f"{x} {y}" for x in WORDS for y in WORDS]


def tiny(kind="tiny", **options):
    return models.build_tiny_model(kind, words=WORDS, **options)


def state_of(model) -> dict:
    return {n: p.detach().clone().contiguous() for n, p in model.named_parameters()}


# --- the trainings ---------------------------------------------------------------------------------


def share_of_yes(samples):
    both = zip(samples.texts, samples.response_ids, strict=True)
    return {"yes": [text.split().count("yes") / len(ids) for text, ids in both]}


def train_rl(trainer, folder, reward=share_of_yes):
    """Two prompts a process; three held-out ones; forward passes of three rows, so the last has one."""
    model, tokenizer = tiny()
    config = ppo.PPOConfig(
        steps=3, prompts_per_step=4, samples_per_prompt=2, max_new_tokens=6, train="all", eval_every=2,
        minibatch_size=4, epochs=2, forward_rows=3, learning_rate=1e-3, checkpoint_every=2,
        whiten_rewards=True,
    )  # fmt: skip
    options = {"held_out": PROMPTS[:3], "folder": folder}
    history = trainer(model, tokenizer, PROMPTS, reward, config, **options)
    return history.drop(columns=[c for c in history if c.startswith("seconds_")]), model


def make(kind):
    """A tiny model; tied: whose output layer is its embeddings; lora: of which adapters learn."""
    model, tokenizer = tiny("tiny" if kind in ("tied", "lora") else kind)
    torch.manual_seed(0)  # whatever ran in this process before
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model = type(model)(model.config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    if kind == "lora":
        models.set_trainable(model, "lora", layers=1, lora_rank=2)
    return model, tokenizer


def train_sft(kind, folder, rows_at_once=6):
    """Eleven rows of different lengths, six an optimizer step, so that the second of an epoch has five."""
    model, tokenizer = make(kind)
    prompts = [PROMPTS[3 * i] for i in range(11)]
    answers = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 3]) for i in range(11)]
    rows = sft.encode_completions(tokenizer, prompts, answers)
    history = sft.train_sft(
        model, tokenizer, rows, held_out=rows[:3], folder=folder, learning_rate=1e-2, save_steps=3,
        num_train_epochs=4, per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=6 // rows_at_once,
    )  # fmt: skip
    return history, model


def ranked(kind):
    """Five prompts of three or four responses: two a batch, so that the last batch has one."""
    rng = np.random.default_rng(0)
    prompts, responses, group = [], [], []
    for number in range(5):
        for good in range(3 + number % 2):
            prompts.append(PROMPTS[number])
            responses.append(" ".join(rng.permutation(["yes"] * good + ["no"] * (4 - good))))
            group.append(number)
    group = np.array(group)
    places = range(len(group))
    if kind == "ratings":
        targets = np.array([r.count("yes") / 4 for r in responses], dtype=np.float32)
        return reward_models.Feedback(prompts, responses, group, targets)
    pairs = [(i, j) for i in places for j in places if group[i] == group[j] and i > j]
    return reward_models.Feedback(prompts, responses, group, pairs=np.array(pairs))


def train_reward_model(kind, folder):
    torch.manual_seed(0)
    model = reward_models.RewardModel(*_body())
    config = reward_models.TrainConfig(
        epochs=2, prompts_per_batch=2, prompts_in_memory=1, learning_rate=1e-2
    )
    feedback = ranked(kind)

    def validate():
        return float(model.score(feedback.prompts, feedback.responses).std())

    history = reward_models.train(model, feedback, config, validate=validate, folder=folder)
    return history, model


def _body():
    model, tokenizer = tiny()
    return model.base_model.requires_grad_(True), tokenizer


def train_on_segments(folder):
    """Sentences with known and unknown labels; prompts have one to three of them."""
    model = fine_grained.FineGrainedModel(*_body(), unit="sentence", relations=False)
    responses = ["yes a .", "no b . yes c .", "no d . a no . yes b .", "yes . no .", "c no ."]
    counts = [len(model.segmenter.spans(text)) for text in responses]
    row = np.repeat(np.arange(5), counts)
    known = np.arange(len(row)) % 4 != 3
    labels_ = np.where(known, np.arange(len(row)) % 2, np.nan)
    feedback = fine_grained.SegmentFeedback(
        PROMPTS[:5], responses, np.arange(5), labels=labels_, row=row
    )
    config = reward_models.TrainConfig(epochs=2, prompts_per_batch=2, learning_rate=1e-2)
    return fine_grained.fit(model, feedback, config, folder=folder), model


def train_conditional(folder):
    """Five rows an optimizer step, two at once; three held-out prompts, one that chooses the weights."""
    model, tokenizer = tiny()
    tags = ("good", "bad")
    first = conditions.add_tokens(model, len(tags))
    conditioner = conditions.Conditioner(tokenizer, "token", tokens=tags, first_id=first)
    task = loop.Task(
        PROMPTS[:5], critics.scored(_yes), labels.Quantiles(tags), conditioner,
        held_out=PROMPTS[5:8], judge=_yes, validation=PROMPTS[8:9],
    )  # fmt: skip
    config = loop.ConditioningConfig(
        iterations=2, samples_per_prompt=2, max_new_tokens=6, steps=4, batch_size=5, forward_rows=2,
        check_every=2, eval_samples=2, learning_rate=1e-3,
    )  # fmt: skip
    learner = loop.make_learner(model, tokenizer, config)
    result = loop.train(learner, task, folder=folder)
    history = result.history.drop(columns=[c for c in result.history if c.startswith("seconds_")])
    scores = result.evaluation[["nll", "score"]].astype(float).add_prefix("held out/")
    checks = pd.DataFrame(learner.checks).add_prefix("check/")
    return pd.concat([history, scores, checks], axis=1), model


def _yes(prompts, responses):
    return [float(response.split().count("yes")) for response in responses]


TRAININGS = {
    "SFT": partial(train_sft, "tiny"),
    "SFT of an encoder-decoder": partial(train_sft, "tiny-encoder-decoder"),
    "SFT of tied embeddings": partial(train_sft, "tied"),
    "SFT of adapters": partial(train_sft, "lora"),
    "ratings": partial(train_reward_model, "ratings"),
    "pairs": partial(train_reward_model, "pairs"),
    "segments": train_on_segments,
    "PPO": partial(train_rl, ppo.train_ppo),
    "shuffled PPO": partial(train_rl, ppo.train_ppo, reward=rewards.shuffled(share_of_yes)),
    "RLOO": partial(train_rl, rloo.train_rloo),
    "conditioning": train_conditional,
}


# --- the program -----------------------------------------------------------------------------------


def main(out, names, die_at=None) -> None:
    """Train each and write `<name>.csv` and `<name>.safetensors` into `out`; see `dies` for `die_at`."""
    if os.environ.get("AS_ON_GPUS"):
        shard_on_processors()
    processes.begin(torch.device("cpu"))
    assert processes.world() == 2, processes.world()
    if die_at:
        dies(int(die_at))
    for name in names:
        history, model = TRAININGS[name](Path(out) / "runs" / name)
        if processes.is_main():
            history.to_csv(Path(out) / f"{name}.csv", index=False)
            save_file(state_of(model), Path(out) / f"{name}.safetensors")
        processes.wait()


def shard_on_processors() -> None:
    """Let accelerate make shards here: torch can, over gloo, and accelerate asks for GPUs."""
    real = PartialState.__init__

    def as_on_gpus(self, *arguments, **options):
        real(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus


def dies(step: int) -> None:
    """Kill each process, as the system would, in this step of SFT."""
    from transformers import Trainer

    real = Trainer.training_step

    def killing(self, *arguments, **options):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments, **options)

    Trainer.training_step = killing


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), *sys.argv[3:])
