"""The lines of a chat file: OpenAI's messages, ShareGPT's conversations, TRL's prompts and completions, made one."""

import json
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


def read_line(line: bytes, where: str) -> Any:
    """The JSON value of a line. ValueError naming it where there is none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{where}: the line is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise ValueError(f"{where}: not JSON ({error})") from error
    return _encodable(value, text, where)


def parse_chat(value: Any, where: str) -> Example:
    """The conversation in a line's value. ValueError naming the line for anything that is not one.

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
            f'{where}: needs "messages", a list of {{"role", "content"}}, "conversations", a list of '
            '{"from", "value"}, or "prompt" and "completion"'
        )
    messages = [_message(_turn(turn, i, where), i, where) for i, turn in enumerate(found)]
    if value.get("system"):
        messages = _with_system(messages, value["system"], where)
    roles = [m["role"] for m in messages]
    if roles[-1] != "assistant" or "user" not in roles[: roles.index("assistant")]:
        raise ValueError(
            f"{where}: needs a user message before the first assistant message, and an assistant message at the end: "
            "leave out what follows that"
        )
    return Example(tuple(messages), str(value.get("persona") or ""), where, _tools(value.get("tools"), where))


def _encodable(value: Any, text: str, where: str) -> Any:
    """The value that `text` was parsed into. ValueError if it has a string that is no text: only escapes make one."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(error.object[error.start]):x}"
            raise ValueError(
                f"{where}: {code} is half of a surrogate pair, which cannot be encoded: repair it"
            ) from error
    return value


def _parse(text: str, where: str) -> Any:
    """The value of JSON inside a string; the string itself where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _encodable(value, text, where)


def _turn(turn: Any, i: int, where: str) -> dict:
    """ShareGPT's {"from", "value"} as a message; a message as it is. Nulls, which tables fill up with, are left out."""
    turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    if "from" not in turn or "role" in turn:
        return turn
    speaker = turn.pop("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f'{where}: turn {i} is "from" {speaker!r}: expected one of {", ".join(_SPEAKERS)}')
    content = turn.pop("value", None)
    if role != _CALL:
        return turn | {"role": role, "content": content}
    calls = _parse(content, where) if isinstance(content, str) else content
    return turn | {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _message(message: dict, i: int, where: str) -> dict[str, Any]:
    """A message as chat templates expect it; keys that are not known here are kept for them."""
    role = _ROLES.get(message.get("role")) if isinstance(message.get("role"), str) else None
    if role is None:
        raise ValueError(f'{where}: message {i} needs a "role" of {", ".join(_ROLES)}, got {message.get("role")!r}')
    kept = {k: v for k, v in message.items() if k not in ("tool_calls", _CALL)}
    calls = message.get("tool_calls") or [call for call in [message.get(_CALL)] if call is not None]
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise ValueError(f'{where}: message {i} ({role}): "tool_calls" must be a list, of an assistant')
    if calls:
        kept["tool_calls"] = [_call(call, i, where) for call in calls]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, i, where) for part in content)
    if content is None and (calls or role == "tool"):
        content = ""
    if not isinstance(content, str) or not (content.strip() or calls or role == "tool"):
        raise ValueError(
            f'{where}: message {i} ({role}) has no "content", or a blank one: fill it in, or leave the line out'
        )
    return kept | {"role": role, "content": content}


def _part(part: Any, i: int, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
    raise ValueError(
        f"{where}: message {i} has a content part of type {kind}: only text can be trained on: take the part out, "
        "describe it in words, or leave the line out"
    )


def _call(call: Any, i: int, where: str) -> dict:
    """{"type": "function", "function": {"name", "arguments"}}; the wrapper may be missing."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{where}: message {i} has a tool call without a function's name: {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        parsed = _parse(arguments, where) if arguments.strip() else {}
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        raise ValueError(f"{where}: message {i}: arguments of {function['name']} must be an object, or JSON of one")
    around = {k: v for k, v in call.items() if v is not None and ("function" in call or k == "id")}
    return around | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _with_system(messages: list[dict], system: Any, where: str) -> list[dict]:
    if not isinstance(system, str):
        raise ValueError(f'{where}: "system" must be a string')
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError(f'{where}: "system" and the first turn are different system messages')
    return messages


def _tools(tools: Any, where: str) -> tuple[dict, ...]:
    """The schemas, in the wrapper that templates expect."""
    tools = _parse(tools.strip(), where) if isinstance(tools, str) else tools
    schemas = [t.get("function", t) if isinstance(t, dict) else None for t in tools] if isinstance(tools, list) else []
    if tools and not all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in schemas or [None]):
        raise ValueError(f'{where}: "tools" must be a list of functions\' schemas with a "name", or JSON of one')
    return tuple(
        tool if "function" in tool else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in (tools or ())
    )
