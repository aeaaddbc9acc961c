"""Every tokenizer's settings: one model each, chosen by ``tokenizer.name``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adasid.config.base import Names, Section, Sizes
from adasid.config.parts import Adaptive, Contrast, Controller, Hamr, Repulsion, Revival, Router, Training
from adasid.tables import BEHAVIOR

Experts = Annotated[dict[str, int], Field(strict=False)]


class TokenizerSettings(Section):
    """What every tokenizer has. ``inputs``: the modalities that it reads; ``pairs``: whether it learns from co-engaged pairs."""

    name: str = Field("", description="which tokenizer")
    codebook_size: int = Field(100, ge=2, description="codes in a codebook (K)")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Modalities in slot order, behaviour last."""
        raise NotImplementedError

    @property
    def pairs(self) -> bool:
        """Whether ``item_pairs`` is read."""
        return False

    @property
    def epochs(self) -> Training | None:
        """The training loop's settings; None for a tokenizer that is fitted or needs no data."""
        return None


class Trained(TokenizerSettings):
    """Trained by gradients."""

    reconstruction_weight: float = Field(1.0, ge=0, description="weight of L_recon")
    codebook_weight: float = Field(1.0, gt=0, description="weight of the codebook loss")
    kmeans_samples: int = Field(20_000, ge=1, description="latents that initialise the codebooks")
    kmeans_rounds: int = Field(20, ge=1, description="Lloyd rounds of that initialisation")
    repulsion: Repulsion | None = Field(None, description="repulsion of items whose SIDs overlap: a section of kind hamr or adaptive; null: none")
    contrast: Contrast | None = Field(None, description="contrastive loss on co-engaged pairs; null: none")
    revival: Revival = Field(Revival(), description="revival of dead codes")
    training: Training = Field(Training(), description="the training loop")

    @property
    def pairs(self) -> bool:
        return self.contrast is not None

    @property
    def epochs(self) -> Training | None:
        return self.training


class AdcSid(Trained):
    """ADC-SID (arXiv 2510.25622 v3), with the paper's settings on Beauty where it states them."""

    name: Literal["adc-sid"] = Field("adc-sid", description="mixture of quantization, alignment by richness, weighted behaviour slots")
    shared_experts: int = Field(1, ge=1, description="experts that read all modalities (N_s)")
    content_experts: Experts = Field(
        {"text": 1, "visual": 1}, description="experts of each content modality (N_t, N_v, ...); not given: one for each of features.content"
    )
    behavior_experts: int = Field(3, ge=1, description="experts of the behaviour modality (N_b)")
    latent_width: int = Field(64, ge=2, description="width of a latent and of a codeword (d)")
    projector_width: int = Field(256, ge=2, description="width of the aligned space (d_h)")
    hidden: Sizes = Field((512, 256), description="hidden widths of an expert")
    decoder_hidden: Sizes = Field((256, 512), description="hidden widths of the decoder")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive losses")
    commitment: float = Field(
        1.0, ge=0, description="weight of the commitment half of the codebook loss (0.25 is usual; latents then stray from their codewords)"
    )
    straight_through: Literal["slots", "sum"] = Field(
        "slots",
        description="the reconstruction's gradient passes the quantization of each slot, so that a gate learns by the codeword it weighs; sum: of their sum "
        "(the paper), so that it learns by a latent that the decoder never sees, and grows",
    )
    alignment_weight: float = Field(0.1, ge=0, description="weight of the alignment losses; 0: no contrastive alignment (ablation)")
    controller: Controller = Field(Controller(), description="alignment strength controller")
    router: Router = Field(Router(), description="dynamic behaviour gate")

    @property
    def content(self) -> tuple[str, ...]:
        """Content modalities in slot order."""
        return tuple(self.content_experts)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.content, BEHAVIOR)

    @model_validator(mode="after")
    def _fits(self) -> AdcSid:
        _check_slots("content_experts", self.content_experts, behavior=False)
        if self.router.gate == "switch" and self.straight_through == "slots":
            raise ValueError(
                "tokenizer.router.gate is 'switch', whose slots close where gates learn by codewords: set tokenizer.straight_through: sum"
            )
        return self


