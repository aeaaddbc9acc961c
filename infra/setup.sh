#!/usr/bin/env bash
# Sets up a checkout on Debian or Ubuntu: virtual environment in .venv, packages, Java 17 or newer, Delta's two jars, an
# archive of Spark's classes.
# Nothing is done twice. Packages are those of requirements.lock, by hash (`make lock` renews it). Mirrors: pip's and
# uv's own settings hold; UV_INSTALL_ARGS is passed on to `uv pip install`. EXTRAS: other extras of setup.py, at the
# versions of the lock. LOCK: another lock file; with an empty LOCK the newest packages that setup.py allows, without
# hashes: for an index whose files are others, such as that of torch's CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."
unset SPARK_HOME  # another Spark, into which Delta's jars would go
extras=${EXTRAS:-all,lint} lock=${LOCK-requirements.lock}
python=${PYTHON:-python3}
stop() { echo "setup: $1" >&2; exit 1; }

command -v "$python" >/dev/null || stop "no $python; install Python 3.10 or newer (apt-get install python3 python3-venv), or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "$("$python" --version) is too old; install Python 3.10 or newer and set PYTHON to it"

root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo "$@"; else return 1; fi; }
apt() { command -v apt-get >/dev/null && root apt-get update -qq >/dev/null 2>&1 && root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1; }

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt "python$version-venv" || apt python3-venv || stop "$python has no venv module; install it: apt-get install python3-venv"
fi

java_works() { "${JAVA_HOME:+$JAVA_HOME/bin/}java" -version 2>&1 | awk -F'[".]' '/version/ { exit !($2 >= 17) } END { if (NR == 0) exit 1 }'; }
if ! java_works; then
    echo "setup: installing Java" >&2
    apt openjdk-17-jre-headless || apt openjdk-21-jre-headless || apt default-jre-headless || true
    java_works || stop "no Java 17 or newer, and it could not be installed; install it (apt-get install openjdk-17-jre-headless) or set JAVA_HOME"
fi

[ -z "$lock" ] || [ -r "$lock" ] || stop "no lock file $lock; set LOCK to one, or make it with: make lock"

stamp=.venv/.ready-$(cat setup.py infra/setup.sh infra/installer.lock $lock | sha256sum | cut -c1-12)-$extras${lock:+-locked}
if [ ! -e "$stamp" ]; then
    echo "setup: installing packages into .venv (about two minutes on a good line)" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if .venv/bin/python -m pip install -q --require-hashes -r infra/installer.lock; then
        # uv does not read pip's settings: hand it the mirror that pip uses
        export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}}
        [ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX
        export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} UV_LINK_MODE=${UV_LINK_MODE:-copy}
        # shellcheck disable=SC2206
        install=(.venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python ${UV_INSTALL_ARGS:-})
    else
        install=(.venv/bin/python -m pip install -q)
    fi
    failed="packages could not be installed; see the lines above, and check the package index that pip or uv is set to (LOCK= where its files are not those of $lock)"
    if [ -n "$lock" ] && [ "$extras" = all,lint ]; then
        "${install[@]}" --require-hashes -r "$lock" && "${install[@]}" --no-deps --no-build-isolation -e . || stop "$failed"
    else
        sed 's/ *\\$//; /^ *--hash=/d' ${lock:-/dev/null} > .venv/versions.txt
        "${install[@]}" -c .venv/versions.txt -e ".[$extras]" || stop "$failed"
    fi
    touch "$stamp"
fi

jars=; case ",$extras," in *,s3,*|*,all,*) jars=--s3 ;; esac
.venv/bin/python -m pipelines.engines.jars $jars 2>.venv/jars.log || stop "$(tail -n 1 .venv/jars.log)"
.venv/bin/python -m pipelines.engines.class_archive 2>.venv/class-archive.log || stop "$(tail -n 1 .venv/class-archive.log)"
