"""Fused kernels, a drop-in loss and a training integration for Semantic Flow Regularization (arXiv 2605.27971)."""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import SFRConfig
from .modules import LinearCrossEntropy, SFRLoss, VelocityHead
from .ops import LoRA, SFROutput, flow_matching_loss, linear_cross_entropy, sfr_loss
from .rows import SupervisedRows

if TYPE_CHECKING:
    from .training.attach import attach, detach

__all__ = [
    "LinearCrossEntropy",
    "LoRA",
    "SFRConfig",
    "SFRLoss",
    "SFROutput",
    "SupervisedRows",
    "VelocityHead",
    "__version__",
    "attach",
    "detach",
    "flow_matching_loss",
    "linear_cross_entropy",
    "sfr_loss",
]


def __getattr__(name: str) -> Any:
    # `attach` and `detach` bring transformers along, which users of the losses alone need not have.
    if name in ("attach", "detach"):
        try:
            from .training import attach as functions
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs {error.name}: pip install 'sfr_kernels[train]'") from error

        return getattr(functions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
