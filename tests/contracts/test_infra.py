"""Check infra/: every path, flag, key, tag, version and variable that it names exists."""

import ast
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header

from adasid.config import load
from pipelines.engines import memory

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
FILES = [
    path
    for path in sorted(INFRA.rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts and path.name != "setup.sh"
]
SETUP = (ROOT / "setup.py").read_text()
NIGHT = yaml.safe_load_all((INFRA / "kubernetes" / "nightly.yaml").read_text())
SPARK, RAY = NIGHT
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
STEPS = ["ingest", "encode_content", "build_features", "retokenize", "maintain", "report"]
VARIABLES = {
    "ADASID_HOME",
    "ADASID_CONFIG",
    "ADASID_DRIVER_MEMORY",
    "ADASID_SPARK_MASTER",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_named_exists(path):
    text = path.read_text()
    for job in re.findall(r"jobs/([a-z_]+)\.py", text):
        assert (ROOT / "jobs" / f"{job}.py").exists(), job
    for conf in re.findall(r"conf/([a-z_]+)\.yaml", text):
        assert (ROOT / "conf" / f"{conf}.yaml").exists(), conf
    for key, value in re.findall(r"""--set["', ]+([a-z_.]+)=([A-Za-z0-9]+)""", text):
        load(ROOT / "conf" / "cluster.yaml", [f"{key}={value}"])
    for file in re.findall(r"infra/[\w./-]+\w", text):
        assert (ROOT / file).exists(), file
    for image, tag in re.findall(r"adasid-(spark|ray|mlflow):([\w.]+)", text):
        assert f'version="{tag}"' in SETUP and (INFRA / "images" / f"{image}.Dockerfile").exists()
    for name in re.findall(r"\b(?:ADASID|RAY)_[A-Z_]+\b", text):
        assert name in VARIABLES, name


def test_versions_are_those_that_are_installed():
    assert f'"pyspark=={SPARK["spec"]["template"]["sparkVersion"]}"' in SETUP
    assert (
        f'"ray[default,data,train]=={".".join(RAY["spec"]["rayClusterSpec"]["rayVersion"].split(".")[:2])}.*"' in SETUP
    )


def test_kubernetes_runs_the_jobs_with_flags_that_they_have():
    template = SPARK["spec"]["template"]
    door = template["mainApplicationFile"].removeprefix("local:///opt/adasid/")
    assert f"COPY {door} {door}\n" in (INFRA / "images" / "spark.Dockerfile").read_text()
    for job in [door, *(f"jobs/{name}.py" for name in STEPS)]:
        shown = subprocess.run(
            [sys.executable, job, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for flag in {"--run-date"} if job == door else set(template["arguments"][::2]) - {"--run-date"}:
            assert flag in shown, (job, flag)
    assert SPARK["spec"]["concurrencyPolicy"] == "Forbid"
    assert template["sparkConf"]["spark.kubernetes.driver.service.deleteOnTermination"] == "false"
    assert template["restartPolicy"]["type"] == "OnFailure" and template["restartPolicy"]["onFailureRetries"] == 2
    assert RAY["spec"]["backoffLimit"] == 2
    pods = [*(template[part]["volumeMounts"] for part in ("driver", "executor"))]
    names = {volume["name"] for volume in template["volumes"]}
    assert all(mount["name"] in names for mounts in pods for mount in mounts)
    assert any(template["arguments"][1].startswith(mount["mountPath"]) for mount in pods[0])
    group = RAY["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {mount["name"] for mount in group["containers"][0]["volumeMounts"]} == {
        volume["name"] for volume in group["volumes"]
    }
    words = RAY["spec"]["entrypoint"].split()
    assert (
        words[1] == "jobs/train.py"
        and words[-1]
        in subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    )


def test_kubernetes_runs_the_chain_in_order_and_stops_where_a_job_fails(tmp_path):
    template = SPARK["spec"]["template"]
    door = tmp_path / template["mainApplicationFile"].removeprefix("local:///opt/adasid/")
    for folder in (door.parent, tmp_path / "jobs"):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / door.relative_to(tmp_path), door)
    for job in (ROOT / "jobs").glob("*.py"):
        (tmp_path / "jobs" / job.name).write_text("import sys\nprint(*sys.argv)\nsys.exit(0)\n")

    def night():
        found = subprocess.run([sys.executable, str(door), *template["arguments"]], capture_output=True, text=True)
        return found.returncode, [line.split() for line in found.stdout.splitlines()]

    before = datetime.now(timezone.utc).date()
    code, ran = night()
    days = [f"{day}" for day in (before, datetime.now(timezone.utc).date())]
    assert code == 0 and [Path(words[0]).stem for words in ran] == STEPS
    date = template["arguments"].index("--run-date")
    shared = [*template["arguments"][:date], *template["arguments"][date + 2 :]]
    assert [words[1:] for words in ran] in [
        [[*shared, *(["--run-date", day] if name == "retokenize" else [])] for name in STEPS] for day in days
    ], "the day on which the night began, however long it takes"
    (tmp_path / "jobs" / "report.py").write_text("import sys\nsys.exit(1)\n")
    assert night()[0] == 0, "the generation is published"
    (tmp_path / "jobs" / "retokenize.py").write_text("import sys\nsys.exit(4)\n")
    code, ran = night()
    assert code == 4 and [Path(words[0]).stem for words in ran] == ["ingest", "encode_content", "build_features"]


def test_pods_have_no_privileges_and_bounded_disks():
    template, ray = SPARK["spec"]["template"], RAY["spec"]["rayClusterSpec"]
    pods = []
    for part in ("driver", "executor"):
        pod = template[part]
        (container,) = pod["template"]["spec"]["containers"]
        assert container["name"] == f"spark-kubernetes-{part}"
        pods.append((pod["podSecurityContext"], pod["securityContext"], container["resources"], pod["volumeMounts"]))
        assert any(mount["name"].startswith("spark-local-dir-") for mount in pod["volumeMounts"])
    groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        parts = (container["securityContext"], container["resources"], container["volumeMounts"])
        pods.append((spec["securityContext"], *parts))
    user = re.search(r"USER (\d+)", (INFRA / "images" / "spark.Dockerfile").read_text()).group(1)
    for pod, container, resources, mounts in pods:
        assert pod["runAsNonRoot"] and pod["runAsUser"] == pod["fsGroup"] == int(user)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not container["allowPrivilegeEscalation"] and container["capabilities"] == {"drop": ["ALL"]}
        assert container["readOnlyRootFilesystem"] and "/tmp" in {mount["mountPath"] for mount in mounts}
        assert all("ephemeral-storage" in resources[kind] for kind in ("requests", "limits"))
    empty = [volume["emptyDir"] for volume in template["volumes"] if "emptyDir" in volume]
    assert len(empty) == 2 and all(volume["sizeLimit"] for volume in empty)
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == [None, None, "1"] and [group.get("replicas") for group in groups[1:]] == [8, 0]
    assert groups[2]["rayStartParams"] == {"num-gpus": "1"}


def test_a_driver_has_memory_for_a_small_nightly_run():
    table = load(ROOT / "conf" / "cluster.yaml").retokenize.small_table
    driver = SPARK["spec"]["template"]["driver"]
    needed = memory.small_night(table) / 2**30
    assert int(driver["memoryOverhead"].removesuffix("g")) >= needed
    service = (INFRA / "systemd" / "adasid-nightly.service").read_text()
    assert int(re.search(r"^MemoryMax=(\d+)G$", service, re.M).group(1)) >= int(driver["memory"][:-1]) + needed


def test_ports_are_published_on_this_machine_alone():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_part_of_a_ray_cluster_has_the_token():
    spec = RAY["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {
        "mode": "token"
    }  # KubeRay sets mode and token in head, workers and submitter
    assert spec["submissionMode"] == "K8sJobMode" and "submitterPodTemplate" not in spec
    assert "RAY_AUTH_MODE=token" in (INFRA / "images" / "ray.Dockerfile").read_text()
    assert COMPOSE["services"]["ray"]["command"][-1].startswith(
        "ray get-auth-token --generate > /dev/null && exec ray start --head"
    )


def test_jobs_log_to_a_server_that_answers_them():
    server, ray = COMPOSE["services"]["mlflow"], COMPOSE["services"]["ray"]
    text = (INFRA / "compose.yaml").read_text()
    (typed,) = re.findall(r"#   docker compose -f infra/compose.yaml exec ray python ((?:.*\\\n#)*.*)", text)
    words = typed.replace("\\\n#", " ").split()
    found = load(
        ROOT / words[words.index("--config") + 1], [value for flag, value in zip(words, words[1:]) if flag == "--set"]
    )
    assert (
        (ROOT / words[0]).exists()
        and found.tracking.uri == "http://mlflow:5000"
        and server["ports"] == ["127.0.0.1:5000:5000"]
        and "mlflow" in ray["depends_on"]
    )
    assert f"runs:{found.runs_dir}" in ray["volumes"] and ray["environment"] == {
        "RAY_ADDRESS": "127.0.0.1:6379"
    }  # a driver needs Ray's head beside it
    assert is_allowed_host_header(server["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","), "mlflow:5000")
    cluster = load(ROOT / "conf" / "cluster.yaml")  # what the config map is made from
    mounts = [mount["mountPath"] for mount in SPARK["spec"]["template"]["driver"]["volumeMounts"]]
    assert cluster.tracking.uri and any(str(cluster.run_dir).startswith(mount) for mount in mounts)


def test_the_dag_runs_the_chain_in_order():
    path = INFRA / "airflow" / "adasid_nightly.py"
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "job"
    ]
    jobs = [call.args[0].value for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))]
    assert jobs == STEPS


ATTEMPT = """
import sys
from airflow.exceptions import AirflowFailException
import adasid_nightly
try:
    adasid_nightly.dag.get_task("retokenize").execute({})
    print("done")
except AirflowFailException as error:
    print("final", error)
except Exception as error:
    print("again", error)
print(adasid_nightly.dag.get_task("retokenize").retries)
"""


@pytest.mark.skipif(not shutil.which("airflow"), reason="Airflow is not on the PATH")
@pytest.mark.parametrize(
    ("code", "end"), [(0, "done"), (1, "again"), (2, "final"), (3, "final"), (4, "final"), (5, "final"), (75, "again")]
)
def test_the_dag_tries_a_fault_that_passes_again_and_no_refusal(tmp_path, code, end):
    submit = tmp_path / ".venv" / "bin" / "spark-submit"
    submit.parent.mkdir(parents=True)
    submit.write_text(f"#!/bin/sh\nexit {code}\n")
    submit.chmod(0o755)
    own = {"AIRFLOW_HOME": str(tmp_path), "ADASID_HOME": str(tmp_path), "PYTHONPATH": str(INFRA / "airflow")}
    python = Path(shutil.which("airflow")).with_name("python")
    found = subprocess.run([python, "-c", ATTEMPT], env={**os.environ, **own}, capture_output=True, text=True)
    said = found.stdout.splitlines()[-2:]
    assert said == [end if code == 0 else f"{end} exit code {code}", "2"], found.stdout + found.stderr


def test_the_timer_starts_the_same_chain():
    script = (INFRA / "systemd" / "nightly.sh").read_text()
    assert re.findall(r"jobs/([a-z_]+)\.py", script) == STEPS
    subprocess.run(["bash", "-n", str(INFRA / "systemd" / "nightly.sh")], check=True)
    bare = {
        "PATH": "/usr/bin:/bin",
        "HOME": os.environ["HOME"],
        "ADASID_CONFIG": "conf/none.yaml",
    }  # what a service starts with
    found = subprocess.run([str(INFRA / "systemd" / "nightly.sh")], env=bare, cwd="/", capture_output=True, text=True)
    assert found.returncode == 2 and " ERROR conf/none.yaml: cannot be read" in found.stdout, found.stderr
    for words in (["systemd/nightly.sh"], ["kubernetes/night.py", "--config", "conf/none.yaml", "--run-date"]):
        for day, reason in (
            ("2999-01-01", "2999-01-01 is in the future"),
            ("someday", "'someday' is not a date"),
            ("2026", "'2026' is not a date"),
        ):
            command = [*([sys.executable] if len(words) > 1 else []), str(INFRA / words[0]), *words[1:], day]
            found = subprocess.run(command, env=bare, cwd=ROOT, capture_output=True, text=True)
            assert found.returncode == 2 and re.search(reason, found.stderr), found
            assert "none.yaml" not in found.stdout + found.stderr, "no job is started"
    service = (INFRA / "systemd" / "adasid-nightly.service").read_text()
    assert "RestartPreventExitStatus=2 3 4 5\n" in service and "\nRestart=on-failure\n" in service
    assert "RestartForceExitStatus" not in service, "systemd before 256 refuses it for Type=oneshot"
    assert "ExecStart=/opt/adasid/infra/systemd/nightly.sh" in service
    for line in ("NoNewPrivileges=true", "ProtectSystem=strict", "ProtectHome=true", "PrivateTmp=true"):
        assert f"\n{line}\n" in service
    unit, section = service.split("[Service]")
    assert "StartLimitIntervalSec=" in unit and "StartLimitBurst=" in unit
    writable = re.search(r"^ReadWritePaths=(.+)$", section, re.M).group(1).replace("-/", "/").split()
    assert any(load(ROOT / "conf" / "cluster.yaml").run_dir.is_relative_to(path) for path in writable)
    if shutil.which("systemd-analyze"):
        found = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(INFRA / "systemd" / "adasid-nightly.timer")],
            capture_output=True,
            text=True,
        )
        for fault in ("Unknown", "Failed to parse", "Refusing", "bad unit file"):
            assert fault not in found.stderr, found.stderr


