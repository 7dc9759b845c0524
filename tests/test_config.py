"""`SFRConfig`: the presets have the values that were agreed on, and nothing invalid gets in."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from sfr_kernels import SFRConfig

SHARED = dict(loss="flow", segment_tokens=256, stride=32, min_tokens=16, width=1024, num_layers=3, source_std=1.0)
DEFAULT = SHARED | dict(
    target_scale=None, time_scale=1000.0, hidden_norm="rms", hidden_scale=1.0, time_sampling="stratified",
    num_times=256, target_rule="following", weighting="linear", flow_normalizer="tokens", encoder_pooling="own",
    encoder_max_tokens=None, time_power=3.0, head_steps=200, flow_weight=1.0, flow_share=None, layer_index=-1,
    flow_gate=None, head_ema=0.0,
)  # fmt: skip
OFFICIAL = SHARED | dict(
    target_scale=1.0, time_scale=1.0, hidden_norm="none", hidden_scale=1.0, time_sampling="sequence",
    target_rule="published", weighting="linear_decay", flow_normalizer="weights", encoder_pooling="mean",
    encoder_max_tokens=512, time_power=1.0, head_steps=0, flow_weight=1.0,
)  # fmt: skip


CHANGED = dict(stride=8, weighting="uniform")


@pytest.mark.parametrize("config, table", [
    (SFRConfig(), DEFAULT), (SFRConfig.official(), OFFICIAL), (SFRConfig.official(**CHANGED), OFFICIAL | CHANGED),
])  # fmt: skip
def test_presets_have_the_values_of_the_table(config, table):
    assert {name: getattr(config, name) for name in table} == table


def test_target_scale_gives_unit_variance_by_default():
    # a unit-norm vector of d coordinates has mean square 1/d
    assert SFRConfig().scale_for(384) == math.sqrt(384)
    assert SFRConfig.official().scale_for(384) == 1.0
    assert SFRConfig(target_scale=2.5).scale_for(384) == 2.5


def test_only_flow_has_a_source_that_is_not_a_point():
    dirac = {kind: SFRConfig(loss=kind, segment_tokens=0).is_dirac for kind in ("flow", "mse", "cosine", "cka", "mtp")}
    assert dirac == {"flow": False, "mse": True, "cosine": True, "cka": True, "mtp": True}


def test_json_round_trip_of_every_field():
    # every field away from its default, so that one that is dropped shows
    config = SFRConfig(
        loss="mse", flow_weight=0.25, flow_schedule="cosine", flow_warmup=0.1, width=64, num_layers=5, time_scale=10.0,
        hidden_norm="none", hidden_scale=0.5, target_scale=3.0, source_std=0.5, time_sampling="sequence", num_times=7,
        time_power=2.0, head_steps=3, layer_index=4, flow_gate=0.5, head_ema=0.9,
        segment="sentence", segment_tokens=9, stride=4, min_tokens=3, target_rule="published", weighting="uniform",
        flow_normalizer="weights", encoder_pooling="mean", encoder_max_tokens=100, mtp_tokens=4, seed=-(2**63),
    )  # fmt: skip
    assert all(getattr(config, f.name) != f.default for f in fields(config) if f.name != "flow_share")
    words = SFRConfig(flow_gate="average", flow_weight="auto")
    assert SFRConfig.from_json(words.to_json()) == words != SFRConfig(flow_weight="auto")
    share = SFRConfig(flow_weight="auto", flow_share=0.5)  # which has no meaning with a number
    assert SFRConfig.from_json(share.to_json()) == share and share.wanted_share == 0.5 != SFRConfig().wanted_share
    text = config.to_json()
    assert SFRConfig.from_json(text) == config
    assert json.loads(text) == config.to_dict() and text.endswith("\n")
    assert SFRConfig.from_json("{}") == SFRConfig()  # a missing field has its default


@pytest.mark.parametrize("text, message", {'{"sride": 4}': "sride", "[]": "list", '{"width": 0}': "width"}.items())
def test_json_is_validated_like_a_call(text, message):
    with pytest.raises(ValueError, match=message):
        SFRConfig.from_json(text)


WRONG = {
    ValueError: dict(
        flow_share=[0.0],
        loss=["l2"], flow_weight=[-0.1, math.nan],  # NaN passes every comparison that asks for too small
        flow_schedule=["step"], flow_warmup=[-0.1, 1.0], width=[0], num_layers=[1], time_scale=[0.0, math.inf],
        hidden_norm=["layer"], hidden_scale=[0.0], target_scale=[-1.0], source_std=[-1.0], time_sampling=["uniform"],
        num_times=[0], segment_tokens=[-1], stride=[0], min_tokens=[0], target_rule=["previous"],
        encoder_pooling=["cls"], encoder_max_tokens=[0], weighting=["quadratic"], flow_normalizer=["rows"],
        mtp_tokens=[0], time_power=[0.0], head_steps=[-1], flow_gate=[0.0, math.nan], head_ema=[-0.1, 1.0],
        seed=[2**63, -(2**63) - 1],
    ),
    TypeError: dict(
        width=[8.0], encoder_max_tokens=[8.0], stride=[True], seed=["0"], time_scale=["1"], flow_weight=[None, "large"],
        source_std=[True], layer_index=[0.5], flow_gate=["mean", True], head_ema=["average"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("error, field", [(error, field) for error, fields in WRONG.items() for field in fields])
def test_an_invalid_value_or_type_names_its_field(error, field):
    for value in WRONG[error][field]:
        with pytest.raises(error, match=field):
            SFRConfig(**{field: value})


@pytest.mark.parametrize("fields, words", [
    (dict(flow_weight=1.0, flow_share=0.3), "flow_share needs flow_weight='auto'"),
    (dict(loss="cka"), "segment_tokens"),  # CKA compares whole responses
    (dict(loss="mtp", target_rule="published"), "target_rule"),
    (dict(loss="cka", segment_tokens=0, head_ema=0.9), "head_ema must be 0 with loss='cka', which has no head"),
    (dict(segment="paragraph"), "segment must be one of tokens, sentence, response"),
    (dict(segment="sentence", segment_tokens=0), "segment_tokens must be at least 1 with segment='sentence'"),
])  # fmt: skip
def test_segments_and_rules_that_do_not_fit(fields, words):
    with pytest.raises(ValueError, match=words):
        SFRConfig(**fields)


def test_frozen_and_keyword_only():
    config = SFRConfig()
    with pytest.raises(FrozenInstanceError):
        config.stride = 1
    with pytest.raises(TypeError):
        SFRConfig("flow")
    assert hash(config) == hash(SFRConfig())


def test_the_whole_response_can_be_said_in_two_ways():
    whole = SFRConfig(segment="response")
    assert whole == SFRConfig(segment_tokens=0) == SFRConfig(segment="response", segment_tokens=0)
    assert (whole.segment, whole.segment_tokens) == ("response", 0)
    assert SFRConfig.from_json(whole.to_json()) == whole
