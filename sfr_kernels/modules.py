"""The velocity head and the losses as `nn.Module`s."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .config import HeadShape, HiddenNorm, SFRConfig
from .kernels.softmax_xent import RowStats
from .ops import LoRA, SFROutput, linear_cross_entropy, sfr_loss
from .ops.validate import check_constant, check_head_shape, check_tensor
from .ops.velocity_head import evaluate_head
from .rows import IGNORE_INDEX, SupervisedRows

# Of a head for "mtp", whose x_t and t are always 0: the least of which a row has 16 bytes in 16 bit.
MTP_TARGET_SIZE = 8


class _TimeEmbedding(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)


class VelocityHead(nn.Module):
    """v(x_t, t, h): the small MLP that predicts the flow's velocity (`reference.velocity`).

    Parameters carry the names and shapes of the published head, so its checkpoints load with `load_state_dict`:
    `time_embed.mlp.{0,2}`, from d to 4d and back, `input_proj.{0,1}` with weight [W_x | W_τ | W_h],
    `res_blocks.i.{linear,norm}`, `output_proj`, which starts at zero. The published head has time_scale and
    hidden_scale 1 and no norm of h: `VelocityHead.from_config(SFRConfig.official(), hidden_size, target_size)`. For
    "mtp" the output is no velocity, and has a size of its own.
    """

    def __init__(
        self,
        hidden_size: int,  # H
        target_size: int,  # d
        width: int = 1024,  # D
        num_layers: int = 3,
        time_scale: float = 1000.0,
        hidden_scale: float = 1.0,
        output_size: int | None = None,  # None: target_size, as published
        hidden_norm: HiddenNorm = "rms",
    ):
        super().__init__()
        output_size = target_size if output_size is None else output_size
        sizes = dict(hidden_size=hidden_size, target_size=target_size, width=width, output_size=output_size)
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, an input and an output layer, got {num_layers}")
        if not (time_scale > 0 and hidden_scale > 0):
            raise ValueError(f"time_scale and hidden_scale must be positive, got {time_scale} and {hidden_scale}")
        if hidden_norm not in get_args(HiddenNorm):
            raise ValueError(f"hidden_norm must be one of {', '.join(get_args(HiddenNorm))}, got {hidden_norm!r}")
        self.shape = HeadShape(
            hidden_size, target_size, width, num_layers - 2, float(time_scale), float(hidden_scale), output_size,
            hidden_norm,
        )  # fmt: skip
        self.time_embed = _TimeEmbedding(target_size)
        self.input_proj = nn.Sequential(nn.Linear(2 * target_size + hidden_size, width), nn.LayerNorm(width), nn.SiLU())
        self.res_blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(num_layers - 2))
        self.output_proj = nn.Linear(width, output_size)
        nn.init.zeros_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    @classmethod
    def from_config(cls, config: SFRConfig, hidden_size: int, target_size: int | None = None) -> "VelocityHead":
        """A new head for the config's loss. target_size: of the targets; None for "mtp", which has none."""
        output_size = None
        if config.loss == "mtp":
            if target_size is not None:
                raise ValueError(f"target_size must be None with loss='mtp', got {target_size}: its targets are tokens")
            target_size, output_size = MTP_TARGET_SIZE, config.mtp_tokens * hidden_size
        elif target_size is None:
            raise ValueError(f"target_size must be given for loss={config.loss!r}: it is that of the targets")
        return cls(
            hidden_size, target_size, config.width, config.num_layers, config.time_scale, config.hidden_scale,
            output_size, config.hidden_norm,
        )  # fmt: skip

    def forward(
        self,
        x_t: Tensor,  # (n, d)
        t: Tensor,  # (n,) or a scalar
        hidden: Tensor,  # (n, H)
    ) -> Tensor:  # (n, output_size), d but for "mtp"
        """The velocity at x_t, differentiable in `hidden` and the parameters; x_t and t must not require a gradient."""
        check_tensor("hidden", hidden)
        check_tensor("x_t", x_t)
        n = hidden.shape[0]
        if hidden.shape != (n, self.shape.hidden_size):
            raise ValueError(f"hidden must be (n, {self.shape.hidden_size}), got {tuple(hidden.shape)}")
        if x_t.shape != (n, self.shape.target_size):
            raise ValueError(f"x_t must be ({n}, {self.shape.target_size}), got {tuple(x_t.shape)}")
        if isinstance(t, Tensor):
            check_tensor("t", t)
        check_constant("x_t", x_t)
        check_constant("t", t)
        t = torch.as_tensor(t, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        if t.dim() == 0:
            times, index = t.reshape(1), torch.zeros(n, dtype=torch.int32, device=hidden.device)
        elif t.shape == (n,):
            times, index = t, torch.arange(n, dtype=torch.int32, device=hidden.device)
        else:
            raise ValueError(f"t must be a scalar or ({n},), got {tuple(t.shape)}")
        return evaluate_head(self, hidden, x_t, times, index)

    def extra_repr(self) -> str:
        s = self.shape
        sizes = (
            f"hidden_size={s.hidden_size}, target_size={s.target_size}, output_size={s.output_size}, width={s.width}"
        )
        return f"{sizes}, time_scale={s.time_scale:g}, hidden_scale={s.hidden_scale:g}, hidden_norm={s.hidden_norm}"


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its options fixed; takes (hidden, weight, labels, bias).

    In place of `F.cross_entropy(lm_head(hidden).flatten(0, 1), labels.flatten())`:
    `loss = LinearCrossEntropy()(hidden, lm_head.weight, labels, lm_head.bias)`.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        shift: bool | int = False,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        class_weight: Tensor | None = None,  # (V,), a buffer
        softcap: float | None = None,
        logit_scale: float = 1.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        accum_dtype: torch.dtype | None = None,
        return_stats: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        vocab_start: int = 0,
        debug: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.options: dict[str, Any] = dict(
            shift=shift, ignore_index=ignore_index, reduction=reduction, softcap=softcap, logit_scale=logit_scale,
            label_smoothing=label_smoothing, z_loss=z_loss, logits_dtype=logits_dtype, chunk_rows=chunk_rows,
            accum_dtype=accum_dtype, return_stats=return_stats, process_group=process_group, vocab_start=vocab_start,
            debug=debug, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        labels: Tensor | SupervisedRows,  # (...)
        bias: Tensor | None = None,  # (V,)
        *,
        lora: LoRA | Sequence[LoRA] | None = None,
        normalizer: float | Tensor | None = None,
        row_weight: Tensor | None = None,  # (...)
    ) -> Tensor | tuple[Tensor, RowStats]:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, lora=lora, normalizer=normalizer, row_weight=row_weight,
            class_weight=self.class_weight, **self.options,
        )  # fmt: skip


