"""The rendered book, as a reader's browser sees it. Run by `make test-book`, which renders the book first."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
sys.path.append(str(ROOT / "book" / "_ext"))

import book_site  # noqa: E402

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
EXTRA = ["index", "search", "genindex"]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PHONE, DESK = {"width": 360, "height": 800}, {"width": 1440, "height": 900}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=HTML))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("no Chromium found: install it, or name it in the variable CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def visit(page: Page, url: str) -> list[str]:
    """Load a page; return what went wrong on the way."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on("response", lambda answer: wrong.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)

    def own_host(request) -> None:
        if urlsplit(request.url).scheme not in ("data", "blob") and urlsplit(request.url)[:2] != urlsplit(url)[:2]:
            wrong.append(f"another host: {request.url}")

    page.on("request", own_host)
    page.goto(url, wait_until="networkidle")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise?.then(() => true)")
    return wrong


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("place", ["http", "file"])
@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_page_loads_alone_and_fits_a_phone(browser: Browser, server: str, name: str, place: str, theme: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=theme)
    wrong = visit(page, f"{server if place == 'http' else HTML.as_uri()}/{name}.html")
    # The theme's script runs when all of a page is read, which for a long one is later than the last request.
    page.wait_for_function("document.documentElement.dataset.theme !== 'auto'")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    width, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    page.close()
    assert not wrong, "\n".join(wrong)
    assert width <= screen, f"{name} is {width} px wide on a screen of {screen} px"


WCAG = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
CONTRAST = {"type": "rule", "values": ["color-contrast"]}


# Between the themes only colors differ.
@pytest.mark.parametrize("theme, rules", [("light", WCAG), ("dark", CONTRAST)])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible(browser: Browser, server: str, name: str, theme: str, rules: dict) -> None:
    page = browser.new_page(viewport=DESK, color_scheme=theme)
    visit(page, f"{server}/{name}.html")
    # What is folded has to be accessible too; of the tables of runs, which are all made alike, one.
    page.evaluate("document.querySelectorAll('details:not(.runs)').forEach((element) => { element.open = true; })")
    page.evaluate("document.querySelectorAll('details.runs').forEach((element, n) => { element.open = n === 0; })")
    results = Axe().run(page, options={"runOnly": rules, "resultTypes": ["violations"]})
    page.close()
    assert not results.violations_count, results.generate_report()


@pytest.mark.parametrize("name", PAGES)
def test_images_say_what_they_show(browser: Browser, server: str, name: str) -> None:
    page = browser.new_page()
    visit(page, f"{server}/{name}.html")
    images = page.eval_on_selector_all("article img", "all => all.map((e) => [e.getAttribute('src'), e.alt])")
    page.close()
    for source, alt in images:
        assert alt.strip(), f"{source} has no alternative text"
        assert not re.search(r"\.(png|svg|jpe?g|gif)$", alt), f"the alternative text of {source} is a file name: {alt}"


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_lead_somewhere(browser: Browser, server: str, name: str) -> None:
    page = browser.new_page()
    visit(page, f"{server}/{name}.html")
    links = page.eval_on_selector_all("a[href]", "all => all.map((e) => e.href)")
    page.close()
    own = [urlsplit(link) for link in links if link.startswith(server)]
    assert own
    for link in own:
        target = HTML / unquote(link.path).lstrip("/")
        assert target.is_file(), f"{link.geturl()} leads nowhere"
        if link.fragment and target.suffix == ".html":
            assert re.search(rf'(id|name)="{re.escape(unquote(link.fragment))}"', target.read_text()), link.geturl()


@pytest.mark.parametrize("name", [name for name in PAGES if (ROOT / f"{name}.ipynb").exists()])
def test_a_chapter_opens_with_its_question_and_an_answer_in_two_sentences(
    browser: Browser, server: str, name: str
) -> None:
    page = browser.new_page()
    visit(page, f"{server}/{name}.html")
    opening = page.eval_on_selector_all("article p", "all => all.map((e) => e.innerText)")
    page.close()
    assert any(text.startswith("The question.") for text in opening[:3])
    answer = next(text for text in opening if text.startswith("The answer"))
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", answer.partition(".")[2].strip())
    assert len(sentences) <= 2, answer


@pytest.mark.parametrize("name", PAGES)
def test_what_is_folded_unfolds(browser: Browser, server: str, name: str) -> None:
    page = browser.new_page(viewport=PHONE)
    visit(page, f"{server}/{name}.html")
    for answer in page.query_selector_all("article details:not([open])"):
        inside = answer.query_selector(":scope > :not(summary)")
        assert not inside.is_visible()
        answer.query_selector("summary").click()
        inside.wait_for_element_state("visible", timeout=5000)
    page.close()


def test_the_button_of_each_chapter_opens_it_in_colab() -> None:
    """In the repository that the pages were rendered for; where none is known, there is no button."""
    origin, branch = book_site.git("remote", "get-url", "origin"), book_site.git("branch", "--show-current")
    place = book_site.repository(os.environ, origin, branch)
    for name in PAGES:
        links = re.findall(r'href="(https://colab[^"]+)"', (HTML / f"{name}.html").read_text())
        if place is None or not (ROOT / f"{name}.ipynb").exists():
            assert not links, name
        else:
            repository = place[0].removeprefix("https://github.com/")
            wanted = f"https://colab.research.google.com/github/{repository}/blob/{place[1]}/{name}.ipynb"
            assert set(links) == {wanted}, name


@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_a_page_is_small(name: str) -> None:
    assert (HTML / f"{name}.html").stat().st_size < 1.5e6


def test_the_site_is_small() -> None:
    sizes = {path.relative_to(HTML): path.stat().st_size for path in HTML.rglob("*") if path.is_file()}
    largest = sorted(sizes, key=sizes.get)[-5:]
    assert sum(sizes.values()) < 40e6, {str(name): sizes[name] for name in largest}


def test_records_can_be_downloaded_and_open_at_a_run(browser: Browser, server: str) -> None:
    page = browser.new_page(viewport=PHONE)
    visit(page, f"{server}/book/records.html")
    table = page.locator("details.runs").first
    assert not table.locator("table").is_visible()
    table.locator("summary").click()
    assert table.locator("code").first.is_visible()
    with page.expect_download() as download:
        page.locator('a[href$=".jsonl.gz"]').first.click()
    lines = gzip.decompress(Path(download.value.path()).read_bytes()).splitlines()
    page.close()
    assert json.loads(lines[0])["id"]


# A word of each chapter that stands in few others.
WORDS = {
    "data_and_media": "decord",
    "worlds": "palette",
    "four_bits": "quantile",
    "baselines": "prefix",
    "temporal": "bottleneck",
    "ranks": "allocation",
    "selection": "segmentation",
    "together": "interaction",
    "status": "executed",
    "memory": "rehearsal",
    "real_scale": "recipe",
    "your_model": "classifier",
}


@pytest.mark.parametrize("name", WORDS)
def test_search_finds_each_chapter(browser: Browser, server: str, name: str) -> None:
    page = browser.new_page()
    visit(page, f"{server}/search.html?q={WORDS[name]}")
    page.get_by_text("Search finished").wait_for()  # results come one by one
    found = page.eval_on_selector_all("#search-results li a", "all => all.map((e) => e.href)")
    page.close()
    assert any(f"/book/{name}.html" in link for link in found), found
