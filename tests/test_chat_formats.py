"""The formats of chat files: what each line means, and that a bad one is named by file and line."""

import json

import pytest
from corpora import Words
from tiny import chat, write_chats

from sfr_kernels.training.data import ChatFile, read_chats, split_by_prompt

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ASKED = {"role": "user", "content": "Rain in Paris?"}
ANSWERED = [{"role": "tool", "content": "dry"}, {"role": "assistant", "content": "No."}]
CALLED = {"role": "assistant", "tool_calls": [CALL], "content": ""}
TERSE = {"role": "system", "content": "You are terse."}


def read(tmp_path, *lines):
    return read_chats(write_chats(tmp_path / "chats.jsonl", list(lines)))


def calling(call, result=ANSWERED[0], **extra):
    return {"messages": [ASKED, {"role": "assistant"} | call, result, ANSWERED[1]], "tools": [WEATHER]} | extra


# Each says that the user asked, weather(city="Paris") was called, it was dry, and the answer was no.
SAME_CALL = {
    "as OpenAI has it": calling({"content": None, "tool_calls": [CALL]}),
    "arguments as JSON": calling(
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}], "content": ""}
    ),
    "no wrapper, schemas as JSON": calling({"tool_calls": [CALL["function"]]}, tools=json.dumps([WEATHER["function"]])),
    "the older function_call": calling({"function_call": CALL["function"]}, {"role": "function", "content": "dry"}),
    "content parts": calling(
        {"tool_calls": [CALL], "content": []},
        {"role": "tool", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "ry"}], "name": None},
    ),
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Rain in Paris?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([WEATHER["function"]]),
        "system": "",
    },
    "TRL, with messages": {
        "prompt": [ASKED],
        "completion": [{"role": "assistant", "tool_calls": [CALL]}, *ANSWERED],
        "tools": [WEATHER],
    },
}


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
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
         "system": "You are terse."},
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


def shared(*turns, **extra):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **extra}


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
BAD = [
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
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: .*" + message):
        read(tmp_path, chat("Why?", "Because."), line)
    # a whole pair is a character
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
