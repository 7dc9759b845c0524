"""What is read from a result file, the tables and the page made of it, two files compared, README's tables and `auto`'s
choice. In a browser every plot of the page is drawn, nothing fails or asks for a network, and names are but text."""

import json
import math
import os
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest

from benchmarks.report import choose, compare, data, page, readme, tables
from sfr_kernels.kernels import backend

GPU = dict(name="NVIDIA H100", kind="cuda", capability="9.0", threads=16, clocks=dict(sm_mhz=1980))
CPU = dict(name="AMD EPYC", kind="cpu", capability=None, threads=2, clocks=None)
CASE = dict(op="flow_loss", label="1024 tokens", dtype="bfloat16")
HOSTILE = "<script>alert(1)</script><b>|*"


def run(**fields) -> dict:
    common = dict(date="2026-11-27T13:00:00+00:00", version="0.1.0", revision="abc", selection="quick", device=GPU)
    return dict(line="run", **common | dict(versions=dict(torch="2.13", triton=None)) | fields)


def result(provider: str, kind: str, ms: float | list[float], **fields) -> dict:
    samples = ms if isinstance(ms, list) else [ms] * 5
    common = dict(reference="limit", worth=0, axes=[], sizes=dict(model="A", tokens=1024), ms=float(np.median(samples)))
    counts = dict(flops=2 * 10**12, traffic=10**9, bytes=0, peak_bytes=2**20, issue_ms=0.1, goals={})
    common |= dict(provider=provider, kind=kind, samples_ms=samples)
    return dict(line="result", **CASE | common | counts | fields)


def case(ours: float, peer: float = 4.0, limit: float = 1.0, **fields) -> list[dict]:
    errors = dict(loss=dict(ours=1e-3, eager=1e-3, norm=1.0, ratio=0.5), dx=dict(ours=2e-3, eager=2e-3, ratio=0.75))
    others = ("eager", "peer", peer), ("limit", "limit", limit), ("products", "limit", limit / 2)
    return [result("triton", "ours", ours, **dict(errors=errors) | fields), *(result(*x, **fields) for x in others)]


def steps(ours: float = 100.0, label: str = "B8 L2048") -> list[dict]:
    common = dict(op="training_step", label=label, reference="SFT, HF's loss", worth=1, resident_bytes=3 * 2**20)
    parts = dict(targets=10.0, loss=30.0, backward=60.0)
    return [result("SFT, HF's loss", "peer", 200.0, tokens_per_s=1000.0, parts=dict(loss=200.0), **common),
            result("SFR, ours, stored targets", "ours", ours, tokens_per_s=2000.0, parts=parts, **common)]  # fmt: skip


