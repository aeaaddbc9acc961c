"""Bring the jars that Spark needs into its jar folder, once: Delta's two, those of S3 with ``--s3``, and the log store,
which is compiled here.

Usage: ``python -m pipelines.engines.jars [--s3]``. Spark's own resolver downloads them, so a user's mirror settings
apply. delta-spark's own helper would download 33 jars, a second Hadoop client among them; hadoop-aws would bring an SDK
bundle of 686 MB, of which 14 MB are enough.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pyspark import SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from pipelines.engines.spark import JARS, LOG_STORE_JAR, S3_JAR, class_archive, jar_folder

_DELTA = "io.delta:delta-spark_4.2_2.13:4.4.0,io.delta:delta-storage:4.4.0"
_NO_DELTA = (
    "org.apache.hadoop:*,org.apache.parquet:*,org.antlr:*,org.apache.spark:*,"
    "com.fasterxml.jackson.core:*,org.slf4j:*,org.scala-lang:*,io.unitycatalog:*"
)
_SDK = "2.35.4"
_S3 = ",".join(
    (
        "org.apache.hadoop:hadoop-aws:3.5.0",  # as the Hadoop client of pyspark
        *(
            f"software.amazon.awssdk:{part}:{_SDK}"
            for part in ("s3", "s3-transfer-manager", "sts", "apache-client", "netty-nio-client")
        ),
    )
)
_NO_S3 = "software.amazon.awssdk:bundle,org.apache.hadoop:hadoop-common,io.netty:*,org.slf4j:*,org.wildfly.openssl:*"


def main(arguments: list[str]) -> int:
    """Bring the missing jars; return the exit code."""
    folder = jar_folder()
    before = set(folder.iterdir())
    packages: list[tuple[str, str, str, tuple[str, ...]]] = [("Delta", _DELTA, _NO_DELTA, JARS)]
    if "--s3" in arguments:
        packages.append(("S3", _S3, _NO_S3, (S3_JAR,)))
    for name, wanted, excludes, jars in packages:
        if not all((folder / jar).exists() for jar in jars) and (problem := _resolve(wanted, excludes, folder, jars)):
            print(f"the jars of {name} {problem}; put {' and '.join(jars)} into {folder}", file=sys.stderr)
            return 1
    if not (folder / LOG_STORE_JAR).exists():  # in its own process: this one may have had a Spark session
        command = "from pipelines.engines import jars; jars.compile_log_store()"
        subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])
    if set(folder.iterdir()) != before:
        class_archive().unlink(missing_ok=True)  # it is of one set of jars
    return 0


def _resolve(packages: str, excludes: str, folder: Path, wanted: tuple[str, ...]) -> str:
    """Copy the jars of ``packages`` into ``folder``, those ``wanted`` last; return what failed, else nothing."""
    with tempfile.TemporaryDirectory() as ivy:
        try:
            builder = (
                SparkSession.builder.master("local[1]")
                .config("spark.ui.enabled", "false")
                .config("spark.jars.ivy", ivy)
            )
            session = builder.config("spark.jars.packages", packages).config("spark.jars.excludes", excludes)
            session.getOrCreate().stop()
            SparkContext._gateway.shutdown()  # type: ignore[union-attr]
            SparkContext._gateway = SparkContext._jvm = None  # packages are resolved when a JVM starts
        except Exception as error:
            return f"could not be resolved ({str(error).splitlines()[0]})"
        jars = {path.name.partition("_")[2]: path for path in Path(ivy).rglob("jars/*.jar")}  # group_artifact-version
        if missing := [jar for jar in wanted if jar not in jars]:
            return f"lack {missing[0]}, which Spark's resolver did not bring"
        for name in sorted(jars, key=wanted.__contains__):  # their existence says that all are there
            shutil.copy(jars[name], folder / name)
    return ""


def compile_log_store() -> None:
    """Compile the log store with Janino, which pyspark brings, and write its jar."""
    target = jar_folder() / LOG_STORE_JAR
    source = Path(__file__).with_name("ExclusiveLogStore.java").read_text(encoding="utf-8")
    gateway = launch_gateway()
    try:
        compiler = gateway.jvm.org.codehaus.janino.SimpleCompiler()
        compiler.cook(source)
        classes = {str(name): bytes(code) for name, code in dict(compiler.getBytecodes()).items()}
    finally:
        gateway.shutdown()
    draft = target.with_suffix(".draft")
    with zipfile.ZipFile(draft, "w") as jar:
        for name, code in sorted(classes.items()):
            jar.writestr(zipfile.ZipInfo(f"{name.replace('.', '/')}.class"), code)
    draft.replace(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
