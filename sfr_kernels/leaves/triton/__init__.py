"""Leaves in Triton: NVIDIA GPUs of compute capability 8.0 and newer; bf16, fp16 and float32."""

from .flow_mse import flow_mse
from .flow_path import flow_path
from .norm_act import norm_act
from .norm_act_backward import norm_act_backward
from .scale import scale, scale_, scatter_rows
from .softmax_shard import softmax_gradient, softmax_partials
from .softmax_xent import softmax_xent
from .split import split
from .times import sequence_times, sinusoid, stratified_times

__all__ = [
    "flow_mse",
    "flow_path",
    "norm_act",
    "norm_act_backward",
    "scale",
    "scale_",
    "scatter_rows",
    "sequence_times",
    "sinusoid",
    "softmax_gradient",
    "softmax_partials",
    "softmax_xent",
    "split",
    "stratified_times",
]
