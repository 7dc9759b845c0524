"""Chat data: JSON lines of messages, tokenized so that only the assistant's words are supervised."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError

from ..rows import IGNORE_INDEX

PERSONAS = Path(__file__).parent.parent / "data" / "personas.jsonl"


@dataclass(frozen=True)
class Example:
    """One conversation of a data file."""

    messages: tuple[dict[str, str], ...]
    persona: str  # "" where the file gives none
    where: str  # file:line

    @property
    def prompt(self) -> str:
        """The first thing the user says: conversations with the same prompt stay on one side of the split."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


@dataclass
class Tokenized:
    """Samples ready for a collator, and what had to be cut to fit the context."""

    samples: list[dict]  # input_ids, labels, sample_id
    truncated: int = 0  # samples that were cut
    tokens_cut: int = 0
    left_out: int = 0  # samples whose whole response was beyond the context

    def report(self) -> str | None:
        if not self.truncated:
            return None
        text = f"{self.truncated} examples were longer than the context and lost {self.tokens_cut} tokens at the end"
        return text + (f"; {self.left_out} of them lost their whole response and are left out" if self.left_out else "")


def read_chats(path: str | os.PathLike) -> list[Example]:
    """The conversations of a JSON-lines file: {"messages": [{"role": …, "content": …}, …], "persona": optional}.

    ValueError naming file and line for anything that is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            examples.append(parse_chat(read_line(line, where), where))
    if not examples:
        raise ValueError(f"{path}: the file is empty")
    return examples


def read_line(line: bytes, where: str) -> dict:
    """The JSON object of a line. ValueError naming it where there is none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{where}: the line is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def parse_chat(value: dict, where: str) -> Example:
    """The conversation in a line's value. ValueError naming the line for anything that is not one."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: needs "messages", a list of {{"role", "content"}}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f'{where}: message {i} needs a "role" of system, user or assistant')
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f'{where}: message {i} ({message["role"]}) has no "content"')
    roles = [m["role"] for m in messages]
    if roles[-1] != "assistant" or "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f"{where}: needs a user message before the first assistant message, and the last at the end")
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return Example(kept, str(value.get("persona") or ""), where)


def split_by_prompt(examples: Sequence[Example], share: float = 0.125) -> tuple[list[int], list[int]]:
    """Indices of training and held-out examples.

    A prompt is held out if its SHA-256, read as a number in [0, 1), is below `share`: a property of the prompt alone,
    so adding data moves nothing. If no prompt is, and there are two or more, the lowest one is.
    """
    value = {e.prompt: int(hashlib.sha256(e.prompt.encode()).hexdigest()[:8], 16) / 2**32 for e in examples}
    held = {prompt for prompt, v in value.items() if v < share}
    if not held and len(value) > 1:
        held = {min(value, key=value.get)}
    if len(held) == len(value):
        held = set()
    sides = ([], [])
    for i, example in enumerate(examples):
        sides[example.prompt in held].append(i)
    return sides


def tokenize(examples: Sequence[Example], tokenizer, max_length: int) -> Tokenized:
    """Token ids and labels of each conversation under the tokenizer's chat template; only assistant turns are labelled.

    Turns are found in the rendered text, so a template that renders a turn differently once more follow is refused.
    ValueError naming the line for a response that has no tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one: labels need the place of each token in the text")
    if not tokenizer.chat_template:
        raise ValueError("tokenizer has no chat template: use the instruct version of the model, or set one")
    out = Tokenized([])
    for index, example in enumerate(examples):
        try:
            ids, labels = _tokenize_one(example, tokenizer)
        except TemplateError as error:
            raise ValueError(f"{example.where}: the model's chat template refuses the messages: {error}") from error
        if len(ids) > max_length:
            out.truncated += 1
            out.tokens_cut += len(ids) - max_length
            ids, labels = ids[:max_length], labels[:max_length]
            if all(label == IGNORE_INDEX for label in labels[1:]):
                out.left_out += 1
                continue
        out.samples.append({"input_ids": ids, "labels": labels, "sample_id": index})
    if not out.samples:
        raise ValueError(f"no example has any of its response within {max_length} tokens: raise --max-length")
    return out


def _tokenize_one(example: Example, tokenizer) -> tuple[list[int], list[int]]:
    messages = list(example.messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORE_INDEX] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (text.startswith(through.rstrip()) and through.startswith(before)):
            raise ValueError(f"{example.where}: the chat template renders a turn differently once more turns follow")
        start, stop = len(before), len(through.rstrip())
        inside = [i for i, (a, b) in enumerate(offsets) if a >= start and b <= stop and b > a]
        if not any(ids[i] not in tokenizer.all_special_ids for i in inside):
            raise ValueError(f"{example.where}: the response of message {turn} has no tokens")
        for i in inside:
            labels[i] = ids[i]
    return ids, labels
