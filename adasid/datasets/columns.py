"""Convert columns of a source to the types of the lake: ids and times as text, numbers, vectors of float32. A
conversion is exact or refused.

Every function takes one Arrow array and raises :class:`~adasid.errors.InputError` if its type, or a value, cannot be
converted. The error says what the column is and how to store it; the caller adds the table, the file and the column
(:func:`convert`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from adasid.errors import InputError
from adasid.tables import PICTURE, VECTOR


def decoded(values: pa.Array) -> pa.Array:
    """Return ``values`` without dictionary or run-end encoding."""
    if pt.is_dictionary(values.type):
        return values.dictionary_decode()
    return pc.run_end_decode(values) if pt.is_run_end_encoded(values.type) else values


def ids(values: pa.Array) -> pa.Array:
    """Convert ids to text. Text and integers are exact; floats, booleans and binary are refused, because their text
    form would decide identity."""
    kind = values.type
    if _is_text(kind) or pt.is_integer(kind) or pt.is_null(kind) or (pt.is_decimal(kind) and kind.scale == 0):
        return pc.cast(values, pa.string())
    if pt.is_floating(kind):
        fix = "cast it to integers first, for example .astype('int64') in pandas (a column with missing ids: 'Int64')"
    elif isinstance(kind, pa.UuidType):
        fix = "store it as text, for example str(uuid)"
    elif pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind):
        fix = "store it as text, for example in hexadecimal"
    else:
        fix = "store one text or integer a row"
    raise InputError(f"is {kind}; an id must be text or an integer: {fix}")


def texts(values: pa.Array) -> pa.Array | None:
    """Return titles, or None for a column that is not text."""
    kind = values.type
    if _is_text(kind) or pt.is_integer(kind) or pt.is_null(kind):
        return pc.cast(values, pa.string())
    return None


def times(values: pa.Array) -> pa.Array:
    """Convert times to text: numbers as written (their unit is inferred from their size later), timestamps and dates as
    ISO 8601 in UTC; NaN is null."""
    kind = values.type
    if _is_text(kind) or pt.is_integer(kind) or pt.is_decimal(kind) or pt.is_null(kind):
        return pc.cast(values, pa.string())
    if pt.is_float64(kind):
        return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.string()), pc.cast(values, pa.string()))
    if pt.is_floating(kind):
        raise InputError(f"is {kind}, which cannot hold unix seconds exactly: store it as double or int64")
    if pt.is_timestamp(kind) or pt.is_date(kind):
        # without "safe", a cast to microseconds drops the nanoseconds, and a cast of large seconds wraps around
        if pt.is_timestamp(kind) and kind.unit == "ns":
            values = values.cast(pa.timestamp("us", tz=kind.tz), safe=False)
        try:
            return pc.strftime(values.cast(pa.timestamp("us", tz="UTC")), format="%Y-%m-%dT%H:%M:%SZ")
        except pa.ArrowInvalid as error:
            raise InputError(
                f"is {kind} with a value beyond the years of a timestamp in microseconds ({error})"
            ) from None
    raise InputError(f"is {kind}; must be a number (unix seconds or finer), text or a timestamp")


def positions(values: pa.Array) -> pa.Array:
    """Convert positions in a user's history to int64; NaN is null, a fraction is refused."""
    kind = values.type
    if pt.is_null(kind) or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        numbers = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values) if pt.is_floating(kind) else values
        try:
            return pc.cast(numbers, pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"is {kind} and has a value that is no whole number of 64 bits ({error}): store whole numbers"
            ) from None
    raise InputError(f"is {kind}; must be whole numbers")


def numbers(values: pa.Array) -> pa.Array:
    """Convert ratings or labels to float32; NaN is null, true and false are 1 and 0."""
    kind = values.type
    if pt.is_boolean(kind) or pt.is_null(kind) or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        floats = pc.cast(values, pa.float32(), safe=False)
        return pc.if_else(pc.is_nan(floats), pa.scalar(None, pa.float32()), floats)
    raise InputError(f"is {kind}; must be a number")


def vectors(values: pa.Array) -> pa.Array:
    """Convert vectors to lists of float32, null where there is none. Doubles beyond float32 become infinite, which the
    checks refuse."""
    kind = values.type
    lists = _is_list(kind)
    if pt.is_null(kind):
        return pc.cast(values, VECTOR)
    inner = kind.value_type if lists else kind
    if not lists or not (pt.is_integer(inner) or pt.is_floating(inner) or pt.is_decimal(inner) or pt.is_null(inner)):
        raise InputError(f"is {kind}; must be an array of floats")
    if pt.is_fixed_size_list(kind) and not kind.list_size:
        return pc.if_else(values.is_null(), pa.scalar(None, VECTOR), pa.scalar([], VECTOR))
    return pc.cast(values, VECTOR, safe=False)


def raw_texts(values: pa.Array) -> pa.Array:
    """Convert a raw field to text: numbers and dates as written, the parts of a list that are not null joined
    by ", "; NaN is null."""
    kind = values.type
    if pt.is_null(kind) or _is_text(kind):
        return pc.cast(values, pa.string())
    if _is_list(kind):
        inner = raw_texts(decoded(pc.list_flatten(values)))
        given = np.concatenate([[0], np.cumsum(inner.is_valid())]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(given[_offsets(values)]), inner.drop_null())
        return pc.binary_join(pc.if_else(values.is_null(), pa.scalar(None, lists.type), lists), ", ")
    if pt.is_primitive(kind) or pt.is_decimal(kind):
        written = pc.cast(values, pa.string())
        return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.string()), written) if pt.is_floating(kind) else written
    raise InputError(f"is {kind}; a field that is encoded must be text, a number, or a list of these")


