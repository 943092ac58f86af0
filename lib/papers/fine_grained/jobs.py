"""Fine-grained RLHF's own experiment on qa-feedback, as stages that hand files to one another.

    python -m lib.papers.fine_grained.jobs CONFIG.json            every stage, in order
    python -m lib.papers.fine_grained.jobs CONFIG.json R1 R2      some of them
    accelerate launch -m lib.papers.fine_grained.jobs CONFIG.json    the same on several GPUs

Wu et al. (NeurIPS 2023, sections 4 and appendices; their settings are in their configuration files):

    SFT, SFT-Full               questions -> a policy, the best epoch by ROUGE-Lsum on dev
    R1, R2, R3, preference      feedback -> a reward model, the best by accuracy on dev feedback
    the arms of `Chain.arms`    policy, reward models, questions -> a policy trained by PPO
    evaluate                    every policy, every reward model -> scores.csv, a row an answer

Each stage has a folder in `Chain.folder` with what it made (`model/`, `history.csv`, `scores.csv`) and, as
its last file, `done.json`: the hash of its settings and inputs, and what came out in numbers.  A finished
stage is skipped while that hash stays the same and refused when it does not; a killed one goes on from
`work/`.

Simplified: a batch of reward models holds whole questions with their pairs, the reference's loose pairs;
mean and deviation are those of all training answers.  On several GPUs each holds every model whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lib import (
    generation,
    models,
    ppo,
    processes,
    reward_models,
    rewards,
    runtime,
    sft,
    tables,
)
from lib.course.launch import launch
from lib.papers.fine_grained import first_policy, released, rouge
from lib.papers.fine_grained import models as fine_grained
from lib.papers.fine_grained import schema as qa

DATA = {  # file -> records in the released one
    "train_1k": 1000, "train": 3853, "train_feedback": 2853, "dev": 500, "dev_feedback": 500,
    "test": 948,
}  # fmt: skip
SFT = {"SFT": "train_1k", "SFT-Full": "train"}  # stage -> its training file
REWARDS = ("R1", "R2", "R3", "preference")
EVALUATE = "evaluate"
DONE = "done.json"
SPLITS = ("dev", "test")
PPO = {  # the authors' settings of both arms; a chain's own go first
    "temperature": 0.7, "top_k": 20, "greedy_held_out": True, "train": "all", "whiten_rewards": True,
    "decay": True, "adam_eps": 1e-5, "max_grad_norm": 1e9, "stop_kl": 10.0, "stop_kl_times": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """What the stages depend on; the defaults are the paper's.  JSON holds it as it is."""

    folder: str  # where the stages write
    data: str  # folder with the six files of `DATA`
    policy: str = "google-t5/t5-large"
    values: str = "google-t5/t5-base"
    encoder: str = "allenai/longformer-base-4096"
    max_prompt: int = 1024  # tokens of the policy
    max_answer: int = 200
    records: dict = field(default_factory=dict)  # file -> how many of its first; {}: all
    sft: dict = field(default_factory=dict)  # `transformers.TrainingArguments`
    reward_models: dict = field(default_factory=dict)  # name -> `TrainConfig` and max_length
    released: dict = field(
        default_factory=dict
    )  # name -> folder of the authors' model: not trained
    ppo: dict = field(default_factory=dict)  # `PPOConfig` of all arms, over `PPO`
    arms: dict = field(default_factory=dict)  # name -> rewards, place, and `PPOConfig` of its own
    full: bool = True  # whether SFT-Full is trained
    precision: str = "bf16"  # on GPUs that compute in it; on others, and at "no", float32
    seed: int = 42

    def __post_init__(self):
        if taken := sorted(set(self.arms) & {*SFT, *REWARDS, EVALUATE}):
            raise ValueError(f"arms {taken} have the names of other stages; give them others.")
        for name, arm in self.arms.items():
            paid = arm.get("rewards")
            if not paid or set(paid) - set(REWARDS) or arm.get("place", "dense") not in PLACES:
                raise ValueError(
                    f"arm {name!r} is {arm}; give rewards (of {', '.join(REWARDS)}, each with its "
                    f"weight) and, where it is not dense, place (of {', '.join(PLACES)})."
                )

    @property
    def stages(self) -> list[str]:
        """Every stage, in an order in which each finds what it reads."""
        first = [name for name in SFT if name == "SFT" or self.full]
        return [*first, *REWARDS, *self.arms, EVALUATE]

    @property
    def policies(self) -> list[str]:
        """The stages that make a policy."""
        return [name for name in self.stages if name not in (*REWARDS, EVALUATE)]

    def home(self, stage: str) -> Path:
        """The folder of a stage."""
        return Path(self.folder) / stage.replace(" ", "_").replace("/", "-")

    def model(self, stage: str) -> Path:
        """The folder of a stage's model."""
        return self.home(stage) / "model"

    def path(self, file: str) -> Path:
        """One of the six data files."""
        return Path(self.data) / f"{file}.json"


