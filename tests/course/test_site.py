"""The static site: its links, figures and formulas, without a network, on a desktop and on a phone."""

import ast
import posixpath
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib.course import address, notebooks, site

ROOT = Path(__file__).parents[2]


class Parts(HTMLParser):
    """The ids of a page, its links and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.tags = [], [], [], set()
        self.images = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif "href" in values or "src" in values:
            self.loads.append(values.get("href") or values["src"])
        if tag == "img":
            self.images.append(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site as it is now; nothing is executed."""
    out = tmp_path_factory.mktemp("site")
    assert site.build(out) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def pages(folder):
    return {path.relative_to(folder).as_posix(): Parts(path) for path in folder.rglob("*.html")}


def resolve(name, target):
    path, _, anchor = target.partition("#")
    here = posixpath.join(posixpath.dirname(name), unquote(path)) if path else name
    return posixpath.normpath(here), unquote(anchor)


def test_every_page_and_notebook_is_there(pages):
    names = {path.relative_to(ROOT) for path in (ROOT / "notebooks").rglob("[!.]*.ipynb")}
    names |= {path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")}
    names |= {Path(name) for name in ("data/README.md", "TROUBLESHOOTING.md", "CHANGELOG.md")}
    places = {
        path.with_suffix(".html").as_posix() for path in names if "checkpoint" not in str(path)
    }
    assert places | {"index.html", "CONTRIBUTING.html"} <= set(pages)


def test_every_inner_link_figure_and_anchor_resolves(pages, folder):
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name}: an id occurs twice"
        for target in (*page.links, *page.loads):
            if re.match(r"(https?|mailto|data):", target):
                continue
            goal, anchor = resolve(name, target)
            assert (folder / goal).is_file(), f"{name}: {target}"
            assert not anchor or anchor in pages[goal].ids, f"{name}: {target}"


def test_pages_load_nothing_from_the_net_and_run_no_script(pages, folder):
    for name, page in pages.items():
        assert "script" not in page.tags, name
        assert not [url for url in page.loads if re.match("(https?:)?//", url)], name
    assert not re.search(r"url\(|@import", (folder / "site.css").read_text(encoding="utf-8"))


def test_one_navigation_leads_everywhere(pages, folder):
    for name in pages:
        text = (folder / name).read_text(encoding="utf-8")
        soup = BeautifulSoup(text[: text.index("</nav>")], "html.parser")
        goals = [resolve(name, link["href"])[0] for link in soup.nav.find_all("a")]
        assert set(goals) == set(pages), name
        assert len(soup.nav.find_all("a", {"aria-current": "page"})) == 1


def test_every_figure_has_an_alt_text(pages):
    figures = [(name, image) for name, page in pages.items() for image in page.images]
    assert figures
    assert not [name for name, image in figures if not image.get("alt", "").strip()]


def equal_alts(source):
    """Lines of calls that give a figure's caption as its alt text, or one without the other."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    words = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls]
    return [w for w in words if "alt" in w and w["alt"] == w.get("caption")]


def test_alt_texts_say_something_else_than_captions():
    assert equal_alts("f(caption=text, alt=text)") and not equal_alts("f(caption=a, alt=b)")
    offending = set()
    for path in (ROOT / "notebooks").glob("[!.]*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        if any(equal_alts(cell.source) for cell in cells if cell.cell_type == "code"):
            offending.add(path.stem)
    assert not offending, "an alt text says what is seen, not the caption again"
    for path in (ROOT / "lib").rglob("*.py"):
        assert not equal_alts(path.read_text(encoding="utf-8")), path


# --- links ---------------------------------------------------------------------------------------


def linked(text, monkeypatch, home=""):
    """A link's HTML on a page of docs/, in a course at this address."""
    monkeypatch.setattr(address, "read", lambda root: home)
    pages = [site.Page(PurePosixPath(name), "") for name in ("README.md", "docs/scales.md")]
    soup = BeautifulSoup(f'<p><a href="{text}">words</a></p>', "html.parser")
    site._finish_links(soup, pages[1], {page.source: page for page in pages}, ROOT)
    return str(soup.p)


@pytest.mark.parametrize("target", ["https://arxiv.org/abs/2306.01693", "#here"])
def test_outer_links_and_anchors_stay(target, monkeypatch):
    assert f'href="{target}"' in linked(target, monkeypatch)


def test_links_between_pages_lead_to_pages(monkeypatch):
    assert 'href="../index.html#more"' in linked("../README.md#more", monkeypatch)


def test_source_files_are_linked_where_the_course_has_an_address(monkeypatch):
    assert linked("../lib/ppo.py", monkeypatch) == "<p>words</p>"
    html = linked("../lib/ppo.py", monkeypatch, "https://example.org/course")
    assert 'href="https://example.org/course/blob/main/lib/ppo.py"' in html


