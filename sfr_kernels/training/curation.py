"""Which rows of two public code sets are kept for fine-tuning, as the SFR recipe keeps them, and as which chats.

OpenCodeInstruct (nvidia/OpenCodeInstruct, every column a string): answers judged 5 for requirement conformance, 5 for
logical correctness and at least 4 for edge cases, that pass all of their unit tests, of which there is one; of the
answers to a question, stripped, the best judged, then the shortest (stripped too), then the first.

rStar-Coder (microsoft/rStar-Coder): answers that are verified and passed, of at most 16,384 tokens; of the questions
with the same set of 5-grams, the first. The files of seed_sft have both flags and starter code; those of synthetic_sft
have neither, for its answers were released only if they passed.

Everything here is pure: rows come as dictionaries, by column. Reading files is for the command line.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 16_384
CHARACTERS_PER_TOKEN = 4  # where no tokenizer is given
_GRAM = 5  # words
_LEAST = {"requirement_conformance": 5, "logical_correctness": 5, "edge_case_consideration": 4}
_FLAGS = ("verified", "is_passed")

_BLANK, _UNENCODABLE = "blank question or answer", "text that is not valid UTF-8"
_UNREADABLE, _UNTESTED = "llm_judgement cannot be read", "a unit test failed, or there is none"
_LONG, _REPEATED = f"answer of more than {MOST_TOKENS} tokens", "another answer to the question is kept"

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is asked of a row of one set, and how it becomes a chat."""

    question: str  # its column
    answer: str  # its column
    others: tuple[str, ...]  # the other columns that every file needs, unless it is one of `released_as_passed`
    codes: tuple[str, ...]  # of these, code that belongs into the question and into the answer
    reasons: tuple[str, ...]  # to drop a row, in the order in which they are asked
    drop: Callable[[Row], str | None]  # the reason among them that the row's marks give
    rank: Callable[[Row], tuple]  # of two answers to a question, the lower is kept; else the first
    key: Callable[[str], bytes]  # what two forms of the same question share, 16 bytes
    limited: bool  # to MOST_TOKENS in an answer, and to the first such answer to a question

    def columns(self, names: Collection[str]) -> tuple[str, ...]:
        """The columns to read of a file that has the columns `names`."""
        if self.released_as_passed(names):
            return (self.question, self.answer, self.codes[1])
        return (self.question, self.answer, *self.others)

    def released_as_passed(self, names: Collection[str]) -> bool:
        """Whether a file is one of synthetic_sft, which has neither flags nor starter code."""
        return bool(self.codes) and "seed_question" in names and not {*_FLAGS, self.codes[0]} & {*names}

    def chat(self, row: Row) -> tuple[str, str]:
        """The question and the answer of a row, each with its code where it does not have it already."""
        texts = row[self.question] or "", row[self.answer] or ""
        return tuple(map(_with_code, texts, [row.get(name) for name in self.codes])) if self.codes else texts


class Selection:
    """Chooses among rows that it is shown once and in order. It holds no text: 16 bytes, a rank and a place for every
    question."""

    def __init__(self, recipe: Recipe, count_tokens: Callable[[Sequence[str]], Sequence[int]]):
        self.recipe, self.count_tokens, self.rows = recipe, count_tokens, 0
        self._dropped: Counter[str] = Counter()
        self._best: dict[bytes, tuple] = {}  # (*rank, place) by the key of the question

    def add(self, rows: Sequence[Row]) -> None:
        """Judges the next rows. How they are cut into calls changes nothing."""
        passed = []
        for place, row in enumerate(rows, self.rows):
            question, answer = self.recipe.chat(row)
            reason = self._unusable(row, question + answer) or self.recipe.drop(row)
            if reason is None:
                passed.append((self.recipe.key(row[self.recipe.question]), (*self.recipe.rank(row), place), answer))
            else:
                self._dropped[reason] += 1
        self.rows += len(rows)
        tokens = {}
        if self.recipe.limited:  # counting is slow, and a question that has its answer needs no other
            answers = {found: answer for key, found, answer in passed if key not in self._best}
            tokens = dict(zip(answers, self.count_tokens([*answers.values()]), strict=True)) if answers else {}
        for key, found, _ in passed:
            if key in self._best:
                self._dropped[_REPEATED] += 1
                self._best[key] = min(found, self._best[key])
            elif tokens.get(found, 0) > MOST_TOKENS:
                self._dropped[_LONG] += 1
            else:
                self._best[key] = found

    def _unusable(self, row: Row, text: str) -> str | None:
        if not all((row[name] or "").strip() for name in (self.recipe.question, self.recipe.answer)):
            return _BLANK
        try:
            text.encode()
        except UnicodeEncodeError:
            return _UNENCODABLE
        return None

    def places(self) -> set[int]:
        """The rows that are kept, counted from 0 over all that were shown."""
        return {found[-1] for found in self._best.values()}

    def counts(self) -> dict[str, int]:
        """How many rows were kept, and how many dropped for each reason: the first that applies, in this order."""
        return {"kept": len(self._best)} | {reason: self._dropped[reason] for reason in self.recipe.reasons}


