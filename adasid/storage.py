"""Files in object storage (``s3://``, ``gs://``, ``abfss://``), by the names of :class:`pathlib.Path`, through obstore.

delta-rs uses the same client, so one set of environment variables (AWS_*, GOOGLE_*, AZURE_*) serves tables and files.
There is no rename and no append: a file is put whole, and is visible when it is complete.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from adasid.errors import AdasidError, InputError, TransientError

SCHEMES = ("s3", "gs", "abfss")
_RETRIES: dict[str, Any] = {"max_retries": 6, "retry_timeout": timedelta(seconds=30)}
_CLIENT = {"connect_timeout": "5 seconds", "timeout": "60 seconds"}
_DELTA = {"max_retries": "6", "retry_timeout": "30s", "connect_timeout": "5s", "timeout": "60s"}
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist|ContainerNotFound", re.I)
_REFUSED = re.compile(
    r"status code\W{0,3}40[13]|AccessDenied|Forbidden|PermissionDenied|Unauthenticated|InvalidAccessKeyId|"
    r"SignatureDoesNotMatch|ExpiredToken|InvalidToken|lacked valid authentication|necessary privileges",
    re.I,
)
_GONE = re.compile(r"NoSuchKey|not found|status code\W{0,3}404", re.I)
_WRONG = re.compile(r"status code\W{0,3}4(?!0[4589]|1[2]|29)\d\d", re.I)
"""The store refuses such a request every time; 408, 409, 412 and 429 pass."""
_NO_CREDENTIALS = re.compile(r"instance metadata|no\w* (?:valid )?credential|load credential", re.I)


_PUBLIC = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP", "AWS_REGION", "AWS_DEFAULT_REGION"}
"""These variables are no secrets: training workers get those of the driver, and what :func:`configure` has set."""


def configure(options: Mapping[str, str]) -> None:
    """Set the environment variables ``options`` (``storage.options``) that the environment does not set."""
    for name, value in options.items():
        os.environ.setdefault(name, value)
        _PUBLIC.add(name)
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        os.environ.setdefault("AWS_ALLOW_HTTP", "true")


def environment() -> dict[str, str]:
    """Return the variables that lead other processes to the same store; keys and tokens are not among them."""
    return {name: os.environ[name] for name in sorted(_PUBLIC) if name in os.environ}


def is_remote(path: object) -> bool:
    """Return whether ``path`` is the URI of an object store."""
    return str(path).partition("://")[0] in SCHEMES and "://" in str(path)


def delta_options(path: object) -> dict[str, str] | None:
    """Return delta-rs' ``storage_options`` for a table: the patience of this module's client; None for a local one."""
    return dict(_DELTA) if is_remote(path) else None


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The path of one object, or of a prefix. ``root``: scheme and bucket, such as s3://bucket; ``key``: without a
    slash at its ends.

    Methods raise FileNotFoundError for an object that does not exist, InputError for a missing bucket or refused
    credentials, TransientError for a store that does not answer.
    """

    root: str
    key: str

    @classmethod
    def of(cls, uri: str) -> ObjectPath:
        """Parse a URI."""
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        return cls(f"{scheme}://{bucket}", "/".join(part for part in key.split("/") if part))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, part: str) -> ObjectPath:
        return ObjectPath.of(f"{self}/{part}")

    @property
    def name(self) -> str:
        """Return the last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """Return the path without its last part."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Return the path with another last part."""
        return self.parent / name

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        """Return the path below ``other``. Raises ValueError where it does not lie there."""
        return PurePosixPath(self.key).relative_to(PurePosixPath(other.key))

    def exists(self) -> bool:
        """Return whether the object exists; a prefix is no object (:meth:`is_dir`)."""
        return self.head() is not None

    def head(self) -> dict[str, Any] | None:
        """Return size, e_tag and last_modified of the object, None where it does not exist."""
        with _asking("HEAD", self):
            try:
                return dict(_obstore().head(_store(self.root), self.key))
            except FileNotFoundError as error:
                if _NO_BUCKET.search(str(error)):
                    raise
                return None

    def is_dir(self) -> bool:
        """Return whether an object lies below this prefix."""
        return next(iter(self.files()), None) is not None

    def entries(self) -> Iterator[tuple[ObjectPath, int, float]]:
        """Yield all objects below this prefix, in the order of their keys, with their bytes and the unix time of their
        last change."""
        with _asking("LIST", self):
            for batch in _obstore().list(_store(self.root), f"{self.key}/" if self.key else None):
                for entry in batch:
                    yield ObjectPath(self.root, entry["path"]), entry["size"], entry["last_modified"].timestamp()

    def files(self) -> Iterator[ObjectPath]:
        """Yield the objects below this prefix, in the order of their keys, but for empty ones: these are Hadoop's
        markers of folders."""
        return (path for path, size, _ in self.entries() if size)

    def folders(self) -> list[ObjectPath]:
        """Return the prefixes directly below this one."""
        return self._below()[0]

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the prefixes and the objects directly below this prefix."""
        folders, objects = self._below()
        yield from (*folders, *objects)

    def _below(self) -> tuple[list[ObjectPath], list[ObjectPath]]:
        with _asking("LIST", self):
            found = _obstore().list_with_delimiter(_store(self.root), f"{self.key}/" if self.key else None)
        folders = [ObjectPath(self.root, str(prefix).strip("/")) for prefix in found["common_prefixes"]]
        return folders, [ObjectPath(self.root, entry["path"]) for entry in found["objects"]]

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the objects below this prefix whose parts match those of ``pattern``, one by one."""
        wanted = pattern.split("/")
        for path in self.files():
            parts = path.relative_to(self).parts
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield path

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the objects below this prefix whose last parts match ``pattern``."""
        return (path for path in self.files() if path.relative_to(self).match(pattern))

    def read_bytes(self) -> bytes:
        """Return the content."""
        with _asking("GET", self):
            return bytes(_obstore().get(_store(self.root), self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content as text."""
        return self.read_bytes().decode(encoding)

    def download(self, target: Path) -> None:
        """Write the content into a local file."""
        with _asking("GET", self), target.open("wb") as file:
            for part in _obstore().get(_store(self.root), self.key).stream():
                file.write(part)

    def write_bytes(self, content: bytes) -> None:
        """Put the object; a reader sees the old content or the new."""
        with _asking("PUT", self):
            _obstore().put(_store(self.root), self.key, content)

    def create(self, content: bytes) -> bool:
        """Put the object unless there is one; return whether there was none."""
        with _asking("PUT", self):
            obstore = _obstore()
            try:
                obstore.put(_store(self.root), self.key, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def check_conditions(self) -> None:
        """Create and remove the object. Raises InputError where the store creates it twice."""
        self.create(b"")
        ignored = self.create(b"")
        self.unlink(missing_ok=True)
        if ignored:
            raise InputError(
                f"{self.parent}: the store ignores If-None-Match, by which Delta commits exclude each other: name a "
                "bucket of one that honours it (docs/operations.md, object storage)"
            )

    def write_text(self, content: str, encoding: str = "utf-8") -> None:
        """Put text with :meth:`write_bytes`."""
        self.write_bytes(content.encode(encoding))

    def upload(self, source: Path) -> None:
        """Put the content of a local file, in parts where it is large."""
        with _asking("PUT", self):
            _obstore().put(_store(self.root), self.key, source)

    def copy(self, target: ObjectPath) -> None:
        """Copy the object within its bucket."""
        with _asking("COPY", self):
            _obstore().copy(_store(self.root), self.key, target.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. Removing one that does not exist is no error in most stores, whatever ``missing_ok``."""
        with _asking("DELETE", self):
            try:
                _obstore().delete(_store(self.root), self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove(self) -> int:
        """Remove all objects below this prefix; return their bytes."""
        found = [(path.key, size) for path, size, _ in self.entries()]
        keys = [key for key, _ in found]
        with _asking("DELETE", self):
            for start in range(0, len(keys), 1000):
                _obstore().delete(_store(self.root), keys[start : start + 1000])
        return sum(size for _, size in found)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a prefix exists as soon as an object lies below it."""

    def resolve(self) -> ObjectPath:
        """Return the path itself: a URI is absolute."""
        return self


def fault(error: Exception, operation: str, where: object) -> AdasidError:
    """Return the error to raise for one of the store's client (obstore and delta-rs word them alike)."""
    text = re.sub(r"\x1b\[\d*m|[^\S\n]*↳ *", "", str(error))
    text = re.sub(r"\b(?:https?|s3a?|gs|abfss)://\S+", lambda url: "169.254.169.254" * ("169.254." in url[0]), text)
    bucket = ObjectPath.of(str(where)).root
    what = f"{operation} {where}"
    if _NO_BUCKET.search(text):
        return InputError(f"{what}: {bucket} does not exist: create it, or name another bucket in runs_dir")
    if "169.254." in text or (_NO_CREDENTIALS.search(text) and not _REFUSED.search(text)):
        return InputError(
            f"{what}: the store's client has no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or those "
            "of GOOGLE_* or AZURE_*) in the environment, or give the machine a role"
        )
    if _REFUSED.search(text):
        return InputError(
            f"{what}: the store refused it ({_code(text)}): check the credentials of the environment (AWS_*, GOOGLE_*, "
            f"AZURE_*), and that they may read, write, list and delete in {bucket}"
        )
    if _GONE.search(text):
        return InputError(
            f"{what}: it does not exist (any more): it was removed or vacuumed; run the stage that writes it"
        )
    if _WRONG.search(text):
        return InputError(
            f"{what}: the store refused the request ({_reason(text)}): check AWS_REGION and AWS_ENDPOINT_URL"
        )
    return TransientError(
        f"{what}: the store does not answer ({_reason(text)}): check AWS_ENDPOINT_URL and the network; run "
        "the command again, which resumes"
    )


def translated(error: BaseException) -> AdasidError | None:
    """Return the error of :func:`fault` for one of delta-rs or of Hadoop's s3a that speaks of an object store; None for
    any other."""
    if isinstance(error, AdasidError) or not isinstance(error, Exception):
        return None
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    if request := re.search(r"Error performing (\w+) (https?://[^\s?]+)", text):
        operation, url = request.groups()
        return fault(error, operation, _uri(url))
    hadoop = re.search(r"(?:(\w+) on )?(s3a://[^\s:,]+)", text)
    if hadoop and re.search(r"AWS\w*Exception|AccessDenied|UnknownHost|Status Code: \d+|SdkClientException", text):
        return fault(error, hadoop.group(1) or "access to", f"s3{hadoop.group(2)[3:]}")
    return None


def _uri(url: str) -> str:
    """Return the URI of an object for the URL by which its store was asked."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "").rstrip("/")
    return f"s3:/{url.removeprefix(endpoint)}" if endpoint and url.startswith(endpoint) else url


def _reason(text: str) -> str:
    """Return what the client says of its last attempt, in one line."""
    line = " ".join(text.split())
    found = re.search(r"<Code>([^<]+)</Code>|HTTP error: [^.<]*|Status Code: \d+|status code:? [^<]{0,40}", line)
    return (found.group(1) or found.group()) if found else line[:200]


def _code(text: str) -> str:
    """Return the store's own code for a refusal."""
    match = re.search(r"<Code>([^<]+)</Code>", text) or re.search(r"\b40[13] \w+", text)
    return match.group(match.lastindex or 0) if match else "access denied"


@contextmanager
def _asking(operation: str, path: ObjectPath) -> Iterator[None]:
    """Turn errors of the store's client into those of :func:`fault`."""
    try:
        yield
    except AdasidError:
        raise
    except FileNotFoundError as error:
        if not _NO_BUCKET.search(str(error)):
            raise FileNotFoundError(f"{path} does not exist") from None
        raise fault(error, operation, path) from error
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise fault(error, operation, path) from error


def _obstore() -> Any:
    try:
        return import_module("obstore")
    except ImportError:
        raise InputError(
            "object storage needs the package obstore: run `make setup EXTRAS=s3`, or `pip install 'adasid[s3]'`"
        ) from None


@lru_cache(maxsize=16)
def _store(root: str) -> Any:
    _obstore()
    options = {**_CLIENT, "allow_http": os.environ.get("AWS_ALLOW_HTTP", "false")}
    return import_module("obstore.store").from_url(root, retry_config=_RETRIES, client_options=options)
