"""What a training loop needs around its algorithm: seeds, checkpoints, a history on disk, stops.

The loops are `ppo.train_ppo` and the conditioning loop of Quark and ALT; a loop stays readable because
none of this stands inside it.  The folder of a run:

    made_for.txt         what the run depends on: another run is refused (`claim_folder`)
    history.csv          one row a step, there as soon as the step is done (`History`)
    checkpoint-000020/   weights as safetensors, optimizer.pt, state.json; only the newest stays
    tensorboard/         where REPORT_TO=tensorboard

Random numbers depend on a seed and a key such as ("sample", step), never on what was drawn before, so
a run that was killed continues without any generator's state.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import find_executable_batch_size
from safetensors.torch import load_file, save_file

from lib import processes, runtime, tables

REPORTERS = ("trackio", "wandb", "tensorboard")
PROJECT = "learning-from-feedback"  # the name under which trackio and wandb list the runs


# --- random numbers ------------------------------------------------------------------------------


def seed_for(seed: int, *key: object) -> int:
    """The seed of one purpose of a run, such as seed_for(0, "sample", step): 32 bits."""
    return int(runtime.content_hash(seed, *key)[:8], 16)


def generator_for(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that starts from `seed_for(seed, *key)`."""
    return torch.Generator().manual_seed(seed_for(seed, *key))


def laps(turn: range, count: int, seed: int, *key: object) -> list[int]:
    """Places turn.start to turn.stop of an endless sequence: 0 to count - 1 in a new order each lap.

    Every number comes once in a lap, so prompts or rows are used equally often.
    """
    places = [divmod(place, count) for place in turn]
    orders = {}
    for lap in dict(places):
        order = torch.randperm(count, generator=generator_for(seed, *key, lap))
        orders[lap] = order.tolist()
    return [orders[lap][place] for lap, place in places]


# --- settings ------------------------------------------------------------------------------------


def check_numbers(settings: Mapping[str, object], may_be_zero: Container[str]) -> None:
    """Raise ValueError for a number below 0, or for 0 unless its name is among `may_be_zero`."""
    for name, value in settings.items():
        number = type(value) in (int, float)
        if number and (value < 0 or (value == 0 and name not in may_be_zero)):
            allowed = "at least" if name in may_be_zero else "above"
            raise ValueError(f"{name} is {value!r}; it must be {allowed} 0.")


# --- optimizer -----------------------------------------------------------------------------------


def rate_share(done: int, total: int, warmup: int = 0, decay: bool = False) -> float:
    """Share of the peak learning rate after `done` of `total` steps.

    It rises linearly over the first `warmup` steps, then stays, or with `decay` falls linearly to 0.
    """
    rise = min(1.0, (done + 1) / max(1, warmup))
    left = (total - done) / max(1, total - warmup)
    return rise * min(1.0, left) if decay else rise


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Each parameter group's learning rate: `share` of the group's "peak"."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def check_finite(values: Mapping[str, float], place: str, advice: str) -> None:
    """Raise FloatingPointError that names the place, such as "step 5, minibatch 0", unless all is finite.

    A batch is never skipped in silence: what follows from it would not be the run that was asked for.
    """
    if not all(math.isfinite(value) for value in values.values()):
        raise FloatingPointError(f"{place}: not finite: {dict(values)}. {advice}")


class Clock:
    """Seconds of the stages of a step: `lap(name)` ends a stage and begins the next."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Store the seconds since the last lap under this name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


class RowsAtOnce:
    """How many rows go through a network at once: fewer, for good, once a GPU's memory was too small.

    The last net: plan by `memory.rows_that_fit`.  Rows at once change what is in memory, not the result.
    Where several processes train, the error ends the run, for the others would wait: start with fewer.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def run(self, attempt: Callable[[int], object]) -> object:
        """attempt(rows), which can be done again after an error; with half the rows while memory is short."""
        try:
            return attempt(self.rows)
        except torch.OutOfMemoryError:
            if self.rows == 1 or not processes.alone():
                raise
        # not within `except`, which would hold what the failed attempt has in memory
        return find_executable_batch_size(attempt, self._halve(), self._halve)()

    def _halve(self) -> int:
        self.rows //= 2
        if self.rows:
            warnings.warn(
                f"GPU memory is too small: going on with {self.rows} rows at once.", stacklevel=2
            )
        return self.rows


