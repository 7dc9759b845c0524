"""The report in a browser: every plot is drawn, nothing fails or asks for a network, and names are but text."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest
from test_bench_report import CPU, HOSTILE, data, file, page, sample  # noqa: F401

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
def test_a_browser_draws_every_plot_and_asks_for_nothing(file, tmp_path):  # noqa: F811
    page.write(data.read(file(sample(device=CPU))), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    found = probe(tmp_path, html)
    assert not found["problems"] and not found["cut"] and not found["requests"]
    assert len(found["drawn"]) == 9 and all(found["drawn"]) and HOSTILE in found["texts"]
    for planted in ("<script>throw new Error('x')</script>", "<img src='https://example.org/x.png'>"):
        assert probe(tmp_path, html.replace("</body>", planted + "</body>"))["problems"]