@pytest.mark.parametrize("target", ["nowhere.md", "../../outside.md"])
def test_a_link_to_no_file_is_refused_in_words(target, monkeypatch):
    with pytest.raises(notebooks.RequestError, match="docs/scales.md links to"):
        linked(target, monkeypatch)


def test_headings_are_linked_as_on_github():
    soup = BeautifulSoup("<h1>A: b_c, d</h1><h2>Why? 1</h2><h2>Why? 1</h2>", "html.parser")
    page = site.Page(PurePosixPath("docs/x.md"), "")
    site._finish_headings(soup, page)
    assert [tag["id"] for tag in soup.find_all(True)] == ["a-b_c-d", "why-1", "why-1-1"]
    assert page.title == "A: b_c, d"
    assert page.sections == [("why-1", "Why? 1"), ("why-1-1", "Why? 1")]


# --- in a browser --------------------------------------------------------------------------------

MEASURE = """() => {
  const light = text => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const lin = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    return .2126 * lin(parts[0]) + .7152 * lin(parts[1]) + .0722 * lin(parts[2]);
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const pale = [...document.querySelectorAll("body *")].filter(e => {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest("style, .veiled")) return false;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05) < 4;
  });
  const flat = [...document.querySelectorAll("math")].filter(e => {
    const box = e.getBoundingClientRect();
    return e.checkVisibility() && (box.width < 2 || box.height < 2);
  });
  const broken = [...document.images].filter(e => !(e.complete && e.naturalWidth));
  const say = list => list.slice(0, 5).map(e => e.outerHTML.slice(0, 160));
  return {width: document.documentElement.scrollWidth, formulas: document.querySelectorAll("math").length,
          pale: say(pale), flat: say(flat), broken: say(broken)};
}"""


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_are_legible_and_show_their_images_and_formulas(
    folder, pages, chromium, width, colours
):
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=colours, offline=True
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    formulas = 0
    for name in pages:
        page.goto((folder / name).as_uri())
        seen = page.evaluate(MEASURE)
        formulas += seen.pop("formulas")
        assert seen == {"width": width, "pale": [], "flat": [], "broken": []}, name
    assert formulas
    context.close()


def test_the_menu_opens_on_a_phone_without_a_script(folder, chromium):
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, java_script_enabled=False
    )
    page = context.new_page()
    page.goto((folder / "index.html").as_uri())
    assert not page.locator("nav").is_visible()
    page.locator("header label").click()
    page.locator("nav summary >> text=Using the course").click()
    page.locator("nav >> text=Glossary").click()
    assert page.title().startswith("Glossary")
    context.close()


def test_long_texts_of_a_table_keep_a_width_and_short_ones_do_not():
    texts = ["short", "word " * 6, "word " * 30]
    cells = "".join(f"<td>{text}</td>" for text in texts)
    soup = BeautifulSoup(f"<table><tr>{cells}</tr></table>", "html.parser")
    site._finish_tables(soup)
    assert [cell.get("class") for cell in soup.find_all("td")] == [None, "words", "long"]
    styles = site._styles()
    assert "td.long" in styles and "td.words" in styles


def test_printed_columns_and_broad_figures_are_marked():
    def png(width):
        head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big") + bytes(20)
        return f'<div class="output_png"><img src="data:image/png;base64,{b64encode(head).decode()}"></div>'

    printed = [
        '<div class="output_text"><pre>a word    another</pre></div>',
        '<div class="output_text"><pre>plain words</pre></div>',
    ]
    soup = BeautifulSoup("".join([*printed, png(853), png(1900)]), "html.parser")
    site._finish_outputs(soup)
    classes = [text["class"] for text in soup.find_all("div", "output_text")]
    assert classes == [["output_text", "aligned"], ["output_text"]]
    assert [image.get("class") for image in soup.find_all("img")] == [None, "broad"]
    assert soup.find_all("img")[1]["style"] == "--wide: 1425px"


def test_solutions_are_not_taken_for_lessons():
    source = PurePosixPath("notebooks/solutions/10_toxicity_meter.ipynb")
    label = "10 toxicity meter"
    assert site.Page(source, "Solutions", label).called == f"Solutions: {label}"
    assert site.Page(source, "RewardLM", label).called == label


def test_a_long_name_in_a_table_may_break_and_tags_stay_words():
    soup = BeautifulSoup("<table><tr><td>42_dense_reward_ppo</td></tr></table>", "html.parser")
    site._finish_tables(soup)
    assert len(soup.find_all("wbr")) == 3 and soup.get_text() == "42_dense_reward_ppo"
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    words = "".join(page.split("`")[::2])  # outside code
    assert not re.search(r"<\w", words)


def test_the_menu_shows_where_one_is(folder):
    soup = BeautifulSoup((folder / "docs" / "glossary.html").read_text("utf-8"), "html.parser")
    opened = [part for part in soup.nav.find_all("details") if part.has_attr("open")]
    assert [part.summary.get_text() for part in opened] == ["Using the course"]
    assert opened[0].find("a", {"aria-current": "page"})
