"""The built book: complete, connected, and needing nothing from outside.

Skips until `make book` has built it.
"""

import functools
import http.server
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
NAMES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
CHAPTERS = [name for name in NAMES if name.startswith("notebooks/")]

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").exists(), reason="the book isn't built: run `make book`"
)


class Page(HTMLParser):
    """What a page loads, where it links to, and what can be linked to in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = {key: value or "" for key, value in attributes}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag in {"script", "img", "iframe", "source", "video", "audio", "embed"}:
            self.loads += [values["src"]] if "src" in values else []
        elif tag == "link" and not re.search("canonical|alternate", values["rel"]):
            # index, search, next and prev are for readers; the rest gets fetched.
            self.loads += [values["href"]]
        elif tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(HTML.rglob("*.html"))}


@pytest.mark.parametrize("name", NAMES)
def test_every_page_of_the_table_of_contents_is_built(name):
    assert (HTML / f"{name}.html").exists()


def test_nothing_is_loaded_from_outside(pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlparse(address).netloc, f"{path.name} loads {address}"


def test_styles_load_nothing_from_outside():
    for path in HTML.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
        found = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", text)
        assert not found, f"{path.name} loads {found}"


def test_icons_are_a_font_alone():
    [script] = HTML.glob("_static/vendor/fontawesome/*/js/all.min.js")
    assert script.stat().st_size == 0


def test_links_inside_the_book_lead_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    broken.append(f"{path.name}: {link}")
    assert not broken


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_shows_no_directives_and_no_errors(name):
    text = (HTML / f"{name}.html").read_text(encoding="utf-8")
    assert "#|" not in re.sub(r"<[^>]+>", "", text)
    assert "Traceback (most recent call last)" not in text


def test_no_page_knows_where_it_was_built():
    """Not in an output, a warning or a default value in a signature."""
    for path in HTML.rglob("*.html"):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path.name


def test_exported_cells_name_their_module():
    for name in CHAPTERS:
        module = name.partition("_")[2]
        text = (HTML / f"{name}.html").read_text(encoding="utf-8")
        assert ("export-tab" in text) == (ROOT / "vlm" / f"{module}.py").exists()


def test_a_chapter_names_every_module_that_it_builds():
    for name in CHAPTERS:
        text = (HTML / f"{name}.html").read_text(encoding="utf-8")
        badge = re.search(r'class="builds-badge.*?</p>', text, re.S)
        source = (ROOT / f"{name}.ipynb").read_text(encoding="utf-8")
        for module in set(re.findall(r'"#\| export (\w+)', source)):
            assert f"vlm/{module}.py" in badge[0]
            assert text.count(f"vlm/{module}.py") > 1  # and at its cells


# In a real browser


@pytest.fixture(scope="module")
def address():
    """The book, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


CUT_OUTPUTS = """[...document.querySelectorAll("div.cell_output pre")]
    .filter(text => text.scrollWidth > text.clientWidth).length"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_pages_work_in_a_browser(browser, address, scheme, width):
    """No request leaves the host, nothing is missing, fails, or is too wide."""
    problems = []

    def note(page, what):
        problems.append(f"{page}: {what}")

    size = {"width": width, "height": 800}
    context = browser.new_context(color_scheme=scheme, viewport=size)
    for name in NAMES:
        page = context.new_page()
        page.on(
            "request",
            lambda request, name=name: (
                request.url.startswith((address, "data:", "blob:"))
                or note(name, f"asked for {request.url}")
            ),
        )
        page.on(
            "response",
            lambda response, name=name: (
                response.status < 400
                or note(name, f"{response.status} for {response.url}")
            ),
        )
        page.on("pageerror", lambda error, name=name: note(name, error))
        page.on(
            "console",
            lambda message, name=name: (
                message.type != "error" or note(name, message.text)
            ),
        )
        page.goto(address + name + ".html", wait_until="networkidle")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        formulas = page.locator(".math").count()
        if formulas:
            page.wait_for_selector("mjx-container", state="attached")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            note(name, f"is {wide} pixels wider than the window of {width}")
        cut = page.evaluate(CUT_OUTPUTS)
        if cut and width >= 1200:
            note(name, f"cuts off {cut} outputs")
        page.close()
    context.close()
    assert not problems, "\n".join(problems)
