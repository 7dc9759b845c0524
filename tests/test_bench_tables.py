"""What is written from result files: the terminal's tables, README's sections and figures; README is up to date."""

import io
import json
import re
import shutil

import pytest
from bench_samples import sample
from rich.console import Console

from benchmarks.report import accounts, figures, readme, terminal, words
from benchmarks.report.reading import races
from benchmarks.report.resultfile import shortfall
from benchmarks.step.providers import PUBLISHED_LOOPS, SFR_STORED, SFT_HF

# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def printed(content: dict, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.render(content, console)
    return console.export_text().splitlines()


def block(lines: list[str], op: str) -> list[str]:
    """An op's table, its head first; any part that ends with an empty line."""
    start = lines.index(op) + 1
    return lines[start : lines.index("", start)]


def heads(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("width", [60, 80, 130])
def test_numbers_line_up_at_any_width(kind, width):
    lines = printed(sample(kind), width)
    assert max(map(len, lines)) <= width and not any(line.endswith(" ") for line in lines)
    for op, least in (("linear_cross_entropy", 20), ("flow_loss", 20), ("training_step", 11), ("collation", 6)):
        head, *rows = block(lines, op)
        ends = [m.end() for m in re.finditer(r"\S+( \S+)*", head)]
        numbers = [row for row in rows if row.startswith("  ")]
        assert len(numbers) >= least
        for row in numbers:
            found = {m.end() for m in re.finditer(r"(?<=  )[\d.]+(e-\d+)?(?=  |$)", row)}
            assert found <= set(ends), row
            assert ends[0] in found, "a median for everybody"


def test_every_race_shows_what_was_measured():
    content = sample()
    lines = printed(content, 200)
    head, *rows = block(lines, "softmax_xent")
    assert heads(head) == [
        "ms", "± IQR", "× limit", "TB/s", "peak MiB", "error", "of bound", "× ours",
    ]  # fmt: skip
    race = next(r for r in races(content) if r.op == "softmax_xent")
    ours, peer = race.fastest("ours"), race.fastest("peer")
    shown = {row.split()[0]: row.split()[1:] for row in rows[1 : 1 + len(race.results)]}
    assert rows[0] == race.title
    assert float(shown[ours.provider][0]) == pytest.approx(ours.ms, rel=1e-2)
    assert float(shown[ours.provider][2]) == pytest.approx(ours.ms / race.limit_ms, abs=0.006)
    assert float(shown[ours.provider][3]) == pytest.approx(ours.extra["tb_per_s"], rel=6e-3)
    assert float(shown[ours.provider][-1]) == pytest.approx(ours.worst["ratio"], abs=0.006)
    assert float(shown[peer.provider][-1]) == pytest.approx(peer.ms / ours.ms, abs=0.006)
    assert float(shown["limit"][0]) == pytest.approx(race.limit_ms, rel=2e-2) and len(shown["limit"]) == 3


def test_steps_are_shown_in_units_of_plain_fine_tuning():
    content = sample()
    head, first, *rows = block(printed(content, 80), "training_step")
    assert heads(head) == ["ms", "tokens/s", "MiB", f"× {SFT_HF}"], "whoever does the least work is not the measure"
    race = next(r for r in races(content) if r.op == "training_step")
    plain = next(r for r in race.results if r.provider == SFT_HF)
    shown = {row[:35].strip(): row.split() for row in rows[: len(race.results)]}
    assert first == race.title and shown.keys() == {r.provider for r in race.results}
    for r in race.results:
        assert float(shown[r.provider][-3]) == round(r.extra["tokens_per_s"])
        assert float(shown[r.provider][-1]) == pytest.approx(r.ms / plain.ms, abs=0.006)


def test_what_does_not_fit_is_named():
    narrow, wide = "\n".join(printed(sample(), 80)), "\n".join(printed(sample(), 200))
    assert "Left out for want of width: " in narrow and "Left out" not in wide


def test_exponents_absences_failures_and_missed_goals_follow():
    content = sample()
    lines = printed(content, 200)
    exponents = block(lines, "Time grows as a power of …")
    assert "tokens: linear_cross_entropy: Qwen3-1.7B, 50% supervised, trained, bfloat16" in exponents
    assert any(re.fullmatch(r"  triton +(0\.9|1\.0)\d  from 1024 to 16384", line) for line in exponents)
    headings = [line for line in exponents if not line.startswith(" ")]
    assert len(headings) == len(set(headings)) == 6, "of series that interleave in the file"
    failed = lines.index("Failed:")
    assert lines[failed + 1].startswith("  ours: cuda: WrongResultError: hidden: error 4.1e-03, allowed 3.0e-03 (sfr_")
    assert lines[failed + 2].startswith("  F.linear_cross_entropy: RuntimeError: CUDA out of memory")
    assert block(lines, "Absent:") == [
        "  cuda: no nvcc (1 case of softmax_xent)", "  quack: quack is not installed (1 case of linear_cross_entropy)",
    ]  # fmt: skip
    missed = [goal for b in content["benchmarks"] for goal in b["extra_info"].get("goals", ())]
    goals = lines[lines.index("Missed goals:") + 1 :]
    assert goals.index("") == len(missed) > 0 and all(goal in line for goal, line in zip(missed, goals, strict=False))
    assert lines[-1].endswith(f"2 failed, {len(missed)} goals missed.")


def test_a_cpu_and_a_run_that_was_cut_off_are_said_to_be():
    gpu, cpu = ("\n".join(printed(sample(kind), 100)) for kind in ("cuda", "cpu"))
    assert "times of a CPU" in cpu and "times of a CPU" not in gpu
    assert f"\n{shortfall(sample('cpu'))}\n" in cpu and "2 of velocity_head" in cpu and "CUT" not in gpu
    assert "not run:" not in cpu and "Processor @ 2.10GHz, 2 threads, torch" in cpu
    stopped = sample()
    stopped["sfr_kernels"]["complete"] = False
    assert "\nINCOMPLETE: the run did not end; this is what it had.\n" in "\n".join(printed(stopped, 100))


def test_work_of_one_thread_is_said_to_be():
    lines = printed(sample("cpu"), 120)
    assert all(row.endswith(", one thread") for row in block(lines, "collation") if row.startswith("p"))
    assert block(lines, "training_step")[1].endswith("float32, one thread")
    assert not any("thread" in row for row in block(lines, "sfr_loss"))


def test_output_that_is_no_terminal_is_plain(capsys):
    terminal.render(sample())
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= terminal.PLAIN_WIDTH


def test_labels_are_text_and_nothing_else():
    content = sample()
    for benchmark in content["benchmarks"]:
        benchmark["extra_info"]["label"] = "[red]d [bold] \\[x]"
    assert "[red]d [bold] \\[x], bfloat16" in printed(content, 120)


def test_a_case_that_only_peers_finished_is_shown():
    content = sample()
    content["benchmarks"] = [b for b in content["benchmarks"] if b["extra_info"]["kind"] == "peer"]
    assert any(line.startswith("  Liger") for line in printed(content, 100))
    assert "| – |" in accounts.account("x.json", content, {})


# ---------------------------------------------------------------------------------------------------------------------
# README and its figures


def made(kind: str, **run) -> dict:
    content = sample(kind)
    content["sfr_kernels"] |= dict(complete=True, cut=False) | run
    return content


@pytest.fixture
def root(tmp_path):
    """A tree with a README that has marks, and no results."""
    (tmp_path / readme.FOLDER).mkdir(parents=True)
    marks = "\n".join(f"<!-- {m} -->\nold\n<!-- /{m} -->\n" for m in ("bench", "targets"))
    (tmp_path / "README.md").write_text(f"# Title\n\n{marks}\nEnd.\n")
    return tmp_path


def put(root, name: str, content: dict) -> None:
    (root / readme.FOLDER / f"bench-{name}.json").write_text(json.dumps(content))


def section(root, mark: str) -> str:
    text = (root / "README.md").read_text()
    return text.split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- /{mark} -->")[0]


def test_the_committed_readme_and_figures_are_those_of_the_committed_files():
    assert readme.differences(readme.ROOT) == []


def test_without_a_file_the_readme_says_so(root):
    assert any("-old" in line for line in readme.differences(root))
    readme.write(root)
    assert readme.differences(root) == []
    assert section(root, "bench") == section(root, "targets") == readme.NOTHING
    put(root, "cut-off", made("cuda", complete=False))
    assert readme.differences(root) == []


def test_what_is_written_is_up_to_date_until_a_number_changes(root):
    content = made("cuda")
    put(root, "gpu", content)
    readme.write(root)
    assert readme.differences(root) == []
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\nEnd.\n") and "old" not in text
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(images) == 2 and all((root / image).exists() for image in images)

    for benchmark in content["benchmarks"]:
        if benchmark["extra_info"]["op"] == "sfr_loss" and benchmark["extra_info"]["kind"] == "ours":
            benchmark["stats"]["median"] *= 2
    put(root, "gpu", content)
    found = readme.differences(root)
    assert any(line.startswith("-| Llama-3-8B") for line in found)
    assert any(line.startswith(f"{readme.FIGURES}/limit-") and "does not show" in line for line in found)
    assert not any("step-" in line for line in found)
    readme.write(root)
    assert readme.differences(root) == []


def test_a_run_of_other_cases_alone_is_shown_whole():
    content = made("cuda")
    for entry in content["benchmarks"]:
        entry["extra_info"]["quick"] = False
    main = {race.title for race in races(content) if race.is_main and race.op == "softmax_xent"}
    assert all(f"| softmax_xent | {title} |" in accounts.account("x.json", content, {}) for title in main) and main


def test_cells_are_the_files_numbers():
    content = made("cuda")
    text = accounts.account("x.json", content, {})
    tables, rest = text.split("**Failed**")
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    for op, titled in (("flow_mse", 1), ("softmax_xent", 1), ("linear_cross_entropy", 0)):
        found = [race for race in races(content) if race.op == op and race.is_main]
        assert len(found) >= 2
        for race in found:
            ours, peer = race.fastest("ours"), race.fastest("peer")
            row = next(r for r in rows if r[titled] == race.title and r[0] in (op, race.title))
            assert f"{ours.provider} {words.milliseconds(ours.ms)}" in row
            assert f"{peer.provider} {peer.ms / ours.ms:.2f} ×" in row
            if titled:
                assert row[3:5] == [words.number(ours.extra["tb_per_s"]), f"{race.limit_ms / ours.ms:.0%}"]
            else:
                assert row[2] == f"{ours.ms / race.limit_ms:.2f} ×"
                assert row[4] == " / ".join(words.size(r.extra["peak_bytes"]) for r in (ours, peer))
    assert not any("(tokens)" in cell for row in rows for cell in row), "points of sweeps"
    assert "quack (quack is not installed" in tables and "ours, cuda: WrongResultError" in rest


def test_steps_stand_beside_plain_fine_tuning():
    content = made("cpu")
    race = next(r for r in races(content) if r.op == "training_step")
    ms = {r.provider: r.ms for r in race.results}
    ours = next(r for r in race.results if r.provider == SFR_STORED)
    text = accounts.account("x.json", content, {})
    assert f"| of {SFT_HF} |" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {race.title}, one thread | {SFR_STORED} |"))
    memory = words.size(ours.extra["peak_bytes"] + ours.extra["resident_bytes"])
    share = ours.extra["parts"]["targets"] / sum(ours.extra["parts"].values())
    assert f"| {ms[SFR_STORED] / ms[SFT_HF]:.2f} × | {memory} | {share:.1%} |" in row
    assert f"| {SFT_HF} | {words.milliseconds(ms[SFT_HF])} |" in text and "| 1.00 × |" in text
    loops = next(r for r in race.results if r.provider == PUBLISHED_LOOPS).extra["parts"]
    share = (loops["targets"] + loops["per-token loops"]) / sum(loops.values())
    assert f"| {ms[PUBLISHED_LOOPS] / ms[SFT_HF]:.2f} × |" in text and f"| {share:.1%} |" in text
    for entry in content["benchmarks"]:
        entry["extra_info"].pop("baseline", None)
    assert "| of the baseline |" in accounts.account("x.json", content, {})


def test_what_a_reader_should_know_of_a_run_is_said():
    first = accounts.where("x.json", made("cuda", selection="quick, flow_mse", modified=True))
    assert "NVIDIA H100 80GB HBM3" in first and "torch 2.11.0" in first and "2026-01-02 ([x.json]" in first
    assert "selection: quick, flow_mse, of a working tree with changes" in first and "CPU" not in first
    second = accounts.where("x.json", made("cpu", selection="full", modified=False))
    assert "selection" not in second and "changes" not in second and "**These are times of a CPU**" in second


def test_a_graph_is_told_with_the_memory_of_its_launches():
    content = made("cuda")
    entry = next(b for b in content["benchmarks"] if b["extra_info"]["provider"] == "cuda, graph")
    entry["stats"]["median"] /= 2
    race = next(r for r in races(content) if r.op == "flow_loss" and r.is_main)
    graph = race.fastest("ours")
    launched = next(r for r in race.results if f"{r.provider}, graph" == graph.provider)
    assert "peak_bytes" not in graph.extra
    text = accounts.account("x.json", content, {})
    row = next(line for line in text.split("**flow_loss**")[1].splitlines() if race.title in line)
    assert f"| {graph.provider} " in row and row.split(" | ")[-1].startswith(words.size(launched.extra["peak_bytes"]))


def test_targets_are_told_with_what_a_billion_tokens_cost(root):
    put(root, "gpu", made("cuda"))
    readme.write(root)
    text = section(root, "targets")
    found = {race.title: race.results[0].ms for race in races(sample()) if race.op == "collation"}
    for row in (
        "| building, all-minilm-l6-v2, 100 samples, 2 threads | 200 segments/s: 93% of the encoder alone (215) |",
        "| building, all-minilm-l6-v2, 828 samples, 2 threads | 180 segments/s: 93% of the encoder alone (194) |",
        "| store, d = 1024, float16 | 65.6 bytes a supervised token |",
        "| store, d = 256, int8 | 8.6 bytes a supervised token |",
        "| the collator's part, B8 L2048, d 1024, float16, one thread | "
        f"{found['padded, B8 L2048, d 1024, float16']:.2f} ms padded, "
        f"{found['packed, B8 L2048, d 1024, float16']:.2f} ms packed |",
        "| one sample looked up, d = 1024, float16, one thread | 14 µs |",
    ):
        assert text.count(row) == 1
    hours = 1e9 / 32 / 180 / 3600
    assert f"31.2 million segments, 66 GB at d = 1024, float16, 9 GB at d = 256, int8, {hours:.1f} hours" in text


def test_the_newest_file_of_every_gpu_is_shown_and_a_cpu_only_while_there_is_none(root):
    cpu = made("cpu", date="2026-03-01T00:00:00+00:00")
    put(root, "cpu", cpu)
    readme.write(root)
    assert "bench-cpu.json" in section(root, "bench") and "**These are times of a CPU**" in section(root, "targets")
    figure = next((root / readme.FIGURES).glob("limit-intel-r-xeon*2-threads.svg"))

    put(root, "a-new", made("cuda", date="2026-02-02T00:00:00+00:00"))
    put(root, "b-old", made("cuda", date="2026-02-01T00:00:00+00:00"))
    put(root, "c-cut", made("cuda", date="2026-02-03T00:00:00+00:00", complete=False))
    other = made("cuda", date="2026-01-01T00:00:00+00:00")
    other["sfr_kernels"]["device"] = dict(other["sfr_kernels"]["device"], name="NVIDIA B200")
    put(root, "other", other)
    assert f"{figure.relative_to(root).as_posix()} has no result file" in readme.differences(root)
    readme.write(root)
    for mark in ("bench", "targets"):
        assert re.findall(r"\[(bench-.*?\.json)\]", section(root, mark)) == ["bench-a-new.json", "bench-other.json"]
        assert "CPU" not in section(root, mark)
    assert not figure.exists() and len(list((root / readme.FIGURES).iterdir())) == 4


def test_a_file_with_every_case_comes_before_a_newer_quick_one(root):
    put(root, "a-full", made("cuda", date="2026-02-01T00:00:00+00:00"))
    put(root, "b-quick", made("cuda", date="2026-02-03T00:00:00+00:00", selection="quick"))
    put(root, "c-cut", made("cuda", date="2026-02-04T00:00:00+00:00", complete=False, cut=True))
    put(root, "d-only", made("cuda", date="2026-02-05T00:00:00+00:00", selection="full, softmax_xent"))
    for targets in (False, True):
        assert list(readme.sources(root, targets)) == ["bench-a-full.json"]
    put(root, "e-full", made("cuda", date="2026-02-02T00:00:00+00:00"))
    put(root, "f-targets", made("cuda", date="2026-02-06T00:00:00+00:00", selection="full, targets, collation"))
    assert list(readme.sources(root, targets=False)) == ["bench-e-full.json"]
    assert list(readme.sources(root, targets=True)) == ["bench-f-targets.json"], "it has every case of targets"


def test_a_file_without_targets_leaves_those_to_one_that_has_them(root):
    put(root, "full", made("cuda"))
    newer = made("cuda", date="2026-12-01T00:00:00+00:00")
    newer["benchmarks"] = [b for b in newer["benchmarks"] if b["extra_info"]["op"] not in readme.TARGETS]
    put(root, "kernels", newer)
    readme.write(root)
    assert "bench-kernels.json" in section(root, "bench") and "bench-full.json" in section(root, "targets")


def test_the_command(root, monkeypatch, capsys):
    monkeypatch.setattr(readme, "ROOT", root)
    put(root, "gpu", made("cuda"))
    before = (root / "README.md").read_text()
    assert readme.main(["--check"]) == 1 and "-old" in capsys.readouterr().out
    assert (root / "README.md").read_text() == before and not (root / readme.FIGURES).exists()
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    text = (root / "README.md").read_text()
    for broken in (text.replace("<!-- /bench -->", ""), text + "<!-- targets -->", text.replace("<!-- bench -->", "")):
        (root / "README.md").write_text(broken)
        assert readme.main(["--check"]) == 2 and "README.md needs <!--" in capsys.readouterr().err
    (root / readme.FOLDER / "bench-broken.json").write_text("{")
    assert readme.main([]) == 2 and "bench-broken.json is not JSON" in capsys.readouterr().err


def test_figures_are_the_same_at_every_drawing_and_name_their_data(tmp_path):
    content = made("cuda")
    for data, draw in (
        (figures.limits(content), figures.draw_limits),
        (figures.parts(content), figures.draw_parts),
    ):
        first, second = tmp_path / "first.svg", tmp_path / "second.svg"
        draw(data, first)
        draw(data, second)
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size < 60_000
        text = first.read_text()
        assert all(row["case"] in text for row in data) and "fill: #ffffff" in text
        assert figures.drawn_digest(first) == figures.digest(data) != figures.digest(data[1:])


def test_a_figure_shows_ours_and_the_fastest_peer_in_units_of_the_limit():
    content = made("cuda")
    race = next(r for r in races(content) if r.op == "linear_cross_entropy")
    row = next(r for r in figures.limits(content) if r["op"] == race.op)
    assert row["case"] == race.title
    assert row["ours"] == ("triton", pytest.approx(race.fastest("ours").ms / race.limit_ms, abs=1e-3))
    assert row["peer"] == (race.fastest("peer").provider, pytest.approx(race.lead * race.of_limit, abs=1e-3))
    assert not any("(tokens)" in r["case"] or r["op"] in ("targets", "training_step") for r in figures.limits(content))


def test_another_drawing_makes_figures_stale(root, monkeypatch):
    put(root, "gpu", made("cuda"))
    readme.write(root)
    monkeypatch.setattr(figures, "DRAWING", figures.DRAWING + 1)
    assert sum("does not show" in line for line in readme.differences(root)) == 2
    shutil.rmtree(root / readme.FIGURES)
    assert sum("does not show" in line for line in readme.differences(root)) == 2
