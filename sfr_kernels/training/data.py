"""Data files of chats: read whole and split by prompt, or read shard by shard as a corpus for the target store."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..targets.samples import SHARD_TOKENS
from .formats import Example, at_line, parse_chat, read_line
from .labelling import Tokenized, label_chats

PERSONAS = Path(__file__).parent.parent / "data" / "personas.jsonl"
_TOKEN_BYTES = 4  # text per token, roughly: decides the size of shards


def _lines(path: str | os.PathLike) -> Iterator[bytes]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        yield from file


def read_chats(path: str | os.PathLike) -> list[Example]:
    """The conversations of a JSON-lines file, in the formats of `parse_chat`. ValueError naming file and line for
    anything that is not one."""
    examples = []
    for number, line in enumerate(_lines(path), start=1):
        with at_line(where := f"{path}:{number}"):
            examples.append(parse_chat(read_line(line), where))
    return examples


def split_by_prompt(examples: Sequence[Example], share: float = 0.125) -> tuple[list[int], list[int]]:
    """Indices of training and held-out examples. A prompt is held out if its SHA-256, read as a number in [0, 1), is
    below `share`: that depends on the prompt alone, so that adding data moves none. If no prompt is, and there are two
    or more, the one with the lowest number is."""
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
    """`label_chats`, and ValueError where no example has any of its response within `max_length`."""
    tokenized = label_chats(examples, tokenizer, max_length)
    if not tokenized.samples:
        raise ValueError(f"no example has any of its response within {max_length} tokens: raise --max-length")
    return tokenized


class ChatFile:
    """The conversations of a JSON-lines file as the `train` command tokenizes them; sample i is line i + 1.

    A line is a conversation in a format of `parse_chat`, or a tokenized sample: {"labels": […]}, and where it is packed
    "position_ids" that restart, or "seq_lengths". Only the shards' offsets are kept in memory, and in `counts` what
    was cut from or left out of the samples read so far.
    """

    def __init__(self, path: str | os.PathLike, tokenizer, max_length: int, shard_tokens: int = SHARD_TOKENS):
        self.path, self.tokenizer, self.max_length = Path(path).absolute(), tokenizer, max_length
        digest, lines, offset = hashlib.sha256(), 0, 0
        self.cu_samples, self.offsets, self.counts = [0], [0], Tokenized([])
        for line in _lines(path):
            digest.update(line)
            lines, offset = lines + 1, offset + len(line)
            if offset - self.offsets[-1] >= shard_tokens * _TOKEN_BYTES:
                self.cu_samples.append(lines)
                self.offsets.append(offset)
        if self.cu_samples[-1] < lines:
            self.cu_samples.append(lines)
            self.offsets.append(offset)
        template = tokenizer.chat_template or ""
        template = template if isinstance(template, str) else json.dumps(template, sort_keys=True)  # several, by name
        self.fingerprint: dict[str, Any] = {
            "file": self.path.name,
            "sha256": digest.hexdigest(),
            "max_length": max_length,
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:32],
        }

    def read(self, shard: int) -> list[dict]:
        """The samples of a shard. ValueError naming the line that is none."""
        start, stop = self.offsets[shard : shard + 2]
        with open(self.path, "rb") as file:
            file.seek(start)
            lines = file.read(stop - start).removesuffix(b"\n").split(b"\n")
        first = self.cu_samples[shard] + 1
        if len(lines) != self.cu_samples[shard + 1] - self.cu_samples[shard]:
            raise ValueError(f"{self.path} changed while it was read")
        samples: list[dict] = [{"labels": []} for _ in lines]
        chats, places = [], []
        for i, line in enumerate(lines):
            with at_line(where := f"{self.path}:{first + i}"):
                value = read_line(line)
                if isinstance(value, dict) and "labels" in value:
                    samples[i] = _check_tokenized(value)
                else:
                    chats.append(parse_chat(value, where))
                    places.append(i)
        if chats:
            tokenized = label_chats(chats, self.tokenizer, self.max_length)
            self.counts.count(tokenized)
            for found in tokenized.samples:
                samples[places[found["sample_id"]]] = found
        return samples


def _check_tokenized(value: dict) -> dict:
    for name in ("labels", "position_ids", "seq_lengths"):
        column = value.get(name, [])
        if not isinstance(column, list) or not all(type(x) is int and -(2**63) <= x < 2**63 for x in column):
            raise ValueError(f'"{name}" must be a list of integers')
    count, lengths = len(value["labels"]), value.get("seq_lengths")
    if (places := value.get("position_ids")) is not None and len(places) != count:
        raise ValueError(f'{count} "labels" need as many "position_ids", got {len(places)}')
    if lengths is not None and (min(lengths, default=1) < 1 or sum(lengths) != count):
        raise ValueError(f'"seq_lengths" must be positive and add up to the {count} "labels", got {lengths}')
    return value
