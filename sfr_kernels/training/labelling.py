"""Chats as tokens, with labels on what the assistant says and nothing else.

Turns are found in the text that the chat template renders. Where a template's answers begin, and what it leaves out, is
found by rendering the messages with a mark, a string that occurs nowhere else, in place of the part in question.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from ..rows import IGNORE_INDEX
from .formats import Example, at_line

_CALLS = "tool calls"
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Tokenized:
    """Samples for a collator, and counts of what is missing from them."""

    samples: list[dict]  # input_ids, labels, sample_id
    truncated: int = 0  # samples that were cut to fit the context
    tokens_cut: int = 0
    left_out: int = 0  # samples whose whole response was beyond the context
    unrendered: Counter[str] = field(default_factory=Counter)  # samples, by what the chat template drops of them

    def count(self, other: "Tokenized") -> None:
        """Adds the counts of `other`, not its samples."""
        self.truncated += other.truncated
        self.tokens_cut += other.tokens_cut
        self.left_out += other.left_out
        self.unrendered += other.unrendered

    def report(self) -> str | None:
        lines = []
        if self.truncated:
            cut = f"{self.truncated} examples were longer than the context and lost {self.tokens_cut} tokens at the end"
            left_out = f"; {self.left_out} of them lost their whole response and are left out" if self.left_out else ""
            lines.append(cut + left_out)
        if self.unrendered:
            dropped = ", ".join(f"{what} of {n} examples" for what, n in sorted(self.unrendered.items()))
            lines.append(f"the model's chat template does not render: {dropped}")
        return "\n".join(lines) or None


def label_chats(examples: Sequence[Example], tokenizer, max_length: int) -> Tokenized:
    """Token ids and labels of each conversation under the tokenizer's chat template.

    Labelled is every token with some text of an assistant turn, and the turn's end mark; not a turn with "weight": 0,
    or of tool calls alone that the template does not render. ValueError naming the line for a response without tokens,
    and for a template whose turns cannot be found: that renders a turn differently once more turns follow, or does not
    show where an answer begins.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one: labels need the place of each token in the text")
    if not tokenizer.chat_template:
        raise ValueError("tokenizer has no chat template: use the instruct version of the model, or set one")
    out, special = Tokenized([]), set(tokenizer.all_special_ids)
    for index, example in enumerate(examples):
        with at_line(example.where):
            messages, dropped = _best_form(example, tokenizer)
            ids, labels = _label(example, messages, dropped, tokenizer, special)
        out.unrendered.update({what for what, _ in dropped})
        if len(ids) > max_length:
            out.truncated += 1
            out.tokens_cut += len(ids) - max_length
            ids, labels = ids[:max_length], labels[:max_length]
            if all(label == IGNORE_INDEX for label in labels[1:]):
                out.left_out += 1
                continue
        out.samples.append({"input_ids": ids, "labels": labels, "sample_id": index})
    return out


def last_prompt(example: Example, tokenizer) -> str:
    """The text up to where the last answer begins: what a model is given to answer."""
    with at_line(example.where):
        messages, _ = _best_form(example, tokenizer)
        return _up_to_answer(example, messages, len(messages) - 1, tokenizer)


def _label(example: Example, messages: list[dict], dropped, tokenizer, special: set[int]) -> tuple[list, list]:
    text = _render(example, messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORE_INDEX] * len(ids)
    unrendered_calls = Counter(turn for what, turn in dropped if what == _CALLS)
    for turn, message in enumerate(messages):
        content = message["content"] or ""
        empty = not content.strip() and unrendered_calls[turn] == len(message.get("tool_calls", ()))
        if message["role"] != "assistant" or message.get("weight") == 0 or empty:
            continue
        through = _render(example, messages[: turn + 1], tokenizer)
        if not text.startswith(through.rstrip()):
            raise ValueError("the chat template renders a turn differently once more turns follow")
        begin = len(_up_to_answer(example, messages, turn, tokenizer))
        start, stop = _own_start(through, begin, content), len(through.rstrip())
        inside = [
            i
            for i, (a, b) in enumerate(offsets)
            if a < stop and b > max(a, start) and (a >= start or text[start : min(b, stop)].strip())
        ]
        if all(ids[i] in special for i in inside):
            raise ValueError(f"the response of message {turn} has no tokens")
        for i in inside:
            labels[i] = ids[i]
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError("the chat template renders no response of it, or all have weight 0")
    return ids, labels


def _own_start(through: str, begin: int, content: str) -> int:
    """Where the text of an answer starts: after the template's white space, before the content's own."""
    own, start = content[: -len(content.lstrip()) or None], len(through) - len(through[begin:].lstrip())
    return start - len(own) if through[begin:start].endswith(own) else start


