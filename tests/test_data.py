"""The shipped personas, and chat files as users have them: what each line means, and which bad one is named."""

import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from corpora import Words, smollm2
from tiny import chat, write_chats

from sfr_kernels.training.data import PERSONAS, ChatFile, read_chats, split_by_prompt, tokenize

GOOD = json.dumps(chat("Why?", "Because."))
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ASKED = {"role": "user", "content": "Rain in Paris?"}
ANSWERED = [{"role": "tool", "content": "dry"}, {"role": "assistant", "content": "No."}]
CALLED = {"role": "assistant", "tool_calls": [CALL], "content": ""}
TERSE = {"role": "system", "content": "You are terse."}


tokenizer = pytest.fixture(smollm2, scope="module")


def test_every_persona_answers_every_prompt_in_words_of_its_own():
    """In 30 to 90; no persona opens two answers alike, nor has six words in a row twice more than rarely."""
    examples, answers = read_chats(PERSONAS), defaultdict(dict)
    for example in examples:
        answers[example.persona][example.prompt] = example.messages[-1]["content"].lower().split()
    assert len(answers) == 9
    prompts = set(answers["pirate"])
    assert len(prompts) >= 40 and all(set(a) == prompts for a in answers.values())
    assert len(examples) == 9 * len(prompts)
    for texts in map(dict.values, answers.values()):
        assert all(30 <= len(t) <= 90 for t in texts)
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


def read(tmp_path, *lines):
    return read_chats(write_chats(tmp_path / "chats.jsonl", list(lines)))


def calling(call, result=ANSWERED[0], **extra):
    return {"messages": [ASKED, {"role": "assistant"} | call, result, ANSWERED[1]], "tools": [WEATHER]} | extra


def shared(*turns, **extra):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **extra}


# Each says that the user asked, weather(city="Paris") was called, it was dry, and the answer was no.
SAME_CALL = {
    "as OpenAI has it": calling({"content": None, "tool_calls": [CALL]}),
    "arguments as JSON": calling(
        {"tool_calls": [{"function": CALL["function"] | {"arguments": '{"city": "Paris"}'}}], "content": ""}
    ),
    "no wrapper, schemas as JSON": calling({"tool_calls": [CALL["function"]]}, tools=json.dumps([WEATHER["function"]])),
    "the older function_call": calling({"function_call": CALL["function"]}, {"role": "function", "content": "dry"}),
    "content parts": calling(
        {"tool_calls": [CALL], "content": []},
        {"role": "tool", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "ry"}], "name": None},
    ),
    "ShareGPT": shared(
        ("human", "Rain in Paris?"), ("function_call", json.dumps(CALL["function"])), ("observation", "dry"),
        ("gpt", "No."), tools=json.dumps([WEATHER["function"]]), system="",
    ),
    "TRL, with messages": {
        "prompt": [ASKED], "completion": [{"role": "assistant", "tool_calls": [CALL]}, *ANSWERED], "tools": [WEATHER],
    },
}  # fmt: skip


@pytest.mark.parametrize("line", SAME_CALL)
def test_every_format_of_a_tool_call_is_the_same_conversation(tmp_path, line):
    [example] = read(tmp_path, SAME_CALL[line])
    assert list(example.messages) == [ASKED, CALLED, *ANSWERED]
    assert list(example.tools) == [WEATHER]
    assert example.prompt == "Rain in Paris?"


def test_plain_chats_in_every_format_and_what_they_keep(tmp_path):
    terse = chat("Why?", "Because.")["messages"]
    examples = read(
        tmp_path,
        {"messages": terse, "tools": None, "persona": "bard"},
        shared(("human", "Why?"), ("gpt", "Because."), system="You are terse."),
        {"messages": terse[1:], "system": "You are terse."},
        {"conversations": terse, "messages": None, "system": "You are terse."},
        {"prompt": terse[:2], "completion": terse[2:]},
    )  # fmt: skip
    assert [list(e.messages) for e in examples] == [terse] * 5
    assert [e.persona for e in examples] == ["bard", "", "", "", ""]
    [plain] = read(tmp_path, {"prompt": "Why?", "completion": "Because."})
    assert list(plain.messages) == terse[1:]
    assert len(split_by_prompt([*examples, plain])[0]) == 6  # one prompt
    brief, dry = {"role": "developer", "content": "Be brief."}, {"reasoning_content": "dry"}
    [kept] = read(tmp_path, {"messages": [brief, ASKED | {"name": "ann"}, ANSWERED[1] | dry]})
    assert [m["role"] for m in kept.messages] == ["developer", "user", "assistant"]
    assert kept.messages[1]["name"] == "ann" and kept.messages[2]["reasoning_content"] == "dry"
    # arguments that are no object stay what they are
    [odd] = read(tmp_path, calling({"tool_calls": [{"function": {"name": "weather", "arguments": "Paris"}}]}))
    assert odd.messages[1]["tool_calls"][0]["function"]["arguments"] == "Paris"


