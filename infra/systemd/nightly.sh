#!/usr/bin/env bash
# Runs the nightly jobs on one machine, started by the timer. The first argument is the run date (default: the day on
# which it starts, in UTC). The first job that fails ends the script with its exit code, but for the report: what is
# published stays published.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ ! "${1:-today}" =~ ^([0-9]{4}-[0-9]{2}-[0-9]{2}|today|yesterday)$ ]]; then
  echo "nightly.sh: '$1' is not a date like 2026-11-22, today or yesterday" >&2
  exit 2
fi
day="$(date -u -d "${1:-today}" +%F)" || exit 2
if [[ "$day" > "$(date -u -d tomorrow +%F)" ]]; then
  echo "nightly.sh: $day is in the future, and no earlier day could follow it" >&2
  exit 2
fi
config="${ADASID_CONFIG:?name a file of conf/}"
export PATH="$PWD/.venv/bin:$PATH"  # spark-submit uses the first python3
submit=(spark-submit --master "${ADASID_SPARK_MASTER:-local[*]}" --driver-memory "${ADASID_DRIVER_MEMORY:-8g}")
"${submit[@]}" jobs/ingest.py --config "$config"
"${submit[@]}" jobs/encode_content.py --config "$config"  # does nothing where the source brings all vectors
"${submit[@]}" jobs/build_features.py --config "$config"
"${submit[@]}" jobs/retokenize.py --config "$config" --run-date "$day" --set retokenize.lease.wait=3600
"${submit[@]}" jobs/maintain.py --config "$config"
python3 jobs/report.py --config "$config" || echo "exit code $?: the generation is published without a report" >&2