class AdaSid(AdcSid):
    """ADA-SID (arXiv 2510.25622 v1): behaviour aligned to text + image, item-specific sparsity, SIDs of variable length."""

    name: Literal["ada-sid"] = Field("ada-sid", description="ADC-SID's first version: inactive behaviour slots become PAD")  # type: ignore[assignment]
    behavior_experts: int = Field(5, ge=1, description="experts of the behaviour modality (N_b)")
    threshold: float = Field(0.0, ge=0, description="a behaviour slot whose weight is not above it becomes PAD")
    router: Router = Field(Router(sparsity=0.4, item_weight=0.1), description="dynamic behaviour gate")


class _Content(Section):
    content: Names = Field(("text", "visual"), min_length=1, description="content modalities that are read; not given: all of features.content")

    @model_validator(mode="after")
    def _content(self) -> _Content:
        _check_slots("content", dict.fromkeys(self.content, 1), behavior=False)
        return self


class _Residual(Trained):
    latent_width: int = Field(32, ge=2, description="width of a latent and of a codeword (d)")
    hidden: Sizes = Field((512, 256, 128), description="hidden widths of the encoder; the decoder has them backwards")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment half of the codebook loss")


class RqVae(_Content, _Residual):
    """RQ-VAE (TIGER, arXiv 2305.05065): residual quantization of one content latent."""

    name: Literal["rq-vae"] = Field("rq-vae", description="residual quantization of the content")
    levels: int = Field(6, ge=1, description="codebooks, each of the residual of the one before (L)")

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.content


class Letter(RqVae):
    """LETTER (arXiv 2405.07314): RQ-VAE with collaborative and diversity regularisation."""

    name: Literal["letter"] = Field("letter", description="RQ-VAE whose latent matches behaviour, with diverse codebooks")  # type: ignore[assignment]
    collaborative_weight: float = Field(0.02, ge=0, description="weight of L_CF")
    diversity_weight: float = Field(1e-4, ge=0, description="weight of L_div")
    diversity_groups: int = Field(10, ge=2, description="groups of codewords of a level, formed anew every epoch")
    sinkhorn: float = Field(0.003, ge=0, description="entropy of the balanced assignment of the last level in training; 0: nearest code")
    sinkhorn_rounds: int = Field(50, ge=1, description="row and column normalisations of that assignment")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.content, BEHAVIOR)


class Das(RqVae):
    """DAS (arXiv 2508.10584), item side: RQ-VAE aligned with behaviour and with co-engaged items."""

    name: Literal["das"] = Field("das", description="RQ-VAE aligned with behaviour and co-engagement (item side)")  # type: ignore[assignment]
    behavior_weight: float = Field(0.1, ge=0, description="weight of the contrast of quantized content and behaviour")
    temperature: float = Field(0.07, gt=0, description="temperature of that contrast")
    contrast: Contrast | None = Field(Contrast(), description="contrast of the quantized vectors of co-engaged pairs")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.content, BEHAVIOR)


class QuaSid(RqVae):
    """QuaSID (arXiv 2603.00632): residual quantization, qualified repulsion, co-engaged pairs."""

    name: Literal["quasid"] = Field("quasid", description="RQ-VAE with Hamming-guided repulsion and co-engaged pairs")  # type: ignore[assignment]
    repulsion: Repulsion | None = Field(Hamr(kind="hamr"), description="repulsion of items whose SIDs overlap")
    contrast: Contrast | None = Field(Contrast(), description="contrastive loss on co-engaged pairs")


