"""The rows and targets of `SFRConfig.official()` are, one by one, those that the published code gives."""

import json
from pathlib import Path

import pytest
import torch

from sfr_kernels import SFRConfig
from sfr_kernels.targets.segments import rows_and_texts, segments_of

CASES = json.loads((Path(__file__).parent / "golden/targets.json").read_text())["cases"]


class Numbers:
    """Decodes labels to themselves, those of white space to a space."""

    def __init__(self, blank: list[int]):
        self.blank = set(blank)

    def batch_decode(self, pieces, skip_special_tokens):
        return [" ".join(" " if i in self.blank else str(i) for i in piece) for piece in pieces]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_position_has_the_published_target(case):
    config = SFRConfig.official(**{name: case[name] for name in ("segment_tokens", "stride", "min_tokens")})
    labels = torch.full((len(case["supervised"]), case["length"]), -100)
    for b, runs in enumerate(case["supervised"]):
        for start, stop in runs:
            labels[b, start:stop] = 1000 * b + torch.arange(start, stop)
    tokenizer = Numbers(case["blank_tokens"])
    rows, texts = rows_and_texts(labels, config, tokenizer)
    assert segments_of([{"labels": row} for row in labels.tolist()], config, tokenizer).texts == texts

    found = {}
    for row in range(rows.num_flow):
        text = texts[rows.anchor[row]]
        words = None if text is None else [int(word) for word in text.split()]
        target = None if words is None else [words[0], words[-1], len(words)]
        found[divmod(int(rows.rows[row]), case["length"])] = target, float(rows.weight[row])
    published = {(b, p): (target, weight) for b, p, target, weight in case["rows"]}
    assert found.keys() == published.keys()
    for place, (target, weight) in published.items():
        assert found[place] == (target, pytest.approx(weight, rel=1e-6)), place
