# Builds the jobs, for spark-submit on one machine and for the Spark operator. Build from the checkout:
# docker build -f infra/images/spark.Dockerfile -t adasid-spark:0.1.0 .
# BASE: for builds that can be repeated give it by digest, --build-arg BASE=python:3.11-slim-bookworm@sha256:..., which
# `docker buildx imagetools inspect python:3.11-slim-bookworm` prints; renew the digest with the lock file.
ARG BASE=python:3.11-slim-bookworm
FROM $BASE
RUN apt-get update && apt-get install -y --no-install-recommends openjdk-17-jre-headless procps tini && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/adasid
# versions and hashes; another index with other files (torch's CPU builds) needs another LOCK, made for that index
ARG LOCK=infra/images/requirements.lock PIP_ARGS=""
COPY $LOCK /tmp/requirements.lock
RUN pip install --no-cache-dir $PIP_ARGS --require-hashes -r /tmp/requirements.lock
COPY setup.py README.md LICENSE pyproject.toml ./
COPY adasid adasid
COPY pipelines pipelines
COPY jobs jobs
COPY conf conf
COPY infra/kubernetes/night.py infra/kubernetes/night.py
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && python -m pipelines.engines.jars --s3
ENV ADASID_HOME=/opt/adasid MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
RUN useradd --uid 185 --create-home adasid && mkdir /runs && chown adasid /runs
USER 185
COPY infra/images/entrypoint.sh /opt/entrypoint.sh
ENTRYPOINT ["tini", "--", "/opt/entrypoint.sh"]
