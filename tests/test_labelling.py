"""Which tokens of a chat are labelled, under templates of every kind; what is expected was written by hand."""

import json
import pickle
from itertools import groupby

import pytest
from test_data import ANSWERED, ASKED, CALL, TERSE, WEATHER
from tiny import chat, write_chats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sfr_kernels.training.data import ChatFile, read_chats, tokenize

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def tokenizer(template, *joined: str):
    """A token for every byte, and for each of the strings `joined`, whatever is around it."""
    vocab, merges = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for string in joined:
        first, *rest = BYTES.pre_tokenize_str(string)[0][0]
        for letter in rest:
            merges.append((first, letter))
            first += letter
            vocab[first] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = BYTES, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def labelled(tmp_path, made, *lines, longest=10**6):
    """The labelled texts of each line, run by run, and the report."""
    out = tokenize(read_chats(write_chats(tmp_path / "chats.jsonl", list(lines))), made, longest)
    runs = [[list(run) for kept, run in groupby(s["labels"], lambda x: x != -100) if kept] for s in out.samples]
    return [[made.decode(run) for run in sample] for sample in runs], out.report()


def turns(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SPACED = PLAIN.replace("ASSISTANT: {%", "ASSISTANT:{%")  # leaves the space to the answer
HEADED = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, joined, answer, expected",
    [
        (PLAIN, [" Hello"], "Hello you.", " Hello you."),
        (PLAIN, [" Hello"], "Hello", " Hello"),  # all of it in the token that begins in the prompt
        (PLAIN, [": Hell"], "Hello", ": Hello"),
        (PLAIN, ["u.\n"], "Hello you.", "Hello you.\n"),
        (PLAIN, ["u.\nUSER"], "Hello you.", "Hello you.\nUSER"),  # ends in the next turn
        (PLAIN, ["\n\n"], "Hello\n\n", "Hello"),
        (PLAIN, ["  "], "   x", "  x"),  # the first two spaces are one token, half of it the prompt's
        (PLAIN, [], "   x", "   x"),  # white space of the answer's own
        (SPACED, [" Hello"], "Hello", " Hello"),
        (SPACED, [": "], "Hello", "Hello"),
        (SPACED, [], "Hello", "Hello"),  # the space is the template's
        (SPACED, [], "\n Hello", "\n Hello"),
        (PLAIN, ["\u00e9l"], "\u00e9lan", "\u00e9lan"),
        # without a generation prompt
        (HEADED, [], "Hello", "Hello<|end|>"),
        (HEADED, [], "assistant", "assistant<|end|>"),
        (HEADED, [], "|>\nuser", "|>\nuser<|end|>"),
        (HEADED, ["\nH"], "Hello", "\nHello<|end|>"),
        (HEADED.replace("\n{{ m.content", ": {{ m.content | trim"), [], "  Hello ", "Hello<|end|>"),
        (INST, [], "Hello", "Hello </s>"),
        (INST, [" Hello"], "Hello", " Hello </s>"),
        (INST, [], "[/INST]", "[/INST] </s>"),
        (INST.replace("%} {{", "%}{{"), [], "Hello", "Hello </s>"),
        (PLAIN[: PLAIN.index("{% if")], [], "Hello", "Hello"),
    ],
)  # fmt: skip
def test_a_token_that_holds_some_of_the_answer_is_labelled(tmp_path, template, joined, answer, expected):
    [found], report = labelled(tmp_path, tokenizer(template, *joined), turns("Why?", answer, "So?", "Yes."))
    end = next((end for end in ("<|end|>", " </s>") if expected.endswith(end)), "")
    assert found == [expected, "Yes." + end] and report is None


@pytest.mark.parametrize(
    "template, message",
    {
        HEADED + "<|assistant|>\n": "where an answer begins cannot be told",  # always
        HEADED.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"): "where an answer begins cannot be told",
        HEADED.replace("m.content", "m.content | upper"): "where an answer begins cannot be told",
        HEADED + "{% if add_generation_prompt %}<think>{% endif %}": "generation prompt is not how its answers begin",
        HEADED + "{{ raise_exception('no system role') }}": "no system role",
    }.items(),
)
def test_templates_that_are_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=rf"chats\.jsonl:1: .*{message}"):
        labelled(tmp_path, tokenizer(template), turns("Why?", "Because."))


def test_a_prompt_to_answer_ends_where_labels_begin(tmp_path):
    """Whether or not the template has a generation prompt; of two answers, before the last."""
    from sfr_kernels.training.labelling import last_prompt

    [example] = read_chats(write_chats(tmp_path / "chats.jsonl", [turns("Why?", "So.", "So?", "Yes.")]))
    expected = {
        PLAIN: "USER: Why?\nASSISTANT: So.\nUSER: So?\nASSISTANT: ",
        HEADED: "<|user|>\nWhy?<|end|>\n<|assistant|>\nSo.<|end|>\n<|user|>\nSo?<|end|>\n<|assistant|>\n",
        INST: "[INST] Why? [/INST] So. </s>[INST] So? [/INST]",
    }
    for template, text in expected.items():
        assert last_prompt(example, tokenizer(template)) == text


