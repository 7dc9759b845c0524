"""Data files of chats: read whole, split by prompt, tokenized."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from .formats import Example, parse_chat, read_line
from .labelling import Tokenized, label_chats

PERSONAS = Path(__file__).parent.parent / "data" / "personas.jsonl"


def read_chats(path: str | os.PathLike) -> list[Example]:
    """The conversations of a JSON-lines file, in the formats of `parse_chat`.

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
    """`label_chats` of a whole file: ValueError, too, where no example has any of its response within `max_length`."""
    out = label_chats(examples, tokenizer, max_length)
    if not out.samples:
        raise ValueError(f"no example has any of its response within {max_length} tokens: raise --max-length")
    return out
