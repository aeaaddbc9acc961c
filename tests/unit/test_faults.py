"""Test which faults pass, on real errors: a full disk, refused and silent connections, stores that ask to slow down."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from adasid.errors import GateError, InputError, TransientError
from adasid.faults import passing, wrapped
from pipelines import cli, traces
from pipelines.run import Run

ROWS = pa.table({"a": np.arange(10)})
S3 = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "r", "AWS_ALLOW_HTTP": "true"}
S3 |= {"max_retries": "0", "retry_timeout": "1s", "connect_timeout": "2s", "timeout": "2s"}


def raised(call):
    with pytest.raises(Exception) as found:
        call()
    return found.value


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_full():
    with open("/dev/full", "w") as file:
        file.write("x")


def write_full_by_arrow():
    with pa.OSFile("/dev/full", "wb") as file:  # pq.write_table("/dev/full") would remove the device
        pq.write_table(ROWS, file)


def table_of(port):
    return DeltaTable("s3://bucket/table", storage_options={**S3, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})


@pytest.fixture
def slow_down():
    """The port of an object store that answers every request with SlowDown."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_full_disk_passes():
    assert passing(raised(write_full))
    assert passing(raised(write_full_by_arrow))


def test_a_connection_that_is_refused_or_silent_passes():
    port = closed_port()
    assert passing(raised(lambda: socket.create_connection(("127.0.0.1", port))))
    assert passing(raised(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}")))
    assert passing(raised(lambda: table_of(port)))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert passing(raised(lambda: urllib.request.urlopen(where, timeout=0.2)))


def test_a_store_that_asks_to_slow_down_passes(slow_down):
    assert passing(raised(lambda: table_of(slow_down)))
    assert passing(raised(lambda: urllib.request.urlopen(f"http://127.0.0.1:{slow_down}")))


def test_faults_of_the_input_do_not_pass(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough: code 503, 500 rows")
    write_deltalake(tmp_path / "table", ROWS)
    for call in (
        lambda: pq.read_table(tmp_path / "broken.parquet"),
        lambda: (tmp_path / "absent").read_text(),
        lambda: DeltaTable(tmp_path / "absent"),
        lambda: DeltaTable(tmp_path / "table", version=7),
        lambda: write_deltalake(tmp_path / "table", pa.table({"b": ["x"]}), mode="append"),
        lambda: np.load(tmp_path / "broken.parquet"),
        lambda: os.listdir(tmp_path / "broken.parquet"),
    ):
        assert not passing(raised(call))
    assert not passing(InputError("an item is called 'Connection refused'"))


def test_the_cause_decides_the_class():
    full = raised(write_full)
    assert wrapped(full, "a").exit_code == 75 and wrapped(ValueError("a"), "a").exit_code == 3
    try:
        raise InputError("not writable") from full
    except InputError as error:
        assert passing(error)


CODE = """
import argparse, resource, sys
from pathlib import Path
from adasid.errors import InputError
from pipelines import cli
from pipelines.engines.lake import Lake
import pyarrow as pa, numpy as np
def body(cfg):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    lake = Lake(str(Path(cfg.runs_dir) / "lake"), {})
    schema = pa.schema([("a", pa.float64())])
    lake.write("a", schema, pa.table({"a": np.random.default_rng(0).normal(size=10_000)}).to_batches(), "digest")
sys.exit(cli.run(argparse.Namespace(config=sys.argv[1], overrides=[]), body))
"""


def test_a_job_that_cannot_write_its_table_ends_with_75(tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"name": "t", "runs_dir": str(tmp_path)}))
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "c.yaml"], capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]  # the lines before it are delta-rs's
    assert done.returncode == 75, done.stderr
    assert " ERROR t: DeltaError: " in line and "this fault passes: run the command again" in line


def ended(tmp_path, error, **sections):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"name": "t", "runs_dir": str(tmp_path / "runs"), **sections}))

    def body(cfg):
        try:
            raise ValueError("the engine's words")
        except ValueError as cause:
            raise error from cause

    return cli.run(cli.parser("").parse_args(["--config", str(path)]), body)


def test_the_log_has_the_last_five_traces_with_their_causes_and_no_secret(tmp_path, make_config, capsys):
    secret = {"spark": {"conf": {"spark.hadoop.fs.s3a.secret.key": "planted-s3cr3t"}}}
    log = Run(make_config()).error_log
    for number in range(7):
        kind = (InputError, GateError, TransientError)[number % 3]
        words = f"number {number}: s3://me:pa55word@bucket has planted-s3cr3t"
        assert ended(tmp_path, kind(words), **secret) == kind.exit_code
    text = log.read_text()
    assert text.startswith("==== 20") and text.count("\n==== ") == 4
    assert [number for number in range(7) if f"number {number}: " in text] == [2, 3, 4, 5, 6]
    assert text.index("number 6") < text.index("number 5")
    assert text.count("ValueError: the engine's words") == 5 and text.count("Traceback (most recent call last)") == 10
    assert "planted-s3cr3t" not in text and "pa55word" not in text
    assert "pa55word" not in capsys.readouterr().err


def test_a_trace_with_the_name_of_a_file_that_is_no_text(make_config):
    cfg = make_config()
    assert "whole trace" in traces.keep(cfg, FileNotFoundError(os.fsdecode(b"caf\xe9.parquet")))
    assert "caf\\udce9.parquet" in Run(cfg).error_log.read_text()


def test_an_error_of_the_code_names_its_trace(tmp_path, capsys):
    assert ended(tmp_path, RuntimeError("a bug")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"Z ERROR t: RuntimeError: a bug (whole trace: {tmp_path}/runs/t/error.log)")
