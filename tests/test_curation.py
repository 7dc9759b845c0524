"""The chats that `curate` makes of public code sets: which rows are kept, each for which reason another is dropped."""

import json
import tracemalloc

import corpora
import pytest

corpora.needs("pyarrow", "transformers")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from sfr_kernels.commands import curate as command  # noqa: E402
from sfr_kernels.commands import main  # noqa: E402
from sfr_kernels.training.curation import RECIPES, count_by_characters  # noqa: E402
from sfr_kernels.training.data import read_chats  # noqa: E402

OPEN, RSTAR = "opencodeinstruct", "rstar-coder"
BLANK, UNENCODABLE = "blank question or answer", "text that is not valid UTF-8"
REPEATED = "another answer to the question is kept"
UNREADABLE, UNTESTED = "llm_judgement cannot be read", "a unit test failed, or there is none"
LONG = "answer of more than 16384 tokens"


def judgement(conformance=5, correctness=5, edge_cases=5) -> str:
    names = "requirement_conformance", "logical_correctness", "edge_case_consideration"
    scores = conformance, correctness, edge_cases
    return json.dumps({n: {"score": s, "justification": "so"} for n, s in zip(names, scores, strict=True)})


def open_row(question="Add two numbers.", answer="def add(a, b): return a + b", scores=(5, 5, 5), **others) -> dict:
    """A row with every column of OpenCodeInstruct, all of them strings."""
    return {
        "id": "0", "input": question, "output": answer, "domain": "generic", "generation_algorithm": "self-instruct",
        "llm_judgement": judgement(*scores), "unit_tests": '["assert add(1, 2) == 3"]',
        "tests_execution_status": '["pass", "pass"]', "average_test_score": "1.0",
    } | others  # fmt: skip


def seed_row(question="Print the sum of the two numbers.", response="print(sum)", **others) -> dict:
    """A row with every column of rStar-Coder's seed_sft."""
    return {
        "question_id": "seed_0", "question": question, "starter_code": "", "response": response, "code": "",
        "verified": True, "is_passed": True,
    } | others  # fmt: skip


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def curate(name, out, *files, count=count_by_characters):
    """The counts that are not 0, and the questions and answers that were written."""
    counts = command.curate(files, RECIPES[name], out, count)
    chats = read_chats(out)
    assert all([m["role"] for m in c.messages] == ["user", "assistant"] for c in chats) and counts["kept"] == len(chats)
    return {k: v for k, v in counts.items() if v}, [tuple(m["content"] for m in c.messages) for c in chats]


# One change to a row that is kept otherwise, and the reason to drop it then, or none.
OPEN_CASES = [
    (dict(), None),
    (dict(scores=(4, 5, 5)), "requirement_conformance below 5"),
    (dict(scores=(5, 4, 5)), "logical_correctness below 5"),
    (dict(scores=(5, 5, 4)), None),
    (dict(scores=(5, 5, 3)), "edge_case_consideration below 4"),
    (dict(scores=("5", "5", 4.0)), None),
    (dict(scores=(4, 4, 3)), "requirement_conformance below 5"),
    (dict(scores=(5, 6, 5)), UNREADABLE),
    (dict(scores=(5, None, 5)), UNREADABLE),
    (dict(scores=(5, 5, float("nan"))), UNREADABLE),
    (dict(llm_judgement="the code is good"), UNREADABLE),
    (dict(llm_judgement='{"requirement_conformance": {"score": 5}}'), UNREADABLE),
    (dict(llm_judgement="[" * 100_000), UNREADABLE),
    (dict(llm_judgement=None), UNREADABLE),
    (dict(tests_execution_status='["pass"]'), None),
    (dict(tests_execution_status='["pass", "fail"]'), UNTESTED),
    (dict(tests_execution_status="[]"), UNTESTED),
    (dict(tests_execution_status='{"pass": 2}'), UNTESTED),
    (dict(tests_execution_status=None), UNTESTED),
    (dict(average_test_score="0.9"), UNTESTED),
    (dict(average_test_score=None), UNTESTED),
    (dict(question=" \n"), BLANK),
    (dict(answer=None), BLANK),
    (dict(question="", scores=(1, 1, 1)), BLANK),
    (dict(scores=(5, 5, 1), average_test_score="0"), "edge_case_consideration below 4"),
]
RSTAR_CASES = [
    (dict(), None),
    (dict(verified=False), "not verified"),
    (dict(verified=None, is_passed=False), "not verified"),
    (dict(is_passed=False), "not is_passed"),
    (dict(is_passed=None), "not is_passed"),
    (dict(response="x" * 65_536), None),
    (dict(response="x" * 65_537), LONG),
    # 65,521 characters, and 16 of the block around a code of one
    (dict(response="y" * 65_520, code="z"), LONG),
    (dict(response="y" * 65_519, code="z"), None),
    (dict(response="x" * 65_537, is_passed=False), "not is_passed"),
    (dict(response="  ", code="print()"), BLANK),
    (dict(question=None), BLANK),
]


