# Builds Ray's head and workers with the packages of the Spark image, as a job's driver may run on any of them.
# docker build -f infra/images/ray.Dockerfile -t adasid-ray:0.1.0 .
FROM adasid-spark:0.1.0
USER 0
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
USER 185
# Ray does not start without a token: KubeRay's authOptions provides it, or `ray get-auth-token --generate` creates it
ENV RAY_AUTH_MODE=token
