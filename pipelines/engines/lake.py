"""Read and write the lake: Delta tables in one folder, read outside Spark through delta-rs, always at a version.

Every commit carries the input hash of its rows as metadata. A stage whose outputs already carry its input hash has
nothing to do, which makes every stage safe to run again. Derived tables also carry the versions of their sources.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from adasid import files
from adasid.errors import BusyError, InputError, first_line
from adasid.faults import wrapped
from adasid.files import location
from adasid.storage import ObjectPath, delta_options

_WRITES = {
    "WRITE",
    "CREATE TABLE",
    "CREATE OR REPLACE TABLE",
    "REPLACE TABLE",
    "CREATE TABLE AS SELECT",
    "CREATE OR REPLACE TABLE AS SELECT",
    "MERGE",
}
STAMP = "adasid"
"""This key of a commit's metadata holds the table's input hash."""
_READ = "read"
"""This key of a commit's metadata holds the versions of the tables that were read."""


def stamped(digest: str | None, sources: Mapping[str, int] | None = None) -> str:
    """Return the commit metadata with the input hash ``digest`` and the versions of the table's ``sources``."""
    return json.dumps({STAMP: digest, **({_READ: dict(sources)} if sources else {})})


def properties(
    digest: str | None,
    retries: int | None = None,
    sources: Mapping[str, int] | None = None,
) -> CommitProperties:
    """Return the properties of a commit with the input hash ``digest`` and the versions of ``sources``; ``retries`` 0:
    it succeeds only on the version that was read."""
    return CommitProperties(custom_metadata={"userMetadata": stamped(digest, sources)}, max_commit_retries=retries)


