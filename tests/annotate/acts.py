"""What an annotator does to a page, for the tests."""

from lib import runtime
from lib.papers.fine_grained import schema as qa

SAMPLE = runtime.project_root() / "data" / "samples" / "qa_feedback.json"
EVIL = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2">'
TEXT = "The \U0001f600 mill was built in 1790. It was built in 1790. Some pig runs it."


def item(answer=TEXT, question="When was the mill built?"):
    passages = [["Mill", "The mill was built in 1791.", "It grinds flour."], ["Pig", "Pigs sleep."]]
    answers = [answer, "In 1791.", "Long ago.", "In 1790, they say."]
    return {"question": question, "passages": passages, "gold": "In 1791."} | dict(
        zip(qa.PREDICTIONS, answers, strict=True)
    )


def exported(page, path):
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    return path


def opened(page, path):
    """Open a file of work in the page."""
    page.set_input_files("#import", path)
    page.wait_for_selector("#message:not(:empty)")
    return page.inner_text("#message")


def reload(page):
    """Load the page anew, once the browser has taken what was written (writing does not wait for it)."""
    page.wait_for_timeout(300)
    page.reload()


def drag(page, first, last, shown="picked"):
    """Drag with the mouse from inside one word to inside another (not at the very middle of a letter)."""
    for word, act in ((first, page.mouse.down), (last, page.mouse.up)):
        page.locator(f'#answer [data-i="{word}"]').scroll_into_view_if_needed()
        box = page.locator(f'#answer [data-i="{word}"]').bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2, steps=4)
        act()
    page.wait_for_selector(f'#answer [data-i="{last}"].{shown}')


def choose(page, kind):
    page.check(f"#panel input[value={kind}]")


def label(page, first, last, kind="Irrelevant"):
    """Label words as an error that needs nothing but its type."""
    drag(page, first, last)
    page.click("#label")
    choose(page, kind)
    page.click("#add")


def labels(page):
    """(title, what follows it) of the labels in the list."""
    read = "spans => spans.map(span => span.lastChild.textContent.split(': '))"
    return page.locator("#spans li > span").evaluate_all(read)


def until(page, text):
    """Wait until an expression of the page is true (its policy forbids strings as code later on)."""
    for _ in range(300):
        if page.evaluate(text):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {text}")


def hidden_by_scrolling(page, selector):
    """Whether an element with text is out of the window."""
    box, height = page.locator(selector).bounding_box(), page.viewport_size["height"]
    assert page.inner_text(selector).strip()
    return box["y"] < 0 or box["y"] + box["height"] > height