PLACES = {"dense": lambda reward: reward, "at the end": rewards.at_end}


# --- stages in order, each once ------------------------------------------------------------------


def run(chain: Chain, stages: Sequence[str] = (), accelerator: Accelerator | None = None) -> None:
    """Run these stages (none named: all), in the chain's order; what is finished is skipped.

    Raises ValueError for an unknown stage, for one whose inputs are not there yet, and where a folder holds
    a stage with other settings or inputs.
    """
    if unknown := sorted(set(stages) - set(chain.stages)):
        raise ValueError(f"unknown stages {unknown}; allowed: {', '.join(chain.stages)}.")
    for stage in chain.stages:
        if not stages or stage in stages:
            run_stage(chain, stage, accelerator)


def run_stage(chain: Chain, stage: str, accelerator: Accelerator | None = None) -> dict:
    """Run one stage unless it is finished; what its `done.json` holds."""
    home, key = chain.home(stage), key_of(chain, stage)
    if (home / DONE).exists():
        made = json.loads((home / DONE).read_text(encoding="utf-8"))
        if made["key"] != key:
            raise ValueError(
                f"{home} holds {stage} with other settings or inputs. Give another folder, or delete it "
                "and what was made from it."
            )
        return made
    make = {"SFT": train_sft, "SFT-Full": train_sft, EVALUATE: evaluate}
    make |= dict.fromkeys(REWARDS, train_reward_model)
    started = time.perf_counter()
    runtime.set_seed(chain.seed)
    if stage in chain.arms:
        accelerator = accelerator or make_accelerator(chain)
        result = train_policy(chain, stage, accelerator)
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()
            return {}
    else:
        result = make[stage](chain, stage)
    done = {"stage": stage, "key": key, "seconds": round(time.perf_counter() - started, 1)}
    done["result"] = result
    runtime.write_atomic(home / DONE, runtime.to_json(done))
    shutil.rmtree(home / "work", ignore_errors=True)
    if stage in chain.arms:
        accelerator.wait_for_everyone()
    return done


def run_on(chain: Chain, stage: str, number: int = 1) -> dict:
    """`run_stage` in this process, or in `number` that `accelerate launch` starts: the same files."""
    if number > 1 and not (chain.home(stage) / DONE).exists():
        path = write_chain(chain, Path(chain.folder).absolute() / "launched.json")
        launch(__name__, str(path), stage, processes=number)
    return run_stage(chain, stage)


def inputs_of(chain: Chain, stage: str) -> tuple[list[str], list[str]]:
    """(data files, stages) that a stage reads."""
    if stage in SFT:
        return [SFT[stage], "dev"], []
    if stage in REWARDS:
        return ["train_feedback", "dev_feedback"], []
    if stage == EVALUATE:
        return [*SPLITS], [*chain.policies, *REWARDS]
    return ["train", "dev"], ["SFT", *chain.arms[stage]["rewards"]]


