"""Read the bytes of pictures from a table, a disk, object storage or the web. A picture that cannot be read has a
reason."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pyarrow as pa
import pyarrow.types as pt

from adasid.data.text import readable
from adasid.encoders.base import ABSENT
from adasid.encoders.images import TOO_MANY_BYTES, TOO_MANY_PIXELS
from adasid.errors import InputError, TransientError, first_line
from adasid.faults import passing
from adasid.files import Location
from adasid.storage import SCHEMES, ObjectPath

WEB_NOT_ALLOWED = "web_not_allowed"
MISSING_FILE = "missing_file"
UNREADABLE_FILE = "unreadable_file"
"""Reason: a folder, a file or an object that may not be read, or an address that the server refuses."""
OUTSIDE_ROOT = "outside_root"
"""Reason: a relative path that leaves the root folder, or there is none."""
UNKNOWN_SCHEME = "unknown_scheme"
UNSEEN = (
    WEB_NOT_ALLOWED,
    MISSING_FILE,
    UNREADABLE_FILE,
    OUTSIDE_ROOT,
    UNKNOWN_SCHEME,
    TOO_MANY_BYTES,
    TOO_MANY_PIXELS,
)
"""Reasons of pictures that were not looked at: another attempt may succeed."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(file|data):", re.I)
_SECONDS, _CONNECT, _PART = 60.0, 20.0, 1 << 16


class Place(NamedTuple):
    """A picture's place: its bytes, or else a path or URI."""

    data: bytes | None
    path: str | None


def places(rows: pa.Array) -> Iterator[Place]:
    """Yield the places of pictures [n]: a struct<bytes: binary, path: string>, as Hugging Face's datasets store
    pictures, or binary, or string. Bytes of a path that are not UTF-8 become U+FFFD. Raises InputError for another
    type."""
    kind = rows.type
    if pt.is_struct(kind):
        names = [field.name for field in kind]
        parts = {name: rows.field(name) for name in ("bytes", "path") if name in names}
        if not parts:
            raise InputError(f"the pictures are {kind}: a struct must have the fields bytes or path")
    elif pt.is_string(kind) or pt.is_large_string(kind):
        parts = {"path": rows}
    elif pt.is_binary(kind) or pt.is_large_binary(kind):
        parts = {"bytes": rows}
    elif pt.is_null(kind):
        parts = {}
    else:
        raise InputError(f"the pictures are {kind}: store struct<bytes: binary, path: string>, binary or string")
    given, paths = rows.is_valid().to_pylist(), readable(parts["path"]) if "path" in parts else [None] * len(rows)
    for row, there in enumerate(given):
        data, path = parts["bytes"][row].as_py() if there and "bytes" in parts else None, paths[row] if there else None
        yield Place(data, path if path and path.strip() else None)


@dataclass(frozen=True)
class Rules:
    """Rules say which places may be read: those below ``root``, to which relative paths refer, and below one of
    ``roots`` (folders, buckets, addresses, in any spelling); with ``web`` also public http and https addresses.
    ``max_bytes``: of a picture."""

    max_bytes: int
    root: Location | None = None
    roots: tuple[str, ...] = ()
    web: bool = False

    def allow(self, place: str) -> bool:
        """Return whether a folder, bucket or address of a place is named; a folder also by a link to it."""
        return any(_below(spelling, base) for spelling in _spellings(place) for base in self._named)

    @cached_property
    def _named(self) -> set[str]:
        named = {normal(base) for base in (*self.roots, *([] if self.root is None else [str(self.root)]))}
        return named | {os.path.realpath(base) for base in named if os.path.isabs(base)}


def _below(place: str, base: str) -> bool:
    return place == base or place.startswith(base.rstrip("/") + "/")


def _spellings(place: str) -> Iterator[str]:
    """Yield a place in its normal form, and a file also without symbolic links."""
    if os.path.isabs(place):
        yield from (os.path.normpath(place), os.path.realpath(place))
    elif not place.startswith("http") or os.pardir not in unquote(urlsplit(place).path).split("/"):
        yield normal(place)


def normal(place: str) -> str:
    """Return a folder, a bucket or an address as places are compared: folders as absolute paths, ``file://`` as a path,
    Hadoop's ``s3a://`` as ``s3://``, without a slash at the end."""
    scheme, path = _parsed(place)
    if scheme in SCHEMES:
        return str(ObjectPath.of(path))
    if scheme:
        parts = urlsplit(path)
        return parts._replace(netloc=parts.netloc.lower()).geturl().rstrip("/")
    return os.path.abspath(path)


