"""`SFRConfig`: everything that decides what the SFR objective is, in one frozen, validated dataclass."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

LossKind = Literal["flow", "mse", "cosine", "cka", "mtp"]
HiddenNorm = Literal["rms", "none"]

HIDDEN_NORM_EPS = 1e-6  # added to the mean square


@dataclass(frozen=True, kw_only=True)
class SFRConfig:
    """The SFR objective L = L_CE + flow_weight · L_flow.

    `SFRConfig()` is the recommended objective; `SFRConfig.official()` reproduces the arithmetic of the published code.
    """

    # What regularises the hidden state: conditional flow matching, "mse" (its Dirac limit at t = 0), "cosine", "cka"
    # (linear CKA of response means) or "mtp" (multi-token prediction: the same limit, with tokens for targets).
    loss: LossKind = "flow"
    # λ, the weight of the regulariser. "auto": it begins at 1, and SFRCallback sets it so that at the hidden states the
    # gradient of λ L_flow has the share flow_share of L_CE's, measured at the first step and where Trainer logs.
    flow_weight: float | Literal["auto"] = 1.0
    flow_share: float | None = None  # None: 0.3; only with "auto"
    flow_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of λ after the warm-up; the others decay to 0
    flow_warmup: float = 0.0  # share of the run, in [0, 1), over which λ rises linearly from 0
    # The hidden states are detached for L_flow, and only the head learns from it, while L_flow of the last step is
    # below its running "average" / 1.5, or below a number. SFRCallback sees to it.
    flow_gate: float | Literal["average"] | None = None
    # After each optimizer step the head becomes head_ema · before + (1 − head_ema) · after; 0: it stays as it is.
    head_ema: float = 0.0
    # Which hidden state h of the model the regulariser is of, as `hidden_states` of transformers are numbered: −1: the
    # last, after the final norm, as the lm_head has it; i: what decoder layer i, from 1, gives on to the next; 0: the
    # embeddings; below −1 from the end. L_CE is of the last in any case, and trains the layers after h alone. `attach`
    # goes by it; the losses are of the hidden states that they are given.
    layer_index: int = -1

    width: int = 1024  # D, of the velocity head
    num_layers: int = 3  # of the head: an input layer, num_layers − 2 residual blocks, an output layer
    time_scale: float = 1000.0  # factor on t before the sinusoidal embedding
    # "rms": each hidden state is divided by its root mean square before the head, without parameters, so that h and x_t
    # meet the head's LayerNorm with about the same size in every model: larger, h drowns x_t, smaller, x_t drowns h.
    hidden_norm: HiddenNorm = "rms"
    hidden_scale: float = 1.0  # factor on the hidden states before the head, after their norm
    target_scale: float | None = None  # x_1 = target_scale · embedding; None: √d, unit variance per coordinate
    source_std: float = 1.0  # standard deviation of the noise x_0
    # "stratified": a table of num_times jittered, stratified times a step, of which each row draws one; "sequence": one
    # uniform time per sequence.
    time_sampling: Literal["stratified", "sequence"] = "stratified"
    num_times: int = 256  # M
    # t = u^time_power of a uniform u. Above 1 more times are early, where x_t is mostly noise and only h tells x_1.
    time_power: float = 3.0
    # Before training, steps in which the head alone is trained, on the model as it is (`training.head.fit_head`).
    head_steps: int = 200

    # How far the text of a target goes: k "tokens"; to the first end of a "sentence" at least min_tokens and at most k
    # tokens ahead; or the whole "response", one target for all its rows.
    segment: Literal["tokens", "sentence", "response"] = "tokens"
    segment_tokens: int = 256  # k; 0 means the same as segment="response"
    stride: int = 32  # tokens between anchors
    min_tokens: int = 16  # anchors with fewer tokens ahead are dropped; with "following" not row 0 of a response
    # Which positions carry the flow loss, and their targets. "following": those that predict a supervised label; the
    # first anchor at or after the row. "published": those whose own label is supervised; the nearest anchor of the
    # sequence, before or after the row, and where there is none a zero target.
    target_rule: Literal["following", "published"] = "following"
    # Of rows: "linear" and "uniform" have mean one over a response; "linear_decay" is (m − i)/m, i from 0.
    weighting: Literal["linear", "uniform", "linear_decay"] = "linear"
    # L_flow is divided by the supervised "tokens" of the optimizer step, or by the sum of the "weights" of this call,
    # never less than 1; with loss="cka", which has no weights, "weights" means no division.
    flow_normalizer: Literal["tokens", "weights"] = "tokens"
    encoder_pooling: Literal["own", "mean"] = "own"  # "mean": of the encoder's last hidden states, with no prompt
    encoder_max_tokens: int | None = None  # tokens of a text that the encoder reads; None: its own limit
    mtp_tokens: int = 1  # how many tokens beyond the next "mtp" predicts, those 2, …, mtp_tokens + 1 positions ahead
    seed: int = 0  # of noise and times

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if value in (words := [word for kind in kinds for word in get_args(kind)]):  # in place of a number
                continue
            if isinstance(kinds[0], str):
                if value not in kinds:
                    raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {value!r}")
            elif value is not None or type(None) not in kinds:
                wanted, what = (int | float, "a number") if float in kinds else (int, "an int")
                if isinstance(value, bool) or not isinstance(value, wanted):
                    raise TypeError(f"{name} must be {' or '.join([what, *map(repr, words)])}, got {value!r}")
                if float in kinds and not math.isfinite(value):
                    raise ValueError(f"{name} must be finite, got {value!r}")
        ones = ("width", "num_times", "stride", "min_tokens", "encoder_max_tokens", "mtp_tokens")
        zeros = ("segment_tokens", "flow_weight", "source_std", "flow_warmup", "head_ema", "head_steps")
        for name, least in dict(num_layers=2, **dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)).items():
            if isinstance(value := getattr(self, name), int | float) and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.flow_weight == "auto" and self.layer_index != -1:
            raise ValueError(
                "flow_weight='auto' compares gradients at the last hidden state, which is not that of "
                f"layer_index={self.layer_index}: give flow_weight a number"
            )
        if self.flow_share is not None and self.flow_weight != "auto":
            raise ValueError(f"flow_share needs flow_weight='auto', got flow_weight={self.flow_weight}")
        if self.flow_warmup >= 1:
            raise ValueError(f"flow_warmup is a share of the run and must be below 1, got {self.flow_warmup}")
        if self.head_ema >= 1:
            raise ValueError(f"head_ema must be below 1, at which the head stays as it is, got {self.head_ema}")
        if self.head_ema and self.loss == "cka":
            raise ValueError("head_ema must be 0 with loss='cka', which has no head")
        for name in ("time_scale", "hidden_scale", "target_scale", "time_power", "flow_share", "flow_gate"):
            if isinstance(value := getattr(self, name), int | float) and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if self.segment == "sentence" and self.segment_tokens == 0:
            raise ValueError("segment_tokens must be at least 1 with segment='sentence', got 0")
        if self.segment == "response" or self.segment_tokens == 0:  # the same rule, so that configs compare equal
            object.__setattr__(self, "segment", "response")
            object.__setattr__(self, "segment_tokens", 0)
        if self.loss == "cka" and self.segment_tokens != 0:
            raise ValueError(f"segment_tokens must be 0 with loss='cka', got {self.segment_tokens}")
        if self.loss == "mtp" and self.target_rule != "following":
            raise ValueError(f"target_rule must be 'following' with loss='mtp', got {self.target_rule!r}")

    @classmethod
    def official(cls, **overrides: Any) -> "SFRConfig":
        """The arithmetic of the published code."""
        published: dict[str, Any] = dict(
            target_scale=1.0, time_scale=1.0, hidden_norm="none", hidden_scale=1.0, time_sampling="sequence",
            target_rule="published", weighting="linear_decay", flow_normalizer="weights", encoder_pooling="mean",
            encoder_max_tokens=512, time_power=1.0, head_steps=0,
        )  # fmt: skip
        return cls(**published | overrides)

    @property
    def first_weight(self) -> float:
        """λ where nothing has set it yet."""
        return 1.0 if self.flow_weight == "auto" else float(self.flow_weight)

    @property
    def wanted_share(self) -> float:
        """What "auto" aims at."""
        return 0.3 if self.flow_share is None else float(self.flow_share)

    def scale_for(self, target_size: int) -> float:
        """x_1 = scale_for(d) · embedding, for embeddings of d = `target_size` coordinates."""
        return math.sqrt(target_size) if self.target_scale is None else float(self.target_scale)

    @property
    def is_dirac(self) -> bool:
        """Whether the source is a point and t = 0, so that the head sees (0, 0, h)."""
        return self.loss != "flow"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SFRConfig":
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"SFRConfig has no field {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "SFRConfig":
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"SFRConfig needs a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


@dataclass(frozen=True)
class HeadShape:
    """A velocity head's sizes, scales and norm of h."""

    hidden_size: int
    target_size: int  # of x_t, and of the embedding of t
    width: int
    num_blocks: int
    time_scale: float
    hidden_scale: float
    output_size: int  # target_size for a velocity; for "mtp" mtp_tokens hidden states side by side
    hidden_norm: HiddenNorm
