"""The night as an Airflow 3 DAG: today's tables in, new SIDs out, old files away. Copy it into the DAGs folder.

``ADASID_HOME`` (the checkout, with its ``.venv``) and ``ADASID_CONFIG`` (a file of ``conf/``) are read from the scheduler's environment.
"""

import os
from datetime import datetime, timedelta, timezone

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

HOME = os.environ.get("ADASID_HOME", "/opt/adasid")
CONFIG = os.environ.get("ADASID_CONFIG", "conf/cluster.yaml")

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
        """One job of ``jobs/``. Exit code 4, a refused night, fails at once: trying again would refuse it again."""
        command = f"{HOME}/.venv/bin/spark-submit jobs/{name}.py --config {CONFIG} {arguments}; code=$?; [ $code -eq 4 ] && exit 99; exit $code"
        return BashOperator(task_id=name, bash_command=command, cwd=HOME, append_env=True, skip_on_exit_code=None, **options)

    (
        job("ingest")
        >> job("build_features")
        >> job("retokenize", "--run-date {{ ds }} --set retokenize.lease.wait=3600", execution_timeout=timedelta(hours=6))
        >> job("maintain")
    )