class SFRLoss(nn.Module):
    """`sfr_loss` with its configuration, its options and its velocity head, whose parameters are this module's."""

    def __init__(
        self,
        config: SFRConfig,
        head: VelocityHead | None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        chunk_rows: int | None = None,
        accum_dtype: torch.dtype | None = None,
        debug: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        if not isinstance(config, SFRConfig):
            raise TypeError(f"config must be an SFRConfig, got {type(config).__name__}")
        if (head is None) != (config.loss == "cka"):
            raise ValueError(f"loss={config.loss!r} {'has no' if head is not None else 'needs a'} velocity head")
        if head is not None:
            check_head_shape(head, config)
        self.config, self.head = config, head
        self.options: dict[str, Any] = dict(
            label_smoothing=label_smoothing, z_loss=z_loss, chunk_rows=chunk_rows, accum_dtype=accum_dtype,
            debug=debug, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (B, L, H)
        weight: Tensor,  # (V, H)
        rows: SupervisedRows,
        targets: Tensor,  # (A, d)
        times: Tensor | None = None,  # (M,)
        *,
        seed: int | Tensor,
        flow_hidden: Tensor | None = None,  # (B, L, H)
        bias: Tensor | None = None,  # (V,)
        lora: LoRA | Sequence[LoRA] | None = None,
        flow_weight: float | Tensor | None = None,
        normalizer: float | Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        label_smoothing: float | None = None,  # in place of the option
        return_stats: bool = False,
        return_norms: bool = False,
    ) -> SFROutput:
        options = self.options if label_smoothing is None else self.options | dict(label_smoothing=label_smoothing)
        return sfr_loss(
            hidden, weight, self.head, rows, targets, times, seed=seed, config=self.config, flow_hidden=flow_hidden,
            bias=bias, lora=lora, flow_weight=flow_weight, normalizer=normalizer, softcap=softcap,
            logit_scale=logit_scale, return_stats=return_stats, return_norms=return_norms, **options,
        )  # fmt: skip
