"""Both annotation pages, driven in headless Chromium as an annotator would."""

import copy
import itertools
import json
import re

import pytest
from acts import (
    EVIL,
    TEXT,
    choose,
    drag,
    exported,
    hidden_by_scrolling,
    item,
    label,
    labels,
    opened,
    reload,
    until,
)

from lib import annotate, sft
from lib.papers.fine_grained import schema as qa
from lib.papers.one_hour import annotator


def label_everything(page):
    """Record 1: a wrong fact, a repetition, an unverifiable sentence, a missing answer, a correction."""
    drag(page, 5, 6)
    assert page.inner_text("#picked") == "Selected: in 1790."
    page.click("#label")
    choose(page, "Wrong-Grounding")
    page.click("#add")
    assert "passage" in page.inner_text("#wrong")
    page.select_option("#ground-passage", "1")
    page.check("input[name=ground-sentence][value='1']")
    page.click("#add")

    drag(page, 6, 8)
    assert "overlaps with label 1" in page.inner_text("#picked")
    assert page.is_disabled("#label")

    drag(page, 7, 11)
    page.click("#label")
    choose(page, "Redundant")
    page.click("#add")
    assert "Choose a sentence, or drag" in page.inner_text("#wrong")
    drag(page, 3, 6, shown="repeated")
    page.click("#add")

    drag(page, 15, 12)  # backwards
    page.click("#label")
    choose(page, "Unverifiable")
    page.click("#add")
    assert "every passage" in page.inner_text("#wrong")
    page.check("input[name=looked]")
    page.click("#add")

    page.click("text=Add missing information >> nth=0")
    page.check("#miss input[value=Missing-Answer]")
    page.select_option("#miss-passage", "1")
    page.check("input[name=miss-sentence][value='1']")
    page.click("#miss button >> nth=0")
    page.click("#submit", force=True)
    assert "the corrected answer is unchanged" in page.inner_text("#finish-said")
    page.fill("#corrected", "The \U0001f600 mill was built in 1791.")


def test_select_label_reload_export_validate_train(open_page, tmp_path, tiny):
    items = [item(), item(question="And who?")]
    page = open_page(items)
    label_everything(page)
    reload(page)
    assert "Continued" in page.inner_text("#saved")
    assert page.locator("#spans li").count() == 3 and page.locator("#missing li").count() == 1
    assert page.input_value("#corrected").endswith("1791.")
    page.click("#submit", force=True)
    assert page.inner_text("#counted") == "1 of 2 finished"
    assert page.inner_text("#question") == "And who?"
    reload(page)
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
        assert before == {k: v for k, v in after.items() if k not in ("feedback", "annotation")}
    assert first["errors"][1]["explanation"] == "was built in 1790."

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

    page.click("#spans li >> nth=1 >> button >> nth=1")
    assert page.inner_text("#counted") == "3 of 10 finished"
    page.click("#undo")
    assert page.inner_text("#counted") == "4 of 10 finished"
    page.click("#undo")
    assert page.inner_text("#counted") == "0 of 10 finished"

    broken = copy.deepcopy(records[:2])
    broken[1]["feedback"]["errors"][0]["start"] += 1
    path.write_text(json.dumps(broken), encoding="utf-8")
    page.set_input_files("#import", path)
    page.wait_for_selector(
        "text=Nothing was imported from given.json: record 2: feedback.errors[0]"
    )
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
            choose(page, "Irrelevant")
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
    reload(page)
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
            choose(page, "Wrong-Grounding")
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
    reload(page)
    assert "does not save here" in page.inner_text("#saved")
    page.check("input[name=clean]")
    page.click("#submit", force=True)
    assert len(annotate.import_annotations(exported(page, tmp_path / "o.json"), [item()])) == 1


