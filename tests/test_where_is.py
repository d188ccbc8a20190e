"""Documentation: the search words of docs/architecture.md find their files, and links are valid.

A search word must be part of its question (ignoring spaces, hyphens, underscores, case and brackets), and it
must find the file in one of two ways:

- by name: it consists of whole words of the file's or its folder's name, and finds at most five files;
- by content: the file is the first of `grep -rlF WORD hypergen --include=*.py`, in sorted order.

This must hold for at least four of five questions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(path for path in (ROOT / "hypergen").rglob("*.py") if path.name != "__init__.py")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Row(NamedTuple):
    question: str
    file: Path
    word: str


def table() -> list[Row]:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| `(hypergen/\S+)` \| `(.+)` \|$", page, re.MULTILINE)
    return [Row(question, ROOT / file, word) for question, file, word in rows]


def normalize(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


def found_by_name(word: str) -> list[Path]:
    def names(path: Path) -> list[str]:
        return [path.stem, *path.parent.relative_to(ROOT).parts[1:]]

    return [path for path in PACKAGE if any(f"_{normalize(word)}_" in f"_{name}_" for name in names(path))]


def first_by_content(word: str) -> Path | None:
    return next((path for path in PACKAGE if word in path.read_text(encoding="utf-8")), None)


def is_found_by_question(row: Row) -> bool:
    named = found_by_name(row.word)
    finds_file = (row.file in named and len(named) <= 5) or first_by_content(row.word) == row.file
    return normalize(row.word) in normalize(row.question) and finds_file


def test_there_are_questions_and_each_search_word_finds_its_file() -> None:
    assert len(table()) >= 25
    for row in table():
        assert row.file.is_file(), row
        assert row.file in found_by_name(row.word) or row.word in row.file.read_text(encoding="utf-8"), row


def test_most_questions_are_found_by_their_own_words() -> None:
    missed = [row.question for row in table() if not is_found_by_question(row)]
    assert len(missed) <= len(table()) / 5, missed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_are_valid(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_documents_name_exist(page: Path) -> None:
    """Paths are relative to the repository, or to the package if a page omits `hypergen/`."""
    for path in re.findall(r"`([\w.]+/[\w/.]+\.py)`", page.read_text(encoding="utf-8")):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "hypergen")), path
