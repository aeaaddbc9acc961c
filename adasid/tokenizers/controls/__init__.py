"""This package defines the controls, whose codes carry no information about an item: their settings here, the classes
in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adasid.tokenizers.settings import TokenizerSettings

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class _ControlSettings(TokenizerSettings):
    @property
    def inputs(self) -> tuple[str, ...]:
        """No modality is read."""
        return ()


class ItemIdSettings(_ControlSettings):
    """Control: the item's index in base ``codebook_size``, its digits mixed. Unique, and without meaning."""

    name: Literal["item-id"] = Field("item-id", description="control: the item's index in base K, its digits mixed")
    levels: int = Field(4, ge=1, description="digits: K^levels items at most")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the tokenizer."""
        from adasid.tokenizers.controls.model import ItemId

        return ItemId(self, widths)


class RandomSidSettings(_ControlSettings):
    """Control: codes drawn at random from the seed and the item's index."""

    name: Literal["random"] = Field("random", description="control: random codes")
    levels: int = Field(6, ge=1, description="codes of an item (L)")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the tokenizer."""
        from adasid.tokenizers.controls.model import RandomSid

        return RandomSid(self, widths)
