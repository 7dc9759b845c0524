"""Targets: the text ahead of each anchor, embedded once per data set and looked up by the collator."""

from .collator import SFRCollator
from .encoder import encode, load_encoder
from .segments import segment_texts
from .store import TargetStore, build_targets

__all__ = ["SFRCollator", "TargetStore", "build_targets", "encode", "load_encoder", "segment_texts"]
