"""An HTML page taken apart, as it was written or as a browser left it."""

import json
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "source"}


class Page(HTMLParser):
    """A page's tags with their attributes, its text outside scripts, and how much is drawn in each plot."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.stack, self.text, self.drawn, self.body, self.json = [], [], "", {}, {}, {}
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "body":
            self.body = attributes
        if tag == "div" and attributes.get("class", "").startswith("plot "):
            self.drawn[attributes["id"]] = 0
        if tag not in VOID:
            self.stack.append((tag, attributes))
        if tag == "path" and attributes.get("d") and any("trace" in a.get("class", "").split() for _, a in self.stack):
            plot = next(a["id"] for _, a in reversed(self.stack) if a.get("id", "").startswith("plot-"))
            self.drawn[plot] += 1

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self.stack[-1] if self.stack else ("", {})
        if "data-plot" in attributes:
            self.json[attributes["data-plot"]] = data
        elif tag not in ("script", "style"):
            self.text += f" {data}"

    @property
    def figures(self) -> dict[str, dict]:
        """Plot → what plotly is given."""
        return {name: json.loads(text) for name, text in self.json.items()}
