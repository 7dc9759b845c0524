"""The report of a result file: its numbers are those of the file, it says what is not there, and names are text."""

import copy
import json
import re

import pytest
from bench_samples import HOSTILE, hostile, sample
from pages import Page
from plotly.offline import get_plotlyjs

from benchmarks.report import curves, fits, words
from benchmarks.report import page as report
from benchmarks.report.reading import races
from benchmarks.report.resultfile import load, races_by_op, shortfall
from benchmarks.step.providers import PUBLISHED_LOOPS, SFR_STORED, SFT_HF


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


def test_curves_of_one_plot_are_together_though_their_series_interleave():
    found = fits.sweeps(sample()["benchmarks"])
    order = [(s.series, s.axis) for s in found]
    assert any(a == c != b for a, b, c in zip(order, order[1:], order[2:], strict=False)), "they do"
    grouped = fits.by_plot(found)
    assert list(grouped) == list(dict.fromkeys(order)) and sum(map(len, grouped.values())) == len(found)


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


def test_steps_are_compared_with_plain_fine_tuning_and_with_what_was_published(html):
    by_provider = {}
    for race in races_by_op(sample())["training_step"]:
        ms = {r.provider: r.ms for r in race.results}
        assert race.lead is None, "the fastest of ours is plain fine-tuning"
        for name, taken in ms.items():
            by_provider.setdefault(name, []).append((taken / ms[SFT_HF], taken / ms[PUBLISHED_LOOPS]))
    text = Page(html).text
    summary = text[text.index("Ranges over the cases") : text.index("Absent, failed, missed Failed")]
    assert "training_step 2 – – see the steps below" in summary and "a peer wins" not in summary
    assert f"step cases × {SFT_HF} × {PUBLISHED_LOOPS}" in summary
    for name, found in by_provider.items():
        cells = " ".join(words.spread(list(factors)) for factors in zip(*found, strict=True))
        assert f"{name} {len(found)} {cells}" in summary
    assert len(by_provider[SFR_STORED]) == 2 and len(by_provider) == 7
    assert f"step ms × {SFT_HF} tokens/s" in text and f"rounds × {SFT_HF} peak memory" in text, "in the op's tables"


def test_a_point_of_the_roofline_counts_the_operands_of_the_products(html):
    race = next(r for r in races(sample()) if r.op == "flow_loss")
    extra = race.fastest("ours").extra
    assert curves.intensity(race) == extra["flops"] / extra["traffic"] < extra["flops"] / extra["bytes"]
    figures = Page(html).figures
    points = next(trace for trace in figures["plot-roofline"]["data"] if trace["name"] == race.fastest("ours").provider)
    assert extra["flops"] / extra["traffic"] in points["x"] and extra["tflop_per_s"] in points["y"]
    shown = " ".join(text for t in figures["plot-bandwidth"]["data"] for text in t.get("hovertext") or ())
    assert "flow_mse" in shown and "flow_loss" not in shown and "linear_cross_entropy" not in shown


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
    assert "quack is not installed (1 case of linear_cross_entropy)" in text
    assert "FAILED" in html and "x products, wanted 1.09" in text
    assert "with local changes" in text and "liger_kernel 0.8.5" in text and "Not there quack" in text


def test_a_run_that_was_cut_short_and_times_of_a_cpu_are_said_loudly(html):
    content = sample("cpu")
    text = page_of(content).text
    cut = "CUT SHORT: the time was up before all cases were run. Not run: 2 of velocity_head."
    assert "Times of a CPU: ratios only" in text and cut == shortfall(content) and text.count(cut) == 1
    assert "sfr_kernels on Intel(R) Xeon(R) Processor @ 2.10GHz, 2 threads" in text and "quick, NOT COMPLETE" in text
    assert text.count("not run:") == 0, "said once, and not of every provider"
    content["sfr_kernels"]["cut"] = False
    assert "INCOMPLETE: the run did not end" in page_of(content).text
    for absent in ("Times of a CPU", "INCOMPLETE", "CUT SHORT", "NOT COMPLETE"):
        assert absent not in Page(html).text


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
        ("sweeps", [f"plot-sweep-{n}" for n in range(1, 7)], "No sweep was measured"),
        ("flops", ["plot-roofline"], "there is no roofline"),
        ("kernels", ["plot-bandwidth"], "No kernel without products was measured"),
        ("ceilings", [], "measured no ceiling for copy and matrix product"),
        ("peak_bytes", ["plot-memory-flow_loss", "plot-memory-flow_mse"], "Peak memory was not recorded"),
        ("errors", ["plot-errors"], "No errors of ours were recorded"),
    ],
)
def test_a_plot_with_nothing_to_show_is_absent_and_the_section_says_why(what, plots, words, html):
    whole, page = Page(html), page_of(without(what))
    known = 2 if what == "peak_bytes" else 0  # of targets and of collation it never is
    assert whole.text.count(words) == known < page.text.count(words)
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


def test_names_are_text_to_html_to_json_and_to_plotly(html):
    page = page_of(hostile())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == [tag for tag, _ in Page(html).tags].count("script") and "img" not in tags
    assert HOSTILE in page.text and set(page.figures) == set(Page(html).figures)
    assert "<img" not in json.dumps(page.figures)  # plotly would make elements of some tags


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_report_is_written_whole_and_the_same_again(tmp_path):
    file, first, second = tmp_path / "run.json", tmp_path / "run.html", tmp_path / "a" / "b.html"
    file.write_text(json.dumps(sample("cpu")))
    for out in (first, second):
        report.write_report(load(file), out)
    assert first.read_text() == second.read_text()
    with pytest.raises(ValueError, match="not a result file"):
        report.write_report([], first)
    assert first.read_text() == second.read_text() and not list(tmp_path.glob(".partial*"))


def lacking(key: str) -> dict:
    content = copy.deepcopy(tiny())
    del content["benchmarks"][1]["extra_info"][key]
    return content


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a result file"),
        ('{"benchmarks": []}', 'no object "sfr_kernels"'),
        ('{"sfr_kernels": {"device": {}}}', 'no list "benchmarks"'),
        ('{"sfr_kernels": {}, "benchmarks": []}', 'names no "device"'),
        ('{"sfr_kernels": {"device": {"kind": "cpu"}}, "benchmarks": []}', 'device has no "name"'),
        (json.dumps(lacking("kind")), "benchmark 1 (n): extra_info lacks kind"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_is_wrong(text, reason, tmp_path):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
