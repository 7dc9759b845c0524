"""A data file as a corpus for the target store: read shard by shard, never whole."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ..targets.corpus import SHARD_TOKENS
from .data import parse_chat, read_line, tokenize

_TOKEN_BYTES = 4  # of text, roughly: only decides how large shards are


class ChatFile:
    """The conversations of a JSON-lines file as the `train` command tokenizes them; sample i is line i + 1.

    A line is {"messages": […]}, or a sample that has been tokenized: {"labels": […]}, with "position_ids" that restart
    where it is packed. Of the file one number per shard is kept.
    """

    def __init__(self, path: str | os.PathLike, tokenizer, max_length: int, shard_tokens: int = SHARD_TOKENS):
        self.path, self.tokenizer, self.max_length = Path(path).absolute(), tokenizer, max_length
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        digest, lines, offset = hashlib.sha256(), 0, 0
        self.cu_samples, self.offsets = [0], [0]
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
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
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
            for found in tokenize(chats, self.tokenizer, self.max_length).samples:
                samples[places[found["sample_id"]]] = found
        return samples


def _tokenized(value: dict, where: str) -> dict:
    for name in ("labels", "position_ids"):
        column = value.get(name, [])
        if not isinstance(column, list) or not all(type(x) is int for x in column):
            raise ValueError(f'{where}: "{name}" must be a list of integers')
    return value