class AdaptiveSid(RqVae):
    """AdaSID (arXiv 2604.23522): residual quantization, repulsion regulated by similarity, load and progress."""

    name: Literal["adasid"] = Field("adasid", description="RQ-VAE with adaptive repulsion and co-engaged pairs")  # type: ignore[assignment]
    repulsion: Repulsion | None = Field(Adaptive(kind="adaptive"), description="repulsion of items whose SIDs overlap")
    contrast: Contrast | None = Field(Contrast(weight=(0.0, 0.1), progress=(0.1, 0.9)), description="contrastive loss on co-engaged pairs")


class RqVaePlus(_Residual):
    """RQ-VAE++ (a baseline of arXiv 2510.25622 v1): one RQ-VAE for each modality."""

    name: Literal["rq-vae++"] = Field("rq-vae++", description="a residual quantizer for each modality, behaviour among them")
    levels: Experts = Field(
        {"text": 2, "visual": 2, BEHAVIOR: 2}, description="codebooks of each modality; not given: two for each of features.content and behaviour"
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.levels)

    @model_validator(mode="after")
    def _levels(self) -> RqVaePlus:
        _check_slots("levels", self.levels, behavior=True)
        return self


class MmRqVae(RqVaePlus):
    """MM-RQ-VAE (MME-SID, arXiv 2509.02017): one RQ-VAE for each modality, distributions reconstructed, modalities aligned with behaviour."""

    name: Literal["mm-rq-vae"] = Field("mm-rq-vae", description="RQ-VAE++ with MMD reconstruction and aligned modalities")  # type: ignore[assignment]
    reconstruction: Literal["mmd", "mse"] = Field("mmd", description="mmd: match the batch's distribution, as published; mse: each item")
    reconstruction_weight: float = Field(3.0, ge=0, description="weight of L_recon")
    alignment: Literal["contrastive", "mmd"] = Field("contrastive", description="contrastive: as in the paper; mmd: as in its code")
    alignment_weight: float = Field(0.01, ge=0, description="weight of the alignment of each content modality with behaviour")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive alignment")

    @model_validator(mode="after")
    def _behavior(self) -> MmRqVae:
        if BEHAVIOR not in self.levels:
            raise ValueError(f"tokenizer.levels of mm-rq-vae lacks {BEHAVIOR!r}, which the others are aligned with: add it")
        return self


class Fitted(TokenizerSettings):
    fit_samples: int = Field(200_000, ge=1, description="items that the fit sees; all items are then assigned")
    rounds: int = Field(50, ge=1, description="rounds of the fit")


class Aligner(Section):
    """The content encoder that is trained on co-engaged pairs before residual k-means (QARM)."""

    width: int = Field(64, ge=2, description="width of the aligned vector")
    hidden: Sizes = Field((512, 256), description="hidden widths of the encoder")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss on co-engaged pairs")
    training: Training = Field(Training(epochs=30), description="the training loop")


class RqKmeans(_Content, Fitted):
    """RQ-KMeans (OneRec, QARM): residual k-means without an encoder; plain, balanced, aligned, or one for each modality."""

    name: Literal["rq-kmeans"] = Field("rq-kmeans", description="residual k-means: plain, balanced, aligned, or for each modality")
    levels: int | Experts = Field(6, description="codebooks over the joint content vector, or modality -> codebooks for one quantizer each")
    balanced: bool = Field(False, description="fit with clusters of equal size")
    aligner: Aligner | None = Field(None, description="train a content encoder on co-engaged pairs first; null: raw vectors")

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.levels) if isinstance(self.levels, dict) else self.content

    @property
    def pairs(self) -> bool:
        return self.aligner is not None

    @property
    def epochs(self) -> Training | None:
        return self.aligner.training if self.aligner else None

    @model_validator(mode="after")
    def _levels(self) -> RqKmeans:
        if isinstance(self.levels, dict):
            _check_slots("levels", self.levels, behavior=True)
            if self.aligner:
                raise ValueError(
                    "tokenizer.aligner encodes the joint content vector, but tokenizer.levels names modalities: give a number, or no aligner"
                )
        elif self.levels < 1:
            raise ValueError(f"tokenizer.levels is {self.levels}: must be at least 1")
        return self


