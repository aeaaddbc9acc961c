# Builds the jobs, for spark-submit on one machine and for the Spark operator. Build from the checkout:
# docker build -f infra/images/spark.Dockerfile -t adasid-spark:0.1.0 .
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends openjdk-17-jre-headless procps tini && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/adasid
COPY setup.py README.md LICENSE pyproject.toml ./
COPY adasid adasid
COPY pipelines pipelines
COPY jobs jobs
COPY conf conf
COPY infra/kubernetes/night.py infra/kubernetes/night.py
ARG PIP_ARGS=""
RUN pip install --no-cache-dir $PIP_ARGS -e ".[engines,report]" && python -m pipelines.engines.jars
ENV ADASID_HOME=/opt/adasid MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
RUN useradd --uid 185 --create-home adasid && mkdir /runs && chown adasid /runs
USER 185
COPY infra/images/entrypoint.sh /opt/entrypoint.sh
ENTRYPOINT ["tini", "--", "/opt/entrypoint.sh"]