def test_compose_names_services_and_volumes_that_it_has():
    for name, service in COMPOSE["services"].items():
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"]), name
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in COMPOSE["volumes"], volume
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()


ENTRY = INFRA / "images" / "entrypoint.sh"


def started(*words, **variables):
    """What a pod's container prints, and how it ends."""
    return subprocess.run(
        [str(ENTRY), *words],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
    )


def test_a_driver_pod_runs_the_job_and_any_other_command_runs_as_it_stands(tmp_path):
    assert started("echo", "as it stands").stdout == "as it stands\n"
    job = tmp_path / "job.py"
    job.write_text(
        "import sys\nfrom pyspark import SparkContext\nprint(sys.argv[1], "
        "SparkContext().getConf().get('spark.driver.bindAddress'))\n"
    )
    found = started("driver", "--master", "local[1]", str(job), "argument", SPARK_DRIVER_BIND_ADDRESS="127.0.0.1")
    assert found.returncode == 0 and "argument 127.0.0.1" in found.stdout, found.stderr
    assert "SPARK_DRIVER_BIND_ADDRESS: is set by" in started("driver").stderr


def test_an_executor_pod_works_in_a_folder_that_it_can_write(tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\npwd\n")
    java.chmod(0o755)
    names = ("DRIVER_URL", "EXECUTOR_ID", "EXECUTOR_CORES", "EXECUTOR_MEMORY", "EXECUTOR_POD_IP", "EXECUTOR_POD_NAME")
    settings = {f"SPARK_{name}": "1" for name in (*names, "APPLICATION_ID", "RESOURCE_PROFILE_ID")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = subprocess.run(
        [str(ENTRY), "executor"],
        env={**os.environ, **settings, "PATH": path, "TMPDIR": str(tmp_path), "SPARK_HOME": "/none"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(tmp_path), found.stderr


def test_an_executor_pod_looks_for_its_driver():
    settings = {"ID": "7", "CORES": "1", "MEMORY": "256m", "POD_IP": "127.0.0.1", "POD_NAME": "executor-7"}
    found = started(
        "executor",
        SPARK_DRIVER_URL="spark://CoarseGrainedScheduler@127.0.0.1:9",
        SPARK_APPLICATION_ID="application",
        SPARK_RESOURCE_PROFILE_ID="0",
        SPARK_JAVA_OPT_0="-Dspark.rpc.askTimeout=1s",
        SPARK_JAVA_OPT_1="--add-opens=java.base/java.nio=ALL-UNNAMED",
        **{f"SPARK_EXECUTOR_{name}": value for name, value in settings.items()},
    )
    assert found.returncode != 0 and "Failed to connect to /127.0.0.1:9" in found.stdout + found.stderr
