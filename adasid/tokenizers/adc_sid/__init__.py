"""This package defines ADC-SID, the default tokenizer: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from adasid.settings import Section, Share, Sizes
from adasid.tables import BEHAVIOR
from adasid.tokenizers.settings import Experts, Revival, TrainedSettings, Training, check_slots

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


Start = Literal["axes", "random"]
Distance = Literal["cosine", "euclidean"]


class Controller(Section):
    """Strength of the alignment of an item's content with its behaviour, by richness."""

    enabled: bool = Field(True, description="false: every alignment weight is 1 (ablation)")
    alpha: float = Field(10.0, gt=0, description="slope of the alignment weight over richness")
    beta: float | Literal["calibrated"] = Field(
        "calibrated", description="shift of the alignment weight (paper: 9); calibrated: see calibrated_share"
    )
    calibrated_share: Share = Field(
        0.4,
        description="calibrated beta puts this share of items below a weight of 0.05 (the paper's 'about 40 %')",
    )


class Router(Section):
    """The gate of the behaviour slots, and the sparsity that it learns."""

    gate: Literal["dynamic", "switch", "equal"] = Field(
        "dynamic",
        description="dynamic: R(e_b) weighs behaviour slots; switch: it turns them on and off, in z each counts 1, so "
        "that no weight can tell what codes should; equal: weight 1 for every behaviour slot (ablation)",
    )
    sparsity: float | None = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="target share of inactive behaviour slots, averaged over items; null: no sparsity loss (ablation)",
    )
    lambda_start: float = Field(
        1e-3,
        gt=0,
        description="first weight of the sparsity loss (ReMoE: 1e-8, for 60,000 steps)",
    )
    lambda_step: float = Field(
        1.02,
        gt=1,
        description="factor by which that weight moves a step (ReMoE: 1.2; it overshoots in short runs)",
    )
    item_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the hinge that asks every item for its own sparsity; 0: only the average counts",
    )
    scale: Literal["sigmoid", "alignment"] = Field(
        "sigmoid", description="sigmoid: R is scaled by sigmoid(richness); alignment: by the alignment weight"
    )
    hidden: int = Field(64, ge=1, description="hidden width of the gates")


class ShortTraining(Training):
    """The training loop of experts that begin as principal axes."""

    epochs: int = Field(10, ge=2, description="epochs: each sees as many rows as there are items")


class NoRevival(Revival):
    """No code is replaced unless asked for: replacing codes that few items have takes those of popular items away."""

    min_share: float = Field(
        0.0, ge=0, description="a code used less than this share of its fair share 1/K is revived; 0: none"
    )


class AdcSidSettings(TrainedSettings):
    """ADC-SID (arXiv 2510.25622 v3), started from principal axes. The paper's form: shared_experts: 1,
    behavior_experts: 3, start: random, distance: cosine, damping: 0, count_power: 0, expert_lr: 1, straight_through:
    sum, revival: {min_share: 0.25}, training: {epochs: 100}."""

    name: Literal["adc-sid"] = Field(
        "adc-sid",
        description="mixture of quantization, alignment by richness, weighted slots",
    )
    shared_experts: int = Field(2, ge=1, description="experts that read all modalities (N_s)")
    content_experts: Experts = Field(
        {"text": 1, "visual": 1},
        description="experts of each content modality (N_t, N_v, ...); not given: one for each of features.content",
    )
    behavior_experts: int = Field(2, ge=1, description="experts of the behaviour modality (N_b)")
    start: Start = Field(
        "axes",
        description="axes: an expert begins as the linear map to the principal axes of what it reads, each modality in "
        "dimensions of its own; random: as a random network (the paper)",
    )
    experts: Literal["trained", "fixed"] = Field(
        "trained",
        description="fixed: experts stay the linear maps of start: axes, and nothing is aligned; trained: a network is "
        "added to them",
    )
    content_weight: float = Field(
        0.7,
        gt=0,
        description="start: axes: weight of a content modality, against 1 for behaviour, in what shared experts read",
    )
    distance: Distance = Field(
        "euclidean", description="how the nearest codeword is found; cosine: by direction alone (the paper)"
    )
    damping: Share = Field(
        0.5,
        description="share of the codewords of shared slots and of earlier slots of its modality that a slot does not "
        "quantize again (eta); 0: slots are parallel (the paper)",
    )
    count_power: Share = Field(
        0.5,
        description="an item counts when codebooks are initialised by (its training interactions + 1) to this power",
    )
    expert_lr: Share = Field(
        0.01,
        description="learning rate of codebooks and experts, but for first layers that gates share, as a share of "
        "training.lr (of retokenize.warm.lr in a warm run), at which all else learns",
    )
    codebooks: Literal["trained", "fixed"] = Field(
        "trained",
        description="trained: codewords learn by the codebook loss, and dead ones are revived; fixed: they stay as the "
        "initialisation leaves them",
    )
    latent_width: int = Field(
        64, ge=2, description="width of a latent and of a codeword (d); start: axes: of each modality's part, at most"
    )
    projector_width: int = Field(256, ge=2, description="width of the aligned space (d_h)")
    hidden: Sizes = Field((512, 256), description="hidden widths of an expert")
    decoder_hidden: Sizes = Field((256, 512), description="hidden widths of the decoder")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive losses")
    commitment: float = Field(
        1.0,
        ge=0,
        description="weight of the commitment half of the codebook loss (0.25 is usual; latents stray then)",
    )
    straight_through: Literal["slots", "sum"] = Field(
        "slots",
        description="the reconstruction's gradient passes the quantization of each slot, so that a gate learns by the "
        "codeword it weighs; sum: of their sum (the paper), so that it learns by a latent that the decoder never sees, "
        "and grows",
    )
    alignment_weight: float = Field(
        0.1,
        ge=0,
        description="weight of the alignment losses; 0: no contrastive alignment (ablation)",
    )
    controller: Controller = Field(Controller(), description="alignment strength controller")
    router: Router = Field(Router(), description="dynamic behaviour gate")
    revival: NoRevival = Field(NoRevival(), description="revival of dead codes")
    training: ShortTraining = Field(ShortTraining(), description="the training loop")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.adc_sid.model import AdcSid

        return AdcSid(self, widths)

    @property
    def parallel(self) -> bool:
        """Return whether experts do not depend on each other."""
        return not self.damping

    @property
    def content(self) -> tuple[str, ...]:
        """Return the content modalities in slot order."""
        return tuple(self.content_experts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the content modalities, then behaviour."""
        return (*self.content, BEHAVIOR)

    @classmethod
    def reading(cls, content: Sequence[str]) -> dict[str, Any]:
        """Return one expert for each modality of ``content``."""
        return {"content_experts": dict.fromkeys(content, 1)}

    @model_validator(mode="after")
    def _fits(self) -> AdcSidSettings:
        check_slots("content_experts", self.content_experts, behavior=False)
        if self.experts == "fixed" and self.start == "random":
            raise ValueError("tokenizer.experts is 'fixed', which needs experts that begin well: set start: axes")
        if self.codebooks == "fixed" and self.revival.min_share:
            raise ValueError(
                f"tokenizer.revival.min_share is {self.revival.min_share:g}, but tokenizer.codebooks is 'fixed', so "
                "that no code is revived: set min_share: 0, or codebooks: trained"
            )
        if self.router.gate == "switch" and self.straight_through == "slots":
            fault = "tokenizer.router.gate is 'switch', whose slots close where gates learn by codewords"
            raise ValueError(f"{fault}: set tokenizer.straight_through: sum")
        return self
