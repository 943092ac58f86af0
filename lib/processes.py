"""One batch on several processes: each takes its share, and all end with what one process would have.

`accelerate launch` starts the processes; every one runs the same lines.  The rule of the trainers (`sft`,
`reward_models`, `ppo`, `rloo` and the conditioning loop of Quark and ALT):

    begin     the Accelerator of a training; its DDP adds gradients up
    meet      the same without a training: from here on the others are there
    share     which of so many rows are mine; random numbers are drawn for all rows and cut the same way
    joined    everybody's rows in their order, for everybody
    my_rows   which of those are mine
    once      what the main process alone does: ask a judge that costs money, decide
    is_there  whether a file is there, asked before anyone may write it
    passes    several passes on one batch, of which the last adds the gradients up

A loss is a mean over the *whole* batch: each process divides by what all of them count, and multiplies by
`world()`, for DDP takes the mean over processes.  Files are written by the main process, read by all.
Without `accelerate launch` each function is what its name says of one process, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

PATIENCE = timedelta(hours=12)  # that the others wait while the main process asks a judge


def begin(device: torch.device, precision: str | None = None) -> Accelerator:
    """The accelerator of a training on this kind of device; `precision` as accelerate names it."""
    handlers = [
        # a pooler that no score reads has no gradient; buffers are constants here
        DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    cpu = device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def meet(device: torch.device) -> None:
    """Wait for the other processes of a run (`course.ranks`), before any of them trains or writes."""
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def alone() -> bool:
    """Whether this is the only process."""
    return not torch.distributed.is_available() or not torch.distributed.is_initialized()


def world() -> int:
    """How many processes there are."""
    return 1 if alone() else PartialState().num_processes


def is_main() -> bool:
    """Whether this process writes files."""
    return alone() or PartialState().is_main_process


def wait() -> None:
    """Go on when every process is here."""
    if not alone():
        PartialState().wait_for_everyone()


def share(count: int) -> slice:
    """This process's part of `count` items in order; where they do not divide, the first have one more."""
    if alone():
        return slice(0, count)
    state = PartialState()
    each, more = divmod(count, state.num_processes)
    start = state.process_index * each + min(state.process_index, more)
    return slice(start, start + each + (state.process_index < more))


def my_rows(count: int) -> slice:
    """Where this process's `count` rows stand among all that `joined` gives; each may have another count."""
    counts = joined([count])
    start = 0 if alone() else sum(counts[: PartialState().process_index])
    return slice(start, start + count)


def joined(rows: Sequence) -> list:
    """The rows of all processes, those of the first before those of the second, on every process."""
    return list(rows) if alone() else gather_object(list(rows))


def once(make: Callable, *arguments) -> object:
    """What `make(*arguments)` gives the main process, on every process."""
    if alone():
        return make(*arguments)
    made = [make(*arguments) if is_main() else None]
    return broadcast_object_list(made)[0]


def is_there(path: Path) -> bool:
    """Whether the file is there: every process looks before the main one goes on and may write it."""
    there = path.exists()
    wait()
    return there


def passes(parts: Sequence, network: torch.nn.Module, accelerator: Accelerator) -> Iterator[object]:
    """The parts of a batch, one at a time; gradients are added up over the processes in the last.

    Processes may have different numbers of parts, but each needs at least one.
    """
    for part in parts[:-1]:
        with accelerator.no_sync(network):
            yield part
    yield parts[-1]
