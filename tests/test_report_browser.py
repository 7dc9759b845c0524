"""The report in a browser: every plot is drawn, nothing is cut off, and no name is taken for more than text."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_samples import hostile, sample
from pages import Page

from benchmarks.report import fits
from benchmarks.report import page as report
from benchmarks.report.resultfile import races_by_op


@pytest.fixture(scope="module")
def html() -> str:
    return report.render(sample())


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
    found = {f"plot-time-{op}" for op in ops if op != "training_step"}
    found |= {f"plot-memory-{e['op']}" for e in (b["extra_info"] for b in content["benchmarks"])
              if e["op"] in ops and e["kind"] != "limit" and e.get("peak_bytes") is not None}  # fmt: skip
    curves = {(s.series, s.axis) for s in fits.sweeps(content["benchmarks"])}
    found |= {f"plot-sweep-{n}" for n in range(1, len(curves) + 1)}
    return found | {"plot-overview", "plot-errors", "plot-step", "plot-roofline", "plot-bandwidth"}


@pytest.mark.slow
@pytest.mark.parametrize("kind, width", [("cuda", 1400), ("cpu", 600)])
def test_a_browser_draws_every_plot_and_cuts_nothing_off(kind, width, browse):
    content = sample(kind)
    page = browse(report.render(content).replace("</body>", PROBE), width)
    assert len(expected(content)) > 20 and not faults(page, expected(content))
    probe = json.loads(page.body["data-probe"])
    assert not probe["cut"] and not probe["over"] and probe["width"] <= width
    rows = sum(entry["extra_info"]["op"] == "flow_loss" for entry in content["benchmarks"])
    assert len(probe["column"]) == rows > 20 and probe["column"] == sorted(probe["column"])[::-1]


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
