"""Check the project's structure: imports run one way, the core imports without engines, entry points are thin and their
flags are frozen."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.utils.validation import _validate_param_name

from adasid import tables
from adasid.config import load
from pipelines.engines.tracking import parameters

ROOT = Path(__file__).parents[2]
ENGINES = {"pyspark", "delta", "deltalake", "ray", "mlflow"}
JOBS = (
    "ingest",
    "encode_content",
    "build_features",
    "train",
    "write_sids",
    "report",
    "compare_tokenizers",
    "evaluate",
    "run_all",
    "retokenize",
    "rollback",
    "maintain",
)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("package", "forbidden"), [("adasid", {"pipelines", "jobs", *ENGINES}), ("pipelines", {"jobs"})]
)
def test_imports_run_one_way(package, forbidden):
    bad = [
        (path.name, name)
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert not bad


LAYERS = (
    ("errors", "faults", "files", "settings", "storage", "tables", "ragged", "experts"),
    ("sid", "distributed"),
    ("data", "quantizers"),
    ("config",),
    ("losses", "metrics", "datasets", "encoders"),
    ("tokenizers",),
    ("recommenders",),
    ("training",),
    ("report", "api"),
    ("__init__",),
)
"""The parts of ``adasid``, each above those that it imports. The settings of tokenizers belong to ``config``."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


IMPLEMENTATION = ("base", "artifact", "axes", "encode", "inputs", "relabel", "spaces", "trained", "model")


def level(module):
    parts = module.split(".")[1:]
    settings = parts[0] == "tokenizers" and parts[-1] not in IMPLEMENTATION
    return LEVEL["config" if settings else parts[0]]


def test_no_module_of_the_core_imports_one_of_a_layer_above():
    upward = []
    for path in sorted((ROOT / "adasid").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        mine = level(name.removesuffix(".__init__") if name.count(".") > 1 else name)
        for node in ast.parse(path.read_text()).body:  # imports within functions run later
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if modules == ["adasid"]:
                modules = [f"adasid.{alias.name}" for alias in node.names]
            upward += [(name, other) for other in modules if other.startswith("adasid.") and level(other) > mine]
    assert not upward


def test_the_core_imports_without_engines():
    code = (
        "import sys, pkgutil, importlib\n"
        f"for name in {sorted(ENGINES)!r}: sys.modules[name] = None\n"
        "import adasid\n"
        "for module in pkgutil.walk_packages(adasid.__path__, 'adasid.'): importlib.import_module(module.name)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_a_thin_entry_point_with_help(job):
    path = ROOT / "jobs" / f"{job}.py"
    assert len(path.read_text().splitlines()) <= 60
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout
    for word in (
        "--config FILE",
        "--set KEY=VALUE",
        "--check",
        "Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 missing or invalid input, 4 gate failed, 5 another run "
        "is at work, 75 a fault that passes: run it again",
    ):
        assert word in " ".join(shown.split())
    assert {p.stem for p in (ROOT / "jobs").glob("*.py")} == set(JOBS)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--config"),
        (["--config", "conf/absent.yaml"], 2, "conf/absent.yaml: cannot be read"),
        (
            ["--config", "conf/demo.yaml", "--set", "tokenizer.codebok_size=1"],
            2,
            "did you mean 'tokenizer.codebook_size'",
        ),
        (["--config", "conf/demo.yaml", "--set", "runs_dir=/proc/none"], 3, "not writable"),
        (["--config", "conf/demo.yaml", "--set", "runs_dir={tmp}"], 3, "item_features does not exist"),
    ],
)
def test_exit_codes_and_one_line_errors(arguments, code, words, tmp_path):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    done = subprocess.run([sys.executable, "jobs/write_sids.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_loaded_that_could_run_code():
    code = "\n".join(
        path.read_text() for package in ("adasid", "pipelines", "jobs") for path in (ROOT / package).rglob("*.py")
    )
    for word in ("yaml.load(", "import pickle", "pickle.load", "allow_pickle=True", "torch.load("):
        assert word not in code


def test_table_schemas_are_frozen():
    names = (
        "INTERACTIONS",
        "IN_PLACE",
        "REJECTED_ROWS",
        "TRUTH",
        "ITEM_STATS",
        "USER_STATS",
        "SEQUENCES",
        "RANKING_SAMPLES",
        "ITEM_PAIRS",
        "PREVIOUS_CODES",
        "BEHAVIOR_EMBEDDINGS",
        "CATALOG_STATS",
        "RICHNESS_STATS",
        "SIDS",
        "SID_CHANGES",
        "GENERATIONS",
        "LIVE",
        "LEASES",
    )
    schemas = {name.lower(): getattr(tables, name) for name in names}
    schemas |= {"items": tables.items(["text"]), "item_features": tables.item_features(["text"])}
    found = {
        name: [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in schema]
        for name, schema in schemas.items()
    }
    frozen = json.loads((Path(__file__).parent / "schemas.json").read_text())
    assert found == frozen, (
        "a table's contract changed: say so in docs/data.md and update tests/contracts/schemas.json on purpose"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_tracker_takes_every_key_of_a_config(path):
    for key in parameters(load(path)):
        _validate_param_name(key)
