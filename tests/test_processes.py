"""Two gloo processes end with the history and the weights of one, for everything that trains."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lib import processes, sft, shards, training
from lib.course.launch import launch
from tests import two_processes
from tests.two_processes import TRAININGS

# --- two processes equal one -----------------------------------------------------------------------


def train_on_two(out, names, *more):
    launch("tests.two_processes", str(out), ",".join(names), *more, processes=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder where two processes left what they trained."""
    out = tmp_path_factory.mktemp("two")
    train_on_two(out, TRAININGS)
    return out


def assert_same(out, name, history, model):
    """History and weights of a training are those that the processes left."""
    theirs = pd.read_csv(out / f"{name}.csv")
    pd.testing.assert_frame_equal(theirs, history, rtol=1e-4, atol=1e-4, check_dtype=False)
    weights = load_file(out / f"{name}.safetensors")
    ours = two_processes.state_of(model)
    torch.testing.assert_close(weights, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_end_as_one(two, name, tmp_path):
    assert_same(two, name, *TRAININGS[name](tmp_path))


def test_files_are_written_once(two):
    """The history on disk has each step once, and one checkpoint is left."""
    for name in ("PPO", "pairs"):
        rows = pd.read_csv(two / "runs" / name / "history.csv")
        assert rows.step.is_unique and len(rows) == len(pd.read_csv(two / f"{name}.csv"))
        assert training.newest_checkpoint(two / "runs" / name) is not None


def test_both_killed_they_go_on_to_the_same_end(tmp_path):
    with pytest.raises(RuntimeError, match="on 2 processes ended with"):
        train_on_two(tmp_path, ["SFT"], "5")
    assert (tmp_path / "runs" / "SFT" / "checkpoint-3").exists()
    assert not (tmp_path / "SFT.csv").exists()
    train_on_two(tmp_path, ["SFT"])
    assert_same(tmp_path, "SFT", *TRAININGS["SFT"](None))


# --- in shards -------------------------------------------------------------------------------------

IN_SHARDS = ("SFT", "SFT of tied embeddings", "SFT of adapters")


@pytest.fixture
def as_on_gpus(monkeypatch):
    """accelerate makes shards on GPUs only; torch makes the same ones here."""
    monkeypatch.setenv("FEEDBACK_SHARDS", "1")
    monkeypatch.setenv("AS_ON_GPUS", "1")


def test_fine_tuning_in_shards_ends_as_one_process(tmp_path, as_on_gpus):
    train_on_two(tmp_path, IN_SHARDS)
    for name in IN_SHARDS:
        assert_same(tmp_path, name, *TRAININGS[name](tmp_path / "alone" / name))


def test_a_killed_training_in_shards_goes_on(tmp_path, as_on_gpus):
    with pytest.raises(RuntimeError, match="on 2 processes ended with"):
        train_on_two(tmp_path, ["SFT"], "5")
    assert (tmp_path / "runs" / "SFT" / "checkpoint-3").exists()
    train_on_two(tmp_path, ["SFT"])
    assert_same(tmp_path, "SFT", *TRAININGS["SFT"](None))


def test_what_cannot_be_in_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_SHARDS", "1")
    with pytest.raises(RuntimeError, match="accelerate makes shards on GPUs only"):
        train_on_two(tmp_path / "a", ["SFT"])
    monkeypatch.setenv("AS_ON_GPUS", "1")
    with pytest.raises(RuntimeError, match="not encoder-decoders"):
        train_on_two(tmp_path / "b", ["SFT of an encoder-decoder"])
    assert not shards.wanted()  # one process holds everything


# --- the parts -------------------------------------------------------------------------------------


def test_one_process_has_the_whole_batch_and_waits_for_nobody():
    assert processes.world() == 1 and processes.is_main()
    assert [*range(5)][processes.share(5)] == [*range(5)]
    assert processes.joined([1, 2]) == [1, 2] and processes.once(max, 1, 2) == 2
    processes.wait()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("number", [2, 3])
def test_shares_are_even_and_lose_nothing(count, number, monkeypatch):
    shares = []
    for rank in range(number):
        state = type("State", (), {"num_processes": number, "process_index": rank})
        monkeypatch.setattr(processes, "PartialState", state)
        monkeypatch.setattr(processes, "alone", lambda: False)
        shares.append([*range(count)][processes.share(count)])
    assert sum(shares, []) == [*range(count)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size, times, world, expected", [
    (8, 1, 1, (8, 1)), (4, 4, 1, (4, 4)), (8, 1, 2, (4, 1)), (1, 4, 2, (1, 2)), (4, 3, 2, (3, 2)),
])  # fmt: skip
def test_an_optimizer_step_of_sft_keeps_its_rows(size, times, world, expected):
    arguments = {sft.SIZE: size, sft.ACCUMULATION: times}
    share = sft.divided(arguments, size, world)
    assert (share[sft.SIZE], share[sft.ACCUMULATION]) == expected
    assert world * expected[0] * expected[1] == size * times


def test_an_optimizer_step_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="= 3 rows an optimizer step are not divided by 2"):
        sft.divided({sft.SIZE: 3}, 3, 2)


def test_rows_that_are_accumulated_are_one_batch():
    """An encoder-decoder's loss is the mean over the tokens of the step, however many rows at once."""
    histories = [two_processes.train_sft("tiny-encoder-decoder", None, rows)[0] for rows in (6, 2)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-3, atol=1e-3)


def test_what_launch_runs_says_why_it_failed():
    with pytest.raises(RuntimeError, match="No module named .*nowhere"):
        launch("nowhere", "a", processes=2)


# --- the last net ----------------------------------------------------------------------------------


def test_rows_are_halved_for_good_where_memory_is_short():
    tried = []

    def attempt(rows):
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows

    at_once = training.RowsAtOnce(8)
    with pytest.warns(UserWarning, match="with 4 rows at once"):
        assert at_once.run(attempt) == 2
    assert at_once.run(attempt) == 2 and tried == [8, 4, 2, 2]
    with pytest.raises(ZeroDivisionError):
        at_once.run(lambda rows: 1 / 0)


@pytest.mark.filterwarnings("ignore:GPU memory")
def test_one_row_that_does_not_fit_ends_the_run():
    def attempt(rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="reached zero"):
        training.RowsAtOnce(2).run(attempt)
    with pytest.raises(torch.OutOfMemoryError):
        training.RowsAtOnce(1).run(attempt)


@pytest.mark.filterwarnings("ignore:GPU memory")
@pytest.mark.parametrize("name", ["PPO", "segments", "conditioning"])
def test_a_training_that_ran_out_of_memory_ends_as_one_that_did_not(name, monkeypatch):
    """The first backward pass of the run fails after it has left gradients."""
    whole, _ = TRAININGS[name](None)
    real, calls = torch.Tensor.backward, []

    def runs_out(loss, *arguments, **options):
        real(loss, *arguments, **options)
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "backward", runs_out)
    again, _ = TRAININGS[name](None)
    assert len(calls) > 2
    pd.testing.assert_frame_equal(again, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:GPU memory")
def test_sft_starts_again_from_the_first_weights_with_fewer_rows_at_once():
    class OnGpu(torch.nn.Linear):
        device = torch.device("cuda")

    model = OnGpu(2, 1)
    start, tried = model.weight.detach().clone(), []

    def attempt(rows):
        assert torch.equal(model.weight, start)
        tried.append(rows)
        model.weight.data += 1
        if rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    sft._with_less_at_once(attempt, model, {sft.SIZE: 4})
    assert tried == [4, 2, 1] and torch.equal(model.weight, start + 1)
