"""The documents: lines that can be read, links that lead somewhere, names that exist, commands that parse."""

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from adasid import config, tables
from adasid.config.whole import section_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILES = r"(?:adasid|pipelines|jobs|conf|infra|docs|tests)/[\w./-]*"
OTHERS = {"--master", "--head", "--working-dir"}
"""Flags of other programs that the documents name."""

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def blocks(path, language):
    return [body for kind, body in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def prose(path):
    """The text outside of fenced blocks."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def code(path):
    """The inline code of a document."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


def commands(path):
    return [line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@cache
def shown(job):
    """The help of a job."""
    done = subprocess.run([sys.executable, job, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split())


@cache
def make():
    """The script that writes the generated parts."""
    spec = importlib.util.spec_from_file_location("make_documents", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@document
def test_lines_are_short(path):
    long = [
        f"{path.name}:{number}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert not long
    assert path.name != "README.md" or len(path.read_text(encoding="utf-8").splitlines()) <= 130


def test_generated_parts_are_those_of_the_code():
    texts = make().documents(lambda name: (ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert {"architecture.md", "configuration.md", "dataflow.svg"} == set(texts)
    for name, text in texts.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, (
            f"docs/{name} is out of date: run `make docs`"
        )


def test_the_reference_has_every_key():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for key in keys(config.Config):
        assert f"- `{key}` (" in text or key in {"tokenizer.name", *config.Config.model_fields}, key
    for model in config.TOKENIZERS:
        assert f"### `tokenizer.name: {model().name}`" in text


def keys(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = section_of(field.annotation)
        if (
            name != "tokenizer"
            and isinstance(inner, type)
            and issubclass(inner, BaseModel)
            and not isinstance(field.default, dict)
        ):
            yield from keys(inner, f"{prefix}{name}.")


def anchors(path):
    """Anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target
    for label in re.findall(r"\(\[([\w.]+)\]\)", prose(path)):
        assert f"\n[{label}]: https://" in prose(path), label


@document
def test_files_and_targets_that_are_named_exist(path):
    for span in [*code(path), *commands(path), *"\n".join(blocks(path, "text")).splitlines()]:
        for name in re.findall(rf"(?:^|(?<=\s)){FILES}", span):
            if "/vq" not in name:  # the example of a tokenizer to add
                assert (ROOT / name).exists(), name
    for target in re.findall(
        r"\bmake ([a-z]+(?: [a-z]+)*)", "\n".join([*code(path), *(line.partition("#")[0] for line in commands(path))])
    ):
        for word in target.split():
            assert re.search(rf"^{word}:", MAKE, re.MULTILINE), word


def test_the_tree_of_the_repository_has_every_package():
    tree = "\n".join(blocks(ROOT / "docs" / "architecture.md", "text"))
    for package in ("adasid", "pipelines"):
        for folder in sorted((ROOT / package).iterdir()):
            if folder.is_dir() and folder.name != "__pycache__":
                assert re.search(rf"\b{package}/{folder.name}/", tree), folder


@document
def test_commands_have_flags_values_and_keys_that_exist(path):
    for line in commands(path):
        words = shlex.split(line, comments=True)
        job = next((word for word in words if re.fullmatch(r"jobs/\w+\.py", word)), None)
        if job is None:
            continue
        assert words[words.index(job) - 1] in {"python", "spark-submit"}, line
        own = words[words.index(job) + 1 :]
        for flag in (word for word in own if word.startswith("--")):
            assert flag in shown(job), line
        given = {flag: value for flag, value in zip(own, own[1:]) if flag.startswith("--")}
        if "--stage" in given:
            assert re.search(rf"--stage {{[a-z,]*\b{given['--stage']}\b", shown(job)), line
        known = given["--config"] not in {"mine.yaml", "FILE"}
        assert not known or (ROOT / given["--config"]).exists(), line
        overrides = [value for flag, value in zip(own, own[1:]) if flag == "--set"]
        config.load(ROOT / (given["--config"] if known else "conf/demo.yaml"), overrides)


@document
def test_flags_in_the_text_exist(path):
    flags = {flag for span in code(path) for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    every = "".join(shown(f"jobs/{job.name}") for job in sorted((ROOT / "jobs").glob("*.py"))) if flags - OTHERS else ""
    assert not [flag for flag in flags - OTHERS if flag not in every]


@document
def test_config_keys_in_the_text_exist(path):
    for span in code(path):
        key = re.match(r"(\w+(?:\.\w+)+)(?=$|[:=\s])", span)
        if key and key[1].split(".")[0] in config.Config.model_fields and not key[1].endswith((".md", ".py", ".json")):
            assert known(key[1].split(".")), span


def known(parts):
    """Whether a dotted key is in the schema; a tokenizer's may be of any method."""
    if parts[0] == "tokenizer":
        return any(within(model, parts[1:]) for model in config.TOKENIZERS)
    return within(config.Config, parts)


def within(model, parts):
    if not parts:
        return True
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return False
    field = model.model_fields.get(parts[0])
    if field is None:
        return False
    models = [section_of(field.annotation), type(field.default)]
    if parts[0] == "repulsion":
        models = [config.Hamr, config.Adaptive]
    return len(parts) == 1 or any(within(inner, parts[1:]) for inner in models)


@document
def test_yaml_in_the_text_is_valid(path):
    for block in blocks(path, "yaml"):
        assert config.build(yaml.safe_load(block))


@document
def test_python_in_the_text_compiles(path):
    for block in blocks(path, "python"):
        if path.name != "extending.md":  # parts of files, which a test of the registry puts together
            compile(block, path.name, "exec")


def test_the_messages_that_operations_quotes_are_those_of_the_code():
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    files = [file for package in ("adasid", "pipelines") for file in (ROOT / package).rglob("*.py")]
    source = re.sub(r'"\s+f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))
    quoted = re.findall(r'"([^"]+)"', text[text.index("## Exit codes") : text.index("At code 4")])
    assert len(quoted) > 10
    assert not [part for phrase in quoted for part in phrase.split(" ... ") if part not in source]


def test_the_python_api_works_as_the_readme_shows(tmp_path):
    (block,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("['<r0_")
    assert (tmp_path / "my-tokenizer" / "manifest.json").exists()


def test_the_plan_can_be_asked_for(tmp_path):
    """The one command of the documents that is cheap: it runs nothing."""
    (line,) = {
        span
        for path in DOCUMENTS
        for span in code(path)
        if span.startswith("python jobs/run_all.py") and "mine.yaml" in span
    }
    words = [str(ROOT / "conf" / "demo.yaml") if word == "mine.yaml" else word for word in shlex.split(line)[1:]]
    done = subprocess.run(
        [sys.executable, *words, "--set", f"runs_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in ("ingest", "features", "sids", "report"):
        assert re.search(rf"^  {name}\s+runs\s", done.stdout, re.MULTILINE), done.stdout


def test_tables_that_the_data_document_names_are_those_of_the_lake():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text[text.index("## The published table") : text.index("The table `live`")]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert [name for name in tables.SIDS.names if name != "item_id"] == named
