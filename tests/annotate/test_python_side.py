"""The annotation pages without a browser: what Python builds, shows in notebooks, and takes back."""

import copy
import html
import json
import re

import pytest
from acts import EVIL, SAMPLE, item

from lib import annotate
from lib.course import cli as command_line
from lib.papers.fine_grained import schema as qa


def test_the_page_is_one_offline_file_that_never_parses_data_as_markup(records):
    for kind in annotate.KINDS:
        page = annotate.build(records, kind)
        assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
        assert "innerHTML" not in page and "eval(" not in page and "document.write" not in page
        assert page.count("<script") == 2 and "default-src 'none'" in page


def test_texts_cannot_leave_the_json(records):
    for text in ("</script><script>x()</script>", "<!--<script>", "]]>", "\u2028", "{{ 7*7 }}"):
        page = annotate.build([item(answer=f"{text} end")], "spans")
        assert page.count("<script") == 2 and page.count("</script>") == 2
        stored = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
        assert json.loads(stored)["items"][0]["record"]["prediction 1"] == f"{text} end"


def test_build_refuses_what_cannot_be_annotated():
    with pytest.raises(ValueError, match="four answers"):
        annotate.build([{"instruction": "i", "input": "", "responses": ["a"]}], "compare")
    with pytest.raises(ValueError, match="twice"):
        annotate.build([item(), item()])
    with pytest.raises(ValueError, match="spans, compare"):
        annotate.build([item()], "ranks")
    with pytest.raises(ValueError, match="item 1, question"):
        annotate.build([{"passages": []}])


