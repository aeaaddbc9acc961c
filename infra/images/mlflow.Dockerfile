# Builds the tracking server. MLFLOW_SERVER_ALLOWED_HOSTS names the hosts by which it is reached; without it the server
# answers only to localhost and private addresses.
# docker build -f infra/images/mlflow.Dockerfile -t adasid-mlflow:0.1.0 .
# BASE: for builds that can be repeated give it by digest, --build-arg BASE=python:3.11-slim-bookworm@sha256:..., which
# `docker buildx imagetools inspect python:3.11-slim-bookworm` prints; renew the digest with the lock file.
ARG BASE=python:3.11-slim-bookworm
FROM $BASE
ARG PIP_ARGS=""
COPY infra/images/mlflow.lock /tmp/requirements.lock
RUN pip install --no-cache-dir $PIP_ARGS --require-hashes -r /tmp/requirements.lock && useradd --uid 185 --create-home mlflow && mkdir /mlflow && chown mlflow /mlflow
USER 185
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--backend-store-uri", "sqlite:////mlflow/mlflow.db", "--artifacts-destination", "/mlflow/artifacts", "--serve-artifacts"]