def key_of(chain: Chain, stage: str) -> str:
    """The hash of what a stage depends on; ValueError where something that it reads is not there."""
    files, stages = inputs_of(chain, stage)
    missing = [name for name in files if not chain.path(name).exists()]
    missing += [name for name in stages if not (chain.home(name) / DONE).exists()]
    if missing:
        raise ValueError(
            f"{stage} reads {', '.join(files + stages)}; not there yet: {', '.join(missing)}. Data files "
            f"are looked for in {chain.data}; run earlier stages first: {', '.join(chain.stages)}."
        )
    data = [(name, chain.records.get(name), runtime.file_hash(chain.path(name))) for name in files]
    made = [json.loads((chain.home(name) / DONE).read_text("utf-8"))["key"] for name in stages]
    general = [chain.seed, chain.max_prompt, chain.max_answer, chain.precision]
    own = {name: chain.reward_models.get(stage) for name in REWARDS if name == stage}
    if stage in REWARDS:
        own = [own, chain.encoder, chain.released.get(stage)]
    elif stage in chain.arms:
        own = [PPO, chain.ppo, chain.arms[stage], chain.values]
    elif stage in SFT:
        own = [chain.sft, chain.policy]
    return runtime.content_hash(stage, data, made, general, own)


def questions(chain: Chain, file: str) -> list[dict]:
    """The first records of a file of questions, as many as the chain takes."""
    return qa.load_questions(chain.path(file))[: chain.records.get(file)]


def fitted_prompts(chain: Chain, tokenizer, records: Sequence[dict]) -> list[str]:
    """The records' prompts as the policy reads them: at most `max_prompt` tokens."""
    fit = partial(qa.fit_prompt, tokenizer, max_tokens=chain.max_prompt)
    return [fit(record["question"], qa.passages_of(record)) for record in records]


def precision_of(chain: Chain) -> contextlib.AbstractContextManager:
    """Within: forward passes compute in `mixed_precision`."""
    if mixed_precision(chain) == "bf16":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def mixed_precision(chain: Chain) -> str:
    """The chain's precision where the GPU computes in it itself, else "no" (a T4 only emulates bf16)."""
    return chain.precision if runtime.cuda_has_bfloat16() else "no"


# --- the first policy ----------------------------------------------------------------------------


def train_sft(chain: Chain, stage: str) -> dict:
    """Fine-tune the policy on a file's first answers; keep the epoch with the highest ROUGE-Lsum on dev."""
    home = chain.home(stage)
    make_accelerator(chain)  # it gives each process its GPU
    policy, tokenizer = models.load_policy(chain.policy, dtype=torch.float32)
    train, dev = questions(chain, SFT[stage]), questions(chain, "dev")
    answers = [record["answer"][0] for record in train]
    prompts = fitted_prompts(chain, tokenizer, train)
    rows = sft.encode_completions(tokenizer, prompts, answers, model=policy)
    # the answer's own limit; max_length is the prompt's
    rows = [first_policy.cut_answer(row, chain.max_answer) for row in rows]
    best = BestEpoch(home / "work" / "best", partial(rouge_of, chain, tokenizer, dev))
    history = sft.train_sft(
        policy,
        tokenizer,
        rows,
        folder=home / "work" / "steps",
        max_length=chain.max_prompt + chain.max_answer,
        callbacks=[best],
        save_strategy="epoch",
        seed=chain.seed,
        **chain.sft,
    )
    best.restore(policy)
    table = pd.DataFrame(best.rows)
    result = {"rouge": float(table.rouge.max()), "epoch": int(table.rouge.idxmax()) + 1}
    settings = {"stage": stage, **chain.sft}
    card = {"settings": settings, "metrics": result, "data": [prompts, answers]}
    if processes.is_main():
        tables.write_csv(history, home / "history.csv")
        tables.write_csv(table, home / "epochs.csv")
        models.save(policy, tokenizer, chain.model(stage), card=card)
    processes.wait()
    return result


def rouge_of(chain: Chain, tokenizer, records: Sequence[dict], policy) -> float:
    """Mean ROUGE-Lsum of a policy's greedy answers; several processes share the records."""
    mine = records[processes.share(len(records))]
    samples = answer(chain, policy, tokenizer, mine)
    scores = rouge.rouge_lsum(samples.texts, [record["answer"] for record in mine])
    return float(np.mean(processes.joined(scores)))