def _up_to_answer(example: Example, messages: list[dict], turn: int, tokenizer) -> str:
    """The text before the answer of a turn: up to the generation prompt's end, if the template has one."""
    through = _render(example, messages[: turn + 1], tokenizer)
    before = _render(example, messages[:turn], tokenizer, add_generation_prompt=True)
    if before != _render(example, messages[:turn], tokenizer):
        if not through.startswith(before):
            raise ValueError("the chat template's generation prompt is not how its answers begin")
        return before
    mark = _mark(through)
    answer = {k: messages[turn][k] for k in ("role", "name") if k in messages[turn]} | {"content": mark}
    answered = [*messages[:turn], answer]
    head, found, tail = _render(example, answered, tokenizer).partition(mark)
    followed = _render(example, [*answered, {"role": "user", "content": "And?"}], tokenizer).partition(mark)
    # Some templates always end in the header of an answer, so that one follows this answer, too; not if more turns
    # follow, but then the text before the answer may differ: some put tools before the user's last message.
    if found and followed[1] and mark not in tail and followed[2].startswith(tail.rstrip()):
        for start in (head.rstrip(" "), head.rstrip()):
            if through.startswith(start):
                return start
    raise ValueError(
        "where an answer begins cannot be told: the chat template ignores add_generation_prompt, and "
        "its text is not what comes before an answer, the answer, and what comes after: give it a generation prompt"
    )


def _best_form(example: Example, tokenizer) -> tuple[list[dict], list[tuple[str, int]]]:
    """The messages in the form of which the template drops least, the first such; and what it drops."""
    best = first_error = None
    for messages in _forms(example):
        try:
            dropped = _dropped(example, messages, tokenizer)
        except ValueError as error:
            first_error = first_error or error
            continue
        if best is None or len(dropped) < len(best[1]):
            best = messages, dropped
        if not dropped:
            break
    if best is None:
        raise first_error
    return best


def _forms(example: Example) -> Iterator[list[dict]]:
    """The messages in the forms that templates differ on: arguments of a call as an object or as JSON, missing content
    as "" or null. Null comes last, since some print it."""
    yield list(example.messages)
    if not any("tool_calls" in m for m in example.messages):
        return
    for blank, as_text in (("", True), (None, False), (None, True)):
        messages = []
        for message in example.messages:
            if calls := message.get("tool_calls"):
                if as_text:
                    calls = [_with_function(c, arguments=_as_text(c["function"]["arguments"])) for c in calls]
                message = message | {"tool_calls": calls, "content": message["content"] or blank}
            messages.append(message)
        yield messages


def _as_text(arguments: dict | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_function(call: dict, **changed) -> dict:
    return call | {"function": call["function"] | changed}


def _dropped(example: Example, messages: list[dict], tokenizer) -> list[tuple[str, int]]:
    """What of the messages is missing from their rendered text, each with its turn; -1 for tools."""
    text = _render(example, messages, tokenizer)
    mark, marks = _mark(text), {}

    def marked(what: str, turn: int) -> str:
        name = f"{mark}{len(marks)}x"
        marks[name] = what, turn
        return name

    found, probe = [], []
    for turn, message in enumerate(messages):
        shown = dict(message)
        if message["role"] not in ("user", "assistant"):
            shown["content"] = marked(f"{message['role']} messages", turn)
        for key in _REASONING:
            if isinstance(message.get(key), str) and message[key].strip():
                shown[key] = marked("reasoning", turn)
        if calls := message.get("tool_calls"):
            shown["tool_calls"] = [_with_function(c, name=marked(_CALLS, turn)) for c in calls]
            if (message["content"] or "").strip():
                shown["content"] = marked("text beside tool calls", turn)
            arguments = [c["function"]["arguments"] for c in calls]
            # The template has printed a Python dict: it expects JSON.
            printed = [a for a in arguments if a and isinstance(a, dict) and str(a) in text]
            found += [("arguments of tool calls", turn)] * len(printed)
        probe.append(shown)
    tools = [_with_function(tool, name=marked("tools", -1)) for tool in example.tools]
    rendered = _render(example, probe, tokenizer, tools=tools) if marks else ""
    return found + [what for name, what in marks.items() if name not in rendered]


def _mark(text: str) -> str:
    """A word that is not in the text, which would have to contain its own hash."""
    return f"m{hashlib.sha256(text.encode()).hexdigest()}"


def _render(example: Example, messages: Sequence[dict], tokenizer, **options) -> str:
    options = {"tools": example.tools} | options
    options["tools"] = list(options["tools"]) or None
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"the model's chat template refuses the messages: {error}") from error