def test_inside_a_notebook_output(open_page, tmp_path):
    """The frame that Jupyter and Colab show works like the page itself, markup in texts included."""
    page = open_page([item()])
    outer = tmp_path / "output.html"
    shown = annotate.show(annotate.write([item(answer=EVIL)], tmp_path / "inner.html")).data
    outer.write_text(shown, encoding="utf-8")
    page.goto(outer.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("input[name=clean]").check()
    frame.locator("#submit").click()
    assert frame.locator("#counted").inner_text() == "1 of 1 finished"
    assert all(f.evaluate("window.hacked") is None for f in page.frames)
    covering = "document.elementFromPoint(innerWidth / 2, 300).tagName"
    assert page.evaluate(covering) == "IFRAME"  # it lies on the still excerpt
    outer.write_text(re.sub("<iframe.*</iframe>", "", shown, flags=re.S), encoding="utf-8")
    reload(page)
    assert (
        page.locator("text=Still excerpt").is_visible()
        and page.locator("text=inner.html").is_visible()
    )


# --- several tabs, people, machines --------------------------------------------------------------


def test_two_tabs_lose_nothing(open_page):
    """Each mark is kept from whichever tab it was made in; a tab's stale rest overwrites nothing."""
    items = [item(), item(question="And who?")]
    one = open_page(items)
    two = open_page(items, beside=one)
    label(one, 3, 4)
    two.wait_for_selector("#spans li")
    label(two, 12, 13, "Incoherent")
    two.fill("#corrected", "Written in tab two.")
    until(one, "document.querySelector('#corrected').value === 'Written in tab two.'")
    one.click("#next")  # the step that used to write the first tab's own state over the second's
    one.check("input[name=clean]")
    until(two, "document.querySelector('#chooser').options[1].text.includes('begun')")
    for page in (one, two):
        reload(page)
        page.select_option("#chooser", index=0)
        assert [kind for kind, _ in labels(page)] == ["Irrelevant", "Incoherent"]
        assert page.input_value("#corrected") == "Written in tab two."
        page.select_option("#chooser", index=1)
        assert page.is_checked("input[name=clean]")


def test_tabs_that_write_at_the_same_moment_converge(open_page):
    """The later write holds only one tab's mark: the other tab gives back what it lacks."""
    one = open_page([item()])
    label(one, 3, 4)
    key = "Object.keys(localStorage).find((name) => name.endsWith(ITEMS[0].id))"
    before = one.evaluate(f"localStorage.getItem({key})")
    two = open_page([item()], beside=one)
    label(two, 12, 13)
    one.wait_for_selector("#spans li >> nth=1")
    # a table without tab two's mark, as if it had been read before that was written
    stale = "([key, text]) => { const t = JSON.parse(text); t.clean = { t: Date.now(), v: false };"
    stale += " keep(key, JSON.stringify(t)); }"
    one.evaluate(stale, [one.evaluate(key), before])
    until(one, f"localStorage.getItem({key}).includes('span:12-13')")
    reload(one)
    assert one.locator("#spans li").count() == 2


def test_what_another_tab_wrote_is_shown_when_this_one_saves(open_page):
    """The clock may save between another tab's write and the event that tells of it."""
    page = open_page([item()])
    page.evaluate("""() => localStorage.setItem(slot(ITEMS[0]), JSON.stringify({ "span:3-4":
      { t: 5, v: { from: 3, to: 4, type: "Irrelevant", earlier: "", source: null } } }))""")
    page.evaluate("save(ITEMS[0])")
    until(page, "document.querySelectorAll('#spans li').length === 1")


def test_merging_does_not_depend_on_the_order(open_page):
    page = open_page([item()], "compare")
    merged = """(tables) => { const all = {}; for (const t of tables) merge(all, t);
      return JSON.stringify(Object.entries(all).sort()); }"""
    tables = [
        {"pair0": {"t": 1, "v": 1}, "status": {"t": 5, "v": "done"}},
        {"pair0": {"t": 2, "v": None}, "pair1": {"t": 1, "v": 0}},
        {"pair0": {"t": 2, "v": 2}, "status": {"t": 4, "v": "begun"}},
    ]
    found = {page.evaluate(merged, list(order)) for order in itertools.permutations(tables)}
    assert len(found) == 1 and '"status",{"t":5,"v":"done"}' in found.pop()


def test_a_partial_export_moves_to_another_machine(open_page, tmp_path):
    """Finished and half-finished records go on elsewhere, and back, and what was done meanwhile stays."""
    items = [item(), item(question="And who?"), item(question="And why?")]
    home = open_page(items)
    home.fill("#who", "Ann")
    home.press("#who", "Enter")
    home.check("input[name=clean]")
    home.click("#submit")
    label(home, 3, 4)  # record 2, not finished
    path = exported(home, tmp_path / "monday.json")
    assert "1 finished record exported. 1 begun record came along" in home.inner_text("#message")
    with pytest.warns(UserWarning, match="1 records are begun"):
        (first,) = annotate.import_annotations(path, items)
    assert first["feedback"]["errors"] == [] and first["annotation"]["feedback"]["finished"]

    label(home, 12, 13)  # at home, after the export
    away = open_page(items)
    assert "2 records imported. You annotate as Ann now." in opened(away, path)
    assert away.inner_text("#counted") == "1 of 3 finished"
    away.click("#next")
    assert labels(away) == [["Irrelevant", "“was built”"]]
    away.click("#spans li button >> nth=0")
    choose(away, "Incoherent")
    away.click("#add")
    away.fill("#corrected", "Shorter.")
    away.click("#submit")
    away.check("input[name=clean]")
    away.click("#submit")
    path = exported(away, tmp_path / "tuesday.json")
    assert len(annotate.import_annotations(path, items)) == 3

    assert opened(home, path).startswith("3 records imported.")
    assert [kind for kind, _ in labels(home)] == ["Incoherent", "Irrelevant"]
    assert home.input_value("#corrected") == "Shorter."
    for _ in range(2):  # opening the same file again changes nothing
        opened(home, path)
        assert [kind for kind, _ in labels(home)] == ["Incoherent", "Irrelevant"]


def test_a_file_edited_by_hand_counts_as_it_reads(open_page, tmp_path):
    page = open_page([item()], "compare")
    for pair in range(6):
        page.check(f"input[name=pair{pair}][value='0']")
    assert "All six pairs are called equal" in page.inner_text("#left")
    page.click("#submit")
    path = exported(page, tmp_path / "out.json")
    (record,) = json.loads(path.read_text(encoding="utf-8"))
    record["preference"] = [1, 1, 1, 0, 0, 0]
    path.write_text(json.dumps([record]), encoding="utf-8")
    other = open_page([item()], "compare")
    opened(other, path)
    back = annotate.import_annotations(exported(other, tmp_path / "b.json"), [item()], "compare")
    assert back[0]["preference"] == [1, 1, 1, 0, 0, 0]
    record["annotation"]["preference"]["marks"]["pair0"] = {"t": 1, "v": 7}
    path.write_text(json.dumps([record]), encoding="utf-8")
    assert "record 1: annotation.preference.marks, pair0 does not fit" in opened(other, path)


def test_annotator_and_time_are_exported_and_people_kept_apart(open_page, tmp_path):
    items = [item(), item(question="And who?")]
    page = open_page(items)
    label(page, 3, 4)  # before a name is given
    page.fill("#who", "Ann")
    page.press("#who", "Enter")
    assert "labels made so far are yours" in page.inner_text("#message")
    page.evaluate("ticked -= 4000; moved = Date.now(); clock()")  # four seconds later
    page.fill("#corrected", "Shorter.")
    page.click("#submit")
    page.fill("#who", "Bob")
    page.press("#who", "Enter")
    assert "labels of Ann stay" in page.inner_text("#message")
    assert page.inner_text("#counted") == "0 of 2 finished"
    page.select_option("#chooser", index=0)
    page.check("input[name=clean]")
    page.click("#submit")
    (bob,) = annotate.import_annotations(exported(page, tmp_path / "bob.json"), items)
    page.fill("#who", "Ann")
    page.press("#who", "Enter")
    (ann,) = annotate.import_annotations(exported(page, tmp_path / "ann.json"), items)
    assert len(ann["feedback"]["errors"]) == 1 and bob["feedback"]["errors"] == []
    ann, bob = (record["annotation"]["feedback"] for record in (ann, bob))
    assert (ann["annotator"], bob["annotator"]) == ("Ann", "Bob")
    assert 4 <= ann["seconds"] < 60 and bob["seconds"] < ann["seconds"]
    reload(page)
    assert page.input_value("#who") == "Ann" and page.inner_text("#counted") == "1 of 2 finished"
    mixed = [*json.loads((tmp_path / "ann.json").read_text(encoding="utf-8"))]
    mixed += json.loads((tmp_path / "bob.json").read_text(encoding="utf-8"))
    (tmp_path / "mixed.json").write_text(json.dumps(mixed), encoding="utf-8")
    assert "the work of Ann and Bob" in opened(page, tmp_path / "mixed.json")


def test_a_second_tab_follows_the_name_given_in_the_first(open_page, tmp_path):
    one = open_page([item()])
    two = open_page([item()], beside=one)
    label(two, 3, 4)
    drag(two, 12, 13)
    two.click("#label")  # a form is open there
    one.fill("#who", "Ann")
    one.press("#who", "Enter")
    until(two, "document.querySelector('#who').value === 'Ann'")
    choose(two, "Incoherent")
    two.click("#add")
    reload(one)
    assert [kind for kind, _ in labels(one)] == ["Irrelevant", "Incoherent"]
    (entry,) = one.evaluate(
        "Object.keys(localStorage).filter((name) => name.endsWith(ITEMS[0].id))"
    )
    assert ":Ann:" in entry


def test_time_does_not_run_while_nobody_is_there(open_page):
    page = open_page([item()])
    page.evaluate("ticked -= 4000; moved = Date.now() - 130000; clock()")
    assert page.evaluate("seconds(marks[ITEMS[0].id])") < 1


def test_both_pages_in_turn_fill_one_record(open_page, tmp_path):
    page = open_page([item()])
    page.check("input[name=clean]")
    page.click("#submit")
    marked = annotate.read_items(exported(page, tmp_path / "spans.json"))
    page = open_page(marked, "compare")
    for pair in range(6):
        page.check(f"input[name=pair{pair}][value='0']")
    page.click("#submit")
    (record,) = qa.load_feedback(exported(page, tmp_path / "both.json"), needed=qa.FIELDS)
    assert record["annotation"].keys() == {"feedback", "preference"}


# --- labels: repetition, change, undo, start over ------------------------------------------------


def test_a_repetition_is_labelled_with_the_mouse_alone(open_page, tmp_path):
    page = open_page([item(answer="It was built in 1790. Pigs sleep. It was built in 1790.")])
    drag(page, 7, 11)
    page.click("#label")
    page.click("#panel >> text=Repetition")
    assert page.locator("#panel input[name=sentence]").count() == 2
    page.click("#panel >> text=It was built in 1790. >> nth=1")  # the first stands in the heading
    page.click("#add")
    assert page.inner_text("#spans li >> nth=0 >> span >> nth=0").endswith(
        "(repeats “It was built in 1790.”)"
    )
    page.click("#spans li button >> nth=0")  # or finer: words of the answer itself
    page.click('#answer [data-i="3"]')
    page.click('#answer [data-i="4"]')
    page.wait_for_selector('#answer [data-i="4"].repeated')
    assert page.inner_text("#earlier") == "It repeats: “in 1790.”" == page.inner_text("#picked")
    drag(page, 8, 9, shown="word")
    page.wait_for_selector("#picked >> text=must stand before")
    page.click("#add")
    page.fill("#corrected", "It was built in 1790. Pigs sleep.")
    page.click("#submit")
    (record,) = qa.load_feedback(exported(page, tmp_path / "out.json"))
    (error,) = record["feedback"]["errors"]
    assert (error["error type"], error["explanation"]) == ("Redundant", "in 1790.")


def test_a_label_changes_its_type_in_place(open_page):
    page = open_page([item()])
    label(page, 3, 4)
    page.click('#answer [data-i="3"]')  # a click on the label opens it
    assert page.is_checked("#panel input[value=Irrelevant]")
    choose(page, "Wrong-Grounding")
    page.select_option("#ground-passage", "2")
    page.check("input[name=ground-sentence][value='1']")
    page.click("#add")
    assert labels(page) == [["Wrong fact", "“was built” (passage 2, sentence 1)"]]
    page.click("#spans li button >> nth=0")
    assert page.input_value("#ground-passage") == "2"
    page.click("#cancel")
    page.focus('#answer [data-i="3"]')
    page.keyboard.press("5")
    page.keyboard.press("Enter")
    assert labels(page) == [["Incoherent", "“was built”"]]
    page.focus('#answer [data-i="3"]')
    page.keyboard.press("Delete")
    assert labels(page) == [] and "Undo brings it back" in page.inner_text("#picked")
    page.keyboard.press("Control+z")
    assert labels(page) == [["Incoherent", "“was built”"]]
    page.click("text=Add missing information >> nth=0")
    page.check("#miss input[value=Missing-Answer]")
    page.select_option("#miss-passage", "1")
    page.check("input[name=miss-sentence][value='1']")
    page.click("#miss button >> nth=0")
    page.select_option("#missing select", "Missing-Minor-Auxiliary")
    assert page.locator("#missing li").count() == 1
    assert page.input_value("#missing select") == "Missing-Minor-Auxiliary"
    page.click("#undo")
    assert page.input_value("#missing select") == "Missing-Answer"


def test_undo_and_redo_go_back_several_steps_and_over_records(open_page):
    items = [item(), item(question="And who?")]
    page = open_page(items)
    label(page, 3, 4)
    page.locator("#corrected").press_sequentially("Added ")  # one step, not six
    page.click("#spans li button >> nth=1")
    assert labels(page) == []
    page.click("#next")
    page.check("input[name=clean]")
    page.click("#undo")
    assert not page.is_checked("input[name=clean]") and "Undone: the tick" in page.inner_text(
        "#message"
    )
    page.click("#undo")  # the removal, shown where it happened
    assert page.inner_text("#question") == "When was the mill built?"
    assert labels(page) == [["Irrelevant", "“was built”"]]
    page.keyboard.press("Control+z")
    assert page.input_value("#corrected") == TEXT
    page.keyboard.press("Control+z")
    assert labels(page) == [] and page.is_disabled("#undo")
    for _ in range(4):
        page.click("#redo")
    assert page.inner_text("#question") == "And who?" and page.is_checked("input[name=clean]")
    assert page.is_disabled("#redo")


def test_start_over_one_record_and_all(open_page, records):
    page = open_page([item(), item(question="And who?")])
    for _ in range(2):
        page.check("input[name=clean]")
        page.click("#submit")
    assert page.inner_text("#counted") == "2 of 2 finished"
    page.click("#over")
    assert page.inner_text("#counted") == "1 of 2 finished"
    page.click("#restart")
    assert page.inner_text("#counted") == "0 of 2 finished"
    assert "start over" in page.inner_text("#message")
    page.click("#undo")
    page.click("#undo")
    assert page.inner_text("#counted") == "2 of 2 finished"
    page.click("#restart")
    reload(page)
    assert page.inner_text("#counted") == "0 of 2 finished"
    review = open_page(records[:2])  # over means: as the page came
    review.click("#spans li button >> nth=1")
    review.click("#restart")
    assert review.inner_text("#counted") == "2 of 2 finished"


def test_a_half_filled_form_is_not_dropped_silently(open_page):
    page = open_page([item(), item(question="And who?")])
    drag(page, 3, 4)
    page.click("#label")
    page.click("#next")
    assert page.inner_text("#question") == "When was the mill built?"
    assert "Add this first, or cancel it" in page.inner_text("#wrong")
    page.click("#cancel")
    page.click("text=Add missing information >> nth=0")
    page.check("#miss input[value=Missing-Answer]")
    page.click("#next")
    assert "Add this first" in page.inner_text("#missing-said")
    page.click("#miss button >> nth=1")
    page.click("#next")
    assert page.inner_text("#question") == "And who?"


# --- where the eye is ----------------------------------------------------------------------------


@pytest.mark.parametrize("view", [{"width": 375, "height": 667}, {"width": 1280, "height": 720}])
def test_messages_stand_where_the_eye_is(open_page, view):
    long = item(answer="It is said here. " * 60 + TEXT)
    page = open_page([long, item()], viewport=view)
    label(page, 2, 3)
    drag(page, 3, 4)
    assert "overlaps with label 1" in page.inner_text("#picked")
    assert not hidden_by_scrolling(page, "#picked")
    page.locator("#submit").click(force=True)
    assert "Not finished yet" in page.inner_text("#finish-said")
    assert not hidden_by_scrolling(page, "#finish-said")
    gap = (
        page.locator("#finish-said").bounding_box()["y"]
        - page.locator("#submit").bounding_box()["y"]
    )
    assert 0 < gap < 150
    page.click("#spans li button >> nth=1")
    page.locator("#submit").scroll_into_view_if_needed()
    page.click("#undo")  # its bar stays in view
    assert "Undone" in page.inner_text("#message") and not hidden_by_scrolling(page, "#message")
    page.fill("#corrected", "Short.")
    page.click("#submit")
    assert "next open record" in page.inner_text("#message")
    assert not hidden_by_scrolling(page, "#message") and not hidden_by_scrolling(page, "#question")
    for name in ("#picked", "#message", "#finish-said", "#missing-said"):
        assert page.get_attribute(name, "role") == "status"  # read aloud


def test_words_are_big_enough_for_a_finger(open_page):
    page = open_page([item()], viewport={"width": 375, "height": 667}, has_touch=True)
    boxes = [word.bounding_box() for word in page.locator("#answer .word").all()]
    assert min(box["height"] for box in boxes) >= 24
    page.tap('#answer [data-i="3"]')
    page.tap('#answer [data-i="6"]')
    assert page.inner_text("#picked") == "Selected: was built in 1790."


def test_an_hour_of_notebook_90_comes_back_as_spans(open_page, tmp_path):
    """Words 0 and 1 are irrelevant, 2 and 3 right, 4 and 5 another value; the second answer is right."""
    prompt = "colour red, metal iron, city oslo, age two? metal city:"
    answers = ["age two, metal iron, city rome.", "metal iron, city oslo."]
    page = open_page(
        [{"instruction": prompt, "input": "The age is two.", "responses": [a]} for a in answers]
    )
    for first, last, kind in ((0, 1, "Irrelevant"), (4, 5, "Unverifiable")):
        drag(page, first, last)
        page.click("#label")
        choose(page, kind)
        if kind == "Unverifiable":
            page.check("input[name=looked]")
        page.click("#add")
    page.fill("#corrected", "metal iron, city oslo.")
    page.click("#submit", force=True)
    page.check("input[name=clean]")
    page.click("#submit", force=True)
    bought = annotator.from_file(exported(page, tmp_path / "my_hour.json"))
    assert bought.kind == "spans" and bought.prompts == [prompt] * 2 and bought.answers == answers
    assert [marks.tolist() for marks in bought.marks["R1"]] == [[-1, 1, 1], [1, 1]]
    assert [marks.tolist() for marks in bought.marks["R2"]] == [[-1], [1]]
    assert [marks.tolist() for marks in bought.marks["R3"]] == [[0.5], [1]]
