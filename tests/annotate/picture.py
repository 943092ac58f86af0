"""Draws plots/annotation_page.png, the page at work, for readers of the repository.

Run it after a change of the page: `PYTHONPATH=.:tests python tests/annotate/picture.py` (needs Chromium).
"""

import tempfile
from pathlib import Path

from acts import SAMPLE, choose, drag, label
from conftest import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import sync_playwright

from lib import annotate, runtime
from lib.papers.fine_grained import schema

WORDS = {"Irrelevant": (13, 20), "Wrong-Grounding": (5, 7)}  # of the sample's first answer


def draw(path: Path) -> None:
    bare = [
        {name: value for name, value in record.items() if name not in schema.FIELDS}
        for record in schema.load_feedback(SAMPLE)
    ]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1080, "height": 900}, color_scheme="light")
        page.goto(annotate.write(bare, Path(folder) / "page.html").as_uri())
        page.fill("#who", "Ann")
        page.press("#who", "Enter")
        label(page, *WORDS["Irrelevant"])
        drag(page, *WORDS["Wrong-Grounding"])
        page.click("#label")
        choose(page, "Wrong-Grounding")
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=path)
        browser.close()
    Image.open(path).quantize(64).save(path, optimize=True)  # a quarter of the size


if __name__ == "__main__":
    draw(runtime.project_root() / "plots" / "annotation_page.png")
