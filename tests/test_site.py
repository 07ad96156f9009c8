"""The site that `make docs` writes: documents, API reference, links, and how a browser shows it."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
import sys
import urllib.parse

import build_docs
import pytest
import reference

ROOT = build_docs.ROOT


class Page(html.parser.HTMLParser):
    """The links and anchors of a page, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in ("script", "img", "link", "iframe", "source"):
            self.loaded |= {values[name] for name in ("src", "href") if values.get(name)}


def build(folder, command):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Write the site by the command of `make docs` and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, [sys.executable, build_docs.__file__])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{build_docs.FOLDER / 'index.html'}\n"
    return folder / build_docs.FOLDER


@pytest.fixture(scope="module")
def pages(site):
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


def test_every_document_has_a_page(site):
    names = {path.relative_to(ROOT) for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md")}
    assert len(names) > 8
    for name in names:
        page = name.with_name("index") if name.stem == "README" else name
        assert (site / page).with_suffix(".html").is_file(), name


def test_every_public_module_has_a_page(site):
    pages = site / "reference"
    names = {str(path.relative_to(pages).with_suffix("")).replace("/", ".") for path in pages.rglob("*.html")}
    assert names == {"index", *reference.modules()}
    assert {"samekit", "samekit.model", "samekit.backends.base", "samekit_export.export"} <= names
    assert not [name for name in names if "._" in name]


def test_pages_show_signatures_sections_and_drawings(site):
    pages = site / "reference"
    model = (pages / "samekit.html").read_text(encoding="utf-8")
    for shown in ("from_pretrained", "Arguments:", "Returns:", "Raises:", "[batch, latent_dim, latents]"):
        assert shown in model, shown
    # Markdown joins the lines of a drawing that is not indented into one paragraph.
    for page in pages.rglob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        paragraphs = re.findall(r"<p>(.*?)</p>", text, re.DOTALL)
        assert not [paragraph for paragraph in paragraphs if re.search(r"\|-|-\||──|\w {4,}\w", paragraph)], page.name


def test_nothing_is_loaded_from_other_hosts(site, pages):
    for path, page in pages.items():
        for link in page.loaded:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme != "data":
                assert not parts.netloc, (path.name, link)
                # The page for missing addresses gets its files from a server.
                assert path.name == "404.html" or (path.parent / parts.path).is_file(), (path.name, link)


def test_links_lead_to_pages_and_anchors(site, pages):
    followed = 0
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            parts = urllib.parse.urlsplit(link)
            if not parts.scheme:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
                assert target in pages, (path.name, link)
                assert urllib.parse.unquote(parts.fragment) in pages[target].anchors, (path.name, link)
                followed += 1
    assert followed > 100


def test_broken_links_fail_the_build(site, tmp_path):
    shutil.copytree(site.parent, tmp_path / "build")
    broken = ("docs/export.md#no-such-heading", "docs/no-page.md", "no-picture.png")
    with (tmp_path / "build" / "documents" / "README.md").open("a", encoding="utf-8") as file:
        file.write("\n[a]({}) [b]({}) ![c]({})\n".format(*broken))
    done = build(tmp_path, [sys.executable, "-m", "mkdocs", "build", "--config-file", "build/mkdocs.yml"])
    assert done.returncode == 1
    for target in broken:
        assert f"link '{target}'" in done.stderr, done.stderr


def test_a_browser_shows_and_searches_it_without_a_server(browser, site):
    requests, complaints = [], []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto((site / "index.html").as_uri())
    pictures = tab.evaluate("Promise.all([...document.images].map(async i => (await i.decode(), i.naturalWidth)))")
    tab.locator(".md-nav--primary").get_by_role("link", name="Datasets").click()
    heading = tab.locator("h1").first.inner_text()
    tab.wait_for_load_state("load")
    tab.locator("input.md-search__input").press_sequentially("safetensors")
    tab.locator(".md-search-result__link").first.wait_for()
    found = tab.locator(".md-search-result__link").count()
    tab.goto((site / "reference" / "samekit.html").as_uri())
    members = tab.locator("nav").get_by_role("link", name="AutoencoderModel").count()
    tab.close()
    assert min(pictures) > 500
    assert heading.startswith("Datasets")
    assert found > 0
    assert members > 0
    assert {urllib.parse.urlsplit(url).scheme for url in requests} <= {"file", "data"}
    assert complaints == []
