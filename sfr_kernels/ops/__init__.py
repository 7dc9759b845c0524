"""The losses, an op a file: public function, operator and backward, written once over the kernels and `torch.mm`."""

from .flow_loss import flow_matching_loss
from .linear_cross_entropy import linear_cross_entropy
from .lora import LoRA
from .sfr_loss import SFROutput, sfr_loss

__all__ = ["LoRA", "SFROutput", "flow_matching_loss", "linear_cross_entropy", "sfr_loss"]
