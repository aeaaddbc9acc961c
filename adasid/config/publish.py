"""This module defines where the published tables are registered."""

from __future__ import annotations

from pydantic import Field, model_validator

from adasid.config.names import is_table_name
from adasid.settings import Section


class PublishedTables(Section):
    sids: str | None = Field(None, description="name for `sids`, such as main.recsys.sids; null: it is not registered")
    live: str | None = Field(None, description="name for `live`")
    sid_changes: str | None = Field(None, description="name for `sid_changes`, from the second generation on")

    @model_validator(mode="after")
    def _names(self) -> PublishedTables:
        seen = dict[str, str]()
        for table, name in self.named().items():
            if not is_table_name(name):
                raise ValueError(
                    f"publish.tables.{table} is {name!r}: must be the name of a table in Spark's catalogue, such as "
                    "main.recsys.sids, with backticks around parts that have other characters than letters, digits "
                    "and _"
                )
            if name.lower() in seen:
                raise ValueError(f"publish.tables.{table} is {name!r}, as publish.tables.{seen[name.lower()]} is")
            seen[name.lower()] = table
        return self

    def named(self) -> dict[str, str]:
        """Return table -> name of those that are registered."""
        return {table: name for table, name in self.model_dump().items() if name is not None}


class Publish(Section):
    tables: PublishedTables = Field(
        PublishedTables(), description="names under which Spark's catalogue gives the published tables"
    )
