"""The documents hold together: links lead somewhere, and messages that they quote are in the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md"), *ROOT.glob("benchmarks/*.md")],
)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue  # of other sites
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or not page.is_file() or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        left += [(page.parent / link).resolve() for link in links if ":" not in link]
    assert set(PAGES) - seen <= {ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"}


def test_quoted_messages_are_in_the_source() -> None:
    """A quotation with ... in it names parts of one message, in their order."""
    strings = []
    for file in ROOT.glob("trainer/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quotes = [quote for quote in re.findall(r"`([^`\n]+)`", text) if " " in quote and "trainer " not in quote]
    quotes = [quote for quote in quotes if not re.match(r"[a-z_]+: \S+$", quote)]  # settings
    assert len(quotes) > 10
    for quote in quotes:
        pattern = re.compile(".*".join(map(re.escape, quote.split("..."))), flags=re.DOTALL)
        assert any(pattern.search(string) for string in strings), quote
