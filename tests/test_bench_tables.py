"""What is written from result files: the terminal's tables, README's sections and figures; README is up to date."""

import copy
import io
import json
import re
import shutil

import pytest
from bench_samples import sample
from rich.console import Console

from benchmarks.report import accounts, figures, readme, terminal, words
from benchmarks.report.reading import races

# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def printed(content: dict, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.render(content, console)
    return console.export_text().splitlines()


def block(lines: list[str], op: str) -> list[str]:
    """An op's table, its head first."""
    start = lines.index(op) + 1
    return lines[start : lines.index("", start)]


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("width", [60, 80, 130])
def test_numbers_line_up_at_any_width(kind, width):
    lines = printed(sample(kind), width)
    assert max(map(len, lines)) <= width
    head, *rows = block(lines, "linear_cross_entropy")
    ends = [m.end() for m in re.finditer(r"(± |× )?\S+", head)]
    numbers = [row for row in rows if row.startswith("  ")]
    assert len(numbers) > 20
    for row in numbers:
        found = {m.end() for m in re.finditer(r"(?<=  )[\d.]+(e-\d+)?(?=  |$)", row)}
        assert found <= set(ends), row
        assert ends[0] in found, "a median for everybody"


def test_every_race_shows_what_was_measured():
    content = sample()
    lines = printed(content, 200)
    head, *rows = block(lines, "softmax_xent")
    assert re.split(r"\s{2,}", head.strip()) == [
        "ms", "± IQR", "× limit", "TB/s", "peak MiB", "error", "of bound", "× ours",
    ]  # fmt: skip
    race = next(r for r in races(content) if r.op == "softmax_xent")
    ours, peer = race.fastest("ours"), race.fastest("peer")
    shown = {row.split()[0]: row.split()[1:] for row in rows[1 : 1 + len(race.results)]}
    assert rows[0] == race.title
    assert float(shown[ours.provider][0]) == pytest.approx(ours.ms, rel=1e-2)
    assert float(shown[ours.provider][2]) == pytest.approx(ours.ms / race.limit_ms, abs=0.006)
    assert float(shown[ours.provider][-1]) == pytest.approx(ours.worst["ratio"], abs=0.006)
    assert float(shown[peer.provider][-1]) == pytest.approx(peer.ms / ours.ms, abs=0.006)
    assert float(shown["limit"][0]) == pytest.approx(race.limit_ms, rel=2e-2) and len(shown["limit"]) == 2


def test_what_does_not_fit_is_named():
    narrow, wide = "\n".join(printed(sample(), 80)), "\n".join(printed(sample(), 200))
    assert "Left out for want of width: " in narrow and "Left out" not in wide


def test_exponents_absences_failures_and_missed_goals_follow():
    content = sample()
    lines = printed(content, 200)
    start = lines.index("Time grows as a power of …")
    assert "tokens: linear_cross_entropy, trained, bfloat16" in lines[start:]
    assert any(re.fullmatch(r"  triton +(0\.9|1\.0)\d  from 1024 to 16384", line) for line in lines[start:])
    failed = lines.index("Failed:")
    assert lines[failed + 1].startswith("  ours: cuda: WrongResultError: hidden: error 4.1e-03, allowed 3.0e-03 (sfr_")
    assert lines[failed + 2].startswith("  F.linear_cross_entropy: RuntimeError: CUDA out of memory")
    assert any("quack is not installed" in line for line in lines[lines.index("Absent:") : failed])
    missed = [goal for b in content["benchmarks"] for goal in b["extra_info"].get("goals", ())]
    goals = lines[lines.index("Missed goals:") + 1 :]
    assert goals.index("") == len(missed) > 0 and all(goal in line for goal, line in zip(missed, goals, strict=False))
    assert lines[-1].endswith(f"2 failed, {len(missed)} goals missed.")


def test_a_cpu_and_a_run_that_was_cut_off_are_said_to_be():
    gpu, cpu = ("\n".join(printed(sample(kind), 100)) for kind in ("cuda", "cpu"))
    assert "times of a CPU" in cpu and "times of a CPU" not in gpu
    assert "did not end" in cpu and "did not end" not in gpu


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

TARGETS = (
    ("targets", "minilm, 60 samples", "float16", dict(build=1000.0, **{"encoder alone": 930.0})),
    ("targets", "minilm, all samples", "float16", dict(build=4000.0, **{"encoder alone": 3800.0})),
    ("collation", "B8 L2048, d 1024, float16", "float16", dict(padded=1.04, packed=1.22, lookup=0.014)),
    ("collation", "B8 L2048, d 256, int8", "int8", dict(padded=0.5, packed=0.6, lookup=0.011)),
)


