"""This module defines the settings that several tokenizers share. Settings of one method are in its package.

Nothing here imports torch: :mod:`adasid.config` reads the settings of all tokenizers, also in processes without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from adasid.settings import Names, Section, Share, Sizes
from adasid.tables import BEHAVIOR

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer

SHARED = "shared"
"""Kind of the slots that read all modalities."""
Pair = Annotated[tuple[float, float], Field(strict=False)]
Experts = Annotated[dict[str, int], Field(strict=False)]
"""Modality -> number of slots, in slot order."""


class Training(Section):
    """These settings control the loop that trains a tokenizer by gradients."""

    epochs: int = Field(100, ge=2, description="epochs: each sees as many rows as there are items")
    batch: int = Field(
        1024,
        ge=2,
        description="items a step, all workers together (of co-engaged pairs, half are partners)",
    )
    lr: float = Field(0.001, gt=0, description="AdamW learning rate at the start; cosine decay to 0")
    weight_decay: float = Field(0.0001, ge=0, description="AdamW weight decay (not on codebooks and biases)")
    warmup_epochs: int = Field(1, ge=1, description="epochs without quantization, before the k-means initialisation")
    checkpoint_epochs: int = Field(20, ge=1, description="epochs between two checkpoints, at most a fifth of epochs")
    log_epochs: int = Field(5, ge=1, description="epochs between two rows of metrics, at most a fifth of epochs")

    @model_validator(mode="after")
    def _warmup(self) -> Training:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"tokenizer.training.warmup_epochs {self.warmup_epochs} is not below "
                f"tokenizer.training.epochs {self.epochs}: nothing would be quantized"
            )
        return self


class Revival(Section):
    """These settings control the replacement of codes that hardly any item has."""

    every: int = Field(50, ge=1, description="steps between two looks at code usage")
    min_share: float = Field(
        0.25,
        ge=0,
        description="a code used less than this share of its fair share 1/K is revived",
    )
    until: Share = Field(0.9, description="share of training after which codes are left alone")


class Hamr(Section):
    """Hamming-guided margin repulsion (QuaSID, arXiv 2603.00632, eqs 8 to 13)."""

    kind: Literal["hamr"] = Field(description="hamr: QuaSID's repulsion")
    full_margin: float = Field(
        0.8,
        gt=0,
        le=2,
        description="cosine distance below which items of one whole SID are repelled",
    )
    partial_margin: float = Field(0.5, gt=0, le=2, description="the same for SIDs that differ in at most radius slots")
    radius: int | None = Field(
        None,
        ge=1,
        description="Hamming distance up to which an overlap is partial; null: a third of the slots",
    )
    full_weight: float = Field(0.2, ge=0, description="weight of the repulsion of whole overlaps")
    partial_weight: float = Field(0.1, ge=0, description="weight of the repulsion of partial overlaps")


class Adaptive(Section):
    """Adaptive overlap regulation (AdaSID, arXiv 2604.23522): relaxation, load-adaptive strengthening,
    progress-adaptive rebalancing."""

    kind: Literal["adaptive"] = Field(description="adaptive: AdaSID's repulsion")
    thresholds: Pair = Field(
        (0.18, 0.3),
        description="cosine from which an overlap is spared: for one shared code, for all; evenly spaced between",
    )
    margin: float = Field(
        1.0,
        gt=0,
        le=2,
        description="cosine distance below which an overlap that is not spared is repelled",
    )
    load: Literal["pattern", "code"] = Field(
        "pattern",
        description="load of an overlap counts pairs with the same matching slots, or also the same codes",
    )
    load_gain: Pair = Field((1.0, 2.0), description="strength at no load and at full load")
    load_power: float = Field(1.0, gt=0, description="sharpness of the rise between")
    load_quantile: Share = Field(0.9, description="quantile of the loads seen that counts as full load")
    progress: Pair = Field((0.1, 0.9), description="share of training at which rebalancing starts and ends")
    weight: Pair = Field((1.0, 0.2), description="weight of the repulsion before and after rebalancing")

    @model_validator(mode="after")
    def _window(self) -> Adaptive:
        low, high = self.thresholds
        if not -1 < low <= high <= 1:
            raise ValueError(f"repulsion.thresholds {self.thresholds} must rise within -1 and 1")
        if self.margin <= 1 - low:
            raise ValueError(
                f"repulsion.margin {self.margin:g} must be above 1 - {low:g} (the lowest threshold): "
                "else the hinge never acts on an overlap that is not spared"
            )
        if not 0 <= self.progress[0] < self.progress[1] <= 1:
            raise ValueError(f"repulsion.progress {self.progress} must rise within 0 and 1")
        return self


Repulsion = Annotated[Hamr | Adaptive, Field(discriminator="kind")]


class Contrast(Section):
    """These settings control the InfoNCE of co-engaged pairs."""

    weight: Pair = Field((0.1, 0.1), description="weight of the loss on pairs: at the start, at the end")
    progress: Pair = Field((0.0, 1.0), description="share of training between which the weight moves")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss on co-engaged pairs")

    @model_validator(mode="after")
    def _window(self) -> Contrast:
        if not 0 <= self.progress[0] < self.progress[1] <= 1:
            raise ValueError(f"contrast.progress {self.progress} must rise within 0 and 1")
        return self


class TokenizerSettings(Section):
    """The settings of a tokenizer. The docstring's first paragraph says which method it is and names its paper as
    ``arXiv 2510.25622 v3``: ``conf/base.yaml`` and docs/configuration.md show it."""

    name: str = Field("", description="which tokenizer")
    codebook_size: int = Field(100, ge=2, description="codes in a codebook (K)")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer. ``widths``: modality -> width, of all ``inputs``. The class is imported here,
        because it needs torch."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the modalities that are read, in slot order, behaviour last."""
        raise NotImplementedError

    @property
    def parallel(self) -> bool:
        """Return whether slots of one kind do not depend on each other, as experts and sub-spaces, and may be permuted;
        else each quantizes the residual of the one before."""
        return False

    @property
    def pairs(self) -> bool:
        """Return whether the tokenizer learns from co-engaged pairs (the table ``item_pairs``)."""
        return False

    @property
    def epochs(self) -> Training | None:
        """Return the settings of the training loop; None for a tokenizer that is fitted or needs no data."""
        return None

    @classmethod
    def reading(cls, content: Sequence[str]) -> dict[str, Any]:
        """Return the keys, with values, by which a section that does not list its inputs reads all of ``content``."""
        return {}


