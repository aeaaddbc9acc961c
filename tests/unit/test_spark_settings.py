"""Test whose Spark settings win."""

from adasid.config import Spark
from pipelines.engines.spark import _EXTENSION, _REQUIRED, _launch, chosen, class_archive, partitions, sized
from tests import s3

GIVEN = {
    "spark.sql.shuffle.partitions": "512",
    "spark.ui.enabled": "true",
    "spark.sql.session.timeZone": "Asia/Tokyo",
    "spark.sql.extensions": "com.example.Other",
}


def test_spark_submit_wins_over_defaults_but_not_where_values_would_be_wrong():
    settings = chosen(Spark(shuffle_partitions=8), GIVEN)
    assert "spark.sql.shuffle.partitions" not in settings and "spark.ui.enabled" not in settings
    assert settings["spark.sql.session.timeZone"] == "UTC" and _REQUIRED.items() <= settings.items()
    assert settings["spark.sql.extensions"] == f"{_EXTENSION},com.example.Other"


def test_the_config_wins_over_both_and_defaults_fill_the_rest():
    own = {"spark.ui.enabled": "false", "spark.sql.session.timeZone": "UTC+1", "spark.task.maxFailures": 2}
    settings = chosen(Spark(shuffle_partitions=8, conf=own), {**GIVEN, "spark.task.maxFailures": "9"})
    assert {key: settings[key] for key in own} == {key: str(value) for key, value in own.items()}
    assert chosen(Spark(shuffle_partitions=8), {})["spark.sql.shuffle.partitions"] == "8"
    assert "spark.sql.shuffle.partitions" not in chosen(Spark(), {})


def test_the_number_of_partitions_follows_the_size_of_the_input():
    compressed = "spark.sql.inMemoryColumnarStorage.compressed"
    assert [sized(size, 4)[compressed] for size in (0, 2**29, 2**29 + 1)] == ["false", "false", "true"]
    assert [partitions(size, 4) for size in (0, 2**20, 2**30, 2**30 + 1, 100 * 2**30)] == [8, 8, 32, 33, 3200]


def test_no_progress_bar_is_drawn_over_the_lines_of_a_job():
    key = "spark.ui.showConsoleProgress"
    assert _launch(Spark())[key] == chosen(Spark(), {key: "true"}, _launch(Spark()))[key] == "false"
    assert _launch(Spark(conf={key: "true"}))[key] == "true"


def test_java_options_of_the_config_join_those_of_the_log():
    found = _launch(Spark(conf={"spark.driver.extraJavaOptions": "-Xss4m"}))["spark.driver.extraJavaOptions"]
    assert "log4j2.properties" in found and found.endswith(" -Xss4m")


def test_the_java_of_a_job_uses_the_class_archive_of_setup():
    assert class_archive().exists()
    assert f"-XX:SharedArchiveFile={class_archive()}" in _launch(Spark())["spark.driver.extraJavaOptions"]


def test_the_settings_of_s3a_follow_the_environment_and_have_no_secret(monkeypatch):
    for name, value in s3.environment(9000).items():
        monkeypatch.setenv(name, value)
    settings = chosen(Spark(), {"spark.hadoop.fs.s3a.retry.limit": "9"})
    assert settings["spark.hadoop.fs.s3a.endpoint"] == "http://127.0.0.1:9000"
    assert settings["spark.hadoop.fs.s3a.endpoint.region"] == "us-east-1"
    assert settings["spark.hadoop.fs.s3a.connection.ssl.enabled"] == "false"
    assert "spark.hadoop.fs.s3a.retry.limit" not in settings  # spark-submit's stays
    assert not any(s3.ENVIRONMENT[name] in settings.values() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