def answer(chain: Chain, policy, tokenizer, records: Sequence[dict]) -> generation.Samples:
    """A policy's answers by the likeliest tokens, one a record."""
    prompts = fitted_prompts(chain, tokenizer, records)
    size = {"max_new_tokens": chain.max_answer, "rows_per_batch": 64}
    with precision_of(chain):
        return generation.sample(
            policy, tokenizer, prompts, temperature=0.0, label="answers", **size
        )


class BestEpoch(transformers.TrainerCallback):
    """Measures the model after each epoch and keeps the weights of the best in a folder."""

    def __init__(self, folder: Path, measure: Callable):
        self.folder = folder
        self.measure = measure
        self.rows: list[dict] = []

    def on_train_begin(self, args, state, control, **_):
        """Epochs of the run that this one continues."""
        path = self.folder / "epochs.jsonl"
        rows = tables.read_jsonl(path).to_dict("records") if path.exists() else []
        self.rows = [row for row in rows if row["step"] <= state.global_step]

    def on_epoch_end(self, args, state, control, model=None, **_):
        """Measure; the weights are written before the line that names them the best."""
        training = model.training
        model.eval()
        value = self.measure(model)
        model.train(training)
        if all(value > row["rouge"] for row in self.rows) and processes.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            state_dict = {name: x.detach().contiguous() for name, x in model.named_parameters()}
            with runtime.atomic_folder(self.folder / "weights") as staging:
                save_file(state_dict, staging / "best.safetensors")
        row = {"epoch": round(state.epoch), "step": state.global_step, "rouge": value}
        self.rows.append(row)
        if processes.is_main():
            tables.write_jsonl(pd.DataFrame(self.rows), self.folder / "epochs.jsonl")

    def restore(self, model) -> None:
        """The best epoch's weights into the model."""
        processes.wait()
        weights = load_file(self.folder / "weights" / "best.safetensors")
        model.load_state_dict(weights, strict=False)


# --- reward models -------------------------------------------------------------------------------


def train_reward_model(chain: Chain, stage: str) -> dict:
    """Train a reward model on the training feedback; keep the best by accuracy on the dev feedback."""
    home = chain.home(stage)
    make_accelerator(chain)  # it gives each process its GPU
    dev = feedback_of(chain, stage, "dev_feedback")
    history = None
    if stage in chain.released:
        model = released.convert(chain.released[stage], stage)
    else:
        model = build_reward_model(chain, stage)
        config = dict(chain.reward_models[stage])
        config.pop("max_length", None)
        config = reward_models.TrainConfig(**config, seed=chain.seed)
        train = feedback_of(chain, stage, "train_feedback")
        with precision_of(chain):
            history = fine_grained.fit(
                model,
                train,
                config,
                validate=lambda: measure(model, dev)["accuracy"],
                folder=home / "work",
            )
    with precision_of(chain):
        result = measure(model, dev)
    result |= {"mean": model.mean, "std": model.std}
    card = {"settings": {"stage": stage, **chain.reward_models.get(stage, {})}, "metrics": result}
    if processes.is_main():
        if history is not None:
            tables.write_csv(history, home / "history.csv")
        models.save(model, model.tokenizer, chain.model(stage), card=card)
    processes.wait()
    return result


def build_reward_model(chain: Chain, stage: str) -> fine_grained.FineGrainedModel:
    """An untrained one on the chain's encoder, which trains too.  R1 sees no passages."""
    encoder, tokenizer = reward_models.load_backbone(chain.encoder)
    encoder.requires_grad_(True)
    length = chain.reward_models[stage].get("max_length", 2048)
    unit = released.UNITS[stage]
    return fine_grained.FineGrainedModel(
        encoder, tokenizer, unit=unit, context=stage != "R1", relations=False, max_length=length
    )


def feedback_of(chain: Chain, stage: str, file: str) -> reward_models.Feedback:
    """The first records of a feedback file as training data of a reward model."""
    records = qa.load_feedback(chain.path(file))[: chain.records.get(file)]
    records = fine_grained.used_for(records)[stage]
    return fine_grained.feedback_for(stage, records)