# --- the best weights ----------------------------------------------------------------------------


@dataclass
class Best:
    """The weights with the highest held-out value so far, copied to the processor's memory."""

    step: int | None = None
    value: float = -math.inf
    weights: Mapping[str, torch.Tensor] | None = None

    def offer(self, step: int, value: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights if their value is higher than every one before."""
        if self.step is None or value > self.value:
            self.step = step
            self.value = value
            self.weights = {n: p.detach().to("cpu", copy=True) for n, p in weights.items()}


@torch.no_grad()
def copy_weights(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of `source` into those of `target`, name by name, in place."""
    for name, parameter in target.items():
        parameter.copy_(source[name])


# --- checkpoints ---------------------------------------------------------------------------------


def claim_folder(folder: Path | str, what: str, *key: object) -> Path:
    """Make a folder for the checkpoints of one run, marked with the hash of what the run depends on.

    Raises ValueError where it holds another run: resuming would mix two of them.
    """
    marker = Path(folder) / "made_for.txt"
    line = f"{what} {runtime.content_hash(*key)}\n"
    if marker.exists() and marker.read_text(encoding="utf-8") != line:
        raise ValueError(
            f"{folder} holds a run with other settings or data ({what}). Give another folder, or delete it."
        )
    runtime.write_atomic(marker, line)
    return Path(folder)


@dataclass
class Checkpoint:
    """What `save_checkpoint` wrote."""

    step: int
    state: dict
    tensors: dict[str, dict[str, torch.Tensor]]
    optimizer: dict | None


def save_checkpoint(
    folder: Path | str,
    step: int,
    state: dict,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    optimizer: dict | None = None,
) -> Path:
    """Write `checkpoint-<step>/` and remove the older ones; a reader sees a whole checkpoint or none.

    Args:
        folder: the run's folder.
        step: at least 0; the highest is the newest.
        state: anything that JSON can hold (numbers come back bit by bit).
        tensors: name -> (name -> tensor); each becomes `<name>.safetensors`, tensor by tensor, so no
            second copy of the model stands in memory.
        optimizer: a `state_dict`.
    """
    folder = Path(folder)
    final = folder / f"checkpoint-{step:06d}"
    for leftover in folder.glob(".checkpoint-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if not final.exists():
        part = Path(tempfile.mkdtemp(dir=folder, prefix=".checkpoint-"))
        try:
            for name, group in tensors.items():
                plain = {key: value.detach().contiguous() for key, value in group.items()}
                save_file(plain, part / f"{name}.safetensors")
            if optimizer is not None:
                torch.save(optimizer, part / "optimizer.pt")
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            for path in part.iterdir():
                _sync(path)
            part.chmod(0o755)
            part.rename(final)  # from here on it counts
        except Exception as error:
            crossed = final.exists() or not part.exists()
            shutil.rmtree(part, ignore_errors=True)  # a full disk must not be kept full
            if crossed:
                raise RuntimeError(
                    f"another process trains into {folder} too. End one of them, or give each a folder."
                ) from error
            raise
    for other in folder.glob("checkpoint-*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path | str) -> Path | None:
    """The folder's newest checkpoint, or None."""
    checkpoints = Path(folder).glob("checkpoint-*")
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def load_checkpoint(folder: Path | str, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The folder's newest checkpoint with its tensors on `device`, or None.  Loads no pickled code."""
    path = newest_checkpoint(folder)
    if path is None:
        return None
    files = path.glob("*.safetensors")
    tensors = {file.stem: load_file(file, device=str(device)) for file in files}
    optimizer = None
    if (path / "optimizer.pt").exists():
        optimizer = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(int(path.name.removeprefix("checkpoint-")), state, tensors, optimizer)


def _sync(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


# --- rows ----------------------------------------------------------------------------------------


def write_rows(path: Path | str, rows: Iterable[dict]) -> Path:
    """JSON lines, a row a line; a reader sees the whole file or none."""
    return runtime.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path | str) -> list[dict]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# --- history -------------------------------------------------------------------------------------


class History:
    """The rows of a run: in memory, in `history.csv` as they come, and where REPORT_TO says.

    Args:
        what: the kind of run, such as "PPO"; part of the name under which it is reported.
        folder: the run's folder; None keeps no file.
        settings: reported once, beside the rows.
        rows: those of a checkpoint; later ones in the file are dropped, for they come again.
        writes: False keeps neither file nor report; of several processes the main one alone has them.

    A row's first value is its step; a second row of the same step is merged into the first.  Raises what
    `report_to` raises.
    """

    def __init__(
        self,
        what: str,
        folder: Path | str | None = None,
        settings: Mapping | None = None,
        rows: Iterable[dict] = (),
        writes: bool = True,
    ):
        self.rows = list(rows)
        writes = writes and processes.is_main()
        self.folder = Path(folder) if folder and writes else None
        self._report = open_reporter(what, self.folder, settings or {}) if writes else None
        self._write()

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Mapping) -> None:
        """Keep a row, write it to the file, and report its numbers."""
        (name, step), *_ = row.items()
        if self.rows and self.rows[-1].get(name) == step:
            self.rows[-1].update(row)
            self._write()
        else:
            self.rows.append(dict(row))
            self._append()
        if self._report is not None:
            numbers = {k: float(v) for k, v in row.items() if isinstance(v, (bool, int, float))}
            del numbers[name]
            self._report.log(numbers, int(step))

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(self.rows)

    def close(self) -> None:
        """End the report."""
        if self._report is not None:
            self._report.close()

    def _write(self) -> None:
        """The whole file."""
        self._columns = list(self.frame())
        if self.folder and self.rows:
            tables.write_csv(self.frame(), self.folder / "history.csv")

    def _append(self) -> None:
        """The last row, in the time of one row; the whole file where it brings a new column."""
        row = self.rows[-1]
        if not set(row) <= set(self._columns):
            self._write()
        elif self.folder:
            values = [row.get(name) for name in self._columns]
            line = tables.csv_text(None, [values], typed=True)
            with open(self.folder / "history.csv", "a", encoding="utf-8", newline="") as file:
                file.write(line)


def report_to() -> str:
    """Where histories go besides their file: $REPORT_TO, "trackio", "wandb", "tensorboard" or "".

    Raises ValueError for another name, and ImportError where the library is not installed.
    """
    name = os.environ.get("REPORT_TO", "").strip().lower()
    if name in ("", "none"):
        return ""
    if name not in REPORTERS:
        raise ValueError(f"REPORT_TO is {name!r}; allowed: {', '.join(REPORTERS)}, or empty.")
    if importlib.util.find_spec(name) is None:
        raise ImportError(
            f"REPORT_TO is {name!r}, but {name} is not installed. Try `pip install {name}`, or unset "
            "REPORT_TO: the history is written to history.csv all the same."
        )
    return name


def open_reporter(what: str, folder: Path | None, settings: Mapping):
    """An object with `log(numbers, step)` and `close()` for the library that REPORT_TO names, or None.

    A run that continues from its folder is reported under the name it had.
    """
    name = report_to()
    if not name:
        return None
    mark = uuid.uuid4().hex[:12]
    if folder is not None:
        path = folder / "report_id.txt"
        if not path.exists():
            runtime.write_atomic(path, mark)
        mark = path.read_text(encoding="utf-8")
    kinds = {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}
    return kinds[name](what.replace(" ", "-"), mark, folder, dict(settings))


class _Wandb:
    def __init__(self, what, mark, folder, settings):
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=f"{what}-{mark}",
            id=mark,
            resume="allow",
            config=settings,
            dir=folder,
        )
        # steps that a killed run had reported come again: by a step of their own that is no fault
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers, step):
        self.run.log({**numbers, "step": step})

    def close(self):
        self.run.finish()


class _Trackio:
    def __init__(self, what, mark, folder, settings):
        import trackio

        self.run = trackio.init(
            project=PROJECT, name=f"{what}-{mark}", resume="allow", config=settings, embed=False
        )

    def log(self, numbers, step):
        self.run.log(numbers, step=step)

    def close(self):
        self.run.finish()


class _TensorBoard:
    def __init__(self, what, mark, folder, settings):
        from torch.utils.tensorboard import SummaryWriter

        home = folder / "tensorboard" if folder else runtime.project_root() / "runs" / "tensorboard"
        self.writer = SummaryWriter(log_dir=str(home / f"{what}-{mark}"))
        self.writer.add_text("settings", json.dumps(settings, indent=2, default=str))

    def log(self, numbers, step):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()