def _offsets(values: pa.Array) -> pa.Array:
    """Return the offsets of lists in their flattened values, where a null is an empty list."""
    lengths = pc.fill_null(pc.list_value_length(values), 0).cast(pa.int64())
    return pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])


def pictures(values: pa.Array) -> pa.Array:
    """Convert pictures to ``tables.PICTURE``: from the bytes of their files, from paths or URIs, or from a struct of
    both."""
    kind = values.type
    if pt.is_struct(kind):
        given = {field.name for field in kind}
        if given & {"bytes", "path"}:
            parts = {name: decoded(pc.struct_field(values, name)) for name in ("bytes", "path") if name in given}
            return _picture(len(values), parts)
    elif _is_text(kind) or _is_binary(kind):
        return _picture(len(values), {"path" if _is_text(kind) else "bytes": values})
    elif pt.is_null(kind):
        return pc.cast(values, PICTURE)
    raise InputError(
        f"is {kind}; a picture must be the bytes of its file, a path or URI, or a struct of bytes and path"
    )


def _picture(size: int, given: Mapping[str, pa.Array]) -> pa.Array:
    """Return structs of the parts that are given, null where all are."""
    parts = [
        pc.cast(given[field.name], field.type) if field.name in given else pa.nulls(size, field.type)
        for field in PICTURE
    ]
    absent = pc.and_(parts[0].is_null(), parts[1].is_null())
    return pa.StructArray.from_arrays(parts, fields=list(PICTURE), mask=absent)


def convert(batch: pa.RecordBatch, schema: pa.Schema, where: str) -> pa.RecordBatch:
    """Return the columns of ``batch`` that a table of the lake has (``tables.items`` or ``tables.INTERACTIONS``),
    converted to its ``schema``; a column that the batch lacks is null. Raises InputError that begins with ``where`` and
    names the column."""
    given = {name: decoded(batch.column(index)) for index, name in enumerate(batch.schema.names)}
    columns = []
    for field in schema:
        name, how = _source(field)
        given_name = next((candidate for candidate in name if candidate in given), None)
        if field.name == "label" and given_name is None and "rating" in given and pt.is_boolean(given["rating"].type):
            given_name = "rating"  # true and false are labels, whatever the column's name
        elif field.name == "rating" and given_name and pt.is_boolean(given[given_name].type):
            given_name = None
        try:
            column = how(given[given_name]) if given_name else None
        except InputError as error:
            raise InputError(f"{where}: column {given_name!r} {error}") from None
        columns.append(pa.nulls(batch.num_rows, field.type) if column is None else column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


_SOURCES: Mapping[str, tuple[tuple[str, ...], Callable[[pa.Array], pa.Array | None]]] = {
    "item_id": (("item_id",), ids),
    "user_id": (("user_id",), ids),
    "title": (("title",), texts),
    "timestamp": (("timestamp",), times),
    "pos": (("pos", "order"), positions),
    "rating": (("rating",), numbers),
    "label": (("label",), numbers),
}


def _source(field: pa.Field) -> tuple[tuple[str, ...], Callable[[pa.Array], pa.Array | None]]:
    """Return the names that a column of the lake has at its source, and how it is converted."""
    if pt.is_list(field.type):
        return (field.name,), vectors
    if pt.is_struct(field.type):
        return (field.name,), pictures
    names, how = _SOURCES.get(field.name, ((field.name,), raw_texts))
    raw = pt.is_string(field.type) and how in (numbers, positions)  # a raw field of items with the name of another
    return ((field.name,), raw_texts) if raw else (names, how)


def plain_ids(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield ids (the one column of ``batches``) beside the ids stripped of blanks, in Unicode's form NFC."""
    for batch in batches:
        plain = pc.utf8_trim_whitespace(pc.utf8_normalize(batch.column(0), "NFC"))
        yield pa.RecordBatch.from_arrays([batch.column(0), plain], names=["id", "plain"])


def read_from(target: pa.Schema) -> set[str]:
    """Return the names of the source columns that are read for ``target``."""
    return {name for field in target for name in _source(field)[0]}


def problems(schema: pa.Schema, target: pa.Schema, where: str) -> None:
    """Raise InputError if a column of a source's ``schema`` cannot be converted for ``target``, before any row is
    read."""
    wanted = [name for name in schema.names if name in read_from(target)]
    for name in wanted:
        if schema.names.count(name) > 1:
            raise InputError(f"{where}: column {name!r} stands there twice; remove one")
    fields = [schema.field(name) for name in wanted]
    convert(
        pa.RecordBatch.from_arrays([pa.nulls(0, _plain(field.type)) for field in fields], names=wanted), target, where
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pt.is_list(kind)
        or pt.is_large_list(kind)
        or pt.is_fixed_size_list(kind)
        or pt.is_list_view(kind)
        or pt.is_large_list_view(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))