def _parsed(place: str) -> tuple[str, str]:
    """Return the scheme of a URI, with Hadoop's ``s3a`` as ``s3``, and the URI with it; of a path or a ``file:`` no
    scheme, and the path."""
    uri = _URI.match(place)
    scheme = (uri[1] or uri[2]).lower() if uri else ""
    rest = place.partition(":")[2]
    if scheme in ("", "file"):
        return "", unquote(rest.removeprefix("//").removeprefix("localhost")) if scheme else place
    scheme = "s3" if scheme == "s3a" else scheme
    return scheme, f"{scheme}:{rest}"


def read(place: Place, rules: Rules) -> bytes | str:
    """Return the bytes of a picture, or the reason why they cannot be read. Raises TransientError where a disk or an
    object store does not answer."""
    if place.data is not None:
        return place.data if len(place.data) <= rules.max_bytes else TOO_MANY_BYTES
    if place.path is None:
        return ABSENT
    path = place.path.strip()
    try:
        return _read(_where(path, rules), rules)
    except _Refused as refusal:
        return refusal.reason
    except (FileNotFoundError, NotADirectoryError):
        return MISSING_FILE
    except (OSError, ValueError, InputError) as error:  # a path with a zero byte; a bucket that the store refuses
        if isinstance(error, InputError) and find_spec("obstore") is None:
            raise
        if passing(error):
            raise TransientError(f"{path}: does not answer ({first_line(error)}): run the command again") from error
        return UNREADABLE_FILE


class _Refused(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason


def _where(path: str, rules: Rules) -> Location | str:
    """Return the file or the object that a path or a URI names, or its address in the web."""
    scheme, path = _parsed(path)
    if scheme in ("http", "https"):
        if not rules.web:
            raise _Refused(WEB_NOT_ALLOWED)
        return path
    if scheme in SCHEMES:
        return _allowed(ObjectPath.of(path), rules)
    if scheme:
        raise _Refused(UNKNOWN_SCHEME)
    if os.path.isabs(path):
        return _allowed(Path(os.path.normpath(path)), rules)
    inner = os.path.normpath(path)
    if rules.root is None or inner.split(os.sep)[0] == os.pardir:
        raise _Refused(OUTSIDE_ROOT)
    return rules.root / inner


def _allowed(place: Location, rules: Rules) -> Location:
    if not rules.allow(str(place)):
        raise _Refused(OUTSIDE_ROOT)
    return place


def _read(where: Location | str, rules: Rules) -> bytes:
    max_bytes = rules.max_bytes
    if isinstance(where, str):
        return _download(where, rules)
    if isinstance(where, Path):
        facts = where.stat()
        if not stat.S_ISREG(facts.st_mode):  # opening a pipe waits for its writer
            raise _Refused(UNREADABLE_FILE)
        size = facts.st_size
    else:
        size = ((where.head() if where.key else None) or {"size": -1})["size"]
    if size < 0 or size > max_bytes:
        raise _Refused(MISSING_FILE if size < 0 else TOO_MANY_BYTES)
    return where.read_bytes()


class _Redirects(HTTPRedirectHandler):
    """Follow redirects to http and https only, and to addresses that may be read."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise HTTPError(newurl, code, "redirect to another scheme", headers, fp)
        _check_public(newurl, self.rules)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_public(url: str, rules: Rules) -> None:
    """Refuse an address of this machine or of a private network, unless the rules name it."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if rules.allow(url):
        return
    found = socket.getaddrinfo(parts.hostname or "", port, type=socket.SOCK_STREAM)
    if not all(ipaddress.ip_address(address[4][0]).is_global for address in found):
        raise _Refused(WEB_NOT_ALLOWED)


def _download(url: str, rules: Rules) -> bytes:
    """Fetch a picture. A server that fails is no error: one picture of many is missing."""
    request = Request(quote(url, safe=":/?#[]@!$&'()*+,;=%~"), headers={"User-Agent": "adasid", "Accept": "image/*"})
    deadline, max_bytes = time.monotonic() + _SECONDS, rules.max_bytes
    try:
        _check_public(url, rules)
        with build_opener(_Redirects(rules)).open(request, timeout=_CONNECT) as answer:
            if int(answer.headers.get("Content-Length") or 0) > max_bytes:
                raise _Refused(TOO_MANY_BYTES)
            parts, size = [], 0
            while part := answer.read1(_PART):
                parts.append(part)
                size += len(part)
                if size > max_bytes or time.monotonic() > deadline:
                    raise _Refused(TOO_MANY_BYTES if size > max_bytes else UNREADABLE_FILE)
            return b"".join(parts)
    except HTTPError as error:
        error.close()
        raise _Refused(MISSING_FILE if error.code in (404, 410) else UNREADABLE_FILE) from None
    except (OSError, HTTPException, ValueError):
        raise _Refused(UNREADABLE_FILE) from None