@pytest.mark.parametrize("name, row, cases", [(OPEN, open_row, OPEN_CASES), (RSTAR, seed_row, RSTAR_CASES)])
def test_each_filter_drops_the_rows_beyond_its_threshold(tmp_path, name, row, cases):
    rows, wanted = [], {"kept": 0}
    for i, (change, reason) in enumerate(cases):
        rows.append(row(**{"question": f"Write the program number {i}, please."} | change))
        wanted[reason or "kept"] = wanted.get(reason or "kept", 0) + 1
    counts, chats = curate(name, tmp_path / "chats.jsonl", write(tmp_path / "rows.parquet", rows))
    assert counts == wanted
    questions = [row["question" if name == RSTAR else "input"] for row in rows]
    assert [c[0] for c in chats] == [q for q, (_, reason) in zip(questions, cases, strict=True) if reason is None]
    # every reason of the recipe is crossed, but for those shown below
    assert {*RECIPES[name].reasons} == {*wanted, REPEATED, UNENCODABLE} - {"kept"}


@pytest.mark.parametrize("yes, no", [(1, 0), ("True", "False"), ("1", "0"), ("true", "yes"), (1.0, None)])
def test_flags_may_be_numbers_or_strings(tmp_path, yes, no):
    flags = (yes, yes), (no, yes), (yes, no)
    rows = [seed_row(f"question {i}", verified=v, is_passed=p) for i, (v, p) in enumerate(flags)]
    counts, chats = curate(RSTAR, tmp_path / "chats.jsonl", write(tmp_path / "rows.parquet", rows))
    assert counts == {"kept": 1, "not verified": 1, "not is_passed": 1} and chats[0][0] == "question 0"


def test_of_the_answers_to_a_question_the_best_judged_the_shortest_and_the_first_is_kept(tmp_path):
    one = [
        open_row("  best judged\n", "short", scores=(5, 5, 4)),
        open_row("shortest", "longer by 1"),
        open_row("first", "one"),
        open_row("first", "two"),
        open_row("only the second passes", "failed", average_test_score="0.5"),
    ]
    two = [
        open_row("best judged", "a long answer", scores=(5, 5, 5)),
        open_row("First", "in another case it is another question"),
        open_row("shortest", "\n\n  shorter  \t\n\n\n"),
        open_row("first", "six"),
        open_row("best judged", "short again", scores=(5, 5, 4)),
        open_row("only the second passes", "passed"),
    ]
    files = [write(tmp_path / "1.parquet", one), write(tmp_path / "2.parquet", two)]
    counts, chats = curate(OPEN, tmp_path / "chats.jsonl", *files)
    assert chats == [
        ("first", "one"),
        ("best judged", "a long answer"),
        ("First", "in another case it is another question"),
        ("shortest", "\n\n  shorter  \t\n\n\n"),
        ("only the second passes", "passed"),
    ]
    assert counts == {"kept": 5, UNTESTED: 1, REPEATED: 5}


def test_of_questions_with_the_same_5_grams_the_first_is_kept(tmp_path):
    questions = [
        "a b c d e a b c d", "one two three four", "a b c d e", "a b c d f", "two three four five",
        "p q r s p q r", "q r s p q r s",  # which share all their 4-grams
    ]  # fmt: skip
    same = ["b c d e a b c d e", "A B C D E a b c d e\tA", "One  two three\n four ", "a  b c\nd e"]
    others = ["one two three", "f a b c d"]
    files = [write(tmp_path / "1.parquet", [seed_row("a b c d f", verified=False), *map(seed_row, questions)])]
    files += [write(tmp_path / "2.parquet", [seed_row(q, "print(2)") for q in (*same, *others)])]
    counts, chats = curate(RSTAR, tmp_path / "chats.jsonl", *files)
    assert [c[0] for c in chats] == [*questions, *others]
    assert counts == {"kept": 9, "not verified": 1, REPEATED: 4}


