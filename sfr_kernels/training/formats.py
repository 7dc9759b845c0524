"""The lines of a chat file: OpenAI's messages, ShareGPT's conversations, TRL's prompts and completions, in one form."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ROLES = {r: r for r in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
_CALL = "function_call"
_SPEAKERS = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", _CALL: _CALL, "tool_call": _CALL,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One conversation of a data file."""

    messages: tuple[dict[str, Any], ...]  # "content" is a string, arguments of "tool_calls" are objects if they parse
    persona: str  # "" where the file gives none
    where: str  # file:line
    tools: tuple[dict, ...] = ()  # JSON schemas of the functions that may be called

    @property
    def prompt(self) -> str:
        """The first thing the user says: conversations with the same prompt stay on one side of the split."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


@contextlib.contextmanager
def at_line(where: str) -> Iterator[None]:
    """Puts `where`, file:line, before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_line(line: bytes) -> Any:
    """The JSON value of a line. ValueError where there is none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise ValueError(f"not JSON ({error})") from error
    return _encodable(value, text)


def parse_chat(value: Any, where: str) -> Example:
    """The conversation in a line's value. ValueError for anything that is not one.

    {"messages": [{"role", "content"}, …]}, {"conversations": [{"from", "value"}, …]}, or {"prompt", "completion"}, each
    a string or messages; with "system", "tools" and "persona" if there are any.
    """
    value = value if isinstance(value, dict) else {}
    found = value.get("messages") or value.get("conversations")
    if found is None and None not in (value.get("prompt"), value.get("completion")):
        prompt, completion = value["prompt"], value["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        found = prompt + completion if isinstance(prompt, list) and isinstance(completion, list) else None
    if not isinstance(found, list) or not found:
        raise ValueError(
            'needs "messages", a list of {"role", "content"}, "conversations", a list of {"from", "value"}, or '
            '"prompt" and "completion"'
        )
    messages = [_message(_turn(turn, i), i) for i, turn in enumerate(found)]
    if value.get("system"):
        messages = _with_system(messages, value["system"])
    roles = [m["role"] for m in messages]
    if roles[-1] != "assistant" or "user" not in roles[: roles.index("assistant")]:
        raise ValueError("needs a user message before the first assistant message, and an assistant message at the end")
    return Example(tuple(messages), str(value.get("persona") or ""), where, _tools(value.get("tools")))


def _encodable(value: Any, text: str) -> Any:
    """The value that `text` was parsed into. ValueError if a string in it, made by an escape, cannot be encoded."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(error.object[error.start]):x}"
            raise ValueError(f"{code} is half of a surrogate pair, which cannot be encoded: repair it") from error
    return value


def _parse(text: str) -> Any:
    """The value of JSON inside a string; the string itself where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _encodable(value, text)


def _turn(turn: Any, i: int) -> dict:
    """ShareGPT's {"from", "value"} as a message; a message as it is. Nulls, as in rows of tables, are left out."""
    turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    if "from" not in turn or "role" in turn:
        return turn
    speaker = turn.pop("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f'turn {i} is "from" {speaker!r}: expected one of {", ".join(_SPEAKERS)}')
    content = turn.pop("value", None)
    if role != _CALL:
        return turn | {"role": role, "content": content}
    calls = _parse(content) if isinstance(content, str) else content
    return turn | {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _message(message: dict, i: int) -> dict[str, Any]:
    """A message as chat templates expect it; unknown keys are kept, which a template may know."""
    role = _ROLES.get(message.get("role")) if isinstance(message.get("role"), str) else None
    if role is None:
        raise ValueError(f'message {i} needs a "role" of {", ".join(_ROLES)}, got {message.get("role")!r}')
    kept = {k: v for k, v in message.items() if k not in ("tool_calls", _CALL)}
    calls = message.get("tool_calls") or ([] if message.get(_CALL) is None else [message[_CALL]])
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise ValueError(f'message {i} ({role}): "tool_calls" must be a list, of an assistant')
    if calls:
        kept["tool_calls"] = [_call(call, i) for call in calls]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, i) for part in content)
    if content is None and (calls or role == "tool"):
        content = ""
    if not isinstance(content, str) or not (content.strip() or calls or role == "tool"):
        raise ValueError(f'message {i} ({role}) has no "content", or a blank one: fill it in, or leave the line out')
    return kept | {"role": role, "content": content}


def _part(part: Any, i: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
    raise ValueError(
        f"message {i} has a content part of type {kind}; only text can be trained on: take the part out, or describe it"
    )


def _call(call: Any, i: int) -> dict:
    """{"type": "function", "function": {"name", "arguments"}}, of a call or of its function alone."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"message {i} has a tool call without a function's name: {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        parsed = _parse(arguments) if arguments.strip() else {}
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        raise ValueError(f"message {i}: arguments of {function['name']} must be an object, or JSON of one")
    wrapper = {k: v for k, v in call.items() if v is not None and ("function" in call or k == "id")}
    return wrapper | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _with_system(messages: list[dict], system: Any) -> list[dict]:
    if not isinstance(system, str):
        raise ValueError('"system" must be a string')
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError('"system" and the first turn are different system messages')
    return messages


def _tools(tools: Any) -> tuple[dict, ...]:
    """The schemas as {"type": "function", "function": schema}, which templates expect."""
    tools = _parse(tools.strip()) if isinstance(tools, str) else tools
    schemas = [t.get("function", t) if isinstance(t, dict) else None for t in tools] if isinstance(tools, list) else []
    if tools and not all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in schemas or [None]):
        raise ValueError('"tools" must be a list of functions\' schemas with a "name", or JSON of one')
    return tuple(
        tool if "function" in tool else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in (tools or ())
    )
