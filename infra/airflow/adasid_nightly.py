"""Schedule the nightly run as an Airflow 3 DAG: ingest, encode content, build features, retokenize, maintain,
report. Copy it into the DAGs folder.

``ADASID_HOME`` (the checkout, with its ``.venv``), ``ADASID_CONFIG`` (a file of ``conf/``), ``ADASID_SPARK_MASTER``
(default: this machine) and ``ADASID_DRIVER_MEMORY`` are read from the scheduler's environment. A job is tried up to
three times after a fault that passes (exit code 75), a failure (1) or a signal; exit codes 2 to 5 fail the task at
once: a refused run (4) would be refused again.

The run date is the scheduler's: ``ds`` is the UTC date of the run's logical date. With a cron schedule Airflow 3 takes
the time at which a run is due (``CronTriggerTimetable``), so the run of 2 January at 02:30 has ``ds`` 2026-01-02, also
when it is cleared and run again later. Where ``[scheduler] create_cron_data_intervals`` is on, ``ds`` is the day
before. A run without a logical date (triggered by an asset) has no ``ds`` and fails.
"""

import os
from datetime import datetime, timedelta, timezone

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

HOME = os.environ.get("ADASID_HOME", "/opt/adasid")
MASTER = os.environ.get("ADASID_SPARK_MASTER", "local[*]")
MEMORY = os.environ.get("ADASID_DRIVER_MEMORY", "8g")
CONFIG = os.environ.get("ADASID_CONFIG", "conf/cluster.yaml")
FINAL = {2, 3, 4, 5}
RETOKENIZE = "--run-date '{{ ds }}' --set retokenize.lease.wait=3600"


class Job(BashOperator):
    """Run a job, and decide by its exit code whether it is tried again."""

    def execute(self, context: dict) -> None:
        """Raise AirflowFailException for exit codes that a retry does not change."""
        command = ["bash", "-c", self.bash_command]
        code = self.subprocess_hook.run_command(command, env=self.get_env(context), cwd=self.cwd).exit_code
        if code:
            raise (AirflowFailException if code in FINAL else AirflowException)(f"exit code {code}")


with DAG(
    "adasid_nightly",
    description="New and changed items get semantic IDs; published ones stay",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
) as dag:

    def job(name: str, arguments: str = "", **options: object) -> Job:
        """Return the task that runs one job of ``jobs/``."""
        command = (
            f"PATH={HOME}/.venv/bin:$PATH spark-submit --master '{MASTER}' --driver-memory {MEMORY} "
            f"jobs/{name}.py --config {CONFIG} "
            f"{arguments}"
        )
        return Job(task_id=name, bash_command=command, cwd=HOME, append_env=True, **options)

    features = job("ingest") >> job("encode_content") >> job("build_features")
    features >> job("retokenize", RETOKENIZE, execution_timeout=timedelta(hours=6)) >> job("maintain") >> job("report")