def test_code_that_is_missing_is_appended(tmp_path):
    starter, code = "def f(x):\n    pass\n", "def f(x):\n    return '```'\n"
    rows = [
        seed_row("double", "So:", starter_code=starter, code=code),
        seed_row(f"has it:\n{starter}!", f"Here:\n{code}\nDone.", starter_code=f"\n{starter}", code=f"{code}\n"),
        seed_row("other line ends", f"Here:\n{code}", code=code.replace("\n", " \r\n")),
        seed_row("within a line", "Use spin x.", code="in"),
        seed_row("only thought of", f"<think>\n{code}</think>\nSo:", code=code),
        seed_row("has none", "no code", starter_code=None, code=" \n"),
    ]
    _, chats = curate(RSTAR, tmp_path / "chats.jsonl", write(tmp_path / "rows.parquet", rows))
    assert chats == [
        ("double\n\n```python\ndef f(x):\n    pass\n```", "So:\n\n````python\ndef f(x):\n    return '```'\n````"),
        (f"has it:\n{starter}!", f"Here:\n{code}\nDone."),
        ("other line ends", f"Here:\n{code}"),
        ("within a line", "Use spin x.\n\n```python\nin\n```"),
        ("only thought of", f"<think>\n{code}</think>\nSo:\n\n````python\n{code}````"),
        ("has none", "no code"),
    ]


def test_synthetic_sft_has_no_flags(tmp_path, capsys):
    row = {"question": "add", "seed_question": "sum", "seed_source": "taco", "response": "So:", "code": "a + b"}
    files = [write(tmp_path / "synthetic.parquet", [row]), write(tmp_path / "seed.parquet", [seed_row("sum")])]
    counts, chats = curate(RSTAR, tmp_path / "chats.jsonl", *files)
    assert counts == {"kept": 2} and chats[0] == ("add", "So:\n\n```python\na + b\n```")
    said = capsys.readouterr().err
    assert f"{files[0]}: no verified and is_passed" in said and f"{files[1]}: no" not in said


