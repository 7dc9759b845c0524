"""The report of a result file: its numbers are those of the file, it says what is not there, and a browser draws it."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_samples import sample
from pages import Page
from plotly.offline import get_plotlyjs

from benchmarks.report import fits
from benchmarks.report import page as report
from benchmarks.report.resultfile import races_by_op


@pytest.fixture(scope="module")
def html() -> str:
    return report.render(sample())


def page_of(content: dict) -> Page:
    return Page(report.render(content))


def tiny() -> dict:
    """One case: ours takes 2 ms, a peer 3 ms, the limit 1 ms."""
    extra = dict(op="softmax_xent", label="8 rows", dtype="bfloat16", case={})
    content = sample()
    content["benchmarks"] = [
        dict(group="g", name="n", stats=dict(median=1e-3 * ms, q1=0.9e-3 * ms, q3=1.2e-3 * ms, rounds=10),
             extra_info=extra | dict(provider=provider, kind=kind, limit_ms=1.0))
        for provider, kind, ms in (("triton", "ours", 2.0), ("eager", "peer", 3.0), ("limit", "limit", 1.0))
    ]  # fmt: skip
    content["sfr_kernels"] |= dict(absent=[], failed=[])
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Fits


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 2.25])
def test_an_exponent_known_by_construction(power):
    xs = [1024, 2048, 8192, 65536]
    assert fits.exponent(xs, [3.0 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)
    # deviations of y that are orthogonal to log x change nothing
    bent = [2.0**power, 4.0 * 4.0**power, 8.0**power]
    assert fits.exponent([2, 4, 8], bent) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize(
    "xs, ys, words",
    [
        ([1, 2], [1, 2], "3 distinct"),
        ([1, 2, 2, 1], [1, 2, 3, 4], "3 distinct"),
        ([1, 2, 0], [1, 2, 3], "xs must be positive"),
        ([1, 2, 3], [1, -2, 3], "ys must be positive"),
        ([1, 2, 3], [1, float("nan"), 3], "ys must be positive"),
        ([1, 2, 3], [1, 2], "one length"),
    ],
)
def test_what_cannot_be_fitted_is_refused(xs, ys, words):
    with pytest.raises(ValueError, match=words):
        fits.exponent(xs, ys)


def test_sweeps_are_curves_of_a_provider_in_milliseconds():
    def point(x, seconds, provider="triton", axis="tokens"):
        extra = dict(provider=provider, sweeps=[dict(series="s", axis=axis, x=x), dict(series="s", axis="b", x=x)])
        return dict(stats=dict(median=seconds), extra_info=extra)

    entries = [point(4, 0.016), point(1, 0.001), point(2, 0.004), point(1, 0.5, "eager"), point(2, 0.5, "eager")]
    alone = dict(stats=dict(median=1.0), extra_info=dict(provider="triton", sweeps=[]))
    ours, also, eager, _ = fits.sweeps([*entries, alone])
    assert (ours.series, ours.axis, ours.provider) == ("s", "tokens", "triton")
    assert ours.xs == [1, 2, 4] and ours.ms == [1.0, 4.0, 16.0] and ours.exponent == pytest.approx(2.0)
    assert (also.axis, also.xs, also.ms) == ("b", ours.xs, ours.ms), "a case may be a point of several curves"
    assert eager.xs == [1, 2] and eager.exponent is None


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


def test_the_bars_are_the_numbers_of_the_file():
    page = page_of(tiny())
    figure = page.figures["plot-time-softmax_xent"]
    bars = {trace["name"]: trace for trace in figure["data"] if trace["type"] == "bar"}
    assert set(bars) == {"triton", "eager"}  # the limit is a line
    assert bars["triton"]["x"] == [2.0] and bars["eager"]["x"] == [3.0]
    assert bars["triton"]["error_x"]["array"] == pytest.approx([0.4])
    assert bars["triton"]["error_x"]["arrayminus"] == pytest.approx([0.2])
    (line,) = (trace for trace in figure["data"] if trace.get("name") == "limit")
    assert line["x"] == [1.0, 1.0, None]
    assert "median 2.00 ms, quartiles 1.80 to 2.40, 10 rounds" in bars["triton"]["hovertext"][0]
    assert "2.00 × 1.50 × eager" in page.text  # the summary


def test_a_peer_that_is_faster_is_said_to_win():
    content = tiny()
    content["benchmarks"][1]["stats"]["median"] = 1e-3
    assert "a peer wins 1" in page_of(content).text and "a peer wins" not in page_of(tiny()).text


def test_a_peer_far_behind_is_cut_and_its_label_says_so():
    content = tiny()
    content["benchmarks"][1]["stats"] = dict(median=0.5)
    figure = page_of(content).figures["plot-time-softmax_xent"]
    (labels,) = (trace for trace in figure["data"] if trace.get("mode") == "text")
    assert labels["text"] == [" 2.00 × · 2.00 ms", " cut: 500.00 × · 500 ms"]
    assert labels["x"][1] == figure["layout"]["xaxis"]["range"][1] == 12.0


def test_one_point_is_no_curve():
    content = tiny()
    for entry in content["benchmarks"]:
        entry["extra_info"]["sweeps"] = [dict(axis="tokens", x=8, series="s")]
    page = page_of(content)
    assert "s, against tokens: a single point" in page.text and "plot-sweep-1" not in page.figures


def test_without_a_limit_times_are_milliseconds():
    content = tiny()
    content["benchmarks"].pop()
    for entry in content["benchmarks"]:
        del entry["extra_info"]["limit_ms"]
    page = page_of(content)
    figure = page.figures["plot-time-softmax_xent"]
    assert figure["layout"]["xaxis"]["title"]["text"] == "ms" and "No limit was measured" in page.text


def test_every_provider_of_ours_is_blue_and_no_peer_is(html):
    figure = Page(html).figures["plot-time-softmax_xent"]
    for trace in figure["data"]:
        if trace["type"] == "bar":
            red, blue = (int(trace["marker"]["color"][i : i + 2], 16) for i in (1, 5))
            assert (blue > red + 20) == (trace["name"] in ("cuda", "triton", "torch"))


def test_who_is_absent_or_failed_is_named_ours_first(html):
    text = Page(html).text
    assert text.index("cuda (ours) : WrongResultError") < text.index("F.linear_cross_entropy : RuntimeError")
    assert text.index("cuda (ours) : no nvcc") < text.index("quack : quack is not installed")
    assert "FAILED" in html and "x products, wanted 1.09" in text
    assert "with local changes" in text and "liger_kernel 0.8.5" in text and "Not there quack" in text


def test_a_run_that_was_cut_short_and_times_of_a_cpu_are_said_loudly(html):
    text = page_of(sample("cpu")).text
    assert "Times of a CPU: ratios only" in text and "INCOMPLETE: the run ended" in text
    assert "Times of a CPU" not in Page(html).text and "INCOMPLETE" not in Page(html).text


def without(what: str) -> dict:
    """The sample, with something not measured."""
    content = sample()
    entries = content["benchmarks"]
    if what in ("ceilings", "training_step"):
        entries = [entry for entry in entries if entry["extra_info"]["op"] != what]
    elif what == "kernels":
        entries = [e for e in entries if e["extra_info"]["op"] in ("linear_cross_entropy", "ceilings", "training_step")]
    else:
        for entry in entries:
            entry["extra_info"].pop(what, None)
    return content | dict(benchmarks=entries)


@pytest.mark.parametrize(
    "what, plots, words",
    [
        ("training_step", ["plot-step", "plot-memory-training_step"], "No training step was measured"),
        ("parts", ["plot-step"], "No step was taken apart"),
        ("sweeps", [f"plot-sweep-{n}" for n in range(1, 9)], "No sweep was measured"),
        ("flops", ["plot-roofline"], "there is no roofline"),
        ("kernels", ["plot-bandwidth"], "No kernel without products was measured"),
        ("ceilings", [], "measured no ceiling for copy and matrix product"),
        ("peak_bytes", ["plot-memory-flow_loss", "plot-memory-flow_mse"], "Peak memory was not recorded"),
        ("errors", ["plot-errors"], "No errors of ours were recorded"),
    ],
)
def test_a_plot_with_nothing_to_show_is_absent_and_the_section_says_why(what, plots, words, html):
    whole, page = Page(html), page_of(without(what))
    assert words not in whole.text and words in page.text
    assert not set(plots) & set(page.figures)
    assert set(plots[:1]) <= set(whole.figures) and len(page.figures) > 3


def test_a_file_without_a_single_benchmark_still_names_what_failed():
    content = sample() | dict(benchmarks=[])
    page = page_of(content)
    assert not page.figures and "No case was measured" in page.text and "WrongResultError" in page.text


def test_the_page_needs_no_network(html):
    assert html.count(get_plotlyjs()) == 1
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"@import|url\(|\bimport\s*\(|fetch\(|XMLHttpRequest|https?://", own)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")


HOSTILE = (
    '</script><script>document.body.dataset.injected=1</script><img src=x onerror="document.body.dataset.injected=2">'
)


def hostile() -> dict:
    """Names that would run if any of them were taken for more than text."""
    content = sample()
    for entry in content["benchmarks"]:
        extra = entry["extra_info"]
        extra["label"] += HOSTILE
        extra["provider"] += HOSTILE if extra["provider"] == "Liger" else ""
        for point in extra.get("sweeps") or []:
            point["series"] += HOSTILE
    about = content["sfr_kernels"]
    about["failed"].append(about["failed"][0] | dict(provider=HOSTILE, reason=HOSTILE))
    about["device"] = about["device"] | dict(name=HOSTILE)
    about["versions"] = about["versions"] | {HOSTILE: HOSTILE}
    return content


def test_names_are_text_to_html_to_json_and_to_plotly(html):
    page = page_of(hostile())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == [tag for tag, _ in Page(html).tags].count("script") and "img" not in tags
    assert HOSTILE in page.text and set(page.figures) == set(Page(html).figures)
    assert "<img" not in json.dumps(page.figures)  # plotly would make elements of some tags


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_command_writes_beside_the_file_or_where_it_is_told(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(sample("cpu")))
    assert report.main([str(file)]) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert report.main([str(file), "--out", str(tmp_path / "a" / "b.html")]) == 0
    assert (tmp_path / "a" / "b.html").read_text() == (tmp_path / "run.html").read_text()


def lacking(key: str) -> dict:
    content = copy.deepcopy(tiny())
    del content["benchmarks"][1]["extra_info"][key]
    return content


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a result file"),
        ('{"benchmarks": []}', 'no object "sfr_kernels"'),
        ('{"sfr_kernels": {"device": {}}}', 'no list "benchmarks"'),
        (json.dumps(lacking("kind")), "benchmark 1 (n): extra_info lacks kind"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_is_wrong(text, words, tmp_path, capsys):
    file, out = tmp_path / "run.json", tmp_path / "run.html"
    out.write_text("before")
    if text is not None:
        file.write_text(text)
    assert report.main([str(file)]) == 2
    said = capsys.readouterr().err
    assert words in said and str(file) in said and said.count("\n") == 1
    assert out.read_text() == "before" and not list(tmp_path.glob(".partial*"))


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

# Runs after the plots are drawn: text that is cut off or lies on other text, the page's width, and a sorted column.
PROBE = """<script>
const waiting = setInterval(() => {
  if (document.body.dataset.drawn === undefined) return;
  clearInterval(waiting);
  const cut = [], over = [];
  for (const plot of document.querySelectorAll("div.plot")) {
    const frame = plot.getBoundingClientRect();
    const texts = [...plot.querySelectorAll("text")].filter(t => t.textContent.trim())
      .map(t => [plot.id + ": " + t.textContent, t.getBoundingClientRect()]);
    for (const [name, box] of texts)
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1) cut.push(name);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (width > 2 && height > 4) over.push(a + " | " + b);
    }));
  }
  const heads = [...document.querySelectorAll("#op-flow_loss details th")];
  const head = heads.find(h => h.textContent === "median ms");
  head.click();
  head.click();
  const column = [...head.closest("table").tBodies[0].rows].map(row => +row.cells[head.cellIndex].dataset.order);
  document.body.dataset.probe = JSON.stringify({ cut, over, column, width: document.documentElement.scrollWidth });
}, 50);
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """(html, width) → the page as Chromium has it after its scripts, without a network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing = f"needs a browser: none of {', '.join(names)} is on PATH"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)

    def call(html: str, width: int = 1400) -> Page:
        path = Path(tmp_path / "page.html")
        path.write_text(html)
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += [
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=30000",
            f"--window-size={width},2000",
        ]
        command += ["--hide-scrollbars", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        return Page(done.stdout)

    return call


def faults(page: Page, expected: set[str]) -> list[str]:
    """What is wrong with a page that a browser has drawn."""
    found = [f"{name} is not drawn" for name in sorted(expected) if not page.drawn.get(name)]
    if page.body.get("data-problems") != "0":
        found.append(f"{page.body.get('data-problems')} script errors")
    if page.body.get("data-drawn") != str(len(expected)):
        found.append(f"{page.body.get('data-drawn')} of {len(expected)} plots are done")
    return found


def expected(content: dict) -> set[str]:
    """The plots that a whole file has, from the file itself."""
    ops = [op for op in races_by_op(content) if op != "ceilings"]
    found = {f"plot-time-{op}" for op in ops if op != "training_step"} | {f"plot-memory-{op}" for op in ops}
    curves = {(s.series, s.axis) for s in fits.sweeps(content["benchmarks"])}
    found |= {f"plot-sweep-{n}" for n in range(1, len(curves) + 1)}
    return found | {"plot-overview", "plot-errors", "plot-step", "plot-roofline", "plot-bandwidth"}


@pytest.mark.slow
@pytest.mark.parametrize("kind, width", [("cuda", 1400), ("cpu", 600)])
def test_a_browser_draws_every_plot_and_cuts_nothing_off(kind, width, browse):
    content = sample(kind)
    page = browse(report.render(content).replace("</body>", PROBE), width)
    assert len(expected(content)) > 25 and not faults(page, expected(content))
    probe = json.loads(page.body["data-probe"])
    assert not probe["cut"] and not probe["over"] and probe["width"] <= width
    assert len(probe["column"]) == 10 - 2 * (kind == "cpu") + 2 and probe["column"] == sorted(probe["column"])[::-1]


@pytest.mark.slow
def test_a_browser_takes_hostile_names_for_text(browse):
    content = hostile()
    page = browse(report.render(content))
    assert not faults(page, expected(content)) and "data-injected" not in page.body


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, words",
    [
        ("</body>", "<script>throw new Error('planted')</script></body>", "1 script errors"),
        ("</body>", "<script>Promise.reject(new Error('planted'))</script></body>", "1 script errors"),
        ("</body>", "<script>console.error('planted')</script></body>", "1 script errors"),
        ("</body>", "<img src='https://example.org/x.png'></body>", "1 script errors"),  # the page forbids it
        ('data-plot="plot-step">{', 'data-plot="plot-step">{"data":[],"layout":{}}{', "plot-step is not drawn"),
        ('"data":[', '"data":[],"unused":[', "is not drawn"),  # of the first figure; nothing raises
    ],
)  # fmt: skip
def test_the_same_check_finds_a_page_that_is_broken(old, new, words, browse, html):
    assert old in html
    page = browse(html.replace(old, new, 1))
    assert any(words in fault for fault in faults(page, expected(sample())))
