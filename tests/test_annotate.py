"""The annotation pages: what Python builds and takes back, and both pages driven in headless Chromium."""

import copy
import html
import json
import re
import shutil

import pytest

from lib import annotate, runtime, sft
from lib.course import cli as command_line
from lib.papers.fine_grained import schema as qa

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
SAMPLE = runtime.project_root() / "data" / "samples" / "qa_feedback.json"
EVIL = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">'
TEXT = "The \U0001f600 mill was built in 1790. It was built in 1790. Some pig runs it."


def item(answer=TEXT, question="When was the mill built?"):
    passages = [["Mill", "The mill was built in 1791.", "It grinds flour."], ["Pig", "Pigs sleep."]]
    answers = [answer, "In 1791.", "Long ago.", "In 1790, they say."]
    return {"question": question, "passages": passages, "gold": "In 1791."} | dict(
        zip(qa.PREDICTIONS, answers, strict=True)
    )


@pytest.fixture
def records():
    return qa.load_feedback(SAMPLE)


# --- the Python side -----------------------------------------------------------------------------


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


def test_frame_for_notebooks_escapes_the_page():
    shown = annotate.show(annotate.build([item()])).data
    assert shown.count("<iframe") == 1 and "<script" not in shown and "srcdoc=" in shown


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(items, kind, **context options) -> a page from a file, watched for errors and requests."""
    contexts = []

    def open_it(items, kind="spans", **options):
        path = annotate.write(items, tmp_path / f"{kind}.html", kind)
        context = chromium.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda r: page.faults.append(r.url) if "http" in r.url[:5] else None)
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        assert not [fault for page in context.pages for fault in page.faults]
        context.close()


def exported(page, path):
    with page.expect_download() as found:
        page.click("#export")
    found.value.save_as(path)
    return path


def drag(page, first, last):
    """Drag with the mouse from inside one word to inside another (not at the very middle of a letter)."""
    for word, act in ((first, page.mouse.down), (last, page.mouse.up)):
        page.locator(f'#answer [data-i="{word}"]').scroll_into_view_if_needed()
        box = page.locator(f'#answer [data-i="{word}"]').bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2, steps=4)
        act()
    page.wait_for_selector(f'#answer [data-i="{last}"].picked')


def chosen(page, kind):
    page.check(f"#panel input[value={kind}]")


def label_everything(page):
    """Record 1: a wrong fact, a repetition, an unverifiable sentence, a missing answer, a correction."""
    drag(page, 5, 6)
    assert page.inner_text("#picked") == "Selected: in 1790."
    page.click("#label")
    chosen(page, "Wrong-Grounding")
    page.click("#add")
    assert "passage" in page.inner_text("#wrong")
    page.select_option("#ground-passage", "1")
    page.check("input[name=ground-sentence][value='1']")
    page.click("#add")

    drag(page, 6, 8)
    assert "overlaps with label 1" in page.inner_text("#message")
    assert page.is_disabled("#label")

    drag(page, 7, 11)
    page.click("#label")
    chosen(page, "Redundant")
    page.fill("#earlier", "not in the answer")
    page.click("#add")
    assert "letter by letter" in page.inner_text("#wrong")
    page.fill("#earlier", "was built in 1790.")
    page.click("#add")

    drag(page, 15, 12)  # backwards
    page.click("#label")
    chosen(page, "Unverifiable")
    page.click("#add")
    assert "every passage" in page.inner_text("#wrong")
    page.check("input[name=looked]")
    page.click("#add")

    page.click("text=Add missing information >> nth=0")
    page.check("#miss input[value=Missing-Answer]")
    page.select_option("#miss-passage", "1")
    page.check("input[name=miss-sentence][value='1']")
    page.click("#miss button")
    page.click("#submit", force=True)
    assert "the corrected answer is unchanged" in page.inner_text("#message")
    page.fill("#corrected", "The \U0001f600 mill was built in 1791.")


def test_select_label_reload_export_validate_train(open_page, tmp_path, tiny):
    items = [item(), item(question="And who?")]
    page = open_page(items)
    label_everything(page)
    page.reload()
    assert "Continued" in page.inner_text("#saved")
    assert page.locator("#spans li").count() == 3 and page.locator("#missing li").count() == 1
    assert page.input_value("#corrected").endswith("1791.")
    page.click("#submit", force=True)
    assert page.inner_text("#counted") == "1 of 2 finished"
    assert page.inner_text("#question") == "And who?"
    page.reload()
    assert page.inner_text("#question") == "And who?"
    page.check("input[name=clean]")
    page.click("#submit", force=True)

    path = exported(page, tmp_path / "out.json")
    records = annotate.import_annotations(path, items)
    assert records == json.loads(page.input_value("#rawtext", timeout=1000))
    first, second = (r["feedback"] for r in records)
    texts = [TEXT[e["start"] : e["end"]] for e in first["errors"]]
    assert texts == ["in 1790.", "It was built in 1790.", "Some pig runs it."]
    kinds = [e["error type"] for e in first["errors"]]
    assert kinds == ["Wrong-Grounding", "Redundant", "Unverifiable"]
    source = {"passage_id": 1, "sentence_id": [1]}
    assert json.loads(first["errors"][0]["explanation"]) == source
    assert first["missing-info"] == [{"error type": "Missing-Answer", **source}]
    assert second == {"errors": [], "missing-info": [], "corrected-prediction": TEXT}
    for before, after in zip(items, records, strict=True):
        assert before == {k: v for k, v in after.items() if k != "feedback"}

    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    prompts = [
        qa.fit_prompt(tokenizer, r["question"], qa.passages_of(r), "", max_tokens=64)
        for r in records
    ]
    corrected = [" " + r["feedback"]["corrected-prediction"] for r in records]
    rows = sft.encode_completions(tokenizer, prompts, corrected)
    history = sft.train_sft(model, tokenizer, rows, max_steps=1, learning_rate=1e-2)
    assert history.loss.iloc[0] > 0
    assert any(
        not a.equal(b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True)
    )


def test_import_for_review_edit_and_undo(open_page, records, tmp_path):
    bare = [{k: v for k, v in r.items() if k not in ("feedback", "preference")} for r in records]
    page = open_page(bare)
    path = tmp_path / "given.json"
    path.write_text(json.dumps([*records[:4], item()]), encoding="utf-8")
    page.set_input_files("#import", path)
    page.wait_for_selector("text=4 records imported, 1 of other items left out")
    assert page.inner_text("#counted") == "4 of 10 finished"
    back = annotate.import_annotations(exported(page, tmp_path / "out.json"), bare)
    assert [r["feedback"] for r in back] == [r["feedback"] for r in records[:4]]

    page.click("#spans li >> nth=1 >> button")
    assert page.inner_text("#counted") == "3 of 10 finished"
    page.click("#undo")
    assert page.inner_text("#counted") == "0 of 10 finished"

    broken = copy.deepcopy(records[:2])
    broken[1]["feedback"]["errors"][0]["start"] += 1
    path.write_text(json.dumps(broken), encoding="utf-8")
    page.set_input_files("#import", path)
    page.wait_for_selector("text=Nothing was imported: record 2: feedback.errors[0]")
    assert page.inner_text("#counted") == "0 of 10 finished"


def test_annotated_records_open_for_review(open_page, records, tmp_path):
    for kind, field in annotate.KINDS.items():
        page = open_page(records, kind)
        assert page.inner_text("#counted") == "10 of 10 finished"
        path = exported(page, tmp_path / f"{kind}.json")
        back = annotate.import_annotations(path, records, kind)
        assert [r[field] for r in back] == [r[field] for r in records]


def test_markup_in_texts_does_nothing(open_page, tmp_path):
    evil = item(answer=f"{EVIL} tail", question=EVIL)
    evil["passages"] = [[EVIL, EVIL]]
    evil |= {name: f"{EVIL} {name}" for name in qa.PREDICTIONS[1:]} | {"gold": EVIL}
    for kind in annotate.KINDS:
        page = open_page([evil], kind)
        if kind == "spans":
            page.click('#answer [data-i="0"]')
            page.click("#label")
            chosen(page, "Irrelevant")
            page.click("#add")
            page.fill("#corrected", EVIL)
        assert EVIL in page.inner_text("#main")
        assert page.locator("#main img, #main script").count() == 0
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None
        # and if markup did get in, the page's policy would still stop it
        page.evaluate("html => { document.body.insertAdjacentHTML('beforeend', html) }", EVIL)
        page.wait_for_timeout(200)
        assert page.evaluate("window.hacked") is None


def test_comparison_names_the_conflicting_triple(open_page, tmp_path):
    record = item()
    page = open_page([record], "compare")

    def say(pair, value):
        page.check(f"input[name=pair{pair}][value='{value}']")

    say(0, 1)
    assert "Not compared yet: A and C; A and D" in page.inner_text("#left")
    for pair, value in enumerate((1, 2, 1, 1, 1, 1)):  # A > B, C > A, B > C: a circle
        say(pair, value)
    told = page.inner_text("#left")
    assert "Answers A, B and C contradict each other: A over B, C over A, B over C." in told
    page.click("#submit", force=True)
    assert page.inner_text("#counted") == "0 of 1 finished"
    page.reload()
    assert "A, B and C contradict" in page.inner_text("#left")
    say(1, 1)
    page.click("#submit", force=True)
    path = exported(page, tmp_path / "out.json")
    (found,) = annotate.import_annotations(path, [record], "compare")
    order = annotate.display_order(record)  # A, B, C, D were ranked in this order
    for (a, b), value in zip(qa.PAIRS, found["preference"], strict=True):
        assert value == (1 if order.index(a) < order.index(b) else 2)


def test_page_and_library_agree_on_conflicts(open_page):
    page = open_page([item()], "compare")
    states = [[(n // 3**i) % 3 for i in range(6)] for n in range(3**6)]
    found = page.evaluate("states => states.map(conflicts)", states)
    assert found == [[list(t) for t in qa.conflicts(state)] for state in states]


def test_keyboard_alone_is_enough(open_page, tmp_path):
    page = open_page([item()])
    keys = page.keyboard

    def tab_to(selector):
        for _ in range(60):
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            keys.press("Tab")
        raise AssertionError(f"{selector} cannot be reached with Tab")

    tab_to("#answer .word")
    for key in ("End", "ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowRight"):
        keys.press(key)
    assert page.inner_text("#picked") == "Selected: pig runs"
    keys.press("1")
    assert page.evaluate("document.activeElement.value") == "Irrelevant"
    keys.press("Enter")
    assert page.inner_text("#spans li span >> nth=0").endswith("Irrelevant: “pig runs”")
    tab_to("#corrected")
    keys.press("End")
    keys.type(" Corrected.")
    tab_to("#submit")
    keys.press("Enter")
    assert page.inner_text("#counted") == "1 of 1 finished"
    page.focus("#export")
    with page.expect_download() as download:
        keys.press("Enter")
    download.value.save_as(tmp_path / "out.json")
    (found,) = annotate.import_annotations(tmp_path / "out.json", [item()])
    (error,) = found["feedback"]["errors"]
    assert TEXT[error["start"] : error["end"]] == "pig runs"


def test_every_control_has_a_name(open_page, records):
    unnamed = """() => [...document.querySelectorAll("button, input, select, textarea, progress")]
      .filter(e => e.offsetParent && !(e.textContent || "").trim() && !e.labels?.length
                   && !e.getAttribute("aria-label")).map(e => e.outerHTML)"""
    for kind in annotate.KINDS:
        page = open_page(records, kind)
        for detail in page.locator("details:visible > summary").all():
            detail.click()
        if kind == "spans":
            page.click("#answer .word:not(mark .word) >> nth=0")
            page.click("#label")
            chosen(page, "Wrong-Grounding")
        assert page.evaluate(unnamed) == []
        assert page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", annotate.KINDS)
def test_a_phone_shows_it_without_sideways_scrolling_and_with_contrast(open_page, kind, scheme):
    long = item(answer="word " * 60 + "x" * 300, question="Why? " * 40)
    view = {"width": 375, "height": 700}
    page = open_page([long], kind, viewport=view, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    contrast = """() => {
      const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
      const root = getComputedStyle(document.documentElement);
      const probe = document.body.appendChild(document.createElement("i"));
      const value = (name) => { probe.style.color = `var(${name})`;
        return light(getComputedStyle(probe).color); };
      const on = (a, b) => { const [x, y] = [value(a), value(b)].sort((p, q) => q - p);
        return (x + .05) / (y + .05); };
      const backs = ["--page", "--box", "--pick", "--c0", "--c1", "--c2", "--c3", "--c4"];
      const fronts = ["--soft", "--link", "--good", "--bad"];
      return [...backs.map(b => on("--text", b)), ...fronts.map(f => on(f, "--page"))];
    }"""
    assert min(page.evaluate(contrast)) >= 4.5


def test_without_storage_the_page_says_so_and_works(open_page, chromium, tmp_path):
    page = open_page([item()])
    page.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})"
    )
    page.reload()
    assert "does not save here" in page.inner_text("#saved")
    page.check("input[name=clean]")
    page.click("#submit", force=True)
    assert len(annotate.import_annotations(exported(page, tmp_path / "o.json"), [item()])) == 1


def test_inside_a_notebook_output(open_page, tmp_path):
    """The frame that Jupyter and Colab show works like the page itself, markup in texts included."""
    page = open_page([item()])
    outer = tmp_path / "output.html"
    outer.write_text(annotate.show(annotate.build([item(answer=EVIL)])).data, encoding="utf-8")
    page.goto(outer.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("input[name=clean]").check()
    frame.locator("#submit").click()
    assert frame.locator("#counted").inner_text() == "1 of 1 finished"
    assert all(f.evaluate("window.hacked") is None for f in page.frames)
