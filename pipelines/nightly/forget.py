"""Remove users from every table of a lake, in all its versions.

Rows are deleted by a commit that has the input hash of the one before, so that no stage runs again because of it. Then
the data files of all earlier versions are vacuumed, and what the Delta log says of these files (least and greatest
values, predicates) is removed: Delta keeps both outside the data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable, write_deltalake

from adasid.config import Config
from adasid.errors import InputError, TransientError
from adasid.files import Location, local, location, remove, write_text
from pipelines.engines.lake import Lake, properties
from pipelines.engines.tracking import StageContext
from pipelines.nightly.retention import quoted, tracked_runs
from pipelines.publish import generations
from pipelines.publish.lease import leased
from pipelines.run import Run
from pipelines.sources import in_place

_CHUNK = 500
"""So many values are in one predicate."""
_REFUSED = ("row_hash", "row")


def forget(cfg: Config, context: StageContext, users: Iterable[str], files: Iterable[str] = ()) -> None:
    """Remove ``users``, and those that ``files`` name, one a line, from every table, and from what the run's folder and
    MLflow say about errors. Raises InputError for a file that cannot be read, or where no user is named;
    TransientError, after all else, while MLflow is away."""
    wanted = sorted({*users, *(line for file in files for line in _lines(file))})
    if not wanted or "" in wanted:
        raise InputError("--forget-user: an empty id; name the user as the column user_id does")
    seen, purged = Counter[str](), dict[str, int]()
    with leased(context, cfg.retokenize.lease) as lease:
        for name in context.lake.tables():
            column = _column(context.lake.delta(name))
            if column is None and name != "interactions":
                continue
            lease.check()
            if column is None:
                _forget_copies(context, name)
                continue
            present = _present(context.lake, name, column, wanted)
            if present:
                deleted = _delete(context.lake, name, column, present)
                removed = _purge(context.lake, name)
                purged[name] = context.lake.delta(name).version()
                context.facts[name] = f"{deleted} rows deleted, {removed} files removed"
                seen.update({user for users in present.values() for user in users})
            else:
                context.facts[name] = "none"
            context.note(f"{name}: {context.facts[name]}")
        _note_lost(context, purged)
    _forget_errors(context, wanted)
    for user in wanted:
        if user not in seen:
            context.note(f"user {user!r} is in no table")
    context.facts["users"] = f"{len(seen)} of {len(wanted)} were there"
    context.status = "done" if seen else "up to date"
    if context.recorder.away and Run(cfg).tracking_uri:
        raise TransientError(
            "MLflow does not answer, so its error messages may still name a user; the tables and files do not: run the "
            "command again"
        )


def _forget_copies(context: StageContext, name: str) -> None:
    """Remove what earlier versions have copied of a table that is now read in place, and name its source."""
    at = in_place.reference(Lake(context.lake.root, {}), name)
    if at is None:
        return
    removed = _purge(context.lake, name)
    context.facts[name] = f"read in place, {removed} files of earlier copies removed"
    context.note(f"{name}: {context.facts[name]}; its rows are at {at.location}, which is yours to clean", "WARN")


def _lines(file: str) -> Iterator[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--forget-users {file}: cannot be read ({error}); give a UTF-8 file, one id a line") from None
    yield from (line for line in text.split("\n") if line)


def _column(table: DeltaTable) -> str | None:
    """Return the column that names users or rows of users; None for a table without users."""
    names = {field.name for field in table.schema().fields}
    return "user_id" if "user_id" in names else "row_hash" if names >= set(_REFUSED) else None


def _present(lake: Lake, name: str, column: str, users: list[str]) -> dict[str, set[str]]:
    """Return value of ``column`` -> users, for rows of ``users`` in any data file, whether a version needs it or not.
    Rejected rows are named by their hash."""
    folder = location(lake.path(name))
    files: list[Location] = [file for file in folder.rglob("*.parquet") if file.parent.name != "_delta_log"]
    names = [column] if column == "user_id" else list(_REFUSED)
    wanted, result = pa.array(users), dict[str, set[str]]()
    mentions = _finder(users)
    for file in files:
        with local(file) as path:
            rows_of_users = ds.dataset(path, format="parquet")
            if not {*names} <= {*rows_of_users.schema.names}:  # a version that referred to the source
                continue
            for batch in rows_of_users.to_batches(columns=names):
                values, *rows = (batch[name].cast(pa.string()) for name in names)
                if not rows:
                    result |= {user: {user} for user in values.filter(pc.is_in(values, wanted)).unique().to_pylist()}
                    continue
                for number, text in zip(values.to_pylist(), rows[0].to_pylist()):
                    if mentioned := mentions(text):
                        result[number] = mentioned
    return result


def _finder(users: list[str]) -> Callable[[str], set[str]]:
    """Return a function that gives the users of a rejected row: by its column ``user_id``, or as words of a line that
    could not be parsed."""
    wanted = {*users}
    anyone = _word(form for user in users for form in _forms(user))

    def mentioned(row: str) -> set[str]:
        values = json.loads(row)
        if "user_id" in values:
            return wanted & {values["user_id"]}
        text = str(values.get("line"))
        return {user for user in users if _mentions(text, user)} if anyone.search(text) else set()

    return mentioned


def _mentions(text: str, user: str) -> bool:
    """Return whether a text has the id as a word, as it is or escaped."""
    return bool(_word(_forms(user)).search(text))


def _word(forms: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of a word that is one of ``forms``."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})(?!\w)")


def _forms(user: str) -> set[str]:
    """Return the id as it is and as JSON and Python escape it."""
    escaped = json.dumps(user, ensure_ascii=False)[1:-1]
    return {user, escaped, json.dumps(user)[1:-1], repr(user)[1:-1], repr(escaped)[1:-1]}


def _delete(lake: Lake, name: str, column: str, values: Iterable[str]) -> int:
    """Delete the rows with these values from the current version; return how many there were.

    An empty table takes their place: what delta-rs writes at a DELETE, Arrow cannot filter (``string_view``)."""
    ordered, deleted = sorted(values), 0
    wanted = pa.array(ordered)
    for batch in lake.delta(name).to_pyarrow_dataset().to_batches(columns=[column]):
        deleted += pc.sum(pc.is_in(batch[column].cast(pa.string()), wanted)).as_py() or 0
    for start in range(0, len(ordered) if deleted else 0, _CHUNK):
        where = f"{column} IN ({', '.join(map(quoted, ordered[start : start + _CHUNK]))})"
        same = properties(lake.input_hash(name), sources=lake.lineage(name))
        none = pa.schema(lake.delta(name).schema().to_arrow()).empty_table()
        write_deltalake(lake.delta(name), none, mode="overwrite", predicate=where, commit_properties=same)
    return int(deleted)


def _purge(lake: Lake, name: str) -> int:
    """Remove what the log says of values, and all data files that the current version does not need; return the number
    of files. The files come last: while there are some, running it again does all of this again."""
    folder = location(lake.path(name))
    log, same = folder / "_delta_log", properties(lake.input_hash(name), sources=lake.lineage(name))
    stay = {unquote(file).removeprefix(f"{folder}/") for file in lake.delta(name).file_uris()}
    commits: list[Location] = sorted(log.glob("*.json"), key=str)
    for file in commits:
        text = file.read_text(encoding="utf-8")
        plain = "\n".join(_without_values(line, stay) for line in text.splitlines())
        if plain != text.rstrip("\n"):
            write_text(file, plain + "\n")
    checkpoints = [*log.glob("*.checkpoint*.parquet"), *log.glob("_last_checkpoint")]
    whole = (log / f"{0:020}.json").exists()  # then the log can be read without a checkpoint
    if not whole:
        lake.delta(name).create_checkpoint()
        newest = f"{lake.delta(name).version():020}."
        checkpoints = [file for file in log.glob("*.checkpoint*.parquet") if not file.name.startswith(newest)]
    # checksums, of Hadoop and of Delta, are of files as they were before
    for file in [*checkpoints, *log.glob("*.crc"), *log.glob(".*.crc")]:
        file.unlink(missing_ok=True)
    table = lake.delta(name)
    if whole:
        table.create_checkpoint()
    removed = table.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True, commit_properties=same)
    remove(folder / "_change_data")
    return len(removed)


def _without_values(line: str, stay: set[str]) -> str:
    """Return a line of the log without predicates, and without the statistics of files that do not ``stay``: they have
    the least and the greatest ids."""
    action: dict[str, Any] = json.loads(line) if line.strip() else {}
    for kind in ("add", "remove"):
        if kind in action and unquote(action[kind]["path"]) not in stay:
            action[kind].pop("stats", None)
    (action.get("commitInfo", {}).get("operationParameters") or {}).pop("predicate", None)
    return json.dumps(action, separators=(",", ":"), ensure_ascii=False) if action else line


def _note_lost(context: StageContext, purged: dict[str, int]) -> None:
    """Note the versions that cannot be read any more, and the generations and pins that were made of them."""
    lake = context.lake
    for name, version in purged.items():
        context.note(f"{name}: only version {version} can be read now")
    lost = []
    for generation in generations.history(lake):
        sources = set(_sources(lake, generation.inputs.items()))
        if any(table in purged and version < purged[table] for table, version in sources):
            lost.append(str(generation.generation))
    if lost:
        context.note(
            f"generations {', '.join(lost)} stay, but a version of a table that they were computed from is gone"
        )
    for table, version in context.cfg.pins.items():
        if version < purged.get(table, 0):
            context.note(f"the config pins {table} at version {version}, which is gone: set another version")


def _sources(lake: Lake, tables: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield the tables and versions, and recursively those that they were computed from."""
    for table, version in tables:
        yield table, version
        yield from _sources(lake, lake.lineage(table, version).items())


def _forget_errors(context: StageContext, users: list[str]) -> None:
    """Remove messages and stack traces that name one of the users."""
    log = Run(context.cfg).error_log
    if log.exists() and any(_mentions(log.read_text(encoding="utf-8"), user) for user in users):
        log.unlink()
        context.note(f"{log} named a user: removed")
    removed, changed = "removed: it named a user who was to be forgotten", 0
    for path in context.recorder.spool.files():  # what MLflow has not taken yet
        kept = context.recorder.spool.read(path)
        tags = [record["tags"] for record in kept.records if (record.get("tags") or {}).get("error")]
        named = [tag for tag in tags if any(_mentions(tag["error"], user) for user in users)]
        for tag in named:
            tag["error"] = removed
        if named:
            context.recorder.spool.replace(kept)
            changed += len(named)
    for run in list(tracked_runs(context)) if not context.recorder.away else ():
        message = run.data.tags.get("error", "")
        if any(_mentions(message, user) for user in users):
            context.client.set_tag(run.info.run_id, "error", removed)
            changed += 1
    if changed:
        context.note(f"{changed} error messages in MLflow named a user: removed")
