"""A data file as a corpus for the target store: read shard by shard, never whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..targets.samples import SHARD_TOKENS
from .formats import parse_chat, read_line
from .labelling import Tokenized, label_chats

_TOKEN_BYTES = 4  # of text, roughly: only decides how large shards are


class ChatFile:
    """The conversations of a JSON-lines file as the `train` command tokenizes them; sample i is line i + 1.

    A line is a conversation in a format of `parse_chat`, or a sample that has been tokenized: {"labels": […]}, where it
    is packed with "position_ids" that restart, or the "seq_lengths" of what it is packed from. Of the file one number
    per shard is kept, and in `counts` what the samples read so far lack.
    """

    def __init__(self, path: str | os.PathLike, tokenizer, max_length: int, shard_tokens: int = SHARD_TOKENS):
        self.path, self.tokenizer, self.max_length = Path(path).absolute(), tokenizer, max_length
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        digest, lines, offset = hashlib.sha256(), 0, 0
        self.cu_samples, self.offsets, self.counts = [0], [0], Tokenized([])
        with open(self.path, "rb") as file:
            for line in file:
                digest.update(line)
                lines, offset = lines + 1, offset + len(line)
                if offset - self.offsets[-1] >= shard_tokens * _TOKEN_BYTES:
                    self.cu_samples.append(lines)
                    self.offsets.append(offset)
        if lines == 0:
            raise ValueError(f"{path}: the file is empty")
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
        """The samples of a shard. ValueError naming the line of one that is none."""
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
            where = f"{self.path}:{first + i}"
            value = read_line(line, where)
            if isinstance(value, dict) and "labels" in value:
                samples[i] = _tokenized(value, where)
            else:
                chats.append(parse_chat(value, where))
                places.append(i)
        if chats:
            tokenized = label_chats(chats, self.tokenizer, self.max_length)
            self.counts.count(tokenized)
            for found in tokenized.samples:
                samples[places[found["sample_id"]]] = found
        return samples


def _tokenized(value: dict, where: str) -> dict:
    for name in ("labels", "position_ids", "seq_lengths"):
        column = value.get(name, [])
        if not isinstance(column, list) or not all(type(x) is int and -(2**63) <= x < 2**63 for x in column):
            raise ValueError(f'{where}: "{name}" must be a list of integers')
    count, lengths = len(value["labels"]), value.get("seq_lengths")
    if (places := value.get("position_ids")) is not None and len(places) != count:
        raise ValueError(f'{where}: {count} "labels" need as many "position_ids", got {len(places)}')
    if lengths is not None and (min(lengths, default=1) < 1 or sum(lengths) != count):
        raise ValueError(f'{where}: "seq_lengths" must be positive and add up to the {count} "labels", got {lengths}')
    return value
