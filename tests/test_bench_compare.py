"""Comparing result files: a planted slow-down is found, noise is not, and what cannot be compared is refused."""

import copy
import json
import random
import statistics

import pytest
from bench_samples import sample

from benchmarks.report import compare, resultfile

CASE = ("norm_act", "8192 rows", "bfloat16")


def stats(ms: float, noise: float, rounds: int = 40, seed: int = 0) -> dict:
    """Rounds around a median, `noise` of it between the quartiles."""
    draw = random.Random(seed)
    data = sorted(1e-3 * ms * (1 + noise / 1.349 * draw.gauss(0, 1)) for _ in range(rounds))
    middle = (data[(rounds - 1) // 2] + data[rounds // 2]) / 2
    data = [t * 1e-3 * ms / middle for t in data]
    q1, q3 = data[rounds // 4], data[-1 - rounds // 4]
    return dict(median=1e-3 * ms, q1=q1, q3=q3, iqr=q3 - q1, rounds=rounds, data=data)


def entry(ms: float, provider: str = "cuda", kind: str = "ours", noise: float = 0.01, seed: int = 0, **extra) -> dict:
    op, label, dtype = CASE
    info = dict(op=op, label=label, dtype=dtype, case={}, provider=provider, kind=kind, flops=0, bytes=100)
    return dict(group=f"{op}: {label}, {dtype}", stats=stats(ms, noise, seed=seed), extra_info=info | extra)


def content(*entries: dict, **run) -> dict:
    device = dict(name="GPU", kind="cuda", capability="9.0", driver="1", clocks=None)
    defaults = dict(device=device, selection="full", complete=True, versions=dict(torch="2.11.0"), absent=[], failed=[])
    return dict(benchmarks=list(entries), sfr_kernels=defaults | run)


def of(a: dict, b: dict, threshold: float = 0.05) -> compare.Comparison:
    return compare.compare(content(a), content(b), threshold)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [True, False], ids=["rounds", "quartiles"])
def test_ten_percent_is_found_and_one_is_not(seed, kept):
    base = entry(1.0, seed=seed)
    for factor, found in ((1.10, True), (1.01, False), (0.99, False), (0.9, False)):
        new = entry(factor, seed=seed + 100)
        if not kept:
            new["stats"].pop("data")
        outcome = of(base, new)
        assert outcome.failed is found and outcome.mean_ratio == pytest.approx(factor)
        (pair,) = outcome.pairs
        assert pair.low < factor < pair.high


@pytest.mark.parametrize("seed", range(5))
def test_what_lies_within_the_noise_is_no_regression(seed):
    assert not of(entry(1.0, noise=0.2, seed=seed), entry(1.06, noise=0.2, seed=seed + 50)).failed
    assert of(entry(1.0, noise=0.01, seed=seed), entry(1.06, noise=0.01, seed=seed + 50)).failed
    # more rounds of the same run do not make a noisy run certain
    base, new = entry(1.0), entry(1.06)
    base["stats"], new["stats"] = stats(1.0, 0.2, 1000, seed), stats(1.06, 0.2, 1000, seed + 50)
    assert not of(base, new).failed


def test_two_rounds_say_nothing_of_the_noise():
    base, new = entry(1.0), entry(2.0)
    base["stats"]["rounds"], base["stats"]["data"] = 2, base["stats"]["data"][:2]
    assert not of(base, new).failed


def test_the_threshold_is_the_callers():
    assert not of(entry(1.0), entry(1.10), threshold=0.2).failed
    assert of(entry(1.0), entry(1.04), threshold=0.02).failed


def race(ms: float, limit: float, *peers: float, seed: int = 0, **work) -> dict:
    """A file with one case: ours, its limit, and peers."""
    found = [entry(ms, seed=seed, **work), entry(limit, "limit", "limit", seed=seed + 7, **work)]
    return content(*found, *(entry(p, f"peer {i}", "peer", seed=seed + 20 + i) for i, p in enumerate(peers)))


def judged(a: dict, b: dict) -> compare.Pair:
    found = compare.compare(a, b, 0.05)
    (pair,) = (p for p in found.pairs if p.kind == "ours")
    assert found.failed is pair.regressed
    return pair


def test_a_slow_down_must_be_one_by_itself_and_against_the_references():
    both = judged(race(1.0, 0.8), race(1.2, 0.8, seed=3))
    assert both.regressed and both.time == pytest.approx(1.2) and both.ratio == pytest.approx(1.2)
    slower_clock = judged(race(1.0, 0.8), race(1.2, 0.96, seed=3))
    assert not (slower_clock.regressed or slower_clock.hidden) and slower_clock.ratio == pytest.approx(1.0)
    faster_clock = judged(race(1.0, 0.8), race(1.0, 0.72, seed=3))
    assert faster_clock.hidden and not faster_clock.regressed and faster_clock.ratio == pytest.approx(1 / 0.9)
    out = compare.rendered(compare.compare(race(1.0, 0.8), race(1.0, 0.72, seed=3), 0.05))
    assert "slower?" in out and "1.11 x in units of its references, 1.00 x by itself" in out and "REGR" not in out


def test_one_reference_that_moved_does_not_decide():
    pair = judged(race(1.0, 0.8, 2.0, 3.0), race(1.2, 2.4, 2.0, 3.0, seed=3))
    assert pair.references == 3 and pair.ratio == pytest.approx(1.2) and pair.regressed
    pair = judged(race(1.0, 0.8, 2.0, 3.0), race(1.0, 0.4, 2.0, 3.0, seed=3))
    assert pair.ratio == pytest.approx(1.0) and not pair.hidden


def test_a_reference_did_the_same_work_in_both_files_and_more_than_twice():
    assert judged(race(1.0, 0.8), race(1.2, 0.96, flops=5, seed=3)).references == 0
    again = race(1.2, 0.96, seed=3)
    again["benchmarks"][1]["stats"] |= dict(rounds=2, data=again["benchmarks"][1]["stats"]["data"][:2])
    assert judged(race(1.0, 0.8), again).references == 0 and judged(race(1.0, 0.8), again).regressed
    assert judged(content(entry(1.0)), content(entry(1.2, seed=3))).references == 0


def test_the_noise_of_the_references_counts():
    a, b = race(1.0, 0.8), race(1.12, 0.8, seed=3)
    assert judged(a, b).regressed
    b["benchmarks"][1]["stats"] = stats(0.8, 0.6)
    assert not judged(a, b).regressed


def test_what_references_of_a_case_differ_by_counts():
    a, same = race(1.0, 0.8, 2.0, 3.0), race(1.12, 0.8, 2.0, 3.0, seed=3)
    apart = race(1.12, 0.8, 2.0 * 1.1, 3.0 / 1.1, seed=3)
    assert judged(a, same).regressed and not judged(a, apart).regressed
    found = compare.compare(a, apart, 0.05)
    assert 0.1 < found.scatter < 0.3 and f"differ by {found.scatter:.1%}" in compare.rendered(found)
    # but not what all of them do: that is the machine
    assert compare.compare(a, race(1.3, 1.04, 2.6, 3.9, seed=3), 0.05).scatter == pytest.approx(0, abs=1e-9)


def rerun(found: dict, seed: int, apart: float, planted: dict[str, float]) -> dict:
    """Another run of a file: rounds drawn again, each off by 3%; every case up to 1.3 times faster or slower than it
    was, every provider off by another `apart`. planted: op → how many times as long ours take."""
    found, draw, drift = copy.deepcopy(found), random.Random(seed), {}
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        factor = drift.setdefault(benchmark["group"], 1.3 ** draw.uniform(-1, 1)) * (1 + draw.gauss(0, apart))
        factor *= planted.get(info["op"], 1.0) if info["kind"] == "ours" else 1.0
        again = draw.choices(benchmark["stats"]["data"], k=benchmark["stats"]["rounds"])
        data = [factor * (1 + draw.gauss(0, 0.03)) * t for t in again]
        q1, median, q3 = statistics.quantiles(data, n=4)
        benchmark["stats"] |= dict(median=median, q1=q1, q3=q3, iqr=q3 - q1, data=data)
    return found


@pytest.mark.parametrize("kind, seed", [("cuda", 0), ("cuda", 1), ("cpu", 2), ("cpu", 3)])
def test_a_machine_that_drifts_is_no_regression(kind, seed):
    found = compare.compare(sample(kind), rerun(sample(kind), seed, 0.03, {}), 0.05)
    assert not found.regressions and 0.02 < found.scatter < 0.05
    assert sum(p.time > 1.05 for p in found.pairs if p.kind == "ours") > 10, "it looks like many"


@pytest.mark.parametrize("kind, seed", [("cuda", 0), ("cuda", 1), ("cpu", 2), ("cpu", 3)])
def test_ten_percent_of_ours_are_found_on_a_machine_that_drifts(kind, seed):
    slow = "linear_cross_entropy"
    found = compare.compare(sample(kind), rerun(sample(kind), seed, 0.0, {slow: 1.1}), 0.05)
    ours = {p.key for p in found.pairs if p.kind == "ours" and p.key[0] == slow}
    assert len(ours) > 15 and found.failed and {p.key for p in found.regressions} < ours
    # the others are those that the machine's drift makes up for: it is said of them
    assert len([p for p in found.pairs if p.key in ours and (p.regressed or p.hidden)]) > 0.8 * len(ours)


def test_only_ours_fail():
    a, b = content(entry(1.0, "Liger", "peer")), content(entry(2.0, "Liger", "peer"))
    found = compare.compare(a, b, 0.05)
    assert found.pairs[0].problems and not found.failed and found.mean_ratio is None
    gone = compare.compare(a, content(entry(1.0)), 0.05)
    assert not gone.failed and gone.only_base == [(*CASE, "Liger")] and gone.only_new == [(*CASE, "cuda")]


def test_more_memory_is_a_regression():
    many = 100 * resultfile.MIB
    for factor, found in ((1.0, False), (1.04, False), (1.10, True), (0.5, False)):
        outcome = of(entry(1.0, peak_bytes=many), entry(1.0, peak_bytes=int(factor * many)))
        assert outcome.failed is found
    assert not of(entry(1.0, peak_bytes=0), entry(1.0, peak_bytes=4096)).failed  # less than the allocator rounds by
    assert not of(entry(1.0, peak_bytes=None), entry(1.0, peak_bytes=many)).failed


def test_what_is_no_longer_right_is_a_regression():
    def judged(ratio):
        return entry(1.0, errors=dict(loss=dict(ratio=0.1), hidden=dict(ratio=ratio)), worst="hidden")

    assert not of(judged(0.4), judged(0.9)).failed
    for new in (judged(1.2), judged(None), entry(1.0)):
        assert of(judged(0.4), new).failed
    assert "hidden" in of(judged(0.4), judged(None)).regressions[0].problems[0]


def test_ours_that_are_gone_are_named_with_the_reason():
    a, peer = content(entry(1.0), entry(1.0, "Liger", "peer")), entry(1.0, "Liger", "peer")
    group = entry(1.0)["group"]
    wrong = dict(op=CASE[0], group=group, provider="cuda", ours=True, reason="WrongResultError: dy")
    for run, reason in (
        (dict(failed=[wrong]), "failed: WrongResultError: dy"),
        (dict(absent=[dict(op=CASE[0], group=group, provider="cuda", reason="no nvcc")]), "absent: no nvcc"),
        (dict(failed=[wrong | dict(group="norm_act: 1 row, bfloat16")]), "not in the new file"),
        (dict(), "not in the new file"),
        (dict(failed=[wrong], complete=False), "failed: WrongResultError: dy"),
    ):
        found = compare.compare(a, content(peer, **run), 0.05)
        assert found.failed and found.lost == {(*CASE, "cuda"): reason}


def test_ours_that_the_new_file_did_not_come_to_are_a_note():
    a, peer = content(entry(1.0), entry(1.0, "Liger", "peer")), entry(1.0, "Liger", "peer")
    late = dict(op=CASE[0], group=entry(1.0)["group"], provider="cuda", reason="not run: the time was up (--minutes)")
    for run, reason in (
        (dict(absent=[late], complete=False, cut=True), "not run: the time was up (--minutes)"),
        (dict(absent=[late]), "not run: the time was up (--minutes)"),
        (dict(complete=False), "not in the new file"),
    ):
        found = compare.compare(a, content(peer, **run), 0.05)
        assert not found.failed and not found.lost and found.not_run == {(*CASE, "cuda"): reason}
        out = compare.rendered(found)
        assert f"not measured: cuda: norm_act, 8192 rows, bfloat16: {reason}" in out and "GONE" not in out


def test_a_smaller_selection_loses_whole_cases_only():
    a = content(entry(1.0), entry(1.0, "triton"))
    other = entry(1.0, label="1 row")
    assert compare.compare(a, content(other), 0.05).failed
    quick = compare.compare(a, content(other, selection="quick"), 0.05)
    assert not quick.failed and len(quick.only_base) == 2
    assert compare.compare(a, content(entry(1.0), selection="quick"), 0.05).lost.keys() == {(*CASE, "triton")}


def test_runs_that_differ_say_so():
    a, b = content(entry(1.0)), content(entry(1.0), versions=dict(torch="2.12.0"), complete=False)
    notes = compare.compare(a, b, 0.05).notes
    assert notes == ["different torch: 2.11.0 -> 2.12.0", "the new file's run did not end"]
    assert compare.rendered(compare.compare(a, b, 0.05)).startswith("!!! different torch")
    cut = content(entry(1.0), complete=False, cut=True)
    assert compare.compare(a, cut, 0.05).notes == ["the new file's run was cut: the time was up"]


def test_clocks_differ_where_the_device_does_or_by_more_than_they_move():
    def clocked(**clocks) -> dict:
        common = dict(sm_mhz=1755, memory_mhz=2619, max_sm_mhz=1980, max_memory_mhz=2619, power_limit_w=700.0)
        return content(entry(1.0), device=dict(name="GPU", kind="cuda", clocks=common | clocks))

    def notes(b: dict) -> list[str]:
        return compare.differences(clocked(), b)

    assert notes(clocked(sm_mhz=1770, memory_mhz=1593)) == []
    assert notes(clocked(sm_mhz=1700)) == ["different SM clocks under load: 1755 MHz -> 1700 MHz"]
    assert notes(clocked(max_sm_mhz=1755)) == ["different highest SM clocks: 1980 MHz -> 1755 MHz"]
    assert notes(clocked(power_limit_w=500.0)) == ["different power limits: 700 W -> 500 W"]
    unknown = notes(content(entry(1.0), device=dict(name="GPU", kind="cuda", clocks=None)))
    assert len(unknown) == 3 and unknown[-1] == "different power limits: 700 W -> unknown"


# ---------------------------------------------------------------------------------------------------------------------
# The command, on whole files


def files(tmp_path, a: dict, b: dict) -> list[str]:
    for name, found in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(found))
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


def slowed(found: dict, op: str, provider: str, factor: float) -> dict:
    found = copy.deepcopy(found)
    for benchmark in found["benchmarks"]:
        if (benchmark["extra_info"]["op"], benchmark["extra_info"]["provider"]) == (op, provider):
            for key in ("median", "q1", "q3", "iqr", "min", "max", "mean"):
                benchmark["stats"][key] *= factor
            benchmark["stats"]["data"] = [factor * t for t in benchmark["stats"]["data"]]
    return found


def test_a_file_is_no_worse_than_itself(tmp_path, capsys):
    assert compare.main(files(tmp_path, sample(), sample())) == 0
    out = capsys.readouterr().out
    assert "REGRESSION" not in out and "ratios: 1.000" in out and "0 of ours became worse, 0 are gone." in out


def test_a_slowed_kernel_leads_the_table(tmp_path, capsys):
    a, b = sample(), slowed(slowed(sample(), "flow_mse", "cuda", 1.1), "flow_mse", "torch.compile", 3.0)
    assert compare.main(files(tmp_path, a, b)) == 1
    lines = capsys.readouterr().out.splitlines()
    first, second, third = lines[1:4]
    assert all("REGRESSION" in line and "cuda: flow_mse" in line for line in (first, second))
    assert "peer worse" in third and third.split()[0] == "3.000"
    assert first.index("REGRESSION") == second.index("REGRESSION") == third.index("peer worse")
    assert compare.main([*files(tmp_path, a, b), "--threshold", "0.15"]) == 0
    assert compare.main([*files(tmp_path, a, b), "--provider", "triton"]) == 0
    assert compare.main([*files(tmp_path, a, b), "--provider", "triton", "--provider", "cuda"]) == 1


def test_devices_that_differ_are_refused(tmp_path, capsys):
    other = copy.deepcopy(sample())
    other["sfr_kernels"]["device"]["name"] = "NVIDIA H200"
    paths = files(tmp_path, sample(), other)
    assert compare.main(paths) == 2
    assert "NVIDIA H200" in capsys.readouterr().err
    assert compare.main([*paths, "--different-devices"]) == 0
    assert capsys.readouterr().out.startswith("!!! different devices: NVIDIA H100")


def test_bad_input_is_named(tmp_path, capsys):
    good, other = files(tmp_path, sample(), content(device=sample()["sfr_kernels"]["device"]))
    broken = tmp_path / "broken.json"
    for text, reason in (("{", "not JSON"), ("[]", "not a result file"), ('{"benchmarks": []}', "not a result file")):
        broken.write_text(text)
        with pytest.raises(ValueError, match=f"broken.json.*{reason}"):
            resultfile.load(broken)
        assert compare.main([good, str(broken)]) == 2
    for arguments in ([good, "missing.json"], [good, good, "--provider", "nobody"], [good, good, "--threshold", "-1"]):
        assert compare.main(arguments) == 2
    err = capsys.readouterr().err
    assert "missing.json" in err and "nobody; there are" in err and "--threshold must be above 0" in err
    assert compare.main([other, other]) == 2 and "no benchmark in common" in capsys.readouterr().err
