"""Register the published tables in Spark's catalogue, under the names of ``publish.tables``.

What is registered is recorded in the run's folder, so that a job that starts no Spark does not start it for this.
"""

from __future__ import annotations

import json

from pyspark.sql import SparkSession

from adasid.config import Config
from adasid.errors import InputError, TransientError, first_line
from adasid.files import write_json
from pipelines.engines import catalog
from pipelines.engines import spark as engine
from pipelines.engines.tracking import StageContext
from pipelines.run import Run


def check(cfg: Config, context: StageContext) -> None:
    """Raise InputError where a name cannot be registered: another table has it, or its schema or catalogue does not
    exist. Call it before anything is published."""
    for table, name in _open(cfg).items():
        key = f"publish.tables.{table}"
        try:
            spark = engine.session(cfg.spark)
            if not _present(spark, key, name, _location(cfg, table)):
                catalog.check_schema(spark, key, name)
        except TransientError as error:  # it need not pass before the table is published
            context.note(str(error), "WARN")


def register(cfg: Config, context: StageContext) -> None:
    """Create the entries that are missing. The tables are published already, so a fault is a warning; the next run
    tries again."""
    for table, name in _open(cfg).items():
        key, location = f"publish.tables.{table}", _location(cfg, table)
        try:
            if not context.lake.exists(table):
                continue
            spark = engine.session(cfg.spark)
            if not _present(spark, key, name, location):
                catalog.create(spark, key, name, location)
                context.note(f"{name} is registered for {location}")
                if catalog.in_memory(spark, name):
                    context.note(
                        f"{name}: this catalogue is in memory and ends with this job: name one that stays", "WARN"
                    )
            if _recorded(cfg).get(table) != [name, location]:
                write_json(Run(cfg).registered, {**_recorded(cfg), table: [name, location]})
        except Exception as error:
            context.note(f"{key} {name} is not registered; the next run tries again ({first_line(error)})", "WARN")


def _open(cfg: Config) -> dict[str, str]:
    """Return table -> name of those that are to be looked up: all of them where Spark runs already, else those that
    are not recorded."""
    named, recorded = cfg.publish.tables.named(), _recorded(cfg)
    if named and SparkSession.getActiveSession() is not None:
        return named
    return {table: name for table, name in named.items() if recorded.get(table) != [name, _location(cfg, table)]}


def _recorded(cfg: Config) -> dict[str, list[str]]:
    """Return table -> name and location of those that were registered."""
    path = Run(cfg).registered
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _location(cfg: Config, table: str) -> str:
    return Run(cfg).lake.path(table)


def _present(spark: SparkSession, key: str, name: str, location: str) -> bool:
    """Return whether the entry exists. Raises InputError where another table has its name."""
    found = catalog.entry(spark, key, name)
    if found is None:
        return False
    if found != catalog.Entry("delta", location):
        other = f"a {found.provider} table at {found.location}" if found.provider else "a view"
        raise InputError(
            f"{key} {name}: the name is taken by {other}, not by {location}: choose another name, or drop that entry"
        )
    return True
