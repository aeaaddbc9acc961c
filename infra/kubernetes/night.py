"""Run the nightly jobs in one Spark application, one after another; the first failure ends it with its exit code, but
for that of the report: what is published stays published.

  spark-submit infra/kubernetes/night.py --config conf/cluster.yaml --run-date today

``--run-date`` goes to retokenize, as the day on which the night began; all other arguments go to every job.
"""

import argparse
import runpy
import sys
from pathlib import Path

from pipelines import cli

JOBS = Path(__file__).resolve().parents[2] / "jobs"
NIGHT = ("ingest", "encode_content", "build_features", "retokenize", "maintain", "report")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run-date", required=True, type=cli.day, metavar="DATE", help="as in jobs/retokenize.py")
    own, shared = parser.parse_known_args()
    for name in NIGHT:
        job = JOBS / f"{name}.py"
        sys.argv = [str(job), *shared, *(["--run-date", own.run_date.isoformat()] if name == "retokenize" else [])]
        try:
            runpy.run_path(str(job), run_name="__main__")
        except SystemExit as end:
            if end.code and name != "report":
                raise
            if end.code:
                print(f"exit code {end.code}: the generation is published without a report", file=sys.stderr)