def with_targets(content: dict) -> dict:
    """The sample with benchmarks of targets as `bench_targets` records them."""
    kept = [b for b in content["benchmarks"] if b["extra_info"]["op"] not in readme.TARGETS]
    for op, label, dtype, times in TARGETS:
        for provider, ms in times.items():
            extra = dict(op=op, label=label, dtype=dtype, provider=provider, sweeps=[])
            extra["kind"] = "limit" if provider == "encoder alone" else "ours"
            if op == "targets":
                extra |= dict(encoder="minilm", threads=2, segments=200 if ms < 2000 else 720)
                extra |= dict(case=dict(encoder="minilm"), segments_per_s=1e3 * extra["segments"] / ms)
            else:
                wide = dtype == "float16"
                extra["case"] = dict(storage_dtype=dtype, target_size=1024 if wide else 256)
                extra["bytes_per_token"] = 65.6 if wide else 8.6
            kept.append(dict(group=f"{op}: {label}, {dtype}", stats=dict(median=ms / 1e3, rounds=3), extra_info=extra))
    return content | dict(benchmarks=kept)


def made(kind: str, **run) -> dict:
    content = copy.deepcopy(with_targets(sample(kind)))
    content["sfr_kernels"] |= dict(complete=True) | run
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
                assert row[3:5] == [f"{ours.extra['tb_per_s']:.2f}", f"{race.limit_ms / ours.ms:.0%}"]
            else:
                assert row[2] == f"{ours.ms / race.limit_ms:.2f} ×"
                assert row[4] == " / ".join(words.size(r.extra["peak_bytes"]) for r in (ours, peer))
    assert not any("(tokens)" in cell for row in rows for cell in row), "points of sweeps"
    assert "quack (quack is not installed" in tables and "ours, cuda: WrongResultError" in rest


def test_steps_stand_beside_plain_fine_tuning():
    content = made("cuda")
    steps = [b for b in content["benchmarks"] if b["extra_info"]["op"] == "training_step"]
    for benchmark in steps:
        extra = benchmark["extra_info"]
        extra["provider"] = accounts.PLAIN if extra["provider"] == "eager" else extra["provider"]
        extra["parts"] = {"targets": 10.0, "per-token loops": 15.0, "loss": 75.0}
    race = next(r for r in races(content) if r.op == "training_step")
    ours = race.fastest("ours")
    plain = next(r for r in race.results if r.provider == accounts.PLAIN)
    text = accounts.account("x.json", content, {})
    row = next(line for line in text.splitlines() if line.startswith(f"| {race.title} | {ours.provider} |"))
    memory = words.size(ours.extra["peak_bytes"] + ours.extra["resident_bytes"])
    assert f"| {ours.ms / plain.ms:.2f} × | {memory} | 25.0% |" in row
    assert f"| {accounts.PLAIN} | {plain.ms:.0f} ms |" in text and "| 1.00 × |" in text


def test_what_a_reader_should_know_of_a_run_is_said():
    first = accounts.where("x.json", made("cuda", selection="quick, flow_mse", modified=True))
    assert "NVIDIA H100 80GB HBM3" in first and "torch 2.11.0" in first and "2026-01-02 ([x.json]" in first
    assert "selection: quick, flow_mse, of a working tree with changes" in first and "CPU" not in first
    second = accounts.where("x.json", made("cpu", selection="full", modified=False))
    assert "selection" not in second and "changes" not in second and "**These are times of a CPU**" in second


def test_a_graph_is_told_with_the_memory_of_its_launches():
    content = made("cuda")
    race = next(r for r in races(content) if r.op == "flow_loss")
    ours = next(b for b in content["benchmarks"] if b["extra_info"] is race.fastest("ours").extra)
    graph = copy.deepcopy(ours)
    graph["extra_info"] |= dict(provider=f"{race.fastest('ours').provider}, graph", peak_bytes=None)
    graph["stats"]["median"] /= 2
    content["benchmarks"].append(graph)
    text = accounts.account("x.json", content, {})
    row = next(line for line in text.split("**flow_loss**")[1].splitlines() if race.title in line)
    assert ", graph" in row and row.split(" | ")[-1].startswith(words.size(ours["extra_info"]["peak_bytes"]))


def test_targets_are_told_with_what_a_billion_tokens_cost(root):
    put(root, "gpu", made("cuda"))
    readme.write(root)
    text = section(root, "targets")
    for row in (
        "| building, minilm, 60 samples, 2 threads | 200 segments/s: 93% of the encoder alone (215) |",
        "| building, minilm, all samples, 2 threads | 180 segments/s: 95% of the encoder alone (189) |",
        "| store, d = 1024, float16 | 65.6 bytes a supervised token |",
        "| store, d = 256, int8 | 8.6 bytes a supervised token |",
        "| the collator's part, B8 L2048, d 1024, float16 | 1.04 ms padded, 1.22 ms packed |",
        "| one sample looked up, d = 1024, float16 | 14 µs |",
    ):
        assert row in text
    hours = 1e9 / 32 / 180 / 3600
    assert f"31.2 million segments, 66 GB at d = 1024, float16, 9 GB at d = 256, int8, {hours:.1f} hours" in text


def test_the_newest_file_of_every_gpu_is_shown_and_a_cpu_only_while_there_is_none(root):
    cpu = made("cpu", date="2026-03-01T00:00:00+00:00")
    put(root, "cpu", cpu)
    readme.write(root)
    assert "bench-cpu.json" in section(root, "bench") and "**These are times of a CPU**" in section(root, "targets")
    figure = next((root / readme.FIGURES).glob("limit-x86-64*.svg"))

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
