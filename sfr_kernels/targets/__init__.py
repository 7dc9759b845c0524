"""Targets: the text ahead of each anchor, embedded once per data set and looked up by the collator."""

from .build import build_targets
from .collator import SFRCollator
from .encoder import encode, load_encoder
from .online import OnlineTargets
from .samples import SampleList
from .segments import rows_and_texts, segment_texts
from .shards import DamagedStore
from .store import TargetStore

__all__ = ["DamagedStore", "OnlineTargets", "SFRCollator", "SampleList", "TargetStore", "build_targets", "encode",
           "load_encoder", "rows_and_texts", "segment_texts"]  # fmt: skip