def sample(**fields) -> list[dict]:
    """Main cases, a curve, a training step, a hostile name, what failed, and what is absent."""
    curve = [row for n in (256, 512, 1024) for row in case(1e-4 * n**1.5, label=f"{n} tokens", axes=["tokens"],
                                                           worth=3, sizes=dict(model="A", tokens=n))]  # fmt: skip
    lost = dict(CASE, provider="liger_kernel", kind="peer", reason="liger_kernel is not installed")
    wrong = dict(CASE, provider="cuda", kind="ours", reason="loss: 3.0 × its bound")
    built = [result(name, kind, ms, op="targets", label="100 samples", reference="encoder", segments_per_s=rate)
             for name, kind, ms, rate in (("build", "ours", 4e4, 90.0), ("encoder", "limit", 3e4, 100.0))]  # fmt: skip
    return [run(**fields), *case(2.0, label="main"), *curve, *steps(), *built,
            result(HOSTILE, "peer", 3.0, label="main"), dict(line="absent", **lost), dict(line="failed", **wrong),
            dict(line="end")]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(lines: list[dict], name: str = "bench-a.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def test_a_result_stands_beside_its_reference_by_rounds(file):
    ours, limit = [2.0, 9.0, 4.0, 6.0, 10.0], [1.0, 3.0, 2.0, 2.0, 5.0]
    results = data.read(file([run(), *case(ours, limit=1.0), result("limit", "limit", limit), dict(line="end")]))
    row = results.frame.set_index("provider").loc["triton"]
    assert row.of_reference == 2.0 and row.low == 2.0 and row.high == 3.0  # of 2, 3, 2, 3, 2; the medians' is 6 / 2
    assert row.of_bound == 0.75 and row.error == 2e-3 and results.complete and not results.warnings
    assert "limit" in results.frame.provider.values and len(results.frame) == 4  # a later line replaces one


def test_a_resumed_file_and_half_a_line(file):
    other = dict(CASE, label="other")
    skips = [dict(line="skipped", reason="the time was up", **key) for key in (CASE, other)]
    path = file([run(), *skips, run(selection="full"), *case(2.0), dict(line="case", **CASE)])
    with open(path, "a") as half:
        half.write('{"line": "resul')
    results = data.read(path)
    assert results.run["selection"] == "full" and len(results.frame) == 4 and not results.complete
    assert [line["label"] for line in results.gone] == ["other"] and "time was up" in results.warnings[0]


@pytest.mark.parametrize(
    "lines, number",
    [
        ([], 1), ([dict(line="end")], 1), ([run(), dict(line="other")], 2), ([run(), ["line"]], 2),
        ([run(device=dict(name="GPU"))], 1), ([run(), result("a", "ours", [1.0, -1.0])], 2),
        ([run(), result("a", "ours", 1.0) | dict(samples_ms=[None])], 2),
        ([run(), dict(line="failed", **CASE)], 2), ([run(), result("a", "ours", [1.0, math.nan])], 2),
        ([run(), result("a", "ours", 1.0) | dict(samples_ms=[])], 2),
    ],
)  # fmt: skip
def test_the_line_that_is_not_one_is_named(lines, number, file):
    with pytest.raises(ValueError, match=f"bench-a.jsonl, line {number} "):
        data.read(file(lines))


def test_the_tables_say_what_the_file_says(file):
    results = data.read(file(sample()))
    rows = {row[""]: row for row in tables.of_op("flow_loss", results.frame[results.frame.worth == 0]).rows}
    row = rows["triton ★"]
    assert row["time"] == "2.00 ms" and row["× reference"] == "2.00 [2.00, 2.00]" and row["× products"] == "4.00"
    assert row["TFLOP/s"] == "1,000" and row["TB/s"] == "0.500" and row["of bound"] == "0.750" and "eager" in rows
    summary = tables.summary(results).rows[0]
    assert summary["best × reference"] == "0.41 to 3.28" and summary["ours failed"] == "1"  # 1e-4 * 256**1.5
    assert {row["p"] for row in tables.curves(results.frame)[0].rows if row[""] == "triton"} == {"1.50"}
    step = tables.of_op("training_step", results.frame).rows[1]
    assert step["× reference"].startswith("0.50 ") and step["targets' share"] == "10.0%"
    assert step["peak memory"] == "4.00 MiB" and step["tokens/s"] == "2,000"
    assert [tables.duration(ms) for ms in (0.009, 0.5, 12.0, 40_000)] == ["9.00 µs", "500 µs", "12.0 ms", "40.0 s"]
    said = tables.show(results)
    assert said.index("cuda (ours) failed: loss: 3.0") < said.index("liger_kernel absent: liger_kernel is not")


def test_goals_are_missed_above_them_and_where_nothing_was_measured(file):
    goals = {"of limit": 1.9, "of products": 4.0, "of peer": 0.6, "lm_heads": 1.5, "of quack": 9.0}
    goals |= {"memory of eager": 1}
    rows = case(2.0)
    rows[0] |= dict(goals=goals, weight_bytes=2**19, resident_bytes=2**19)
    found = tables.goals(data.read(file([run(), *rows])).frame).rows
    measured = {row["goal"]: row["measured"] for row in found}
    assert measured == {"of limit": "2.00", "lm_heads": "3.00", "of quack": "–", "memory of eager": "1.50"}


def test_a_table_in_its_three_forms():
    rows = [{"case": "a", "": f"<i>|{n}*", "ms": str(n), "nothing": "–", "last": "wide" * 5} for n in (1, 22)]
    table = tables.Table("t", rows, 2)
    assert tables.render(table, "text", 20).split("\n") == ["t", "           ms", "a", "  <i>|1*    1", "  <i>|22*  22"]
    assert "wide" in tables.render(table, "text", 80) and "nothing" not in tables.render(table, "text", 80)
    assert "<td>&lt;i&gt;|1*</td>" in tables.render(table, "html") and "<i>" not in tables.render(table, "html")
    assert "| a | &lt;i&gt;\\|1\\* | 1 | widewide" in tables.render(table, "markdown")
    assert tables.render(table, "markdown", columns=("ms",)).splitlines()[-1] == "| 22 |"


@pytest.mark.parametrize("lines", [sample(device=CPU), [run(), sample()[-2]], [run(), dict(line="end")]])
def test_the_page_and_the_tables_of_what_there_is(lines, file, tmp_path):
    """Also of a file without a result. Names are escaped for HTML, for plotly and for the JSON that it reads."""
    results = data.read(file(lines))
    page.write(results, tmp_path / "new" / "page.html")
    html = (tmp_path / "new" / "page.html").read_text()
    assert "Goals missed" in tables.show(results) and "Goals missed" in html
    assert all(warning in html for warning in results.warnings)
    shown = html.split("</style>")[1].rsplit("</script>", 1)[1]
    assert "<b>" not in shown and "<script>alert" not in html and "\\u003cscript\\u003ealert" not in html
    assert ("&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;|*" in html) == (len(lines) > 2)
    assert ('"name":"triton"' in html.split("<h2>Curves")[1]) == (len(lines) > 2), "a curve's legend names it"


WATCH = """<script>
const problems = [], drawn = [], cut = [], texts = [];
const note = event => problems.push(event.message || event.violatedDirective || String(event.reason || event.type));
for (const name of ["error", "unhandledrejection", "securitypolicyviolation"]) addEventListener(name, note, true);
console.error = (...words) => problems.push(words.join(" "));
addEventListener("load", () => setTimeout(() => {
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    drawn.push(plot.querySelectorAll(".trace path, path.point").length);
    for (const text of plot.querySelectorAll("text")) {
      const [frame, box] = [plot.getBoundingClientRect(), text.getBoundingClientRect()];
      texts.push(text.textContent);
      if (box.width && (box.left < frame.left - 1 || box.right > frame.right + 1)) cut.push(text.textContent);
    }
  }
  const requests = performance.getEntriesByType("resource").length;
  document.body.dataset.probe = JSON.stringify({ problems, drawn, cut, texts, requests });
}, 1000));
</script>"""


def probe(folder, html: str) -> dict:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("needs Chromium on PATH") if os.environ.get("CI") == "true" else pytest.skip("no Chromium on PATH")
    (folder / "page.html").write_text(html.replace("<style>", WATCH + "<style>", 1))
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--window-size=1300,2000",
               "--dump-dom", (folder / "page.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return json.loads(unescape(re.search('data-probe="(.*?)"', done.stdout)[1]))


@pytest.mark.slow
def test_a_browser_draws_every_plot_and_asks_for_nothing(file, tmp_path):
    page.write(data.read(file(sample(device=CPU))), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    found = probe(tmp_path, html)
    assert not found["problems"] and not found["cut"] and not found["requests"]
    assert len(found["drawn"]) == 9 and all(found["drawn"]) and HOSTILE in found["texts"]
    for planted in ("<script>throw new Error('x')</script>", "<img src='https://example.org/x.png'>"):
        assert probe(tmp_path, html.replace("</body>", planted + "</body>"))["problems"]


def noisy(ours: float = 1.0, limit: float = 1.0, seed: int = 0, **fields) -> list[dict]:
    """Six cases of 30 rounds whose times scatter by 3%; ours of the first takes `ours` times as long."""
    rng, lines = np.random.default_rng(seed), [run(**fields)]
    for n in range(6):
        scale = {"triton": ours if n == 0 else 1.0, "limit": limit}
        for row in case(2.0, label=f"case {n}"):
            ms = row["ms"] * scale.get(row["provider"], 1.0) * rng.normal(1.0, 0.03, 30)
            lines.append(row | dict(samples_ms=list(ms), ms=float(np.median(ms))))
    return [*lines, dict(line="end")]


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_tenth_is_a_regression_and_a_hundredth_is_none(seed, file, capsys):
    """Nor is a machine that is slower as a whole, or a reference that became faster."""
    old = file(noisy(), "old.jsonl")
    for ours, limit, status in ((1.1, 1.0, 1), (1.01, 1.0, 0), (1.0, 0.85, 0), (0.9, 1.0, 0)):
        assert compare.main([old, file(noisy(ours, limit, seed), "new.jsonl")]) == status, (ours, limit)
        worse = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WORSE")]
        assert len(worse) == status and all("case 0" in line and "× the time" in line for line in worse)
    slower = [row | dict(samples_ms=[1.3 * ms for ms in row["samples_ms"]]) if "ms" in row else row for row in noisy()]
    assert compare.main([old, file(slower, "new.jsonl")]) == 0


def test_without_a_reference_the_times_count(file):
    lines = [[run(), result("store", "ours", [ms * x for x in (1.0, 1.01, 0.99)], reference=None)] for ms in (1, 1.2)]
    assert compare.main([file(lines[0], "old"), file(lines[1], "new")]) == 1
    assert compare.main([file(lines[1], "old"), file(lines[0], "new")]) == 0
    few = [run(), result("store", "ours", [1.2, 1.2], reference=None)]
    assert compare.main([file(lines[0], "old"), file(few, "new")]) == 0


def changed(**fields) -> list[dict]:
    return [x | fields if x.get("provider") == "triton" and x["label"] == "case 1" else x for x in noisy()]


@pytest.mark.parametrize(
    "new, status, said",
    [
        (changed(peak_bytes=int(2.06 * 2**20)), 1, "memory 1.00 MiB -> 2.06 MiB"),
        (changed(peak_bytes=int(2.04 * 2**20)), 0, "2.04 MiB"),
        (changed(errors=dict(loss=dict(ours=1.0, ratio=None))), 1, "error over its bound"),
        (changed(line="failed", reason="out of memory")[:-1], 1, "case 1, bfloat16, triton: failed: out of memory"),
        (changed(line="absent", reason="no compiler"), 1, "triton: absent: no compiler"),
        (changed(line="skipped", provider=None, reason="late")[:-1], 0, "note: flow_loss, case 1, bfloat16, triton: n"),
        (noisy()[:-9], 0, "missing: the run did not end"), (noisy(selection="full"), 0, "different selection"),
        (noisy(versions=dict(torch="2.14")), 0, "different torch: 2.13 -> 2.14"), (noisy(device=CPU), 2, "differ"),
        ([run(), dict(line="end")], 1, "not in the new file"), (noisy()[:5], 0, "note: flow_loss, case 1"),
        ([dict(line="end")], 2, "new.jsonl, line 1 "),
    ],
)  # fmt: skip
def test_what_else_became_worse_is_told_from_what_was_not_measured(new, status, said, file, capsys):
    files = file(noisy(), "old.jsonl"), file(new, "new.jsonl")
    assert compare.main([*files]) == status
    out = capsys.readouterr()
    assert said in out.out + out.err
    if said == "differ":
        assert compare.main([*files, "--different-devices"]) == 0 and "different device" in capsys.readouterr().out


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- bench -->\nb<!-- /bench -->\nc\n")
    (tmp_path / "benchmarks/README.md").write_text("<!-- bench --><!-- /bench -->")
    return tmp_path


def test_readme_shows_the_newest_complete_file_of_a_gpu(root, file, capsys):
    """Each file has a time of its own, by which it is known."""
    readme.main([], root)
    nothing = "Nothing of this has been measured yet."
    assert (root / "README.md").read_text() == f"a\n<!-- bench -->\n{nothing}\n<!-- /bench -->\nc\n"
    files = dict(cpu=(dict(device=CPU, date="2026-12-01T"), 70.0), old=(dict(date="2026-01-01T"), 700.0),
                 new=(dict(date="2026-02-01T"), 7.0))  # fmt: skip
    for name, (fields, ms) in files.items():
        file([run(**fields), *case(ms), *steps(ms + 2), dict(line="end")], f"benchmarks/results/bench-{name}.jsonl")
    cut = [*case(7000.0), *case(7.7, label="other"), *steps(7002.0), *steps(9.7, label="other")]
    file([run(date="2026-01-02T"), *cut], "benchmarks/results/bench-cut.jsonl")
    assert readme.main(["--check"], root) == 1 and "README.md" in capsys.readouterr().out
    assert readme.main([], root) == 0 and readme.main(["--check"], root) == 0
    text, manual = ((root / path).read_text() for path in ("README.md", "benchmarks/README.md"))
    for shown, ms in ((text, 2.0), (manual, 0.0), (manual, 2.0)):
        assert f"{7 + ms:.2f} ms" in shown and f"{70 + ms:.1f} ms" not in shown and f"{700 + ms:.0f} ms" not in shown
        assert f"{7.7 + ms:.2f} ms" in shown and "7.00 s" not in shown, "of a run that was cut, what no other has"
        assert "CPU" not in shown
    assert text.startswith("a\n<!-- bench -->\ndevice") and text.endswith("<!-- /bench -->\nc\n")
    assert text.count("Reference: ") == 2 and "flow_loss" not in text, "of each file the training step, nothing else"
    assert "Goals missed" in manual and "Goals missed" not in text and "TFLOP/s" in manual and "TFLOP/s" not in text


def test_readme_shows_a_cpu_where_no_gpu_has_run_the_training_step(root, file):
    file([run(), *case(7.0), dict(line="end")], "benchmarks/results/bench-gpu.jsonl")
    file([run(device=CPU), *case(70.0), *steps(72.0), dict(line="end")], "benchmarks/results/bench-cpu.jsonl")
    readme.main([], root)
    text, manual = ((root / path).read_text() for path in ("README.md", "benchmarks/README.md"))
    assert "72.0 ms" in text and "These are times of a CPU" in text and "7.00 ms" not in text
    assert "7.00 ms" in manual and "CPU" not in manual


def test_readme_without_its_marks_is_refused(root):
    (root / "README.md").write_text("<!-- bench --><!-- bench --><!-- /bench -->")
    with pytest.raises(ValueError, match=r"README\.md needs <!-- bench --> and <!-- /bench -->"):
        readme.main([], root)


def test_the_faster_backend_is_chosen_with_its_origin(file, tmp_path, monkeypatch):
    """By the sum over the shapes that both were timed at; where calls are small, by what they cost the CPU too."""
    rows = [("a", "large", "cuda", 1.0, 9.0), ("a", "large", "triton", 2.0, 0.1), ("b", "large", "cuda", 1.0, 0.1),
            ("b", "large", "triton", 0.5, 0.1), ("d", "large", "cuda", 99.0, 0.1), ("c", "small", "cuda", 0.1, 0.4),
            ("c", "small", "triton", 0.2, 0.3), ("c", "small", "eager", 0.01, 0.01)]  # fmt: skip
    lines = [result(provider, "ours", ms, op="norm_act", label=label, size=size, issue_ms=issue)
             for label, size, provider, ms, issue in rows]  # fmt: skip
    lines += [result(provider, "ours", ms, op="flow_path", size="large", issue_ms=0.1)
              for provider, ms in (("cuda", 0.96), ("triton", 1.0))]  # fmt: skip
    lines += [result("cuda", "ours", 1.0, op="flow_mse", size="large"), *case(1.0)]
    monkeypatch.setattr(backend, "FASTEST", tmp_path / "fastest.json")
    other = dict(capability="8.0", kernel="norm_act", size="large", backend="cuda", ms={}, origin="old.json")
    backend.FASTEST.write_text(json.dumps([other]))
    for _ in range(2):  # a second time it takes the place of the first
        choose.choose(file([run(), *lines]))
    common = dict(capability="9.0", kernel="norm_act", origin="bench-a.jsonl")
    almost = dict(kernel="flow_path", size="large", backend="triton", ms=dict(cuda=0.96, triton=1.0))
    assert json.loads(backend.FASTEST.read_text()) == [
        other,
        common | almost,
        common | dict(size="large", backend="cuda", ms=dict(cuda=2.0, triton=2.5)),
        common | dict(size="small", backend="triton", ms=dict(cuda=0.4, triton=0.3)),
    ]
    with pytest.raises(ValueError, match="not measured on a GPU"):
        choose.choose(file([run(device=CPU), *case(1.0)]))
