"""Serve an S3 endpoint on loopback for tests: moto's server, one request at a time, so that its check of conditional
PUTs cannot race.

Run as a program: ``python -m tests.s3 PORT [BUCKET ...]``. ``GET /_requests`` returns the requests so far as JSON;
``PUT /_fault`` sets what the server does instead of answering (:data:`FAULTS`, none for an empty body); ``PUT /_rival``
gives the content of a commit that another writer puts just before the next Delta commit arrives.
"""

from __future__ import annotations

import collections
import io
import json
import re
import sys
import threading
import time
import urllib.request

import pyarrow as pa
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

FAULTS = ("down", "commits", "denied", "read-only", "slow S", "dies N", "no conditions")
"""``down``: every request fails with 503; ``commits``: only PUTs of Delta commits do; ``denied``: 403 to all;
``read-only``: 403 to what writes; ``slow S``: S seconds more for every request; ``dies N``: from the N-th Delta commit
on, every request fails with 503; ``no conditions``: ``If-None-Match`` is ignored."""
SCHEMA = pa.schema([("item_id", pa.string())])
ENVIRONMENT = {
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "adasid-test",
    "AWS_SECRET_ACCESS_KEY": "adasid-planted-secret",
    "AWS_ALLOW_HTTP": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def environment(port: int) -> dict[str, str]:
    """Return the variables with which clients reach the server."""
    return {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def ask(port: int, path: str, method: str = "GET", body: bytes = b"") -> bytes:
    """Send one request to the server."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body or None, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


_COMMIT = re.compile(r"/_delta_log/\d{20}\.json$")


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, code="-", size="-") -> None:
        """Log nothing."""


class Server:
    """A WSGI application around moto's that counts requests and injects faults."""

    def __init__(self) -> None:
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.requests: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.fault, self.rival = "", b""

    def __call__(self, environ, start):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path in ("/_requests", "/_ready"):
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"requests": self.requests, "bytes": self.bytes}).encode()]
        if path == "/_fault":
            self.fault = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode()
            start("200 OK", [("Content-Length", "0")])
            return [b""]
        if path == "/_rival":
            self.rival = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            start("200 OK", [("Content-Length", "0")])
            return [b""]
        if self.rival and method == "PUT" and _COMMIT.search(path):
            content, self.rival = self.rival, b""
            theirs = {**environ, "wsgi.input": io.BytesIO(content), "CONTENT_LENGTH": str(len(content))}
            for name in [name for name in theirs if name.startswith(("HTTP_X_AMZ", "HTTP_IF", "HTTP_TRANSFER"))]:
                del theirs[name]
            list(self.inner(theirs, lambda status, headers, info=None: None))
        kind = "LIST" if method == "GET" and "list-type" in environ.get("QUERY_STRING", "") else method
        self.requests[kind] += 1
        self.bytes[kind] += int(environ.get("CONTENT_LENGTH") or 0)
        if answer := self._refusal(method, path):
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            code, name = answer
            body = (
                b"" if method == "HEAD" else f"<Error><Code>{name}</Code><Message>injected</Message></Error>".encode()
            )
            start(code, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if self.fault == "no conditions":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        result = self.inner(environ, start)
        if method == "GET":
            result = list(result)
            self.bytes[kind] += sum(map(len, result))
        return result

    def _refusal(self, method: str, path: str) -> tuple[str, str] | None:
        writes = method in ("PUT", "POST", "DELETE")
        if self.fault.startswith("slow "):
            time.sleep(float(self.fault.removeprefix("slow ")))
        commit = _COMMIT.search(path)
        if self.fault.startswith("dies ") and method == "PUT" and commit:
            left = int(self.fault.removeprefix("dies ")) - 1
            self.fault = f"dies {left}" if left else "down"
        if self.fault == "down" or (self.fault == "commits" and writes and commit):
            return "503 Service Unavailable", "ServiceUnavailable"
        if self.fault == "denied" or (self.fault == "read-only" and writes):
            return "403 Forbidden", "AccessDenied"
        return None


def main(port: int, buckets: list[str]) -> None:
    """Serve until the process ends."""
    server = make_server("127.0.0.1", port, Server(), threaded=False, request_handler=_Quiet)

    def create() -> None:
        for bucket in buckets:
            ask(server.port, f"/{bucket}", "PUT")
        print(server.port, flush=True)

    threading.Thread(target=create, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