class ContentSettings(Section):
    """These are the settings of a tokenizer that reads content modalities, which ``content`` names."""

    content: Names = Field(
        ("text", "visual"),
        min_length=1,
        description="content modalities that are read; not given: all of features.content",
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the content modalities."""
        return self.content

    @classmethod
    def reading(cls, content: Sequence[str]) -> dict[str, Any]:
        """Return ``content`` as the value of the key ``content``."""
        return {"content": list(content)}

    @model_validator(mode="after")
    def _content(self) -> ContentSettings:
        check_slots("content", dict.fromkeys(self.content, 1), behavior=False)
        return self


class TrainedSettings(TokenizerSettings):
    """These are the settings of a tokenizer that is trained by gradients."""

    reconstruction_weight: float = Field(1.0, ge=0, description="weight of L_recon")
    codebook_weight: float = Field(1.0, gt=0, description="weight of the codebook loss")
    kmeans_samples: int = Field(20_000, ge=1, description="latents that initialise the codebooks")
    kmeans_rounds: int = Field(20, ge=1, description="Lloyd rounds of that initialisation")
    repulsion: Repulsion | None = Field(
        None,
        description="repulsion of items whose SIDs overlap: a section of kind hamr or adaptive; null: none",
    )
    contrast: Contrast | None = Field(None, description="contrastive loss on co-engaged pairs; null: none")
    revival: Revival = Field(Revival(), description="revival of dead codes")
    training: Training = Field(Training(), description="the training loop")

    @property
    def pairs(self) -> bool:
        """Return whether there is a contrastive loss on pairs."""
        return self.contrast is not None

    @property
    def epochs(self) -> Training | None:
        """Return the training loop."""
        return self.training


class ResidualSettings(TrainedSettings):
    """These are the settings of a tokenizer that quantizes the latents of an encoder residually."""

    latent_width: int = Field(32, ge=2, description="width of a latent and of a codeword (d)")
    hidden: Sizes = Field((512, 256, 128), description="hidden widths of the encoder; the decoder has them backwards")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment half of the codebook loss")


class FittedSettings(TokenizerSettings):
    """These are the settings of a tokenizer whose quantizer is fitted without gradients."""

    fit_samples: int = Field(200_000, ge=1, description="items that the fit sees; all items are then assigned")
    rounds: int = Field(50, ge=1, description="rounds of the fit")
    count_power: Share = Field(
        0.0,
        description="an item counts in k-means by (its training interactions + 1) to this power; 0: all items count "
        "alike",
    )


class SpacesSettings(ContentSettings, FittedSettings):
    """These are the settings of a tokenizer that fits one quantizer to the joint content vector, or one to each
    modality."""

    levels: int | Experts = Field(
        6,
        description="slots of the joint content vector, or modality -> slots for one quantizer each (rq-kmeans: shared "
        "first, for slots of the joint vector of all these modalities)",
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the modalities of ``levels``, or the content modalities."""
        if not isinstance(self.levels, dict):
            return self.content
        return tuple(kind for kind in self.levels if kind != SHARED)

    @model_validator(mode="after")
    def _slots(self) -> SpacesSettings:
        if isinstance(self.levels, dict):
            check_slots("levels", self.levels, behavior=True, shared=self.name == "rq-kmeans")
        elif self.levels < 1:
            raise ValueError(f"tokenizer.levels is {self.levels}: must be at least 1")
        return self


def check_slots(key: str, numbers: Mapping[str, int], behavior: bool, shared: bool = False) -> None:
    """Check ``numbers``, modality -> slots, of ``tokenizer.<key>``. Raises ValueError if it is empty, for a number
    below 1, for a name that is no modality (``behavior`` and ``shared`` only if allowed), for behaviour that is not
    last and shared slots that are not first."""
    if not numbers:
        raise ValueError(f"tokenizer.{key} is empty: name at least one modality, for example text")
    for modality, number in numbers.items():
        if number < 1:
            raise ValueError(f"tokenizer.{key}.{modality} is {number}: must be at least 1, or leave the modality out")
        if (modality == SHARED and not shared) or (modality == BEHAVIOR and not behavior):
            raise ValueError(f"tokenizer.{key}: {modality!r} is not a content modality")
    if SHARED in numbers and (next(iter(numbers)) != SHARED or len(numbers) == 1):
        raise ValueError(
            f"tokenizer.{key}: name {SHARED!r} first and a modality after it, the slots of a SID are in this order"
        )
    if BEHAVIOR in numbers and list(numbers)[-1] != BEHAVIOR:
        raise ValueError(f"tokenizer.{key}: name {BEHAVIOR!r} last, the slots of a SID are in this order")