@pytest.mark.parametrize("batch", [1, 2, 128])
def test_tokens_are_counted_in_the_answer_with_its_code(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(command, "_BATCH_ROWS", batch)
    # with the code 3 words more: "```python", "code" and "```"
    words = [("a", 16_382), ("b", 3), ("a", 16_381), ("b", 16_382), ("a", 1), ("c", 16_382)]
    rows = [seed_row(f"question {q}", f"{i} " * n, code="code") for i, (q, n) in enumerate(words)]
    seen = []

    def count(texts):
        seen.extend(texts)
        return [len(text.split()) for text in texts]

    counts, chats = curate(RSTAR, tmp_path / "chats.jsonl", write(tmp_path / "rows.parquet", rows), count=count)
    assert [(q, a.split()[0]) for q, a in chats] == [("question b", "1"), ("question a", "2")]
    assert counts == {"kept": 2, REPEATED: 2, LONG: 2}
    assert seen[1] == "1 1 1\n\n```python\ncode\n```"
    # where an earlier answer was kept the others are not counted, unless they are in the same batch
    assert [text[0] for text in seen] == [*({1: "0125", 2: "0125", 128: "012345"}[batch])]


def test_special_tokens_are_not_counted():
    def tokenizer(texts, add_special_tokens, return_attention_mask):
        return {"input_ids": [[7] * (len(text.split()) + add_special_tokens) for text in texts]}

    assert command._counter(tokenizer)(("a b", "")) == [2, 0]


def test_the_tokenizer_of_a_model_counts(tmp_path):
    tokenizer = corpora.smollm2()
    texts = ["def f(x):\n    return x + 1", "héllo <|im_end|>", ""]
    assert command._counter(tokenizer)(texts) == [len(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    # "a" and " a" are tokens; by characters both answers are of half as many
    rows = [seed_row("fits", "a" + " a" * 16_383), seed_row("does not", "a" + " a" * 16_384)]
    file, out = write(tmp_path / "rows.parquet", rows), tmp_path / "chats.jsonl"
    options = ["curate", "--format", RSTAR, str(file), "--out", str(out)]
    assert main([*options, "--model", "smollm2-135m-instruct"]) == 0
    assert [c.prompt for c in read_chats(out)] == ["fits"]
    assert main([*options, "--overwrite"]) == 0
    assert [c.prompt for c in read_chats(out)] == ["fits", "does not"]


def test_what_stands_in_the_way_is_said_before_anything_is_written(tmp_path, capsys):
    def file(name, row, *without):
        return write(tmp_path / f"{name}.parquet", [{k: v for k, v in row.items() if k not in without}])

    def fails(*arguments, name=OPEN, out=tmp_path / "chats.jsonl"):
        before = corpora.files_of(tmp_path)
        assert main(["curate", "--format", name, "--out", str(out), *map(str, arguments)]) == 2
        assert corpora.files_of(tmp_path) == before
        return capsys.readouterr().err

    good, lacks = file("good", open_row()), file("lacks", open_row(), "output", "unit_tests")
    few, nested = file("few", {"input": "q", "output": "a"}), file("nested", open_row(tests_execution_status=["pass"]))
    said = fails(good, lacks, few, nested)
    assert f"{lacks} has no column output; it has id, input, domain, generation_algorithm, llm_judgement" in said
    assert f"{few} has no column llm_judgement, tests_execution_status, average_test_score; it has input, ou" in said
    assert f"{nested}: column tests_execution_status must hold strings, it holds list<" in said
    assert f"{good} has no column question, response, starter_code, code, verified, is_pas" in fails(good, name=RSTAR)
    # a file with a column of the synthetic set is not one if it has any that this set has not
    for without in (("verified",), ("is_passed",), ("starter_code",), ("verified", "is_passed")):
        seed = file("-".join(without), seed_row(seed_question="sum"), *without)
        assert f"{seed} has no column {', '.join(without)}; it has question_id" in fails(seed, name=RSTAR)

    table = pa.Table.from_pylist([open_row()])
    pq.write_table(table.append_column("output", table["output"]), tmp_path / "double.parquet")
    assert f"{tmp_path}/double.parquet has 2 columns output" in fails(good, tmp_path / "double.parquet")

    (tmp_path / "plain.parquet").write_text("not parquet")
    assert f"{tmp_path}/plain.parquet is not a parquet file" in fails(good, tmp_path / "plain.parquet")
    assert f"{tmp_path}/none.parquet does not exist" in fails(good, tmp_path / "none.parquet")
    (tmp_path / "link.parquet").symlink_to(good)
    assert f"given more than once: {good}" in fails(good, tmp_path / "link.parquet")
    said = fails(file("dropped", open_row(answer="")))
    assert "dropped.parquet is kept" in said and f"\n1  {BLANK}\n" in said
    assert "--model counts" in fails(good, "--model", "any")
    assert f"--out {lacks} exists" in fails(good, out=lacks)
    assert "a file of their own" in fails(good, "--overwrite", out=good)
    assert "a file of their own" in fails(good, "--overwrite", out=tmp_path)


def test_the_command_prints_the_counts(tmp_path, capsys):
    rows = [open_row(f"question {i}") for i in range(12)] + [open_row("q", scores=(4, 5, 5)), open_row("question 3")]
    out = tmp_path / "new" / "chats.jsonl"
    arguments = ["curate", "--format", OPEN, str(write(tmp_path / "rows.parquet", rows)), "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert all(f"\n{line}\n" in said for line in ("12  kept", " 1  requirement_conformance below 5", f" 1  {REPEATED}"))
    assert out.read_text().startswith('{"messages": [{"role": "user", "content": "question 0"}, {"role": "assistant"')


def strings(*raw: bytes) -> pa.Array:
    """A column of strings with these bytes, which need not be UTF-8: neither pyarrow nor parquet looks."""
    ends = [0, *(sum(map(len, raw[: i + 1])) for i in range(len(raw)))]
    return pa.Array.from_buffers(
        pa.string(), len(raw), [None, pa.array(ends, pa.int32()).buffers()[1], pa.py_buffer(b"".join(raw))]
    )


def test_bytes_that_are_no_text_are_dropped(tmp_path):
    good = "é \u2028\x00 \U0001f600 \\ud83d"
    half = b"half \xed\xa0\xbd of a surrogate pair"
    table = pa.Table.from_pylist([open_row(str(i)) for i in range(4)])
    for name, raw in (("input", [half, b"caf\xe9", b"answer"]), ("output", [b"1", b"2", half])):
        table = table.set_column(table.schema.get_field_index(name), name, strings(good.encode(), *raw))
    pq.write_table(table, tmp_path / "rows.parquet")
    counts, chats = curate(OPEN, tmp_path / "chats.jsonl", tmp_path / "rows.parquet")
    assert counts == {"kept": 1, UNENCODABLE: 3} and chats == [(good, good)]


def test_neither_batches_nor_row_groups_nor_long_strings_matter(tmp_path, monkeypatch):
    rows = [
        open_row(f"question {i % 7}", "x" * (i * 5 % 11 + 1), scores=(5, 5 - (i % 13 == 3), 5 - i % 2))
        for i in range(60)
    ]
    found = set()
    for i, (batch, groups, cut) in enumerate([(128, 60, 30), (1, 60, 31), (7, 1, 1), (7, 9, 59)]):
        monkeypatch.setattr(command, "_BATCH_ROWS", batch)
        files, table = [tmp_path / f"{i}-{j}.parquet" for j in range(2)], pa.Table.from_pylist(rows)
        if i % 2:  # as polars writes them
            table = table.cast(pa.schema([(name, pa.large_string()) for name in table.schema.names]))
        for file, part in zip(files, (table[:cut], table[cut:]), strict=True):
            pq.write_table(part, file, row_group_size=groups)
        counts, _ = curate(OPEN, tmp_path / f"{i}.jsonl", *files)
        found.add((json.dumps(counts), (tmp_path / f"{i}.jsonl").read_bytes()))
        assert counts["kept"] == 7 and counts[REPEATED] > 10
    assert len(found) == 1


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.null()], ids=str)
def test_strings_of_every_kind_are_read(tmp_path, kind):
    codes = [None] * 2 if kind == pa.null() else ["print(0)", "print(1)"]
    table = pa.Table.from_pylist([seed_row(str(i)) for i in range(2)])
    table = table.set_column(table.schema.names.index("code"), "code", pa.array(codes).cast(kind))
    pq.write_table(table, tmp_path / "rows.parquet")
    _, chats = curate(RSTAR, tmp_path / "chats.jsonl", tmp_path / "rows.parquet")
    ends = [f"\n\n```python\n{code}\n```" if code else "" for code in codes]
    assert [answer for _, answer in chats] == [f"print(sum){end}" for end in ends]


def watched(monkeypatch, see) -> None:
    """Calls `see` whenever the rows of a batch have been taken out."""
    whole = command._rows

    def rows(batch):
        found = whole(batch)
        see()
        return found

    monkeypatch.setattr(command, "_rows", rows)


@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_midway_leaves_what_was_there(tmp_path, monkeypatch, old):
    file, out, seen = tmp_path / "rows.parquet", tmp_path / "chats.jsonl", []
    write(file, [open_row(f"question {i}") for i in range(300)])
    monkeypatch.setattr(command, "_BATCH_ROWS", 100)
    if old:
        out.write_text(old)

    def see():
        seen.append([p.name for p in tmp_path.iterdir() if p not in (file, out)])
        if len(seen) == 5:  # the second batch of the three that are written
            raise KeyboardInterrupt

    watched(monkeypatch, see)
    with pytest.raises(KeyboardInterrupt):
        command.curate([file], RECIPES[OPEN], out, count_by_characters)
    assert seen[:3] == [[]] * 3 and seen[4][0].startswith(".partial-chats.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {file.name} | ({out.name} if old else set())
    assert old is None or out.read_text() == old


def test_a_file_that_breaks_off_is_named(tmp_path):
    whole = write(tmp_path / "rows.parquet", [open_row(f"question {i}") for i in range(50)], compression="none")
    content = bytearray(whole.read_bytes())
    content[10:600] = bytes(590)  # the first page, with the footer as it was
    whole.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read"):
        command.curate([whole], RECIPES[OPEN], tmp_path / "chats.jsonl", count_by_characters)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """One row group of 32 MB; neither Python nor pyarrow holds a twelfth of it at once."""
    monkeypatch.setattr(command, "_BATCH_ROWS", 4)
    rows = [seed_row(f"question {i}", f"{i:08}" * 4096) for i in range(1000)]
    pages = dict(compression="none", use_dictionary=False, data_page_size=1 << 16, write_batch_size=8)
    file = write(tmp_path / "rows.parquet", rows, **pages)
    size, allocated = file.stat().st_size, []
    assert size > 32_000_000 and pq.ParquetFile(file).num_row_groups == 1
    del rows
    before = pa.total_allocated_bytes()
    watched(monkeypatch, lambda: allocated.append(pa.total_allocated_bytes() - before))
    tracemalloc.start()
    try:
        counts = command.curate([file], RECIPES[RSTAR], tmp_path / "chats.jsonl", count_by_characters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts["kept"] == 1000 and len(allocated) == 500
    assert peak < size / 12 and max(allocated) < size / 12
