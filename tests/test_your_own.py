"""docs/your_own.md: every block runs, one after the other, in a folder with a reader's own things."""

import re
from pathlib import Path

from conftest import WORDS, completion

from lib import models
from lib.course import notebooks

PAGE = (Path(__file__).parents[1] / "docs" / "your_own.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, scripted, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    Path("mine.txt").write_text(
        "the cat\nthe dog\na mat\nyou are nice\nthe cat sat\na dog ran on\n"
    )
    rows = [f"Say {word}.,,{word} it is,{score}" for score, word in enumerate(WORDS[:7], start=1)]
    Path("ratings.csv").write_text("\n".join(["instruction,input,response,score", *rows]) + "\n")
    models.save(*models.build_tiny_model("tiny", words=WORDS), "my_model")
    scope = {"address": scripted(lambda body: completion("(a)")).url}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        assert len(block.splitlines()) <= 11
        # the assets are a download: here a tiny model and a word list take their places
        exec(block.replace('"policy"', '"my_model"').replace('"hate"', '"lexicon-insults"'), scope)
    assert len(scope["history"]) == 2 and (tmp_path / "work" / "history.csv").exists()
    assert scope["scores"].shape == (7,) and scope["scores"].std() > 0
    assert "(a)" in capsys.readouterr().out
    assert scope["again"].num_parameters() == scope["policy"].num_parameters()


def test_the_page_says_which_notebooks_have_which_parameters():
    rows = re.findall(r"(?m)^\| ((?:`[A-Z_]+`(?:, )?)+) \| ([\d, ]+) \|", PAGE)
    rows = [(name, numbers) for names, numbers in rows for name in re.findall("[A-Z_]+", names)]
    assert len(rows) == 14
    has = {
        path.stem[:2]: notebooks.read_parameters(path)
        for path in notebooks.find_notebooks().values()
    }
    for name, listed in rows:
        assert listed.split(", ") == [number for number in has if name in has[number]], name
