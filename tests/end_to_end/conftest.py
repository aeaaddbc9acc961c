"""Publish a generation of a small shop once for all test processes; the nightly tests work on copies."""

import os

import pytest
from filelock import FileLock

from adasid.config import load
from pipelines import chain
from tests.end_to_end.clusters import bare_python, cluster, nodes  # noqa: F401
from tests.end_to_end.running import config_file, run_stage


@pytest.fixture(scope="session")
def shop(tmp_path_factory, request):
    """Its folder."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shop"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            request.getfixturevalue("spark")
            folder.mkdir()
            cfg = load(config_file(folder, "shop"))
            for name, _ in chain.STAGES[:-1]:
                run_stage(cfg, name)
            (folder / "made").touch()
    return folder
