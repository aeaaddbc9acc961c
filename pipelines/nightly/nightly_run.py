"""Provide what every data flow of a nightly run shares: the tables that it reads, and how its table is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from pyspark.sql import DataFrame, SparkSession

from adasid.config import Config, digest
from adasid.errors import InputError
from adasid.files import Location
from adasid.sid import Slot
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.base import Tokenizer
from pipelines import report
from pipelines.content import vectors
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.nightly import verdict
from pipelines.publish import exports, generations, registration
from pipelines.publish.encode import check_features
from pipelines.publish.gates import failures
from pipelines.publish.generations import Candidate, Generation
from pipelines.publish.lease import Lease
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.training.register import register


@dataclass
class NightlyRun:
    """A nightly run has ``live``: the live generation; ``version``: of the current ``item_features``; ``day``: the run
    date; ``key``: the input hash, without the chosen policy and tokenizer; ``dry``: nothing is published. Spark starts
    on first use."""

    cfg: Config
    context: StageContext
    lease: Lease
    live: Generation
    version: int
    day: str
    key: str
    dry: bool = False

    @property
    def lake(self) -> Lake:
        """Return the lake."""
        return self.context.lake

    @property
    def artifact(self) -> Location:
        """Return the folder of the live tokenizer."""
        return Run(self.cfg).of_name(self.live.artifact)

    @property
    def refused(self) -> Location:
        """Return the path at which a refusal is recorded for the report."""
        return Run(self.cfg).refused

    @cached_property
    def spark(self) -> SparkSession:
        """Return the Spark session."""
        return engine.session(self.cfg.spark, size=in_place.size(self.lake, "item_features"))

    @cached_property
    def features(self) -> DataFrame:
        """Return the current ``item_features``."""
        return engine.read(self.spark, self.lake, "item_features", self.version)

    @cached_property
    def published(self) -> DataFrame:
        """Return the live rows of ``sids``."""
        return engine.read(self.spark, self.lake, "sids", self.live.sids_version)

    @staticmethod
    def slots(manifest: Manifest) -> list[Slot]:
        """Return the slots of a tokenizer."""
        return list(manifest.slots)

    def champion(self) -> tuple[Tokenizer, Manifest]:
        """Return the live tokenizer and its manifest. Raises InputError where it is damaged, is another one, or does
        not take the current features."""
        tokenizer, manifest = artifact.read(self.artifact)  # damaged weights raise here, not in a task
        live = self.live.tokenizer
        if manifest.digest != live:
            raise InputError(
                f"artifact {self.artifact}: tokenizer {manifest.digest}, but the live SIDs are of {live}: put that "
                "artifact back, or run jobs/write_sids.py"
            )
        check_features(engine.struct(self.lake.schema("item_features", self.version)), manifest)
        vectors.check_tokenizer(self.lake, manifest)
        return tokenizer, manifest

    def _champion(self, live: Generation) -> None:
        exports.point(self.cfg, self.lake)
        registration.register(self.cfg, self.context)
        register(self.cfg, self.context, Run(self.cfg).of_name(live.artifact), live.tokenizer, "champion")

    def track(self, candidate: Candidate) -> None:
        """Track the measurements of the table and every gate; in a dry run also on the screen and on the page."""
        self.context.metrics(verdict.tracked(candidate))
        self.context.document("gates.json", candidate.model_dump(include={"gates"}))
        if self.dry:
            for gate in candidate.gates:
                self.context.note(f"{'passed' if gate.passed else 'FAILED'}: {failures([gate])}")
            self._summarize(candidate)
            self.pages(candidate)

    def note_changes(self, how: str, counts: Mapping[str, int]) -> None:
        """Note how many items are new, changed and removed, and the method of detection."""
        self.context.facts["detected by"] = how
        self.context.note(
            f"by {how}: " + ", ".join(f"{counts.get(why, 0)} {why}" for why in ("new", "changed", "removed"))
        )

    def unchanged(self) -> None:
        """Report that there is nothing to publish."""
        self._up_to_date(f"no item is new, changed or removed since generation {self.live.generation}")
        self.context.facts["item_features"] = self.version  # the report counts this version as read

    def _up_to_date(self, why: str) -> None:
        if not self.dry:
            self._champion(self.live)  # a killed run may not have done this, nor removed a refusal
        if self.refused.exists() and not self.dry:
            self.refused.unlink()
            self.pages()
        if since := self.live.hold:
            self.context.note(f"generation {self.live.generation} is on hold since {since}")
        self.context.status = "up to date"
        self.context.note(why)
        self.context.facts.update({"generation": self.live.generation, "items": self.live.items})

    def input_hash(self, policy: str, tokenizer: str) -> str:
        """Return the input hash that the commits of the run carry."""
        return digest(self.key, policy, tokenizer)

    def publish(
        self,
        candidate: Candidate,
        manifest: Manifest,
        input_hash: str,
        write_sids: Callable[[], object],
        write_changes: Callable[[], object],
    ) -> None:
        """Publish a table that passed its gates (:func:`pipelines.publish.generations.publish`), and report it; not in
        a dry run, nor where it was published and then rolled back. Raises GateError where the live generation is on
        hold."""
        if self.dry:
            self.context.status = "dry run"
            self.context.note(f"dry run: all gates passed; generation {self.live.generation} stays live")
            return
        if self.live.hold:
            self.pages()
            generations.check_hold(self.lake)
        if generations.settled(self.lake, input_hash):
            number = generations.next_number(self.lake) - 1
            self._up_to_date(
                f"generation {number} was published from these inputs and rolled back: jobs/rollback.py --to {number} "
                "makes it live again"
            )
            return
        registration.check(self.cfg, self.context)
        exports.check(self.cfg, self.lake, self.version)
        generation = generations.publish(
            self.context,
            input_hash,
            candidate,
            self.live.generation,
            write_sids,
            write_changes,
            before_live=partial(exports.write, self.cfg, self.lake, self.slots(manifest), allowed=self.lease.check),
            allowed=self.lease.check,
        )
        self._champion(generation)
        self.context.status = "done"  # training the tokenizer may have set another status
        self.refused.unlink(missing_ok=True)
        self.pages()
        self._summarize(generation)

    def _summarize(self, candidate: Candidate) -> None:
        """Add what changed to the facts of the run."""
        churn = candidate.churn
        number = f"{candidate.generation} (dry run)" if self.dry else candidate.generation
        facts = {"generation": number, "policy": candidate.policy, "items": candidate.items}
        facts |= {why: churn[why] for why in ("new", "changed", "removed")}
        self.context.facts.update(facts | {"churn": f"{churn['churn']:.2%}"})

    def pages(self, dry: Candidate | None = None) -> None:
        """Write the page of the last generations and of a ``dry`` run, and log it in MLflow."""
        folder = report.write_nights(self.cfg, self.lake, dry)
        self.context.artifact(folder)
        self.context.facts["page"] = str(folder / "index.html")
