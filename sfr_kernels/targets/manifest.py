"""`manifest.json`: what a store was made from and what it holds. Written last: a folder with one is a whole store."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..config import SFRConfig
from .shards import DamagedStore

FORMAT = 3
FILE = "manifest.json"
_NAMES = ("name", "file")  # fields for people to read, which are not compared
_HINTS = {
    "data.labels": " (the samples are not those it was built of: other data, or cut, masked, tokenized or packed "
    "differently)"
}


class StaleTargets(ValueError):
    """A store was made of something else than what it is to be used with. Its argument says what differs."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}. Give another folder, or have the targets replaced: build_targets(..., replace=True), or "
            "the command `targets --overwrite`"
        )


@dataclass(frozen=True)
class Identity:
    """What decides every byte of a store."""

    encoder: dict  # of describe_encoder
    tokenizer: str  # of tokenizer_hash
    segments: dict  # of segment_rules
    data: dict  # fingerprint of the samples
    dtype: str  # of the embeddings
    batch_size: int  # of the encoder: batch composition changes rounding
    cu_samples: Sequence[int]  # where shards start and stop

    def fields(self) -> dict[str, Any]:
        """Its fields in the manifest."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cu_samples"}
        return {"format": FORMAT} | values | {"samples": self.cu_samples[-1]}

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name the files of such a store."""
        return _hash([_without_names(self.fields()), list(self.cu_samples)])[:12]


def segment_rules(config: SFRConfig) -> dict[str, Any]:
    """The fields of the config that decide where segments are, and how their text is embedded."""
    names = ("segment", "segment_tokens", "stride", "min_tokens", "target_rule", "encoder_pooling",
             "encoder_max_tokens")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def tokenizer_hash(tokenizer) -> str:
    """A hash of everything that decides the text of tokens."""
    if getattr(tokenizer, "is_fast", False):
        # Before the tokens stand truncation and padding, which every call may change.
        text = tokenizer.backend_tokenizer.to_str()
        state = hashlib.sha256(text[text.index('"added_tokens"') :].encode()).hexdigest()
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    special = sorted(getattr(tokenizer, "all_special_ids", []))
    return _hash([state, special, getattr(tokenizer, "clean_up_tokenization_spaces", None)])[:32]


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Every field of `wanted` in which `stored` differs, in words."""
    a, b = _flat(stored), _flat(wanted)
    found = [
        f"{key}: stored {_short(a.get(key))!r}, wanted {_short(value)!r}{_HINTS.get(key, '')}"
        for key, value in b.items()
        if a.get(key) != value and key.split(".")[-1] not in _NAMES
    ]
    if any(text.startswith("encoder.") for text in found):
        found.insert(0, f"encoder: stored {a.get('encoder.name')!r}, wanted {b.get('encoder.name')!r}")
    return found


def _short(value: Any) -> Any:
    """The first digits of a hash; another value as it is."""
    return value[:8] if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,64}", value) else value


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    content = content | {"checksum": _hash(content)}
    write_atomically(folder / FILE, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """FileNotFoundError if the folder has no whole store; StaleTargets, naming every difference, if its format or a
    field is not the one wanted; DamagedStore if it was changed."""
    try:
        content = json.loads((folder / FILE).read_text())
        checksum = content.pop("checksum", None)
    except FileNotFoundError:
        unfinished = ": one is being built there" if any(folder.glob(".building-*")) else ""
        raise FileNotFoundError(f"there are no targets in {folder}{unfinished}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{folder / FILE} is damaged: {error}") from error
    if content.get("format") != FORMAT:
        raise StaleTargets(f"the targets in {folder} have format {content.get('format')!r}, not {FORMAT}")
    if checksum != _hash(content):
        raise DamagedStore(f"{folder / FILE} is damaged: its checksum does not fit")
    if found := differences(content, wanted or {}):
        raise StaleTargets(f"the targets in {folder} were made differently: {'; '.join(found)}")
    return content


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_names(v) for k, v in value.items() if k not in _NAMES}
    return value


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out
