"""Each section of the report describes, plots and tabulates one part of the material, or says why it cannot."""

from adasid.report.sections.codes import semantic_ids, weights
from adasid.report.sections.data import behavior, catalogue, content
from adasid.report.sections.runs import provenance, stages, tokenizer

ALL = (catalogue, content, behavior, weights, semantic_ids, tokenizer, stages, provenance)
