"""Test the list of tokenizers: what is derived from it, and the example of docs/extending.md, which adds one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adasid import config
from adasid.config import render
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer

ROOT = Path(__file__).parents[2]
WIDTHS = {"text": 24, "visual": 16, "behavior": 12}


def test_settings_are_read_without_torch():
    code = "import sys, adasid.config as c; c.load('conf/beauty.yaml'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("model", config.TOKENIZERS, ids=lambda model: model.__name__)
def test_a_tokenizer_has_a_name_a_class_and_one_settings_object(model):
    settings = model()
    tokenizer = artifact.build(settings, WIDTHS)
    assert isinstance(tokenizer, Tokenizer) and settings.name and model.__name__.endswith("Settings")
    assert f"{type(tokenizer).__name__}Settings" in [base.__name__ for base in model.__mro__]
    assert [name for name, value in vars(tokenizer).items() if value is settings] == ["settings"]
    assert artifact.settings_of(settings.model_dump(mode="json")) == settings
    assert config.build({"tokenizer": {"name": settings.name}}).tokenizer == settings


def test_names_are_unique():
    names = [model().name for model in config.TOKENIZERS]
    assert len(set(names)) == len(names)


def test_the_documents_show_the_list():
    assert render.render_tokenizers() in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), (
        "run `make docs`"
    )
    (listed,) = re.findall(
        r"^Tokenizers: (.*?) \(\[", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert re.findall(r"`(\S+)`", listed) == [model().name for model in config.TOKENIZERS]


def test_the_example_of_a_new_tokenizer_passes_the_common_suite(tmp_path):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL))
    for path in ("adasid", "tests/planted.py", "tests/__init__.py", "tests/unit/test_tokenizers.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, tmp_path / path, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / path).exists():
            shutil.copy(ROOT / path, tmp_path / path)
    imported, entry = blocks.pop("adasid/tokenizers/registry.py").split("\n\n")
    insert(tmp_path / "adasid/tokenizers/registry.py", "\nTOKENIZERS: ", f"{imported}\n\nTOKENIZERS: ")
    insert(tmp_path / "adasid/tokenizers/registry.py", "    RandomSidSettings,\n)", f"    RandomSidSettings,\n{entry})")
    line = blocks.pop("tests/unit/test_tokenizers.py")
    insert(tmp_path / "tests/unit/test_tokenizers.py", "SECTIONS = {\n", f"SECTIONS = {{\n{line}")
    for path, code in blocks.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
    assert {Path(path).name for path in blocks} == {"__init__.py", "model.py"}
    code = "import sys; from adasid import config; assert 'torch' not in sys.modules; print(config.render_tokenizers())"
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "| `vq` | one codebook over the content | content |" in shown.stdout, shown.stderr
    (typed,) = re.findall(r"```sh\npython (-m pytest .*)\n", text)
    done = subprocess.run([sys.executable, *typed.split()], cwd=tmp_path, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 10, done.stdout[-3000:] + done.stderr[-3000:]


def insert(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")
