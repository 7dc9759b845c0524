"""`SFRConfig`: everything that decides what the SFR objective is, in one frozen, validated dataclass."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

LossKind = Literal["flow", "mse", "cosine", "cka", "mtp"]


@dataclass(frozen=True, kw_only=True)
class SFRConfig:
    """The SFR objective L = L_CE + flow_weight · L_flow.

    `SFRConfig()` is the recommended objective; `SFRConfig.official()` reproduces the arithmetic of the published code.

    loss             what regularises the hidden state: "flow" (conditional flow matching), "mse" (its Dirac limit at
                     t = 0), "cosine", "cka" (linear CKA of response means), "mtp" (multi-token prediction).
    flow_weight      λ, the weight of the regulariser.
    flow_schedule    how a training run moves λ after the warm-up: "constant", "linear" or "cosine" decay to zero.
    flow_warmup      share of the run, in [0, 1), over which λ rises linearly from zero.
    width            D, the width of the velocity head.
    num_layers       layers of the velocity head: an input layer, num_layers − 2 residual blocks, an output layer.
    time_scale       factor on t before the sinusoidal embedding.
    hidden_scale     factor on the hidden states before the head. Unscaled, their common offset and their few large
                     coordinates (measured on SmolLM2-135M) drown x_t in the head's LayerNorm.
    target_scale     x_1 = target_scale · embedding; None means √d, unit variance per coordinate.
    source_std       standard deviation of the noise x_0.
    time_sampling    "stratified": a table of `num_times` jittered, stratified times a step, each row draws one;
                     "sequence": one uniform time per sequence.
    num_times        M, the size of that table.
    segment          how far the text of a target goes: "tokens", k of them; "sentence", to the first end of a sentence
                     at least `min_tokens` and at most k tokens ahead; "response", all of it, one target for every row.
    segment_tokens   k, tokens of future text in a target; 0 means the same as segment="response".
    stride           tokens between anchors.
    min_tokens       shortest future text that gets a target.
    target_rule      which positions carry the flow loss, and which text each is to foresee. "following": those that
                     predict a supervised label; the first anchor at or after the row. "published": those whose own
                     label is supervised; the nearest anchor of the sequence, before the row or after it, and where
                     there is none a zero target (DESIGN section 1, Presets).
    weighting        row weights: "linear" and "uniform" have mean one over a response; "linear_decay" is
                     (m − i + 1)/m.
    flow_normalizer  L_flow is divided by the supervised "tokens" of the optimizer step, or by the sum of the
                     "weights" of this call (never less than 1); with "cka", which has no weights, by nothing.
    encoder_pooling  of the sentence encoder: its "own", or the "mean" of its last hidden states, with no prompt.
    encoder_max_tokens
                     tokens of a text that the encoder reads; None: as many as its own configuration says.
    mtp_offset       j ≥ 2: "mtp" predicts the token j positions ahead.
    seed             the seed of noise and times.
    """

    loss: LossKind = "flow"
    flow_weight: float = 1.0
    flow_schedule: Literal["constant", "linear", "cosine"] = "constant"
    flow_warmup: float = 0.0
    width: int = 1024
    num_layers: int = 3
    time_scale: float = 1000.0
    hidden_scale: float = 0.0625
    target_scale: float | None = None
    source_std: float = 1.0
    time_sampling: Literal["stratified", "sequence"] = "stratified"
    num_times: int = 256
    segment: Literal["tokens", "sentence", "response"] = "tokens"
    segment_tokens: int = 256
    stride: int = 32
    min_tokens: int = 16
    target_rule: Literal["following", "published"] = "following"
    weighting: Literal["linear", "uniform", "linear_decay"] = "linear"
    flow_normalizer: Literal["tokens", "weights"] = "tokens"
    encoder_pooling: Literal["own", "mean"] = "own"
    encoder_max_tokens: int | None = None
    mtp_offset: int = 2
    seed: int = 0

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            value = getattr(self, name)
            if choices := [c for c in get_args(hint) if isinstance(c, str)]:
                if value not in choices:
                    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            elif value is None and type(None) in get_args(hint):
                continue
            elif int in (hint, *get_args(hint)) and float not in get_args(hint):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{name} must be an int, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            elif not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        for name, least in dict(
            width=1,
            num_layers=2,
            num_times=1,
            segment_tokens=0,
            stride=1,
            min_tokens=1,
            encoder_max_tokens=1,
            mtp_offset=2,
            flow_weight=0,
            source_std=0,
            flow_warmup=0,
        ).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.flow_warmup >= 1:
            raise ValueError(f"flow_warmup is a share of the run and must be below 1, got {self.flow_warmup}")
        for name in ("time_scale", "hidden_scale", "target_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if self.segment == "sentence" and self.segment_tokens == 0:
            raise ValueError("segment_tokens must be at least 1 with segment='sentence', got 0")
        if self.segment == "response" or self.segment_tokens == 0:  # two ways to say it, one value
            object.__setattr__(self, "segment", "response")
            object.__setattr__(self, "segment_tokens", 0)
        if self.loss == "cka" and self.segment_tokens != 0:
            raise ValueError(
                f"segment_tokens must be 0 with loss='cka', which compares responses, got {self.segment_tokens}"
            )
        if self.loss == "mtp" and self.target_rule != "following":
            raise ValueError(
                "loss='mtp' predicts labels further ahead of the next one: target_rule must be 'following'"
            )

    @classmethod
    def official(cls, **overrides: Any) -> "SFRConfig":
        """The arithmetic of the published code (DESIGN section 1, Presets)."""
        published: dict[str, Any] = dict(
            target_scale=1.0,
            time_scale=1.0,
            hidden_scale=1.0,
            time_sampling="sequence",
            target_rule="published",
            weighting="linear_decay",
            flow_normalizer="weights",
            encoder_pooling="mean",
            encoder_max_tokens=512,
        )
        return cls(**published | overrides)

    def scale_for(self, target_size: int) -> float:
        """The factor from an embedding of `target_size` coordinates to x_1."""
        return math.sqrt(target_size) if self.target_scale is None else float(self.target_scale)

    @property
    def is_dirac(self) -> bool:
        """True where the source is a point and t is 0, so that the head sees (0, 0, h)."""
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
    """A velocity head's sizes and scales."""

    hidden_size: int
    target_size: int
    width: int
    num_blocks: int
    time_scale: float
    hidden_scale: float