def count_by_characters(texts: Sequence[str]) -> list[int]:
    """About how many tokens texts have: a quarter of their characters, rounded up."""
    return [-(-len(text) // CHARACTERS_PER_TOKEN) for text in texts]


def _with_code(text: str, code: str | None) -> str:
    """The text, and after it the code as a block of Python unless the text has its lines, whatever blanks end them.
    Thoughts before `</think>` do not count."""
    if not code or not code.strip() or f"\n{_lines(code)}\n" in f"\n{_lines(text.rpartition('</think>')[2])}\n":
        return text
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{text.rstrip()}\n\n{fence}python\n{code.strip(chr(10))}\n{fence}"


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _stripped_key(question: str) -> bytes:
    return _digest(question.strip())


def _grams_key(question: str) -> bytes:
    """A digest of the set of the question's 5-grams of words in lower case; of all of it where it has fewer words."""
    words = question.lower().split()
    if len(words) < _GRAM:
        return _digest(" ".join(words))
    return _digest("\n".join(sorted({" ".join(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)})))


def _scores(row: Row) -> list[float] | None:
    """The judge's three scores; None if they cannot be read."""
    try:
        judgement = json.loads(row["llm_judgement"])
        scores = [float(judgement[name]["score"]) for name in _LEAST]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return scores if all(0 <= score <= 5 for score in scores) else None  # NaN is none


def _drop_open_code_instruct(row: Row) -> str | None:
    scores = _scores(row)
    if scores is None:
        return _UNREADABLE
    for score, (name, least) in zip(scores, _LEAST.items(), strict=True):
        if score < least:
            return f"{name} below {least}"
    return None if _all_tests_passed(row) else _UNTESTED


def _all_tests_passed(row: Row) -> bool:
    """Whether there are unit tests, the status of each is "pass", and the share of those that passed is 1."""
    try:
        statuses, share = json.loads(row["tests_execution_status"]), float(row["average_test_score"])
    except (ValueError, TypeError, RecursionError):
        return False
    return isinstance(statuses, list) and len(statuses) > 0 and all(s == "pass" for s in statuses) and share == 1


def _drop_rstar_coder(row: Row) -> str | None:
    """A flag that the row lacks is one that `Recipe.columns` did not ask for."""
    for name in _FLAGS:
        value = row.get(name, True)
        if not (value.strip().lower() in ("true", "1") if isinstance(value, str) else value == 1):
            return f"not {name}"
    return None


RECIPES = {
    "opencodeinstruct": Recipe(
        question="input",
        answer="output",
        others=("llm_judgement", "tests_execution_status", "average_test_score"),
        codes=(),
        reasons=(
            _BLANK, _UNENCODABLE, _UNREADABLE, *(f"{name} below {least}" for name, least in _LEAST.items()), _UNTESTED,
            _REPEATED,
        ),
        drop=_drop_open_code_instruct,
        rank=lambda row: (-sum(_scores(row)), len(row["output"].strip())),
        key=_stripped_key,
        limited=False,
    ),
    "rstar-coder": Recipe(
        question="question",
        answer="response",
        others=("starter_code", "code", *_FLAGS),
        codes=("starter_code", "code"),
        reasons=(_BLANK, _UNENCODABLE, *(f"not {name}" for name in _FLAGS), _REPEATED, _LONG),
        drop=_drop_rstar_coder,
        rank=lambda row: (),
        key=_grams_key,
        limited=True,
    ),
}  # fmt: skip