def measure(model: fine_grained.FineGrainedModel, feedback: reward_models.Feedback) -> dict:
    """Accuracy of known segments, or of decided pairs; of segments also precision, recall, F1 of errors,
    and the accuracy of the better constant answer; n.  Several processes share the rows."""
    scores = fine_grained.score_all(model, feedback)
    if feedback.pairs is not None:
        values = np.array([row[0] if len(row) else model.mean for row in scores])
        right = values[feedback.pairs[:, 0]] > values[feedback.pairs[:, 1]]
        return {"accuracy": float(right.mean()), "n": len(right)}
    known = ~np.isnan(feedback.labels)
    wrong = feedback.labels[known] == 1
    called = np.concatenate(scores)[known] <= 0  # as `signs` decides
    hits = (wrong & called).sum()
    counts = {
        "precision": called.sum(),
        "recall": wrong.sum(),
        "f1": (wrong.sum() + called.sum()) / 2,
    }
    result = {name: float(hits / n) if n else 0.0 for name, n in counts.items()}
    constant = max(wrong.mean(), 1 - wrong.mean())
    result |= {"accuracy": float((wrong == called).mean()), "constant": float(constant)}
    return result | {"n": int(known.sum())}


# --- PPO -----------------------------------------------------------------------------------------


def make_accelerator(chain: Chain) -> Accelerator:
    """The processes of a stage and their precision."""
    return processes.begin(runtime.get_device(), mixed_precision(chain))


def load_reward_models(chain: Chain, names: Sequence[str], device=None) -> dict:
    """Kept reward models by name, in eval mode, without gradients."""
    loaded = {name: released.load(chain.model(name)) for name in names}
    for model in loaded.values():
        model.requires_grad_(False)
        model.to(device or runtime.get_device())
    return loaded


def reward_of(
    loaded: dict, weights: dict, tokenizer, *, place: str = "dense", whole: dict | None = None
) -> rewards.RewardFunction:
    """Sum of weighted rewards, each paid where its segment ends, or all at the last token.

    `loaded`: name -> model; `weights`: name -> w_k; `whole`: the policy's prompt -> the prompt that the
    reward models read, where the policy's is cut.
    """
    whole = whole or {}
    parts = fine_grained.segment_rewards(loaded, weights, lambda prompt: whole.get(prompt, prompt))
    return PLACES[place](rewards.compose(parts, tokenizer))


def train_policy(chain: Chain, stage: str, accelerator: Accelerator) -> dict:
    """PPO from the fine-tuned policy; dev questions, answered greedily, choose the weights that are kept."""
    home, arm, device = chain.home(stage), dict(chain.arms[stage]), accelerator.device
    weights, place = arm.pop("rewards"), arm.pop("place", "dense")
    policy, tokenizer = models.load_policy(
        str(chain.model("SFT")), dtype=torch.float32, device=device
    )
    value_model = models.load_policy(chain.values, dtype=torch.float32, device=device)[0]
    train, dev = questions(chain, "train"), questions(chain, "dev")
    prompts, held_out = (fitted_prompts(chain, tokenizer, part) for part in (train, dev))
    full = [fine_grained.prompt_of(record) for record in [*train, *dev]]
    whole = dict(zip([*prompts, *held_out], full, strict=True))
    loaded = load_reward_models(chain, weights, device)
    options = PPO | {"max_new_tokens": chain.max_answer} | chain.ppo | arm
    history = ppo.train_ppo(
        policy,
        tokenizer,
        prompts,
        reward_of(loaded, weights, tokenizer, place=place, whole=whole),
        ppo.PPOConfig(**options, seed=chain.seed),
        held_out=held_out,
        value_model=value_model,
        folder=home / "work",
        accelerator=accelerator,
    )
    result = {"best_step": history.attrs["best_step"], "stopped": history.attrs["stopped"]}
    result["held_out_start"] = history.attrs["held_out_start"]
    result["held_out_best"] = float(history.held_out_reward.max())
    if accelerator.is_main_process:
        tables.write_csv(history, home / "history.csv")
        card = {"settings": {"stage": stage, **chain.arms[stage]}, "metrics": result}
        models.save(policy, tokenizer, chain.model(stage), card=card)
    return result


