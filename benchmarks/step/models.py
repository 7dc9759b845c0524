"""The models of the training-step benchmark: real sizes, random weights, and copies that share their parameters.

Every provider trains the same weights. A copy has modules of its own, so that `attach` on one leaves the others plain,
but its parameters and buffers are those of the model it was copied from: memory holds them, and the optimizer's states,
once.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfr_kernels import SFRConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8  # of LoRA


@dataclass(frozen=True)
class Trunk:
    """A decoder's sizes, those of its public config."""

    name: str
    family: str  # "qwen2" or "llama"
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # the lm_head's weight is that of the embeddings
    rope_theta: float
    norm_eps: float


QWEN2 = Trunk("Qwen2-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936, True, 1e6, 1e-6)
LLAMA3 = Trunk("Llama-3-8B", "llama", 4096, 14336, 32, 32, 8, 128256, False, 5e5, 1e-5)
SMOLLM2 = Trunk("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 49152, True, 1e5, 1e-5)
SMALL_QWEN2 = Trunk("Qwen2 in small", "qwen2", 64, 160, 2, 4, 2, 3072, True, 1e6, 1e-6)
SMALL_LLAMA3 = Trunk("Llama-3 in small", "llama", 64, 192, 2, 4, 1, 2048, False, 5e5, 1e-5)


@dataclass(frozen=True)
class EncoderShape:
    """A BERT's sizes; its hidden size is that of the targets, d."""

    hidden_size: int = 1024  # bge-large
    layers: int = 24
    heads: int = 16
    intermediate_size: int = 4096
    vocab: int = 30522


@dataclass(frozen=True)
class StepShape:
    """A training step: what is trained, on how much."""

    trunk: Trunk
    lora: bool  # else every weight is trained
    checkpointing: bool
    optimizer: str = "AdamW"  # or "SGD", which keeps no state
    batch: int = 4
    length: int = 1024
    supervised: float = 0.75  # share of the tokens, the last ones of each sequence
    encoder: EncoderShape = EncoderShape()
    segments: dict = field(default_factory=dict)  # fields of SFRConfig for sequences shorter than its defaults are for

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def config(self) -> SFRConfig:
        return SFRConfig(**self.segments)

    @property
    def official(self) -> SFRConfig:
        return SFRConfig.official(**self.segments)


def build_model(shape: StepShape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal LM made on the device, in training mode; with adapters, in the model's own dtype, where it is LoRA.

    The adapters are as in mid-training, their second factor not zero: else the first would have no gradient.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    t = shape.trunk
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[t.family](
        vocab_size=t.vocab,
        hidden_size=t.hidden_size,
        intermediate_size=t.intermediate_size,
        num_hidden_layers=t.layers,
        num_attention_heads=t.heads,
        num_key_value_heads=t.kv_heads,
        max_position_embeddings=max(8192, shape.length),
        tie_word_embeddings=t.tied,
        rms_norm_eps=t.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": t.rope_theta},
        use_cache=False,  # training makes no use of it
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=list(PROJECTIONS),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return model.train()


def share(model: nn.Module, checkpointing: bool) -> nn.Module:
    """A copy with modules of its own around the same parameters and buffers."""
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, same)
    if checkpointing:
        copy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return copy


def build_optimizer(name: str, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Fused on a GPU. Its learning rate is zero: it does all its work and leaves the weights, and with them the losses
    of all runs, where they are."""
    kind = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    return kind(list(parameters), lr=0.0, fused=device.type == "cuda")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind them, what is shared counted once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
