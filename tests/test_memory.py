"""The memory model: against measured peaks, against known models, and what fits."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import memory, models
from lib.course import record

PROGRAM = Path(__file__).with_name("memory_peak.py")
CAN_MEASURE = Path("/proc/self/clear_refs").exists()


def skeleton(name, train="all", dtype=torch.float32, **size):
    outline = memory.skeleton(name, dtype)
    models.set_trainable(outline, train, **size)
    return outline


@pytest.mark.skipif(not CAN_MEASURE, reason="peaks of memory are read from /proc")
@pytest.mark.parametrize(
    "stage", ["sampling", "fine-tuning", "reward model", "PPO", "conditioning"]
)
@pytest.mark.parametrize("kind, width, layers", [
    ("tiny", 256, 3), ("tiny", 384, 4), ("tiny", 512, 5), ("tiny-encoder-decoder", 384, 3),
])  # fmt: skip
def test_what_is_said_is_within_a_fifth_of_the_measured_peak(stage, kind, width, layers):
    if kind != "tiny" and stage == "reward model":
        pytest.skip("a reward model reads with an encoder alone")
    done = subprocess.run(
        [sys.executable, PROGRAM, stage, kind, str(width), str(layers)],
        # what is freed goes back to the system, so that the peak is that of what is in use
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "LIB_PLAIN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < peak["said"] / peak["measured"] < 1.2, peak


@pytest.mark.parametrize("name, millions", [
    ("google-t5/t5-large", 738), ("openai-community/gpt2-large", 774), ("EleutherAI/gpt-j-6b", 6051),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", 362), ("Qwen/Qwen2.5-0.5B-Instruct", 494),
    ("mistralai/Mistral-7B-Instruct-v0.1", 7242), ("tiiuae/falcon-7b-instruct", 6922),
    ("allenai/longformer-base-4096", 149), ("meta-llama/Llama-3.1-8B", 8030),
])  # fmt: skip
def test_a_model_of_the_papers_is_planned_without_a_network(name, millions):
    outline = memory.skeleton(name, torch.bfloat16)
    assert memory.bytes_of(outline) == pytest.approx(2e6 * millions, rel=3e-3)
    assert memory.kept_by(outline, 1, 64, 64) > 0


def test_what_is_frozen_keeps_nothing_and_trains_nothing():
    name = "HuggingFaceTB/SmolLM2-360M-Instruct"
    whole, top, lora = (
        memory.ppo(skeleton(name, train, layers=4), 4, 100, 50, episodes=4)
        for train in ("all", "top", "lora")
    )
    assert whole.total > top.total > lora.total
    assert whole.parts["gradients"] > 5 * top.parts["gradients"] > 5 * lora.parts["gradients"] > 0
    assert lora.parts["reference"] == lora.parts["gradients"]


def test_eight_bits_take_a_byte_for_each_frozen_weight_of_a_layer():
    outline = skeleton("openai-community/gpt2-medium", "lora", layers=24)
    stage = memory.Stage("any", {"weights": memory.bytes_of(outline), "Adam": 8})
    held = memory.in_eight_bits(stage, outline)
    maps = 24 * 12 * 1024**2  # of a layer: 3 + 1 + 4 + 4 times the width's square
    assert stage.total - held.total == 3 * maps and held.parts["Adam"] == 8


def test_rows_are_halved_until_they_fit_and_what_never_fits_is_refused_with_what_to_try():
    outline = skeleton("HuggingFaceTB/SmolLM2-360M-Instruct")

    def stage(rows):
        return memory.fine_tuning(outline, rows, 256)

    rows = memory.rows_that_fit(stage, 14 * 10**9, most=64)
    assert stage(rows).total <= 14e9 < stage(2 * rows).total
    with pytest.raises(ValueError, match="needs 6.*Adam.*lora"):
        memory.rows_that_fit(stage, 10**9, most=8)


def test_a_table_of_stages_says_what_holds_the_memory():
    outline = skeleton("tiny")
    table = memory.table(
        memory.sampling(outline, 2, 8, 8), memory.ppo(outline, 2, 8, 8, episodes=2)
    )
    assert list(table.index) == ["sampling", "PPO"]
    assert table.columns[-1] == "peak, GB" and all(c.endswith(", GB") for c in table)


CARD = 15 * 10**9  # bytes of a 16 GB card that a run gets
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


def at_gpu(notebook):
    """What a notebook's settings say at `gpu`, as far as it needs no code of the notebook."""
    [path] = (Path(__file__).parents[1] / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    [source] = [s for c in cells if "SETTINGS = {  #" in (s := "".join(c["source"]))]
    table = re.search(r"^SETTINGS = (\{.*?^\})", source, flags=re.M | re.S)[1]
    rows = ast.parse(table, mode="eval").body
    chosen = {}
    for name, row in zip(rows.keys, rows.values, strict=True):
        value = ast.unparse(row.elts[record.SCALES.index("gpu")])
        try:
            chosen[name.value] = eval(value, {"QWEN": QWEN, "GPT2": "openai-community/gpt2"})
        except NameError:  # a constant of the notebook
            continue
    return chosen


@pytest.mark.parametrize("notebook, stage", [
    ("43", lambda x: memory.ppo(skeleton(x["model"], x["train"], layers=x["layers"]), 16, 24,
                                x["max_new_tokens"], episodes=x["episodes"])),
    ("40", lambda x: memory.fine_tuning(skeleton(x["model"], x["train"]), x["batch"],
                                        x["max_answer"], x["max_prompt"])),
    ("31", lambda x: memory.fine_tuning(skeleton(x["student"], "top", layers=x["train_layers"]),
                                        x["batch"], x["max_length"])),
    ("51", lambda x: memory.ppo(skeleton(x["model"], x["train"], layers=x["layers"]), 32, 40,
                                x["max_new_tokens"], episodes=512)),
])  # fmt: skip
def test_what_a_notebook_trains_at_gpu_fits_a_card_of_16_gb(notebook, stage):
    said = stage(at_gpu(notebook))
    assert said.total < CARD, memory.table(said).to_string()
