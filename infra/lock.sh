#!/usr/bin/env bash
# Writes the lock files: versions and hashes of all packages, for Python 3.10 or newer on any platform. What a lock file
# already has stays, unless `--upgrade` or `--upgrade-package NAME` is given; all arguments are passed on to uv.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --no-annotate --no-emit-index-url)
"${compile[@]}" --all-extras "$@" setup.py -o requirements.lock
same=(-c requirements.lock)  # the other files have the same versions
"${compile[@]}" "${same[@]}" --extra engines --extra content --extra report --extra s3 "$@" setup.py -o infra/images/requirements.lock
printf "mlflow\nboto3\n" | "${compile[@]}" "${same[@]}" "$@" - -o infra/images/mlflow.lock
echo uv | "${compile[@]}" "$@" - -o infra/installer.lock
