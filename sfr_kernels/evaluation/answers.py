"""A file of answers that grows as they are made: what a stopped run has made is read back by the next."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where nothing is locked
    fcntl = None


class Answer(NamedTuple):
    text: str  # as the model wrote it, without special tokens
    finished: bool  # ended by the model itself, not by max_new_tokens


class Key(NamedTuple):
    """Which answer: the prompt's SHA-256, and the number of the sample."""

    prompt: str
    sample: int


def key_of(prompt: str, sample: int) -> Key:
    return Key(hashlib.sha256(prompt.encode()).hexdigest(), sample)


class OtherSettings(ValueError):
    """A file of answers has another header."""


class AnswerFile:
    """JSON lines, open for one process at a time: `header`, then an answer a line. Use it as a context manager.

    Entering reads what is there into `answers`, and cuts off a last line that a killed run has not finished. If the
    file begins with another header it is emptied where there is no answer in it, or to `replace` it; else that is
    OtherSettings, naming every difference. ValueError for a file of something else; RuntimeError if another process has
    it open.
    """

    def __init__(self, path: Path, header: dict[str, dict | None], replace: bool = False):
        self.path, self.replace = Path(path), replace
        self.header = json.loads(json.dumps(header))  # as it is read back: tuples are lists
        self.answers: dict[Key, Answer] = {}

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            try:
                if fcntl is not None:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process is writing answers to {self.path}: wait for it to end") from error
            self._file.seek(0)
            data = self._file.read()
            try:
                self.answers, whole = read_answers(self.path, data, self.header)
            except OtherSettings:
                if not self.replace and data.count(b"\n") > 1:
                    raise
                whole = 0
            self._file.truncate(whole)
            if not whole:
                self._write([self.header])
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, answers: dict[Key, Answer]) -> None:
        self._write([key._asdict() | answer._asdict() for key, answer in answers.items()])
        self.answers |= answers

    def _write(self, lines: list[dict]) -> None:
        self._file.write("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode())
        self._file.flush()


def read_answers(path: Path, data: bytes, header: dict) -> tuple[dict[Key, Answer], int]:
    """The answers in `data`, the content of a file at `path`, and how many bytes of it are whole lines. Errors as of
    AnswerFile."""
    first, *lines = data.split(b"\n")
    if not lines:  # not even the header is whole
        if not json.dumps(header, sort_keys=True).encode().startswith(first):
            raise ValueError(f"{path}, line 1: not a header of answers; choose another file")
        return {}, 0
    _check(path, first, header)
    torn, answers = lines.pop(), {}
    for number, line in enumerate(lines, 2):
        try:
            entry = json.loads(line)
            key, answer = (kind(**{f: entry.pop(f) for f in kind._fields}) for kind in (Key, Answer))
            if entry or [*map(type, (*key, *answer))] != [str, int, str, bool]:
                raise ValueError("other fields than those of an answer")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not an answer ({error})") from error
        answers[key] = answer
    return answers, len(data) - len(torn)


def _check(path: Path, line: bytes, header: dict) -> None:
    """OtherSettings unless the line is this header."""
    try:
        stored = json.loads(line)
        old, new = _fields(stored), _fields(header)
        if stored.keys() != header.keys():
            raise ValueError(f"of {', '.join(stored)}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}, line 1: not a header of answers ({error}); choose another file") from error
    names = dict.fromkeys([*new, *old])
    if differences := [f"{n}: {old.get(n)!r} → {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]:
        raise OtherSettings(
            f"{path} holds answers of other settings, stored → wanted: {'; '.join(differences)}. Use those settings, "
            "another file, or replace it"
        )


def _fields(header: dict[str, dict | None]) -> dict[str, object]:
    return {f"{part}.{name}": value for part, fields in header.items() for name, value in (fields or {}).items()}
