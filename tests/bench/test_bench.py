"""The machinery of `python -m lib bench`, on tiny models; nothing here depends on how fast it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import cases, measure, report
from lib import encoding, logprobs
from lib.course import cli as command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records():
    """Every benchmark once, at the tiny size."""
    return {name: measure.measure(name, make("tiny"), 1) for name, make in cases.BENCHMARKS.items()}


@pytest.mark.parametrize("name", cases.BENCHMARKS)
def test_a_record_says_what_made_it_and_both_sides_did_useful_work(records, name):
    record = records[name]
    assert {"device", "versions", "commit", "dtype", "date", "ceilings"} <= set(record)
    assert all(value > 1e6 for value in record["ceilings"].values())
    sides = [run["side"] for run in record["runs"]]
    assert len(sides) >= 2 and "ours" in sides
    for run in record["runs"]:
        assert run["units"] > 0 and run["seconds"] > 0
    table = measure.summary(record)
    assert table["side"].iloc[0] == "ours" and table["ratio"].iloc[0] == 1
    assert (table["share"] > 0).all()
    assert record["name"] in measure.to_text(record) and record["what"] in measure.to_text(record)
    json.dumps(record, allow_nan=False)


def by_hand() -> dict:
    """Two rounds in which ours needs 1 s and 2 s, and the peer 4 s and 4 s, for 100 units."""
    runs = [
        {"round": number, "side": side, "seconds": seconds, "memory": 5e6, "units": 100,
         "flops": 50.0, "moved": 20.0}
        for number, side, seconds in [(1, "ours", 1), (1, "peer", 4), (2, "peer", 4), (2, "ours", 2)]
    ]  # fmt: skip
    rest = {"name": "x", "unit": "tokens", "what": "w", "limit": None, "goal": 2.5}
    rest["sides"] = ["ours", "peer"]
    return {**rest, "ceilings": {"flops_per_s": 100.0, "bytes_per_s": 100.0}, "runs": runs}


def test_ratio_rate_and_share_by_hand():
    ours, peer = measure.summary(by_hand()).to_dict("records")
    assert ours["rate"] == 75 and peer["rate"] == 25
    assert (peer["ratio"], peer["low"], peer["high"], peer["n"]) == (3, 2, 4, 2)
    assert peer["share"] == 0.125 and ours["share"] == 0.375  # 0.5 s of arithmetic at the least
    limited = by_hand() | {"limit": 150}
    assert measure.summary(limited)["share"].iloc[0] == 0.5


def test_linear_time_and_flat_memory_are_recognised():
    growth = [{"size": n, "seconds": n / 10, "memory": 1e6 + n} for n in (10, 100, 1000)]
    record = {"name": "x", "growth": growth, "grows": "texts"}
    fit = measure.growth_fit(record)
    assert fit["time_exponent"] == pytest.approx(1) and fit["memory_spread"] == 990
    assert "1,000 texts: time ~ size^1.00" in measure.growth_text(record)


def test_growth_is_measured_apart(capsys):
    record = measure.grow("score", cases.BENCHMARKS["score"]("tiny"))
    assert [row["size"] for row in record["growth"]] == [40, 800]
    assert "score, 800 texts: " in capsys.readouterr().out
    declared = [name for name, make in cases.BENCHMARKS.items() if make("tiny").growth]
    assert declared == cases.WITH_GROWTH
    goals = [name for name, make in cases.BENCHMARKS.items() if make("tiny").goal]
    assert goals == cases.WITH_GOAL


def test_a_goal_is_met_by_the_median_over_the_first_peer():
    assert "peer: met (3.00 [2.00, 4.00], n = 2)" in measure.decision(by_hand())
    assert "peer: missed" in measure.decision(by_hand() | {"goal": 3.1})


def test_every_run_is_printed_and_no_round_begins_that_would_end_too_late(capsys, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda dtype: {})
    side = {"ours": lambda: lambda: measure.Work(1.0), "peer": lambda: lambda: measure.Work(1.0)}
    benchmark = measure.Benchmark("tokens", 1.0, "nothing", side)
    assert len(measure.measure("x", benchmark, 4, seconds=60)["runs"]) == 8
    assert "x, warm-up, peer: 0.0 s\nx, warm-up, ours" in capsys.readouterr().out
    assert len(measure.measure("x", benchmark, 4, seconds=0)["runs"]) == 2


def test_peak_memory_sees_what_was_freed_again():
    if not measure.PeakMemory.RESET.exists():
        pytest.skip("no resident peak on this system")
    with measure.PeakMemory() as memory:
        torch.ones(40_000_000).sum()
    assert 150e6 < memory.rise < 250e6
    with measure.PeakMemory() as memory:
        torch.ones(10).sum()
    assert memory.rise < 100e6


def test_the_peer_of_logprob_computes_the_same_numbers():
    from trl.trainer.utils import add_fused_lm_head

    model, tokenizer = cases.load("tiny")
    rng = np.random.default_rng(0)
    prompts, responses = (
        [rng.integers(6, 90, n).tolist() for n in sizes] for sizes in ([3, 9, 1], [5, 2, 30])
    )
    ours = logprobs.token_log_probs(model, prompts, responses)
    add_fused_lm_head(model)
    theirs = cases._trl_log_probs(model, tokenizer.pad_token_id, prompts, responses, 2)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_peer_of_sample_counts_tokens_up_to_the_end():
    model, tokenizer = cases.load("tiny")
    end = tokenizer.eos_token_id
    model.get_output_embeddings().weight.data[end] *= 30  # sometimes the end, else anything
    rows = cases._generated(model, tokenizer, cases.articles(6, "tiny"), 4, 3, 8)
    assert len(rows) == 24 and len({len(row) for row in rows}) > 1
    assert all(end not in row[:-1] for row in rows)


def test_separate_models_start_as_one_policy():
    fresh, prompts, config = cases._rl("tiny", train="top", samples_per_prompt=1)
    arrangement = cases._Separate(*fresh(), config)
    ids, seen = encoding.pad_rows([[7, 8, 9, 10], [7, 8, 9, 11]], 0, "left")
    policy, reference = (
        arrangement.forward(model, ids, seen, 2)[0]
        for model in (arrangement.policy, arrangement.reference)
    )
    torch.testing.assert_close(policy, reference)
    before = [p.clone() for p in arrangement.policy.parameters()]
    assert arrangement.step(prompts[: config.prompts_per_step]) > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, arrangement.policy.parameters(), strict=True)
    )


def test_the_command_keeps_records_and_refuses_unknown_names(tmp_path, capsys):
    kept = tmp_path / "one.json"
    arguments = ["bench", "logprob", "--size", "tiny", "--rounds", "1", "--json", str(kept)]
    assert command.main(arguments) == 0
    assert json.loads(kept.read_text())[0]["name"] == "logprob"
    assert "logprob" in capsys.readouterr().out
    assert command.main(["bench", "nosuch"]) == 2
    assert "allowed: sample" in capsys.readouterr().err
    assert command.main(["bench", "logprob", "--size", "tiny", "--rounds", "0"]) == 2
    assert command.main(["bench", "score", "--size", "tiny", "--growth", "--json", str(kept)]) == 0
    assert json.loads(kept.read_text())[0]["growth"]


def test_the_command_without_a_checkout_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    assert command.main(["bench", "logprob"]) == 2
    assert "git clone" in capsys.readouterr().err


def test_the_course_table_shows_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    run = {"notebook": "10_x", "status": "finished", "wall_seconds": 90, "device": "CPU"}
    run |= {"peak_memory_bytes": 2e9, "cpu_count": 2}
    for name, status in (("10_x", "finished"), ("11_y", "failed")):
        folder = tmp_path / "runs" / "demo" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run | {"status": status}))
    assert report.course_table().count("\n") == 2
    assert "| 10_x | 1.5 min | 2.0 GB | CPU, 2 cores |" in report.course_table()


def test_the_figure_shows_every_peer(records):
    figure = report.figure([record | {"device": "here"} for record in records.values()])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == sum(len(measure.summary(r)) - 1 for r in records.values())


def test_the_page_on_speed_shows_the_kept_records():
    table, page = report.speed_table(report.stored()), (ROOT / "docs" / "speed.md").read_text()
    assert table.count("\n") > len(cases.BENCHMARKS)
    assert table in page, "put what `python -m lib bench table` prints into docs/speed.md"


@pytest.mark.parametrize("size", ["real ", "", "demo"])
def test_unknown_sizes_are_refused(size):
    with pytest.raises(ValueError, match="allowed: real, quick, tiny"):
        cases.load(size)