@dataclass(frozen=True)
class Lake:
    """A lake is a folder of Delta tables. ``root``: the folder; ``pins``: table -> version that replaces the latest."""

    root: str
    pins: Mapping[str, int]

    def path(self, table: str) -> str:
        """Return the folder of a table."""
        return f"{self.root}/{table}"

    def target(self, table: str) -> str:
        """Return the folder of a table that is about to be written."""
        return self.path(table)

    def exists(self, table: str) -> bool:
        """Return whether the table has a first version."""
        return DeltaTable.is_deltatable(self.path(table), storage_options=delta_options(self.root))

    def missing(self, table: str, version: int) -> list[str]:
        """Return the files of a version that no longer exist."""
        wanted = [unquote(file) for file in self.open(table, version).file_uris()]
        exists = self.existing(table)
        return [file for file in wanted if not exists(file.removeprefix(f"{self.path(table)}/"))]

    def existing(self, table: str) -> Callable[[str], bool]:
        """Return a function: whether a file of the table's folder, named relative to it, exists."""
        folder = location(self.path(table))
        if isinstance(folder, ObjectPath):  # one listing instead of a request a file
            names = {str(file.relative_to(folder)) for file in folder.files()}
            return names.__contains__
        return lambda name: (folder / name).exists()

    def tables(self) -> list[str]:
        """Return the names of all tables, in order."""
        folder = location(self.root)
        if isinstance(folder, ObjectPath):
            return sorted(_tables(folder))
        return sorted(str(log.parent.relative_to(folder)) for log in folder.rglob("_delta_log"))

    def writable(self) -> None:
        """Raise InputError unless tables can be created under ``root``."""
        folder = location(self.root)
        probe = folder / f".probe-{uuid4().hex}"  # threads and hosts may probe at once
        if isinstance(probe, ObjectPath):
            probe.check_conditions()
            return
        link = probe.with_suffix(".link")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            try:
                os.link(probe, link)
                link.unlink()
            finally:
                probe.unlink()
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM) and error.filename2:
                raise InputError(
                    f"lake {self.root}: this file system has no hard links ({error.strerror}), by which Delta commits "
                    "exclude each other: mount one that has (NFS, Lustre, CephFS), or name a bucket in runs_dir "
                    "(s3://bucket/prefix)"
                ) from error
            raise wrapped(
                error,
                f"lake {self.root}: not writable ({error.strerror}); choose another with --set runs_dir=PATH, or mend "
                "its permissions",
            ) from error

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """Open the table at ``version``, its pin, or its latest version. Raises InputError where there is none."""
        version = self.pins.get(table) if version is None else version
        try:
            return self.delta(table, version)
        except TableNotFoundError:
            raise InputError(
                f"table {table} does not exist in {self.root}: run the stage that writes it first "
                "(see docs/architecture.md)"
            ) from None
        except Exception as error:
            raise wrapped(
                error, f"table {table} in {self.root} cannot be read at version {version}: {first_line(error)}"
            ) from error

    def delta(self, table: str, version: int | None = None) -> DeltaTable:
        """Return delta-rs' table at ``version`` (default: the latest), whatever the pins say. Raises what delta-rs
        raises."""
        return DeltaTable(self.path(table), version=version, storage_options=delta_options(self.root))

    def version(self, table: str) -> int:
        """Return the version that a reader gets: the pin, else the latest."""
        return self.open(table).version()

    def versions(self, *tables: str) -> dict[str, int]:
        """Return :meth:`version` of several tables, by name."""
        return {table: self.version(table) for table in tables}

    def schema(self, table: str, version: int | None = None) -> pa.Schema:
        """Return the schema of the table at a version."""
        return pa.schema(self.open(table, version).schema().to_arrow())

    def input_hash(self, table: str, version: int | None = None) -> str | None:
        """Return the input hash in the commit of ``version`` (default: the latest); None for no table or no hash."""
        return commit_hash(self._commit(table, version))

    def lineage(self, table: str, version: int | None = None) -> dict[str, int]:
        """Return the versions of other tables from which ``version`` (default: the latest) was computed; empty where
        its commit names none."""
        return dict(_metadata(self._commit(table, version)).get(_READ) or {})

    def newer(self, table: str, version: int) -> tuple[int, datetime] | None:
        """Return the latest version, whatever the pins say, and the time of the first commit after ``version`` with
        another input hash; None where the latest has the same hash as ``version``."""
        if not self.exists(table):
            return None
        latest = self.delta(table)
        newest = latest.version()
        if newest <= version:
            return None
        commits = {entry["version"]: entry for entry in latest.history(newest - version + 1)}
        marks = {number: commit_hash(entry) or str(number) for number, entry in commits.items()}
        if marks[newest] == marks.get(version):
            return None
        first = next(number for number in range(version + 1, newest + 1) if marks[number] != marks.get(version))
        return newest, committed(commits[first])

    def _commit(self, table: str, version: int | None) -> dict[str, Any]:
        """Return the commit of ``version`` (default: the latest), empty for none."""
        if not self.exists(table):
            return {}
        latest = self.delta(table)
        version = latest.version() if version is None else version
        entries = latest.history(max(1, latest.version() - version + 1))
        return next((entry for entry in entries if entry["version"] == version), {})

    def made(self, table: str, digest: str) -> int | None:
        """Return the newest version whose commit carries this input hash; None for none."""
        versions = (int(entry["version"]) for entry in self.writes(table) if digest in str(entry.get("userMetadata")))
        return next(versions, None)

    def writes(self, table: str) -> Iterator[dict[str, Any]]:
        """Yield the commits that wrote rows, newest first, without those of maintenance."""
        for entry in self.delta(table).history() if self.exists(table) else ():
            if entry.get("operation") in _WRITES:
                yield entry

    def input_hashes(self, versions: Mapping[str, int]) -> dict[str, str]:
        """Return the input hashes of the given versions; path and version for a table that carries none."""
        return {
            table: self.input_hash(table, version) or f"{self.path(table)}@{version}"
            for table, version in versions.items()
        }

    def fresh(self, digest: str, *tables: str) -> bool:
        """Return whether the latest commit of each table carries this input hash."""
        return all(self.input_hash(table) == digest for table in tables)

    def batches(
        self,
        table: str,
        version: int | None = None,
        columns: list[str] | None = None,
        filter: ds.Expression | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream the rows of one version as Arrow batches."""
        dataset = self.open(table, version).to_pyarrow_dataset()
        yield from dataset.to_batches(columns=columns, filter=filter)

    def read(self, table: str, version: int | None = None, columns: list[str] | None = None) -> pa.Table:
        """Return all rows of one version: for tables that do not grow with the catalogue, and for tests."""
        return self.open(table, version).to_pyarrow_table(columns=columns)

    def write(
        self,
        table: str,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        digest: str,
        sources: Mapping[str, int] | None = None,
    ) -> int:
        """Replace a table in one commit with the input hash ``digest`` and the versions of ``sources``; return the new
        version."""
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        input_hash = properties(digest, sources=sources)
        write_deltalake(
            self.target(table),
            reader,
            mode="overwrite",
            schema_mode="overwrite",
            commit_properties=input_hash,
            storage_options=delta_options(self.root),
        )
        return self.delta(table).version()

    def write_rows(
        self,
        table: str,
        schema: pa.Schema,
        rows: list[dict[str, Any]],
        digest: str,
        sources: Mapping[str, int] | None = None,
    ) -> int:
        """Write a few rows as :meth:`write` does; columns that a row does not name are null."""
        full = [{name: row.get(name) for name in schema.names} for row in rows]
        return self.write(table, schema, pa.Table.from_pylist(full, schema).to_batches(), digest, sources)

    def put(self, table: str, rows: pa.Table, where: str, digest: str) -> None:
        """Replace the rows that satisfy ``where`` by ``rows``, in one commit with the input hash ``digest``."""
        path = self.target(table)
        target = self.delta(table) if self.exists(table) else path
        write_deltalake(
            target,
            rows,
            mode="overwrite",
            predicate=where if self.exists(table) else None,
            commit_properties=properties(digest),
            storage_options=delta_options(self.root),
        )

    def restore(self, table: str, version: int | None) -> None:
        """Restore the rows and the input hash of ``version``, as a new version; None: the table did not exist, and its
        folder is removed."""
        if version is None:
            files.remove(location(self.path(table)))
        else:
            self.delta(table).restore(version, commit_properties=properties(self.input_hash(table, version)))

    def change(self, table: str, version: int, rows: pa.Table, gone: pa.Array, digest: str) -> None:
        """Update the rows of the items in ``rows`` (each once), insert those of new items, and delete those of the
        items ``gone``, in one commit after ``version`` with the input hash ``digest``. It is columnar, without Spark,
        so that a small change of a large table is cheap. Raises BusyError where another run has written since."""
        rows = rows.append_column("_gone", pa.array(np.zeros(rows.num_rows, bool)))
        leaving = pa.table({"item_id": gone, "_gone": np.ones(len(gone), bool)}).cast(
            pa.schema([("item_id", pa.string()), ("_gone", pa.bool_())])
        )
        source = pa.concat_tables([rows.cast(_nullable(rows.schema)), leaving], promote_options="default")
        values = {name: f"s.{name}" for name in rows.column_names if name != "_gone"}
        merge = self.delta(table, version).merge(
            source,
            "t.item_id = s.item_id",
            source_alias="s",
            target_alias="t",
            commit_properties=properties(digest, retries=0),
        )
        merge = (
            merge.when_matched_delete("s._gone")
            .when_matched_update(values)
            .when_not_matched_insert(values, "NOT s._gone")
        )
        try:
            merge.execute()
        except CommitFailedError:
            raise BusyError(
                f"{table}: another run wrote to {self.path(table)} after version {version}; run this one again"
            ) from None


def _tables(folder: ObjectPath, prefix: str = "") -> Iterator[str]:
    """Yield the tables below a prefix, without listing their files."""
    for inner in folder.folders():
        if inner.name == "_delta_log":
            yield prefix.rstrip("/")
            return
    for inner in folder.folders() if prefix.count("/") < 3 else ():
        yield from _tables(inner, f"{prefix}{inner.name}/")


def committed(commit: Mapping[str, Any]) -> datetime:
    """Return the time of a commit, in UTC."""
    return datetime.fromtimestamp(commit["timestamp"] / 1000, timezone.utc)


def _metadata(commit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that adasid wrote into a commit, empty for a commit of another program."""
    try:
        metadata = json.loads(commit["userMetadata"])
    except (ValueError, KeyError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def commit_hash(commit: Mapping[str, Any]) -> str | None:
    """Return the input hash in a commit, None for none."""
    value = _metadata(commit).get(STAMP)
    return None if value in (None, "None") else str(value)  # after maintenance of a table without a hash


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])
