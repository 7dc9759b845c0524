"""Weights that accelerate keeps elsewhere or moves: an attached model's loss is the plain model's own all the same."""

import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from corpora import TARGET, HashEncoder, Words
from outcomes import assert_same, gradients
from safetensors.torch import load_file
from test_adapters import assert_near, assert_same_gradients, own_loss, plain_gradients, tiny_llama, with_head
from tiny import BATCH, CONFIG, PLAIN, SAMPLES, pad

from sfr_kernels import detach
from sfr_kernels.ops import SFROutput
from sfr_kernels.targets import OnlineTargets, SFRCollator

setting = pytest.mark.setting
PARTS = "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head", "sfr"


def dispatched(model, folder=None, offloaded=()):
    places = {part: "disk" if part in offloaded else "cpu" for part in PARTS if part != "sfr" or hasattr(model, "sfr")}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@setting("accelerate", "dispatch_model")
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_model_under_hooks_trains_as_the_plain_one(when):
    plain = tiny_llama()
    model, head = with_head(dispatched(tiny_llama()) if when == "before attach" else tiny_llama())
    if when == "after attach":
        dispatched(model)
    assert hasattr(model.lm_head, "_hf_hook")
    assert_same_gradients(model, model(**BATCH).loss, plain, own_loss(plain, head))
    assert_near(gradients(model.sfr.head), gradients(head))


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "dispatch_model": lambda model, folder: dispatched(model, folder, ("model.layers.0", "lm_head")),
}
BEFORE = [(way, "before attach") for way in WAYS]
WHOLE = dict(preload_module_classes=["Attachment"])  # the head
WAYS_WHOLE = {"cpu_offload, head whole": lambda model, _: cpu_offload(model, torch.device("cpu"), **WHOLE)}


@setting("accelerate", "offloaded weights, evaluation")
@pytest.mark.parametrize(
    ("way", "when"), [*BEFORE, ("dispatch_model", "after attach"), ("cpu_offload, head whole", "after attach")]
)
def test_offloaded_weights_are_evaluated_as_kept_ones(way, when, tmp_path):
    plain, model = tiny_llama(), tiny_llama()
    if when == "before attach":
        WAYS[way](model, tmp_path)
    model, head = with_head(model)
    if when == "after attach":
        (WAYS | WAYS_WHOLE)[way](model, tmp_path)
    assert model.lm_head.weight.is_meta and model.model.layers[0].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).loss, own_loss(plain, head), rtol=1e-5, atol=0)
        detach(model)
        torch.testing.assert_close(model(**PLAIN).loss, plain(**PLAIN).loss, rtol=1e-5, atol=0)


@setting("accelerate", "offloaded weights, save_pretrained")
def test_a_model_with_offloaded_weights_is_saved(tmp_path):
    """The smallest trained weight, by which a head is known to be of the model, among them."""
    kept, _ = with_head(tiny_llama())
    kept.save_pretrained(tmp_path / "kept")
    model, _ = with_head(tiny_llama())
    dispatched(model, tmp_path / "disk", ("model.layers.0", "model.layers.1", "model.norm"))
    assert model.model.norm.weight.is_meta
    model.save_pretrained(tmp_path / "saved")
    for name in ("model.safetensors", "sfr_head.safetensors"):
        assert_same(load_file(tmp_path / "saved" / name), load_file(tmp_path / "kept" / name))
    pairs = [json.loads((tmp_path / name / "sfr_config.json").read_text())["paired"] for name in ("kept", "saved")]
    assert pairs[0] == pairs[1]


@setting("accelerate", "offloading the velocity head", outcome="refused")
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_a_velocity_head_that_is_offloaded_is_refused(way, tmp_path):
    """Its weights are read together, and not in a call of each layer."""
    model, _ = with_head(tiny_llama())
    WAYS[way](model, tmp_path)
    with pytest.raises(ValueError, match=r"head is on meta, hidden on cpu.*offloaded its weights, .* before attach"):
        model(**BATCH)


def with_lm_head_on(device: str, when: str):
    """As dispatch_model leaves a model for a map of devices; its decoder and the batch are on the CPU."""
    model = tiny_llama()
    if when == "after attach":
        model, head = with_head(model)
        model.sfr.to(device)
    add_hook_to_module(model.lm_head.to(device), AlignDevicesHook(torch.device(device)))
    return (model, head) if when == "after attach" else with_head(model)


@setting("accelerate", "lm_head on another device than the batch")
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_all_that_the_loss_needs_goes_where_the_lm_head_is(when):
    """To a device without numbers, so that no second one is needed."""
    model, _ = with_lm_head_on("meta", when)
    devices = []

    def loss(hidden, weight, rows, targets, times, **others):
        parameters = model.sfr.head.parameters()
        devices.append({x.device.type for x in (hidden, weight, rows, rows.labels, targets, times, *parameters)})
        return SFROutput(*hidden.new_zeros(3))

    model.sfr.forward = loss
    assert model(**BATCH, times=torch.ones(3)).loss.device.type == "meta"
    texts = OnlineTargets(HashEncoder(TARGET), Words())
    model.sfr.store = texts
    model(**SFRCollator(CONFIG, texts, pad)(SAMPLES), times=torch.ones(3))
    assert devices == [{"meta"}] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_model_on_two_devices_trains_as_on_one(when):
    plain, (model, head) = tiny_llama(), with_lm_head_on("cuda:0", when)
    loss, wanted = model(**BATCH).loss, own_loss(plain, head.cpu())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    wanted.backward()
    for found, exact in ((model, plain), (model.sfr.head, head)):
        assert_near({name: grad.cpu() for name, grad in plain_gradients(found).items()}, gradients(exact), rtol=1e-3)