# --- every reward model on every policy ----------------------------------------------------------


def evaluate(chain: Chain, stage: str = EVALUATE) -> dict:
    """Greedy answers of every policy to the dev and test questions, scored; `scores.csv`, a row an answer.

    Columns: arm, split, question, sub_sentences, relevant (of them), sentences, factual (of them), R3 and
    preference (standardised), rouge, tokens, text.  Each policy's rows are kept as they come.
    """
    home = chain.home(stage)
    make_accelerator(chain)  # it gives each process its GPU
    loaded = load_reward_models(chain, REWARDS)
    records = {split: questions(chain, split) for split in SPLITS}
    parts = []
    for name in chain.policies:
        path = home / "work" / f"{chain.home(name).name}.jsonl"
        if not processes.is_there(path):
            rows = read_policy(chain, name, records, loaded)
            if processes.is_main():
                tables.write_jsonl(pd.DataFrame(rows).assign(arm=name), path)
            processes.wait()
        parts.append(tables.read_jsonl(path))
    scores = pd.concat(parts, ignore_index=True)
    if processes.is_main():
        tables.write_csv(scores, home / "scores.csv")
    processes.wait()
    return {"rows": len(scores)}


def read_policy(
    chain: Chain, name: str, records: dict[str, list[dict]], loaded: dict
) -> list[dict]:
    """`score_answers` of one policy, a row an answer; several processes share each split's records."""
    policy, tokenizer = models.load_policy(str(chain.model(name)))
    rows = []
    for split in SPLITS:
        mine = records[split][processes.share(len(records[split]))]
        scored = score_answers(chain, policy, tokenizer, mine, loaded).assign(split=split)
        rows += processes.joined(scored.to_dict("records"))
    return rows


def score_answers(chain: Chain, policy, tokenizer, records, loaded: dict) -> pd.DataFrame:
    """A policy's answers to these questions and what every reward model and ROUGE say of them."""
    samples = answer(chain, policy, tokenizer, records)
    prompts = [fine_grained.prompt_of(record) for record in records]
    rows = pd.DataFrame({"question": [record["question"] for record in records]})
    with precision_of(chain):
        for name, parts, right in (
            ("R1", "sub_sentences", "relevant"),
            ("R2", "sentences", "factual"),
        ):
            signs = loaded[name].signs(prompts, samples.texts)
            rows[parts] = [len(row) for row in signs]
            rows[right] = [int((row > 0).sum()) for row in signs]
        for name in ("R3", "preference"):
            model = loaded[name]
            rows[name] = (model.score(prompts, samples.texts) - model.mean) / model.std
    rows["rouge"] = rouge.rouge_lsum(samples.texts, [record["answer"] for record in records])
    rows["tokens"] = [len(ids) for ids in samples.response_ids]
    return rows.assign(text=samples.texts)


# --- the command ---------------------------------------------------------------------------------


def read_chain(path: Path | str) -> Chain:
    """The chain that a JSON file holds.  Raises ValueError for a name that is no setting."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    known = Chain.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{path}: unknown settings {unknown}; allowed: {', '.join(known)}.")
    return Chain(**values)


def write_chain(chain: Chain, path: Path | str) -> Path:
    """The chain as a JSON file for `python -m lib.papers.fine_grained.jobs`."""
    return runtime.write_atomic(path, runtime.to_json(asdict(chain)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages of a chain from the command line."""
    command = "python -m lib.papers.fine_grained.jobs"
    parser = argparse.ArgumentParser(prog=command, description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a JSON file with the settings of the chain")
    parser.add_argument("stages", nargs="*", help="stages to run (default: all)")
    options = parser.parse_args(arguments)
    chain = read_chain(options.config)
    run(chain, options.stages, make_accelerator(chain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
