"""Download Delta's two jars once into Spark's jar folder, through Spark's own resolver (so that a user's mirror
settings apply).

Usage: ``python -m pipelines.engines.jars``. delta-spark's own helper would download 33 jars, a second Hadoop client
among them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines import log
from pipelines.engines.spark import JARS, jar_folder

PACKAGES = "io.delta:delta-spark_4.2_2.13:4.4.0,io.delta:delta-storage:4.4.0"
EXCLUDES = (
    "org.apache.hadoop:*,org.apache.parquet:*,org.antlr:*,org.apache.spark:*,"
    "com.fasterxml.jackson.core:*,org.slf4j:*,org.scala-lang:*,io.unitycatalog:*"
)


def main() -> int:
    """Download the missing jars; return the exit code."""
    folder = jar_folder()
    if all((folder / jar).exists() for jar in JARS):
        return 0
    with tempfile.TemporaryDirectory() as ivy:
        try:
            builder = (
                SparkSession.builder.master("local[1]")
                .config("spark.ui.enabled", "false")
                .config("spark.jars.ivy", ivy)
            )
            builder.config("spark.jars.packages", PACKAGES).config("spark.jars.excludes", EXCLUDES).getOrCreate().stop()
        except Exception as error:
            log.line(
                f"Delta's jars could not be resolved ({str(error).splitlines()[0]}); put {' and '.join(JARS)} into "
                f"{folder}",
                "ERROR",
            )
            return 1
        paths = {jar: next(Path(ivy).rglob(f"*{jar}"), None) for jar in JARS}
        for jar, path in paths.items():
            if path is None:
                log.line(f"Spark's resolver did not bring {jar}; put it into {folder}", "ERROR")
                return 1
            shutil.copy(path, folder / jar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