def test_command_line(tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ["annotate", str(SAMPLE), "--out", str(out), "--kind", "compare"]
    assert command_line.main(arguments) == 0 and "10 records" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert command_line.main(["annotate", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_import_checks_texts_and_consistency(records, tmp_path):
    path = tmp_path / "out.json"

    def read(changed, kind="spans"):
        path.write_text(json.dumps(changed))
        return annotate.import_annotations(path, records, kind)

    assert read(records[:3]) == records[:3]
    other = copy.deepcopy(records[0])
    other["prediction 1"] += " More."
    with pytest.raises(ValueError, match=r"out.json, record 2: is none of these items"):
        read([records[1], other])
    with pytest.raises(ValueError, match="twice"):
        read([records[0], records[0]])
    other = copy.deepcopy(records[0])
    other["feedback"]["corrected-prediction"] = other["prediction 1"]
    with pytest.raises(ValueError, match="labels but no correction"):
        read([other])
    with pytest.raises(ValueError, match="answers 1, 2, 3 contradict"):
        read([records[0] | {"preference": [1, 2, 1, 1, 1, 1]}], "compare")
    with pytest.raises(ValueError, match="preference"):
        read([{k: v for k, v in records[0].items() if k != "preference"}], "compare")


def test_display_order_is_balanced_and_reproducible():
    many = [item(question=f"question {i}") for i in range(400)]
    orders = [annotate.display_order(record) for record in many]
    assert orders == [annotate.display_order(record) for record in many]
    for answer in range(4):
        assert 60 < sum(order[0] == answer for order in orders) < 140


def test_record_is_shown_as_text_and_spans_are_named():
    record = item(answer=f"{EVIL} A pig.")
    start = record["prediction 1"].index("A pig.")
    error = {"error type": "Irrelevant", "explanation": "", "start": start, "end": start + 6}
    record["feedback"] = {
        "errors": [error],
        "missing-info": [],
        "corrected-prediction": EVIL,
    }
    shown = annotate.show_record(record).data
    assert "<script" not in shown and "<img" not in shown and html.escape(EVIL) in shown
    assert re.search(r"\[IRR</b> A pig\.<b>\]", shown)


def test_a_page_in_a_notebook_is_seen_where_frames_and_scripts_are_taken_out(tmp_path):
    """GitHub and notebooks that are not trusted strip frames: an excerpt and the file's place remain."""
    path = annotate.write([item(answer=EVIL), item()], tmp_path / "page.html")
    shown = annotate.show(path)
    assert shown.data.count("<iframe") == 1 and "<script" not in shown.data
    assert "srcdoc=" in shown.data and "<img" not in shown.data
    still = re.sub("<iframe.*?</iframe>", "", shown.data, flags=re.S)
    for text in (
        "record 1 of 2",
        "When was the mill built?",
        html.escape(EVIL),
        "wrong fact",
        str(path),
    ):
        assert text in still
    assert "<a href=" in still and str(path) in repr(shown)
    compared = annotate.show(annotate.write([item()], tmp_path / "c.html", "compare")).data
    assert all(
        name in compared.partition("<iframe")[0] for name in ("six pairs", "In 1791.", "Long ago.")
    )
    with pytest.raises(ValueError, match="the path that `write` returns"):
        annotate.show(annotate.build([item()]))


def test_a_page_of_the_project_is_named_from_its_root(tmp_path, monkeypatch):
    """What is published must not name the folders of the machine it ran on."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = annotate.show(annotate.write([item()], tmp_path / "runs" / "page.html"))
    assert str(tmp_path) not in shown.data + repr(shown) and "runs/page.html" in repr(shown)


# --- guidelines ----------------------------------------------------------------------------------


def test_guidelines_have_an_example_for_each_type_and_are_replaceable(tmp_path, capsys):
    spans = html.unescape(annotate.build([item()]))
    for _, _, title, _ in annotate.TYPES:
        (line,) = re.findall(rf"<li>{title}: (.*?)</li>", spans)
        assert line.count('"') >= 2, f"{title} has no example"
    own = tmp_path / "own.txt"
    own.write_text(
        "# House rules\n- Be <b>kind</b>.\n- Be brief.\n\nThat is all.\n", encoding="utf-8"
    )
    for kind in annotate.KINDS:
        assert 'id="guidelines"' in annotate.build([item()], kind)
        out = tmp_path / f"{kind}.html"
        arguments = ["annotate", str(SAMPLE), "--out", str(out), "--kind", kind]
        assert command_line.main([*arguments, "--guidelines", str(own)]) == 0
        page = out.read_text(encoding="utf-8")
        assert "<h2>House rules</h2>" in page and "<p>That is all.</p>" in page
        assert "<ul><li>Be &lt;b&gt;kind&lt;/b&gt;.</li><li>Be brief.</li></ul>" in page
        assert "In short" not in page
    own.write_text(" \n")
    assert command_line.main([*arguments, "--guidelines", str(own)]) == 2
    assert "guidelines are empty" in capsys.readouterr().err
    assert command_line.main([*arguments, "--guidelines", str(tmp_path / "none.txt")]) == 2


# --- exports at the loaders ----------------------------------------------------------------------


def note(finished=True, **more):
    return {"annotator": "Ann", "seconds": 7, "finished": finished, "marks": {}} | more


def test_an_export_of_either_page_and_both_together_are_read(records, tmp_path):
    marked = [{k: v for k, v in r.items() if k != "preference"} for r in records]
    compared = [{k: v for k, v in r.items() if k != "feedback"} for r in records]
    marked = [r | {"annotation": {"feedback": note()}} for r in marked]
    compared = [r | {"annotation": {"preference": note(annotator="Bob")}} for r in compared]
    files = [tmp_path / "spans.json", tmp_path / "compare.json"]
    for path, exported in zip(files, (marked, compared[::-1]), strict=True):
        path.write_text(json.dumps(exported))
    assert qa.load_feedback(files[0]) == marked
    assert annotate.import_annotations(files[1], records, "compare") == compared[::-1]
    joined = qa.load_feedback(files, needed=qa.FIELDS)
    assert [{k: v for k, v in r.items() if k != "annotation"} for r in joined] == records
    notes = joined[0]["annotation"]
    assert notes["feedback"]["annotator"] == "Ann" and notes["preference"]["annotator"] == "Bob"
    assert len(qa.span_table(joined)) == len(qa.span_table(marked)) > 0
    assert qa.span_table(compared).empty and qa.preference_table(marked).empty
    agreed = qa.agreement(compared, compared, resamples=5)
    assert agreed.unit.tolist() == ["preference"] and agreed.value.tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("spans", lambda r: r.pop("feedback"), "feedback: must be given"),
        ("compare", lambda r: r.pop("preference"), "preference: must be given"),
        ("compare", lambda r: r.update(preference=[3] * 6), "preference: must be six of 1, 2, 0"),
        ("spans", lambda r: r["feedback"].update(errors=None), "feedback.errors: must be a list"),
        ("spans", lambda r: r.pop("passages"), "passages: must be a list"),
    ],
)
def test_a_bad_export_is_refused_by_file_record_and_field(records, tmp_path, kind, change, named):
    broken = copy.deepcopy(records[:2])
    change(broken[1])
    path = tmp_path / "out.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=f"out.json, line 1, record 2, .*{re.escape(named)}"):
        annotate.import_annotations(path, records, kind)
    neither = {k: v for k, v in records[1].items() if k not in qa.FIELDS}
    path.write_text(json.dumps([records[0], neither]))
    with pytest.raises(ValueError, match="record 2, feedback: must be given, or preference"):
        qa.load_feedback(path)
    with pytest.raises(
        ValueError, match=r"out.json, record 1, (feedback|preference): .*one of the files"
    ):
        path.write_text(json.dumps([records[0]]))
        qa.load_feedback([path, path])


def test_unfinished_records_of_an_export_are_left_out_aloud(records, tmp_path):
    bare = {k: v for k, v in records[1].items() if k not in qa.FIELDS}
    begun = bare | {"annotation": {"feedback": note(finished=False)}}
    path = tmp_path / "out.json"
    path.write_text(json.dumps([records[0], begun]))
    for read in (qa.load_feedback, lambda p: annotate.import_annotations(p, records)):
        with pytest.warns(UserWarning, match="out.json: 1 records are begun and not finished"):
            assert read(path) == [records[0]]
    path.write_text(json.dumps([begun]))
    with pytest.raises(ValueError, match="out.json: 1 records are begun.*finish some"):
        qa.load_feedback(path)
    chained = begun | {"preference": records[1]["preference"]}
    path.write_text(json.dumps([chained]))
    assert qa.load_feedback(path) == [chained]  # what is finished of it is there
