"""One stage's real peak of memory on the processor, beside what `lib.memory` says.  Run by test_memory.py.

LIB_PLAIN=1 makes it the plain algorithm, which is what runs on a GPU.
"""

import json
import sys

import numpy as np
import psutil
import torch

from lib import generation, memory, models, ppo, reward_models, sft
from lib.papers.alt import conditions, critics, labels, loop

ROWS, PROMPT, RESPONSE, VOCABULARY = 8, 64, 64, 8000


def peak_since(start: int) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 - start


def build(width: int, layers: int, kind: str):
    if kind == "tiny":
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    else:
        sizes = {"d_model": width, "d_ff": 3 * width, "num_layers": layers}
    return models.build_tiny_model(kind, vocab_size=VOCABULARY, **sizes)


def run(stage: str, model, tokenizer) -> memory.Stage:
    prompt = " ".join(["the"] * PROMPT)
    if stage == "sampling":
        rows, few = 16 * ROWS, 8
        generation.sample(model, tokenizer, [prompt] * rows, max_new_tokens=few)
        return memory.sampling(skeleton(model), rows, PROMPT, few)
    if stage == "fine-tuning":
        rows = sft.encode_completions(
            tokenizer, [prompt] * ROWS, [" ".join(["old"] * RESPONSE)] * ROWS
        )
        options = dict(per_device_train_batch_size=ROWS, num_train_epochs=3, max_length=512)
        sft.train_sft(model, tokenizer, rows, **options)
        outline, length = skeleton(model), len(rows[0]["input_ids"])
        if model.config.is_encoder_decoder:
            return memory.fine_tuning(outline, ROWS, length - PROMPT, PROMPT)
        return memory.fine_tuning(outline, ROWS, length)
    if stage == "reward model":
        judge = reward_models.RewardModel(model.base_model, tokenizer)
        texts = [" ".join(["old"] * RESPONSE)] * ROWS
        prompts = [f"{prompt} {'sea' if i % 2 else 'king'}" for i in range(ROWS)]
        targets = np.linspace(0, 1, ROWS, dtype=np.float32)
        feedback = reward_models.Feedback(prompts, texts, np.arange(ROWS), targets)
        config = reward_models.TrainConfig(epochs=3, prompts_per_batch=8)
        reward_models.train(judge, feedback, config)
        return memory.reward_model(skeleton(model).base_model, ROWS, PROMPT + RESPONSE + 2)
    if stage == "conditioning":
        return condition(model, tokenizer, prompt)
    config = ppo.PPOConfig(
        steps=2, prompts_per_step=ROWS, minibatch_size=ROWS, forward_rows=ROWS, epochs=1, train="all",
        max_new_tokens=RESPONSE,
    )  # fmt: skip
    ppo.train_ppo(model, tokenizer, [prompt] * ROWS, lambda s: [1.0] * len(s), config)
    outline = skeleton(model)
    models.set_trainable(outline, "all")
    return memory.ppo(outline, ROWS, PROMPT, RESPONSE, episodes=ROWS)


def condition(model, tokenizer, prompt: str) -> memory.Stage:
    tags, outline = ("good", "bad"), skeleton(model)
    first = conditions.add_tokens(model, len(tags))
    conditioner = conditions.Conditioner(tokenizer, "token", tokens=tags, first_id=first)
    feedback = critics.scored(lambda prompts, texts: [float(i) for i in range(len(texts))])
    task = loop.Task([prompt] * ROWS, feedback, labels.Quantiles(tags), conditioner)
    config = loop.ConditioningConfig(
        iterations=1, steps=2, batch_size=2 * ROWS, forward_rows=ROWS, max_new_tokens=RESPONSE
    )
    loop.train_conditional(model, tokenizer, task, config)
    return memory.conditioning(outline, ROWS, PROMPT + 1, RESPONSE, drawn=ROWS)


def skeleton(model):
    outline = memory.skeleton(model.config)
    return outline.requires_grad_(True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    stage, kind, width, layers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    run(stage, *build(32, 2, kind))  # what is loaded once
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak counts from here
    start = psutil.Process().memory_info().rss
    said = run(stage, *build(width, layers, kind))
    print(json.dumps({"measured": peak_since(start), "said": said.total, "parts": said.parts}))
