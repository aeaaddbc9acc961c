"""docs/methods.md and the code name each other: sections, modules and config keys that are named exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "methods.md").read_text()
HEADINGS = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", TEXT, re.M))
ROWS = set(re.findall(r"^\| (\d+) \|", TEXT, re.M))

NUMBER = r"\d+(?:\.\d+)?(?: #\d+)?"
REFERENCE = re.compile(rf"\b[Mm]ethods\s+({NUMBER}(?:(?:,|\s+and|\s+to)\s+{NUMBER})*)")
MODULE = re.compile(r"`((?:adasid|pipelines)(?:\.\w+)+)`")
KEY = re.compile(r"`((?:features|behavior|tokenizer|retokenize|retrieval|ranking|compare)\.[\w.]+)[^`]*`")


def references(text):
    """Numbers of sections that ``text`` refers to, with the row of section 10 where one is named."""
    return [number for found in REFERENCE.findall(text) for number in re.findall(NUMBER, found)]


def unresolved(number):
    section, _, row = number.partition(" #")
    return section not in HEADINGS or (row and (section != "10" or row not in ROWS))


def test_a_reference_may_be_a_list_a_range_or_a_row():
    assert references("(Methods 1.2 to 1.4,\n9.4; methods 5 and 10 #3)") == ["1.2", "1.4", "9.4", "5", "10 #3"]
    assert unresolved("99.1") and unresolved("10 #99") and unresolved("1.1 #1")


def test_every_reference_of_the_code_resolves_to_a_heading():
    files = [path for part in ("adasid", "pipelines", "tests") for path in sorted((ROOT / part).rglob("*.py"))]
    found = [
        (str(path.relative_to(ROOT)), number)
        for path in files
        if path != Path(__file__)
        for number in references(path.read_text())
    ]
    assert len(found) > 50
    assert [pair for pair in found if unresolved(pair[1])] == []


def test_headings_are_numbered_once_and_in_order():
    numbers = [tuple(map(int, number.split("."))) for number in re.findall(r"^#{2,3} (\d+(?:\.\d+)?)", TEXT, re.M)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("module", sorted(set(MODULE.findall(TEXT))))
def test_a_named_module_exists(module):
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("key", sorted(set(KEY.findall(TEXT))))
def test_a_named_config_key_exists(key):
    section, *inner = key.split(".")
    base = (ROOT / "conf" / "base.yaml").read_text()
    assert re.search(rf"^{section}:", base, re.M)
    assert [part for part in inner if not re.search(rf"^[# ]+{part}:", base, re.M)] == []


def test_no_line_is_longer_than_120_columns():
    assert [number for number, line in enumerate(TEXT.splitlines(), 1) if len(line) > 120] == []


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_no_equation_lost_a_backslash(path):
    """Where ``\\text`` was written as a tab and ``ext``."""
    assert not re.findall(r"[\x00-\x09\x0b-\x1f]\w*", path.read_text())
