# The same packages for Ray's head and workers; a job's own process may be any of them. docker build -f infra/images/ray.Dockerfile -t adasid-ray:0.1.0 .
FROM adasid-spark:0.1.0
USER 0
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
USER 185
# nothing starts without a token: KubeRay's authOptions brings it, or `ray get-auth-token --generate` makes it
ENV RAY_AUTH_MODE=token
