"""The configuration consists of typed, frozen models, and the field defaults here are the only defaults.

``conf/base.yaml`` shows all of them and a test keeps the two equal. An unknown key, a wrong type or a conflict between
two keys is a :class:`~adasid.errors.ConfigError` that names the file, the key and the nearest valid key.
"""

from adasid.config.content import Content, Encoder
from adasid.config.downstream import Evaluate, Ranking, Retrieval
from adasid.config.nightly import Lease, Retokenize, Warm
from adasid.config.render import render_base, render_tokenizers
from adasid.config.sources import AmazonSource, ArraysSource, FolderSource, Source, Synthetic, TablesSource
from adasid.config.stages import (
    Behavior,
    Categories,
    Compare,
    Explore,
    Features,
    Gates,
    Pairs,
    Ray,
    Sids,
    Spark,
    Tracking,
)
from adasid.config.whole import Config, build, digest, load
from adasid.settings import Names, Section, Share, Sizes
from adasid.tokenizers.ada_sid import AdaSidSettings
from adasid.tokenizers.adaptive_sid import AdaptiveSidSettings
from adasid.tokenizers.adc_sid import AdcSidSettings, Controller, Router
from adasid.tokenizers.controls import ItemIdSettings, RandomSidSettings
from adasid.tokenizers.das import DasSettings
from adasid.tokenizers.letter import LetterSettings
from adasid.tokenizers.mm_rq_vae import MmRqVaeSettings
from adasid.tokenizers.opq import OpqSettings
from adasid.tokenizers.quasid import QuaSidSettings
from adasid.tokenizers.registry import TOKENIZERS, AnyTokenizer
from adasid.tokenizers.rq_kmeans import Aligner, RqKmeansSettings
from adasid.tokenizers.rq_vae import RqVaePlusSettings, RqVaeSettings
from adasid.tokenizers.settings import (
    Adaptive,
    Contrast,
    Experts,
    FittedSettings,
    Hamr,
    Repulsion,
    Revival,
    TokenizerSettings,
    TrainedSettings,
    Training,
)

__all__ = [
    "TOKENIZERS",
    "AdaSidSettings",
    "Adaptive",
    "AdaptiveSidSettings",
    "AdcSidSettings",
    "Aligner",
    "AmazonSource",
    "AnyTokenizer",
    "ArraysSource",
    "Behavior",
    "Categories",
    "Compare",
    "Config",
    "Content",
    "Contrast",
    "Controller",
    "DasSettings",
    "Encoder",
    "Evaluate",
    "Experts",
    "Explore",
    "Features",
    "FittedSettings",
    "FolderSource",
    "Gates",
    "Hamr",
    "ItemIdSettings",
    "Lease",
    "LetterSettings",
    "MmRqVaeSettings",
    "Names",
    "OpqSettings",
    "Pairs",
    "QuaSidSettings",
    "RandomSidSettings",
    "Ranking",
    "Ray",
    "Repulsion",
    "Retokenize",
    "Retrieval",
    "Revival",
    "Router",
    "RqKmeansSettings",
    "RqVaePlusSettings",
    "RqVaeSettings",
    "Section",
    "Share",
    "Sids",
    "Sizes",
    "Source",
    "Spark",
    "Synthetic",
    "TablesSource",
    "TokenizerSettings",
    "Tracking",
    "TrainedSettings",
    "Training",
    "Warm",
    "build",
    "digest",
    "load",
    "render_base",
    "render_tokenizers",
]
