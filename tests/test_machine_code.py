"""The kernels in machine code: the reader on a listing whose counts are known, and the counts kept from growing."""

import json
import shutil
from dataclasses import asdict

import machine_code
import pytest
import sass

MOST = 1.1  # times as many instructions as were committed
# By hand: a prologue, and a loop of 10 instructions, one a call of a slow path; a shorter path does not store.
# Two loads set barrier 0 and one sets 1. At 0x70 what is waited for is 0: by then three are under way.
LISTING = [
    ("LDC R1, c[0x0][0x28]", 7, 0),
    ("LDG.E.128 R4, desc[UR4][R2.64]", 0, 0),  # the loop begins
    ("@!P1 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10]", 0, 0),
    ("LDG.E.128 R12, desc[UR4][R2.64+0x20]", 1, 0),
    ("LDG.E R16, desc[UR4][R6.64]", 2, 0),  # of 4 bytes
    ("@P0 BRA 0x70", 7, 0),
    ("CALL.REL.NOINC 0xe0", 7, 0),  # and then the jump that would follow it
    ("MUFU.EX2 R4, R4", 7, 0b000001),
    ("@P2 BRA 0xa0", 7, 0),
    ("STG.E.128 desc[UR4][R2.64], R4", 7, 0b000110),
    ("@P3 BRA 0x10", 7, 0b000010),  # and ends
    ("@P0 EXIT", 7, 0),
    ("FADD R0, R1, R2", 7, 0),
    ("EXIT", 7, 0),
    ("RET.REL.NODEC R2 0x0", 7, 0),
    ("BRA 0xf0", 7, 0),
]


def written(listing) -> str:
    """As cuobjdump writes it."""
    return "\n".join(
        f"        /*{16 * n:04x}*/                   {text} ;    /* 0x0123456789abcdef */\n"
        f"                                              /* 0x{sets << 46 | waits << 52:016x} */"
        for n, (text, sets, waits) in enumerate(listing)
    )


def test_a_listing_is_read_as_by_hand():
    code = sass.parse(written(LISTING))
    assert [i.text for i in code] == [text for text, *_ in LISTING]
    (loop,) = sass.loops(code)
    assert [i.address for i in loop.path] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0x80, 0x90, 0xA0]
    assert (loop.loads, loop.stores, loop.count("MUFU"), loop.calls, loop.in_flight) == (3, 1, 1, 1, 3)
    whole = sass.body(code)
    assert len(whole.path) == 13 and whole.path[-1].text == "EXIT"  # not by the exit that comes first
    assert len(sass.body(code, (3, 0)).path) == 12
    with pytest.raises(ValueError, match=r"no path with \(9, 9\).*\(3, 0\), \(3, 1\)"):
        sass.body(code, (9, 9))


def test_a_path_that_moves_numbers_one_by_one_is_not_taken():
    one_by_one = ["@P0 BRA 0x40", "LDG.E.U16 R4, [R2]", "LDG.E.U16 R5, [R2]", "BRA 0x50", "NOP", "EXIT"]
    code = sass.parse(written([(text, 7, 0) for text in one_by_one]))
    assert [i.address for i in sass.body(code).path] == [0x00, 0x40, 0x50]


LOAD, STORE, SHARED = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDS.128 R8, [R3]"


@pytest.mark.parametrize(
    "texts, found",
    [
        (
            [LOAD, SHARED, "@P0 BRA 0x10", STORE, "@P1 BRA 0x0"],
            [5],
        ),  # sums of a block's warps, read in the loop of rows
        # two passes over a row on chip
        (["NOP", SHARED, "@P0 BRA 0x10", SHARED, STORE, "@P1 BRA 0x30", "@P2 BRA 0x0"], [2, 3]),
        ([LOAD, LOAD, "@P0 BRA 0x0", LOAD, "@P1 BRA 0x30"], [3]),  # two at a time, and one that may be left
        ([LOAD, "EXIT", STORE, "BRA 0x0"], []),  # code out of the way, to which nothing before it leads
    ],
)
def test_the_loops_that_are_passes(texts, found):
    code = sass.parse(written([(text, 7, 0) for text in [*texts, "EXIT"]]))
    assert [len(piece.path) for piece in sass.loops(code)] == found