class Opq(_Content, Fitted):
    """OPQ (Ge et al., CVPR 2013, as RPG uses it): principal components, a learned rotation, one k-means for each sub-space; over the
    joint content, or for each modality."""

    name: Literal["opq"] = Field("opq", description="optimised product quantization of the content, or of each modality")
    levels: int | Experts = Field(6, description="sub-spaces of the joint content vector, or modality -> sub-spaces for one quantizer each")
    width: int = Field(96, ge=1, description="principal components kept of a vector: at most those there are, and a multiple of its levels")
    whiten: bool = Field(True, description="scale the components to unit variance")
    rounds: int = Field(30, ge=1, description="rounds of the fit")
    momentum: float = Field(0.9, ge=0, lt=1, description="engine own: how far the rotation goes on in the direction of its last step")
    engine: Literal["own", "faiss"] = Field("own", description="own: any K; faiss: K a power of two, needs the faiss-cpu package")

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.levels) if isinstance(self.levels, dict) else self.content

    @model_validator(mode="after")
    def _width(self) -> Opq:
        if isinstance(self.levels, dict):
            _check_slots("levels", self.levels, behavior=True)
        elif self.levels < 1:
            raise ValueError(f"tokenizer.levels is {self.levels}: must be at least 1")
        for levels in self.levels.values() if isinstance(self.levels, dict) else (self.levels,):
            if self.width % levels:
                fix = self.width // levels * levels or levels
                raise ValueError(f"tokenizer.width {self.width} is not a multiple of tokenizer.levels {levels}: take {fix}")
        if self.engine == "faiss" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"tokenizer.engine is 'faiss' but tokenizer.codebook_size {self.codebook_size} is not a power of two: use engine: own")
        return self


class ItemId(TokenizerSettings):
    """Control: the item's index in base ``codebook_size``, its digits mixed. Unique, and without meaning."""

    name: Literal["item-id"] = Field("item-id", description="control: the item's index in base K, its digits mixed")
    levels: int = Field(4, ge=1, description="digits: K^levels items at most")

    @property
    def inputs(self) -> tuple[str, ...]:
        return ()


class RandomSid(TokenizerSettings):
    """Control: codes drawn at random from the seed and the item's index."""

    name: Literal["random"] = Field("random", description="control: random codes")
    levels: int = Field(6, ge=1, description="codes of an item (L)")

    @property
    def inputs(self) -> tuple[str, ...]:
        return ()


TOKENIZERS: tuple[type[TokenizerSettings], ...] = (
    AdcSid,
    AdaSid,
    QuaSid,
    AdaptiveSid,
    RqVae,
    Letter,
    Das,
    RqVaePlus,
    MmRqVae,
    RqKmeans,
    Opq,
    ItemId,
    RandomSid,
)
AnyTokenizer = Annotated[
    AdcSid | AdaSid | QuaSid | AdaptiveSid | RqVae | Letter | Das | RqVaePlus | MmRqVae | RqKmeans | Opq | ItemId | RandomSid,
    Field(discriminator="name"),
]


def _check_slots(key: str, numbers: dict[str, int], behavior: bool) -> None:
    if not numbers:
        raise ValueError(f"tokenizer.{key} is empty: name at least one modality, for example text")
    for modality, number in numbers.items():
        if number < 1:
            raise ValueError(f"tokenizer.{key}.{modality} is {number}: must be at least 1, or leave the modality out")
        if modality == "shared" or (modality == BEHAVIOR and not behavior):
            raise ValueError(f"tokenizer.{key}: {modality!r} is not a content modality")
    if BEHAVIOR in numbers and list(numbers)[-1] != BEHAVIOR:
        raise ValueError(f"tokenizer.{key}: name {BEHAVIOR!r} last, the slots of a SID are in this order")
