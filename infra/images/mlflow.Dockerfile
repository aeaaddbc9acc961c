# Builds the tracking server. MLFLOW_SERVER_ALLOWED_HOSTS names the hosts by which it is reached; without it the server
# answers only to localhost and private addresses.
# docker build -f infra/images/mlflow.Dockerfile -t adasid-mlflow:0.1.0 .
FROM python:3.11-slim-bookworm
ARG PIP_ARGS=""
RUN pip install --no-cache-dir $PIP_ARGS "mlflow>=3.17,<4" && useradd --uid 185 --create-home mlflow && mkdir /mlflow && chown mlflow /mlflow
USER 185
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--backend-store-uri", "sqlite:////mlflow/mlflow.db", "--artifacts-destination", "/mlflow/artifacts", "--serve-artifacts"]
