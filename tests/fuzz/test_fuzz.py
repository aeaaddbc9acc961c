"""Run ingest and build_features on catalogues, events and configs of every kind; `make fuzz` tries random ones.

``ADASID_FUZZ`` is the number of examples, ``ADASID_FUZZ_SEED`` their seed; a case that breaks the contract is saved in
``ADASID_FUZZ_CASES``, with its files and config.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from mlflow.tracking import MlflowClient

from pipelines.features import events
from tests.fuzz import contract
from tests.fuzz.strategies import Example, examples, make

EXAMPLES = int(os.environ.get("ADASID_FUZZ", "0"))
FIXED = (2, 4, 6, 7, 11, 16, 25, 28, 30, 33, 35, 38, 48, 50, 59, 60, 66, 76, 96, 105)
"""Five are accepted (Parquet, Delta, arrays, Amazon files; behaviour), the others are refused."""
SEED = int(os.environ.get("ADASID_FUZZ_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
CASES = Path(os.environ.get("ADASID_FUZZ_CASES", "fuzz-cases"))
PLAIN = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
    verbosity=Verbosity.quiet,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One MLflow store for all examples: to create one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment("adasid", artifact_location=(folder / "artifacts").as_uri())
    return uri


@pytest.fixture(scope="module")
def screen(spark):
    screen = contract.Screen(spark)
    yield screen
    screen.close()


@pytest.mark.parametrize("number", FIXED)
def test_fixed_seeds(number, store, screen, tmp_path, monkeypatch):
    if number % 2 == 0:  # as where items are too many to broadcast
        monkeypatch.setattr(events, "fits_broadcast", lambda frame: False)
    contract.run(make(number), tmp_path, store, screen)


@pytest.mark.skipif(not EXAMPLES, reason="make fuzz sets ADASID_FUZZ")
def test_random_seeds(store, screen):
    codes, reasons, lines, broken = Counter[int](), Counter[str](), Counter[str](), list[str]()
    started = time.monotonic()

    @seed(SEED)
    @settings(PLAIN, max_examples=EXAMPLES)
    @given(examples)
    def tries(example: Example) -> None:
        number = codes.total() + len(broken)
        folder = Path(tempfile.mkdtemp(prefix="adasid-fuzz-"))
        try:
            outcome = contract.run(example, folder, store, screen)
            codes[outcome.code] += 1
            reasons.update(outcome.reasons)
            lines.update([_plain(outcome.line, folder)] if outcome.line else [])
        except Exception as error:
            broken.append(f"{type(error).__name__}: {_plain(str(error), folder)[:1000]}")
            kept = CASES / f"{SEED}-{number}"
            shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("runs"), dirs_exist_ok=True)
            (kept / "example.txt").write_text(f"{error}\n\n{example}\n", encoding="utf-8", errors="replace")
            print(f"example {number}: kept in {kept}: {broken[-1]}", file=sys.stderr)
        shutil.rmtree(folder)
        print(
            f"{number + 1} of {EXAMPLES}, {time.monotonic() - started:.0f} s, {dict(codes)}, {len(broken)} broken",
            file=sys.stderr,
            flush=True,
        )

    tries()
    print(
        f"seed {SEED}: {codes.total() + len(broken)} examples in {time.monotonic() - started:.0f} s",
        *_listed(codes, reasons, lines),
        sep="\n",
        file=sys.stderr,
    )
    assert not broken, f"{len(broken)} examples broke the contract, see {CASES}:\n" + "\n".join(broken)


def _plain(line: str, folder: Path) -> str:
    return re.sub(r"\b\d+\b", "N", line.replace(str(folder), "CASE"))


def _listed(codes: Counter[int], reasons: Counter[str], lines: Counter[str]) -> list[str]:
    named = (("exit codes", codes), ("rows rejected", reasons), ("error lines", lines))
    rows = {title: [f"  {number:6} {key}" for key, number in counted.most_common()] for title, counted in named}
    return [line for title, own in rows.items() for line in (f"{title}:", *own)]
