"""Pages in a real browser at 400 and 1280 px, light and dark: the data page, and the documentation site if it is built.

`make docs` builds the site; .ci/run does so before the tests. Reports and studies are opened by their own tests.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli
from tests.browser import Browser
from tests.page_audit import WIDTHS, audit
from tests.test_data_check import images

SITE = Path(__file__).parents[1] / "build" / "docs"
GENERATED = {"genindex.html", "search.html", "py-modindex.html"}  # Sphinx' own pages


@pytest.fixture(scope="module")
def data_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    done = CliRunner().invoke(
        cli, ["data", "check", str(images(folder / "images")), "--page", str(folder / "page.html")]
    )
    assert done.exit_code == 0, done.output
    return folder / "page.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_data_page_has_no_fault(chromium: Browser, data_page: Path, width: int, dark: bool) -> None:
    assert audit(chromium, data_page, width, dark) == []


def test_the_data_page_breaks_no_name_on_a_phone(chromium: Browser, data_page: Path) -> None:
    chromium.show(data_page, min(WIDTHS), 900)
    script = """return [...document.querySelectorAll('th, td:nth-child(2)')].filter(cell => {
        const range = document.createRange(); range.selectNodeContents(cell);
        return new Set([...range.getClientRects()].map(line => line.top)).size > 1; }).map(cell => cell.textContent)"""
    assert chromium.run("return document.querySelectorAll('td:nth-child(2)').length") > 2
    assert chromium.run(script) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_documentation_has_no_fault(chromium: Browser, width: int, dark: bool) -> None:
    """Wide tables of figures may scroll in their own frame; the page may not."""
    pages = sorted(page for page in SITE.rglob("*.html") if page.name not in GENERATED and "_static" not in page.parts)
    if not (SITE / "objects.inv").exists():  # Sphinx writes it after the pages
        pytest.skip("the documentation is not built here: make docs")
    problems = {page.name: audit(chromium, page, width, dark, scrolling=True) for page in pages}
    assert {name: faults[:5] for name, faults in problems.items() if faults} == {}