def calls_and_answer(*calls, content=None, **extra):
    called = {"role": "assistant", "content": content, "tool_calls": list(calls)} | extra
    return {"messages": [TERSE, ASKED, called, *ANSWERED], "tools": [WEATHER]}


TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}"
ENDING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
TURN = "{% for m in messages %}<|{{ m.role }}|>"
CALLING = TOOLS + TURN + "{{ m.reasoning_content }}{{ m.content }}" + CALLS + "<|end|>{% endfor %}" + ENDING
CALLED = '<call>weather {"city": "Paris"}<|end|>'
# Templates that expect JSON for arguments, null for the content of a call, or both.
PRINTED = CALLING.replace("arguments | tojson", "arguments")
ADDED = CALLING.replace("arguments | tojson", "arguments + ''")
NULL = TURN + "{% if m.content is none %}" + CALLS + "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + ENDING
BOTH = NULL.replace("arguments | tojson", "arguments + ''")
# No generation prompt; and with tools before the last thing the user says.
SILENT = CALLING.removesuffix(ENDING)
LAST = "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
MOVED = LAST + TURN + "{% if m == last %}" + TOOLS + "{% endif %}{{ m.content }}" + CALLS + "<|end|>{% endfor %}"


@pytest.mark.parametrize("template", [CALLING, PRINTED, ADDED, TOOLS + NULL, TOOLS + BOTH, SILENT, MOVED])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_calls_are_labelled_in_the_form_the_template_wants(tmp_path, template, content, arguments):
    call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
    [found], report = labelled(tmp_path, tokenizer(template), calls_and_answer(call, content=content))
    assert found == [CALLED, "No.<|end|>"] and report is None


def test_text_and_reasoning_beside_a_call_and_several_calls(tmp_path):
    line = calls_and_answer(CALL, CALL, content="Let me see.", reasoning_content="Hm. ")
    [found], report = labelled(tmp_path, tokenizer(CALLING), line)
    assert found == ["Hm. Let me see." + CALLED.removesuffix("<|end|>") + CALLED, "No.<|end|>"] and report is None


def test_what_the_template_does_not_render_is_counted_and_not_labelled(tmp_path):
    """Names that occur elsewhere do not make up for it."""
    lines = [
        turns("Why?", "Because of the weather."),
        calls_and_answer(CALL),
        calls_and_answer(CALL, CALL, content="The weather?", reasoning_content="Hm."),
    ]
    made = tokenizer(PLAIN)
    found, report = labelled(tmp_path, made, *lines)
    assert found == [["Because of the weather."], ["No."], ["The weather?", "No."]]
    tail = "reasoning of 1 examples, tool calls of 2 examples, tools of 2 examples"
    assert report == f"the model's chat template does not render: {tail}"
    # INST knows neither system messages nor results of tools; the first of two calls is not both
    found, report = labelled(tmp_path, tokenizer(INST), lines[1])
    assert found == [["No. </s>"]]
    assert report.endswith("system messages of 1 examples, tool calls of 1 examples, tool messages of 1 examples, "
                           "tools of 1 examples")  # fmt: skip
    one = tokenizer(CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    found, report = labelled(tmp_path, one, lines[2])
    assert found == [["Hm. The weather?".replace(". ", ".") + CALLED, "No.<|end|>"]]
    assert report.endswith("render: tool calls of 1 examples")
    assert labelled(tmp_path, one, calls_and_answer(CALL, CALL))[0] == [[CALLED, "No.<|end|>"]]
    instead = tokenizer(CALLING.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"))
    assert labelled(tmp_path, instead, lines[2])[1].endswith("render: text beside tool calls of 1 examples")
    only = {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]}
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: the chat template renders no response"):
        labelled(tmp_path, made, only)

    # a store's corpus counts the same, shard by shard, and as often as it is copied to other processes
    corpus = ChatFile(write_chats(tmp_path / "chats.jsonl", [*lines, turns("Why? " * 50, "So.")]), made, 150, 1)
    corpus = pickle.loads(pickle.dumps(corpus))
    assert len(corpus.cu_samples) == 5 and corpus.counts.report() is None
    samples = [sample for shard in range(4) for sample in corpus.read(shard)]
    assert [any(x != -100 for x in s["labels"]) for s in samples] == [True, True, True, False]
    assert f"does not render: {tail}" in corpus.counts.report()
    assert "1 of them lost their whole response" in corpus.counts.report()


def test_an_answer_of_weight_zero_is_not_labelled(tmp_path):
    line = turns("Why?", "Because.", "So?", "Yes.")
    line["messages"][1]["weight"] = 0
    assert labelled(tmp_path, tokenizer(HEADED), line)[0] == [["Yes.<|end|>"]]
    line["messages"][3]["weight"] = 0
    with pytest.raises(ValueError, match="have weight 0"):
        labelled(tmp_path, tokenizer(HEADED), line)


def test_corpora_of_different_templates_differ(tmp_path):
    """Also where a tokenizer has several, by name."""
    path = write_chats(tmp_path / "chats.jsonl", [chat("Why?", "So.")])
    templates = [PLAIN, HEADED, {"default": PLAIN, "tool_use": CALLING}, {"default": PLAIN, "tool_use": ADDED}]
    prints = [json.dumps(ChatFile(path, tokenizer(template), 100).fingerprint) for template in templates]
    assert len(set(prints)) == 4
