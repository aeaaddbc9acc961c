"""A small shop with a published generation, made once; the nightly tests work on copies."""

import pytest

from adasid.config import load
from pipelines import chain
from tests.end_to_end.running import config_file, run_stage


@pytest.fixture(scope="session")
def shop(tmp_path_factory, spark):
    """Its folder."""
    folder = tmp_path_factory.mktemp("shop")
    cfg = load(config_file(folder, "shop"))
    for name, _ in chain.STAGES[:-1]:
        run_stage(cfg, name)
    return folder