@pytest.mark.parametrize(
    "listing, most",
    [
        # of two loads one is waited for, and two more follow
        ([(LOAD, 0, 0), (LOAD, 1, 0), ("NOP", 7, 0b000001), (LOAD, 2, 0), (LOAD, 3, 0), ("NOP", 7, 0b001110)], 3),
        # each is waited for before the next
        ([(LOAD, 5, 0), ("NOP", 7, 0b100000), (LOAD, 4, 0), ("NOP", 7, 0b010000)], 1),
        # the next round waits for the last load of this one, and for all but one of a barrier
        ([("DEPBAR.LE SB0, 0x1", 7, 0), (LOAD, 0, 0), (LOAD, 0, 0), ("@P0 BRA 0x0", 7, 0)], 3),
    ],
)
def test_loads_in_flight(listing, most):
    code = sass.parse(written([*listing, ("EXIT", 7, 0)]))
    (piece,) = sass.loops(code) or [sass.body(code)]
    assert piece.in_flight == most


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [
        (32, 1024, 1024, 2),  # by threads
        (33, 1024, 1024, 1),  # by registers, which come in eights: 40 · 1024 twice are more than there are
        (96, 128, 1280, 5),  # 16384 // (96 · 32) = 5 warps a quarter
        (32, 512, 130560, 1),  # by shared memory
        (16, 32, 1024, 32),  # by the most there may be
    ],
)
def test_blocks_on_a_multiprocessor(registers, threads, shared, blocks):
    assert machine_code.blocks_of(registers, threads, shared) == blocks


def test_a_pattern_that_finds_not_one_kernel_says_what_there_is(monkeypatch):
    there = ["sfr::other<float>", "sfr::scale_kernel<float, 4>", "sfr::scale_kernel<float, 8>"]
    monkeypatch.setattr(sass, "resources", lambda *_: dict.fromkeys(there))
    monkeypatch.setattr(sass, "demangled", lambda names: names)
    for pattern, listed in (("scale_kernel<float, 2>", there[1:]), ("scale_kernel<", there[1:]), ("gone<", there)):
        monkeypatch.setattr(machine_code, "SOURCES", {"scale": machine_code.Source(pattern, 4)})
        with pytest.raises(ValueError, match=f"scale: '{pattern}' should find one kernel") as raised:
            machine_code.cuda_kernels(None)
        assert str(raised.value).split("\n")[1:] == listed


@pytest.fixture(scope="module")
def record():
    return json.loads(machine_code.RESULT.read_text())


def test_the_readme_has_the_table_of_the_record(record):
    text = machine_code.README.read_text()
    assert machine_code.with_table(text, record) == text


def worse(now: dict[str, dict], then: dict[str, dict]) -> list[str]:
    found = []
    for name, kernel in then.items():
        passes, known = ([part["does"] for part in k["parts"]] for k in (now[name], kernel))
        if passes != known:
            found.append(f"{name}: {passes}, were {known}")
            continue
        for mine, old in zip(now[name]["parts"], kernel["parts"], strict=True):
            if mine["instructions"] > MOST * old["instructions"]:
                found.append(f"{name} {old['does']}: {mine['instructions']} instructions, were {old['instructions']}")
            if mine["loads"] < old["loads"]:
                found.append(f"{name} {old['does']}: {mine['loads']} loads in flight, were {old['loads']}")
        if now[name]["in_flight"] < kernel["in_flight"]:
            found.append(f"{name}: {now[name]['in_flight']} bytes in flight, were {kernel['in_flight']}")
        if now[name]["stack"] > kernel["stack"]:
            found.append(f"{name}: {now[name]['stack']} bytes on the stack")
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_no_kernel_does_more_than_was_committed(record, compiled):
    """After a change that is meant: python tests/machine_code.py --write."""
    pytest.importorskip("triton")
    made = machine_code.versions()
    kernels = {}
    if made["nvcc"] == record["versions"]["nvcc"]:
        kernels |= machine_code.cuda_kernels(compiled("9.0"))
    if made["triton"] == record["versions"]["triton"]:
        kernels |= machine_code.triton_kernels()
    if not kernels:
        pytest.skip(f"{made} compile otherwise than {record['versions']}, which the record is of")
    now = {name: asdict(kernel) for name, kernel in kernels.items()}
    assert list(record["now"]) == list(machine_code.SOURCES)
    found = worse(now, {name: kernel for name, kernel in record["now"].items() if name in now})
    assert not found, "\n".join(found)
