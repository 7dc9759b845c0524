"""Leaves in CUDA C++ (csrc/): NVIDIA GPUs of compute capability 8.0 and newer; bf16, fp16 and float32."""

from .flow_loss import flow_loss, serves_flow_loss
from .flow_mse import flow_mse
from .flow_path import flow_path
from .norm_act import norm_act, norm_act_backward
from .scale import scale, scale_, scatter_rows, split
from .softmax_xent import softmax_gradient, softmax_partials, softmax_xent
from .times import sequence_times, sinusoid, stratified_times

__all__ = [
    "flow_loss",
    "flow_mse",
    "flow_path",
    "norm_act",
    "norm_act_backward",
    "scale",
    "scale_",
    "scatter_rows",
    "sequence_times",
    "serves_flow_loss",
    "sinusoid",
    "softmax_gradient",
    "softmax_partials",
    "softmax_xent",
    "split",
    "stratified_times",
]
