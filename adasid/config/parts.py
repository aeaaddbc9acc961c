"""Sections that several tokenizers share: the loop, the controller, the router, repulsion and contrast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adasid.config.base import Section, Share


class Training(Section):
    epochs: int = Field(100, ge=2, description="epochs: each sees as many rows as there are items")
    batch: int = Field(1024, ge=2, description="items a step, all workers together (of co-engaged pairs, half are partners)")
    lr: float = Field(0.001, gt=0, description="AdamW learning rate at the start; cosine decay to 0")
    weight_decay: float = Field(0.0001, ge=0, description="AdamW weight decay (not on codebooks and biases)")
    warmup_epochs: int = Field(1, ge=1, description="epochs without quantization, before the k-means initialisation")
    checkpoint_epochs: int = Field(20, ge=1, description="epochs between two checkpoints")
    log_epochs: int = Field(5, ge=1, description="epochs between two rows of metrics")

    @model_validator(mode="after")
    def _warmup(self) -> Training:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"tokenizer.training.warmup_epochs {self.warmup_epochs} is not below tokenizer.training.epochs {self.epochs}: nothing would be quantized"
            )
        return self


class Controller(Section):
    enabled: bool = Field(True, description="false: every alignment weight is 1 (ablation)")
    alpha: float = Field(10.0, gt=0, description="slope of the alignment weight over richness")
    beta: float | Literal["calibrated"] = Field(
        "calibrated", description="shift of the alignment weight (paper: 9); calibrated: see calibrated_share"
    )
    calibrated_share: Share = Field(0.4, description="calibrated beta puts this share of items below a weight of 0.05 (the paper's 'about 40 %')")


class Router(Section):
    gate: Literal["dynamic", "switch", "equal"] = Field(
        "dynamic",
        description="dynamic: R(e_b) weighs behaviour slots; switch: it turns them on and off, in z each counts 1, so that no weight can tell what codes "
        "should; equal: weight 1 for every behaviour slot (ablation)",
    )
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        1 / 3, description="target share of inactive behaviour slots, averaged over items; null: no sparsity loss (ablation)"
    )
    lambda_start: float = Field(1e-3, gt=0, description="first weight of the sparsity loss (ReMoE: 1e-8, for 60,000 steps)")
    lambda_step: float = Field(1.02, gt=1, description="factor by which that weight moves a step (ReMoE: 1.2; it overshoots in short runs)")
    item_weight: float = Field(0.0, ge=0, description="weight of the hinge that asks every item for its own sparsity; 0: only the average counts")
    scale: Literal["sigmoid", "alignment"] = Field(
        "sigmoid", description="sigmoid: R is scaled by sigmoid(richness); alignment: by the alignment weight"
    )
    hidden: int = Field(64, ge=1, description="hidden width of the gates")


class Revival(Section):
    every: int = Field(50, ge=1, description="steps between two looks at code usage")
    min_share: float = Field(0.25, ge=0, description="a code used less than this share of its fair share 1/K is revived")
    until: Share = Field(0.9, description="share of training after which codes are left alone")


class Hamr(Section):
    """Hamming-guided margin repulsion (QuaSID, arXiv 2603.00632, eqs 8 to 13)."""

    kind: Literal["hamr"] = Field(description="hamr: QuaSID's repulsion")
    full_margin: float = Field(0.8, gt=0, le=2, description="cosine distance below which items of one whole SID are repelled")
    partial_margin: float = Field(0.5, gt=0, le=2, description="the same for SIDs that differ in at most radius slots")
    radius: int | None = Field(None, ge=1, description="Hamming distance up to which an overlap is partial; null: a third of the slots")
    full_weight: float = Field(0.2, ge=0, description="weight of the repulsion of whole overlaps")
    partial_weight: float = Field(0.1, ge=0, description="weight of the repulsion of partial overlaps")


class Adaptive(Section):
    """Adaptive overlap regulation (AdaSID, arXiv 2604.23522): relaxation, load-adaptive strengthening, progress-adaptive rebalancing."""

    kind: Literal["adaptive"] = Field(description="adaptive: AdaSID's repulsion")
    thresholds: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.18, 0.3), description="cosine from which an overlap is spared: for one shared code, for all; evenly spaced between"
    )
    margin: float = Field(1.0, gt=0, le=2, description="cosine distance below which an overlap that is not spared is repelled")
    load: Literal["pattern", "code"] = Field(
        "pattern", description="load of an overlap counts pairs with the same matching slots, or also the same codes"
    )
    load_gain: Annotated[tuple[float, float], Field(strict=False)] = Field((1.0, 2.0), description="strength at no load and at full load")
    load_power: float = Field(1.0, gt=0, description="sharpness of the rise between")
    load_quantile: Share = Field(0.9, description="quantile of the loads seen that counts as full load")
    progress: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.1, 0.9), description="share of training at which rebalancing starts and ends"
    )
    weight: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (1.0, 0.2), description="weight of the repulsion before and after rebalancing"
    )

    @model_validator(mode="after")
    def _window(self) -> Adaptive:
        low, high = self.thresholds
        if not -1 < low <= high <= 1:
            raise ValueError(f"repulsion.thresholds {self.thresholds} must rise within -1 and 1")
        if self.margin <= 1 - low:
            raise ValueError(
                f"repulsion.margin {self.margin:g} must be above 1 - {low:g} (the lowest threshold): else the hinge never acts on an overlap "
                "that is not spared"
            )
        if not 0 <= self.progress[0] < self.progress[1] <= 1:
            raise ValueError(f"repulsion.progress {self.progress} must rise within 0 and 1")
        return self


Repulsion = Annotated[Hamr | Adaptive, Field(discriminator="kind")]


class Contrast(Section):
    weight: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.1, 0.1), description="weight of the loss on pairs: at the start, at the end"
    )
    progress: Annotated[tuple[float, float], Field(strict=False)] = Field((0.0, 1.0), description="share of training between which the weight moves")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss on co-engaged pairs")

    @model_validator(mode="after")
    def _window(self) -> Contrast:
        if not 0 <= self.progress[0] < self.progress[1] <= 1:
            raise ValueError(f"contrast.progress {self.progress} must rise within 0 and 1")
        return self
