"""This module lists the tokenizers. The union of the config's sections, ``conf/base.yaml`` and the reference in
docs/configuration.md are derived from it. It imports no torch. docs/extending.md shows how to add a tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from adasid.tokenizers.ada_sid import AdaSidSettings
from adasid.tokenizers.adaptive_sid import AdaptiveSidSettings
from adasid.tokenizers.adc_sid import AdcSidSettings
from adasid.tokenizers.controls import ItemIdSettings, RandomSidSettings
from adasid.tokenizers.das import DasSettings
from adasid.tokenizers.letter import LetterSettings
from adasid.tokenizers.mm_rq_vae import MmRqVaeSettings
from adasid.tokenizers.opq import OpqSettings
from adasid.tokenizers.quasid import QuaSidSettings
from adasid.tokenizers.rq_kmeans import RqKmeansSettings
from adasid.tokenizers.rq_vae import RqVaePlusSettings, RqVaeSettings
from adasid.tokenizers.settings import TokenizerSettings

TOKENIZERS: tuple[type[TokenizerSettings], ...] = (
    AdcSidSettings,
    AdaSidSettings,
    QuaSidSettings,
    AdaptiveSidSettings,
    RqVaeSettings,
    LetterSettings,
    DasSettings,
    RqVaePlusSettings,
    MmRqVaeSettings,
    RqKmeansSettings,
    OpqSettings,
    ItemIdSettings,
    RandomSidSettings,
)
BY_NAME: dict[str, type[TokenizerSettings]] = {model.model_fields["name"].default: model for model in TOKENIZERS}

if TYPE_CHECKING:
    AnyTokenizer = TokenizerSettings
else:
    AnyTokenizer = Annotated[Union[TOKENIZERS], Field(discriminator="name")]  # noqa: UP007 - of a tuple
