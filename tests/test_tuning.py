"""The fine-tuning of benchmarks/collapse, on a model of three layers, of which the last two have adapters."""

import json

import pytest
import torch
from corpora import HashEncoder, smollm2
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import chat, tiny_llama, write_chats

from benchmarks.collapse import personas, tuning
from benchmarks.collapse.arms import CE, SHARE
from sfr_kernels.evaluation.generate import Sampling
from sfr_kernels.training.data import read_chats

ARMS = CE.name, SHARE, "MTP", "mse"


@pytest.fixture
def data(tmp_path, monkeypatch):
    tokenizer = smollm2()
    model = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=3, max_position_embeddings=512)
    styles = {"You are terse.": "Yes, {}.", "You are a poet.": "O {}, how you shine upon us all, and all who come!"}
    lines = [chat(f"What of {i}?", text.format(i), system) for i in range(12) for system, text in styles.items()]
    file = write_chats(tmp_path / "chats.jsonl", lines)
    monkeypatch.setattr(tuning, "load_model", lambda *_: (model, tokenizer))
    monkeypatch.setattr(tuning, "load_encoder", lambda *_: HashEncoder(384))
    for name, value in dict(CUT=1, STEPS=4, WARMUP=1, HEAD_STEPS=2).items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(personas.Personas, "read", lambda self: read_chats(file))
    monkeypatch.setattr(personas.Personas, "counts", (2, 2))
    monkeypatch.setattr(personas.Personas, "sampling", Sampling(samples=2, max_new_tokens=4))
    monkeypatch.setattr(personas, "HEAD_STEPS", 2)
    personas.data_of.cache_clear()
    yield personas.data_of("personas", tmp_path)
    personas.data_of.cache_clear()


@torch.no_grad()
def test_layers_that_are_kept_change_no_hidden_state_and_no_cross_entropy(data):
    adapted = data.adapted(0)
    for name, p in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    total = count = 0
    for i in data.choosing:
        ids, labels = (torch.tensor([data.samples[i][name]]) for name in ("input_ids", "labels"))
        out = adapted.model(ids, labels=labels, output_hidden_states=True)
        found = adapted.hidden([data.choosing[0], i])[1, : ids.shape[1]]
        assert torch.allclose(found, out.hidden_states[-1][0], atol=1e-5)
        total, count = total + out.loss * (labels != -100).sum(), count + (labels != -100).sum()
    assert adapted.cross_entropy(data.choosing) == pytest.approx((total / count).item(), rel=1e-5)
    assert torch.allclose(data.upper[0], data.model.model(ids.new_tensor([data.samples[0]["input_ids"]]))[0], atol=1e-5)


def test_no_prompt_is_in_two_parts_of_the_data(data):
    of = [{data.examples[i].prompt for i in part} for part in (data.train, data.asked, data.choosing)]
    assert len(set.union(*of)) == sum(map(len, of)) and [len(x) for x in of[1:]] == [2, 2]


def test_every_arm_answers_with_what_it_learnt_at_its_better_rate(data, tmp_path, monkeypatch):
    done = {}

    def run(path, folder, jobs, work, workers):
        for job in jobs:
            key = json.dumps(job)
            done[key] = done.get(key) or job | work(folder, job)
        return [done[json.dumps(job)] for job in jobs]

    monkeypatch.setattr(personas, "run", run)
    personas.experiment(tmp_path / "results.jsonl", tmp_path, ARMS, 2, 1)
    trained = [x for x in done.values() if x["kind"] == "training"]
    answers = [x for x in done.values() if x["kind"] == "answers"]
    assert len(trained) == len(ARMS) * (len(personas.RATES) + 1) and len(answers) == 1 + 2 * len(ARMS)
    for arm in ARMS:
        ends = {x["rate"]: x["history"][-1]["choosing"] for x in trained if x["arm"] == arm and x["seed"] == 0}
        assert {x["rate"] for x in answers if x["arm"] == arm} == {min(ends, key=ends.get)}
        assert all(len(values) == 2 for x in answers for values in x["values"].values())  # a value for each prompt
    job = {key: value for key, value in answers[-1].items() if key != "values"}
    for path in (tmp_path / "personas/adapters").glob("*.safetensors"):
        path.unlink()
    assert job | personas.answered(tmp_path, job) == answers[-1]  # it is trained again


def test_answers_are_of_the_adapters_that_were_kept(data, tmp_path):
    job = dict(data="personas", kind="answers", arm=CE.name, rate=0.1, seed=0)
    path = personas._adapters(tmp_path, job)
    path.parent.mkdir(parents=True)
    adapters = get_peft_model_state_dict(data.adapted(0).model)  # whose B is zero

    def texts(**changes) -> list[str]:
        personas.answered(tmp_path, job | changes)
        kept = personas._adapters(tmp_path, job | changes).with_suffix(".jsonl")
        _, *lines = kept.read_text().split("\n")  # the first identifies the run
        kept.unlink()
        return lines

    before = texts(rate=None)
    save_file(adapters, path)
    assert texts() == before
    save_file({name: torch.randn_like(x) for name, x in adapters.items()}, path)
    assert texts() != before