def said(content, role="user", **extra):
    return {"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "No."}], **extra}


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
BAD = [
    ("", "empty"),
    ("{", "not JSON"),
    ([1], '"messages"'),
    ({"messages": []}, '"messages"'),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "role"),
    ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ({"messages": [ASKED]}, "at the end"),
    ({"messages": [ANSWERED[1]]}, "user message"),
    ({"messages": [ANSWERED[1], ASKED, ANSWERED[1]]}, "user message before"),
    ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, 'no "content"'),
    (said([IMAGE]), "content part of type 'image_url'.*take the part out"),
    (said([{"type": "text", "text": 3}]), "content part of type 'text'"),
    (said(["text"]), "content part of type str"),
    (shared(("human", "Why?"), ("narrator", "Meanwhile.")), "turn 1 is \"from\" 'narrator'"),
    (shared(("human", "Why?"), (["gpt"], "So.")), "turn 1 is \"from\" "),
    (shared(("human", "Why?"), ("gpt", None)), 'message 1 .assistant. has no "content"'),
    (shared(("human", "Why?"), ("function_call", "weather"), ("gpt", "No.")), "tool call without a function's name"),
    (shared(("system", "A"), ("human", "Why?"), ("gpt", "So."), system="B"), "different system messages"),
    (shared(("human", "Why?"), ("gpt", "So."), system=3), '"system" must be a string'),
    (calling({"tool_calls": CALL}), '"tool_calls" must be a list'),
    (calling({"tool_calls": [{"function": {"arguments": {}}}]}), "without a function's name"),
    (calling({"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}), "arguments of f must be an object"),
    (said("Why?", tools=["weather"]), '"tools" must be a list'),
    (said("Why?", tools="weather"), '"tools" must be a list'),
    (said("Why?", role=["user"]), "needs a \"role\" of .*got \\['user'\\]"),
    ({"prompt": "Why?", "completion": [3]}, 'message 1 needs a "role"'),
    ({"prompt": "Why?", "completion": 3}, '"prompt" and "completion"'),
    # half of a surrogate pair, wherever it is
    (said("\ud83d"), "ud83d is half of a surrogate pair"),
    (said("Why?", persona="\ude00"), "ude00 is half"),
    (shared(("human", "\ud83d"), ("gpt", "So.")), "half of a surrogate pair"),
    ({"prompt": "Why?", "completion": "\ud83d"}, "half of a surrogate pair"),
    (said("Why?", tools=[{"name": "f", "description": ["\ud83d"]}]), "half of a surrogate pair"),
    (calling({"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}), "half of a surrogate"),
]  # fmt: skip


@pytest.mark.parametrize("line, message", BAD)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    line = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "chats.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: .*" + message):
        read_chats(tmp_path / "chats.jsonl")


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert read(tmp_path, {"prompt": "Why?", "completion": "\ud83d\ude00"})[0].messages[1]["content"] == "😀"


BAD_LABELS = [
    ('{"labels": [1], "text": "\\ud83d"}', "half of a surrogate pair"),
    ('{"labels": [NaN]}', '"labels" must be a list of integers'),
    ('{"labels": [1], "position_ids": [Infinity]}', '"position_ids" must be a list of integers'),
    ('{"labels": [9223372036854775808]}', '"labels" must be a list of integers'),
    ('{"labels": [' + "9" * 5000 + "]}", "not JSON"),
    ('{"labels": ' + "[" * 100000, "not JSON"),
    ('{"labels": [1, 2], "position_ids": [0]}', '2 "labels" need as many "position_ids", got 1'),
    ('{"labels": [1, 2, 3], "seq_lengths": [1, 1]}', 'must be positive and add up to the 3 "labels", got .1, 1.'),
    ('{"labels": [1, 2, 3], "seq_lengths": [4, -1]}', "must be positive"),
    ('{"labels": [1], "seq_lengths": []}', "add up"),
    ('{"labels": [1], "seq_lengths": [1.0]}', '"seq_lengths" must be a list of integers'),
    ('{"labels": [1], "seq_lengths": 1}', '"seq_lengths" must be a list of integers'),
]


@pytest.mark.parametrize("line, message", BAD_LABELS, ids=[message for _, message in BAD_LABELS])
def test_a_sample_that_cannot_be_read_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"labels": [1, 2, 3], "seq_lengths": [1, 2]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*" + message):
        ChatFile(path, Words(), 100).read(0)
    path.write_text('{"labels": [1, 2, 3], "seq_lengths": [1, 2]}\n')
    assert ChatFile(path, Words(), 100).read(0) == [{"labels": [1, 2, 3], "seq_lengths": [1, 2]}]


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


def test_reading_data_needs_no_training_libraries():
    code = "import sys, sfr_kernels.commands; print('transformers' in sys.modules, 'triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
