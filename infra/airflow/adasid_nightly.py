"""Schedule the nightly run as an Airflow 3 DAG: ingest, build features, retokenize, maintain. Copy it into the DAGs
folder.

``ADASID_HOME`` (the checkout, with its ``.venv``), ``ADASID_CONFIG`` (a file of ``conf/``) and ``ADASID_DRIVER_MEMORY``
are read from the scheduler's environment. A refused run (exit code 4) is not retried: it would be refused again.

The run date is the scheduler's: ``ds`` is the UTC date of the run's logical date. With a cron schedule Airflow 3 takes
the time at which a run is due (``CronTriggerTimetable``), so the run of 2 January at 02:30 has ``ds`` 2026-01-02, also
when it is cleared and run again later. Where ``[scheduler] create_cron_data_intervals`` is on, ``ds`` is the day
before. A run without a logical date (triggered by an asset) has no ``ds`` and fails.
"""

import os
from datetime import datetime, timedelta, timezone

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

HOME = os.environ.get("ADASID_HOME", "/opt/adasid")
MEMORY = os.environ.get("ADASID_DRIVER_MEMORY", "8g")
CONFIG = os.environ.get("ADASID_CONFIG", "conf/cluster.yaml")
RETOKENIZE = "--run-date '{{ ds }}' --set retokenize.lease.wait=3600"

with DAG(
    "adasid_nightly",
    description="New and changed items get semantic IDs; published ones stay",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
) as dag:

    def job(name: str, arguments: str = "", **options: object) -> BashOperator:
        """Return the task that runs one job of ``jobs/``."""
        command = (
            f"PATH={HOME}/.venv/bin:$PATH spark-submit --driver-memory {MEMORY} jobs/{name}.py --config "
            f"{CONFIG} "
            f"{arguments}"
        )
        return BashOperator(task_id=name, bash_command=command, cwd=HOME, append_env=True, **options)

    features = job("ingest") >> job("build_features")
    features >> job("retokenize", RETOKENIZE, retries=0, execution_timeout=timedelta(hours=6)) >> job("maintain")
