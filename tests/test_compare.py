"""Comparisons of models: planted answers whose collapse is known, and intervals that are as wide as they say."""

import hashlib
import json
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sfr_kernels.commands.report import collapse_matrices, samples_table, write_comparison
from sfr_kernels.evaluation import compare as compare_module
from sfr_kernels.evaluation.compare import CLAIMS, FEWEST_PROMPTS, Cell, Setting, compare, holm, interval, measure
from sfr_kernels.evaluation.fidelity import StyleProbe
from sfr_kernels.evaluation.generate import Answer

PERSONAS = ["pirate", "monk", "robot", "bard"]
PROMPTS = [f"What of number {i}?" for i in range(24)]
CELLS = [Cell(prompt, persona) for prompt in PROMPTS for persona in PERSONAS]
SIZE = 24


def direction(name: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=SIZE) / math.sqrt(SIZE)


def embed(texts: list[str]) -> np.ndarray:
    """The sum of what a text says of its persona and of its prompt, and of the text itself."""
    rows = []
    for text in texts:
        parts = [1.5 * direction(p) for p in PERSONAS if p in text] + [direction(p) for p in PROMPTS if p in text]
        rows.append(sum(parts, 0.3 * direction(text)))
    x = np.stack(rows)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def answer(persona: str, prompt: str, sample: int) -> Answer:
    words = " ".join(f"{persona[:2]}{(sample * 7 + len(prompt) + i) % 23}" for i in range(12))
    return Answer(f"Says the {persona} of {prompt} {words}", True)


def system(collapse: float = 0.0, samples: int = 2, shift: int = 0) -> list[list[Answer]]:
    """A model that on a share of the prompts answers all personas as the pirate does, always with the same words.
    `shift`: whose answer each persona gives."""
    out = []
    for i, cell in enumerate(CELLS):
        prompt = i // len(PERSONAS)
        speaker = PERSONAS[(i + shift) % len(PERSONAS)]
        if prompt < collapse * len(PROMPTS):
            out.append([answer("pirate", cell.prompt, 0)] * samples)
        else:
            out.append([answer(speaker, cell.prompt, j) for j in range(samples)])
    return out


@pytest.fixture(scope="module")
def setting() -> Setting:
    training = [(f"Says the {persona} of {i}", persona) for persona in PERSONAS for i in range(20)]
    probe = StyleProbe(embed([text for text, _ in training]), [persona for _, persona in training])
    return Setting(CELLS, embed, 100, probe, [[answer(c.persona, c.prompt, 9).text] for c in CELLS])


def means(setting, answers) -> dict[str, float]:
    return {name: float(np.nanmean(values)) for name, values in measure(setting, answers).values.items()}


def test_identical_answers_are_full_collapse(setting):
    found = means(setting, system(collapse=1.0))
    for kind in ("between personas", "between samples"):
        assert found[f"distance {kind}"] == pytest.approx(0, abs=1e-6)
        assert found[f"Vendi score {kind}"] == pytest.approx(1, abs=1e-4)
        assert found[f"self-BLEU {kind}"] == pytest.approx(100)
    assert found["style fidelity"] == 1 / len(PERSONAS)  # the pirate's is right
    assert measure(setting, system(collapse=1.0)).similarity == pytest.approx(np.ones((4, 4)), abs=1e-6)


def test_shuffled_answers_are_no_collapse_but_nobody_is_who_he_is(setting):
    apart, shuffled = means(setting, system()), means(setting, system(shift=1))
    for name in apart:
        if name != "style fidelity":
            assert shuffled[name] == pytest.approx(apart[name], rel=1e-5), name
    assert apart["style fidelity"] == 1 and shuffled["style fidelity"] == 0
    assert apart["distance between personas"] > 0.3 and apart["Vendi score between personas"] > 2
    assert apart["self-BLEU between personas"] < 60
    matrix = measure(setting, system()).similarity
    assert matrix.shape == (4, 4) and matrix.diagonal().min() > matrix[~np.eye(4, dtype=bool)].max()


def test_constructed_systems_come_in_their_order(setting):
    found = [means(setting, system(collapse)) for collapse in (0.25, 0.5, 0.75)]
    more = ["style fidelity", "separation of personas"]
    more += [f"{name} between {what}" for name in ("distance", "Vendi score", "distinct-2", "adjusted distinct-1")
             for what in ("personas", "samples")]  # fmt: skip
    for name in more:
        assert found[0][name] > found[1][name] > found[2][name], name
    for name in ("self-BLEU between personas", "self-BLEU between samples"):
        assert found[0][name] < found[1][name] < found[2][name], name


def test_lengths_repetition_relevance_and_cut_answers(setting):
    plain = means(setting, system())
    looped = [[Answer("la la la la la la la la", False)] * 2 for _ in CELLS]
    found = means(setting, looped)
    assert found["words"] == 8 and found["repetition"] == pytest.approx(4 / 5) and found["unfinished"] == 1
    assert plain["unfinished"] == 0 and plain["repetition"] == 0
    other = [[answer(c.persona, PROMPTS[PROMPTS.index(c.prompt) - 1], j) for j in range(2)] for c in CELLS]
    assert means(setting, other)["relevance"] < plain["relevance"] - 0.2


def test_the_number_of_samples_changes_no_measure_between_personas(setting):
    one, four = means(setting, system(samples=1)), means(setting, system(samples=4))
    assert "distance between samples" not in one and "separation of personas" not in one
    for name in ("distance", "Vendi score", "self-BLEU", "distinct-2", "adjusted distinct-1"):
        assert one[f"{name} between personas"] == pytest.approx(four[f"{name} between personas"], rel=0.1)


def test_noise_separates_no_personas(setting):
    """Every answer is another one, of a speaker drawn by lot whoever is asked."""
    draw = np.random.default_rng(3)
    noise = [[answer(PERSONAS[draw.integers(4)], cell.prompt, j) for j in range(4)] for cell in CELLS]
    apart, found = means(setting, system(samples=4)), means(setting, noise)
    assert found["distance between personas"] > 0.3 and found["distance between samples"] > 0.3
    assert abs(found["separation of personas"]) < 0.1 < 0.3 < apart["separation of personas"]


def test_a_prompt_that_not_everybody_is_asked_and_an_unknown_persona():
    training = [(f"Says the {p} of {i}", p) for p in PERSONAS[:2] for i in range(20)]
    probe = StyleProbe(embed([t for t, _ in training]), [p for _, p in training])
    cells = [Cell(PROMPTS[0], "pirate"), Cell(PROMPTS[0], "monk"), Cell(PROMPTS[0], "robot"), Cell(PROMPTS[1], "monk")]
    found = measure(Setting(cells, embed, 100, probe), [[answer(c.persona, c.prompt, 0)] for c in cells])
    assert found.values["style fidelity"].tolist() == [1, 1]  # the robot does not count
    between = found.values["distance between personas"]
    assert between[0] > 0 and math.isnan(between[1]) and not np.isnan(found.similarity[0, 1])
    assert "distance between samples" not in found.values
    with pytest.raises(ValueError, match="answers must be of 4 cells, got 1"):
        measure(Setting(cells, embed, 100), [[Answer("x", True)]])


DRAWS = {
    "normal": lambda draw, n: draw.normal(size=n),
    "skewed": lambda draw, n: draw.exponential(size=n) - 1,
    "quarters": lambda draw, n: draw.integers(-2, 3, n) / 4,
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("prompts", [7, 24])
def test_intervals_cover_the_truth_as_often_as_they_say(kind, prompts, monkeypatch):
    """1,000 experiments without a difference, with 3 standard errors of the simulation; of seven skewed values not
    even Student's interval is right."""
    draws, draw = compare_module._draws, np.random.default_rng(1)
    monkeypatch.setattr(compare_module, "_draws", lambda n: draws(n)[:4000])
    found = [interval(DRAWS[kind](draw, prompts)) for _ in range(1000)]
    covered = np.mean([x.low <= 0 <= x.high for x in found])
    assert 0.95 - 0.021 - {"skewed": 0.05}.get(kind, 0) <= covered <= 0.95 + 0.021
    assert np.mean([x.p > 0.05 for x in found]) == pytest.approx(covered, abs=0.006)  # p says the same


def test_an_interval_of_normal_values_is_students():
    x = np.random.default_rng(0).normal(1.0, 2.0, 8)
    found, student = interval(x), ttest_1samp(x, 0)
    low, high = student.confidence_interval(0.95)
    assert found.mean == pytest.approx(x.mean()) and found.low > 0  # as Student's does
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)
    assert found.p == pytest.approx(student.pvalue, rel=0.5)
    less = interval(x - 1)
    assert less.p == pytest.approx(ttest_1samp(x, 1).pvalue, rel=0.1)
    assert interval(x - 1, level=1 - less.p).low == pytest.approx(0, abs=0.01)  # where the interval reaches 0
    many = np.random.default_rng(0).normal(1.0, 2.0, 400)
    limits = ttest_1samp(many, 0).confidence_interval(0.95)
    assert interval(many)[1:3] == pytest.approx(tuple(limits), abs=0.02)


def test_intervals_of_few_and_of_equal_values():
    few = interval(np.array([1.0, 2, 3, 4]))
    assert few.mean == 2.5 and math.isnan(few.low) and math.isnan(few.p)
    assert interval(np.array([1.0, 2, math.nan, 3, 4])).mean == 2.5
    assert interval(np.zeros(8)) == (0, 0, 0, 1)
    ninths = np.arange(2, 8) / 9 - np.arange(1, 7) / 9  # equal but for rounding
    assert len(set(ninths)) > 1 and interval(ninths) == pytest.approx((1 / 9, 1 / 9, 1 / 9, 2 / 2**6))
    whole = np.array([2, -1, 3, -2, -2, 1, 4, -1])
    halves = [interval(values).p for values in (whole / 2, whole / 9 + 0.3 - 0.3)]
    assert halves[0] == halves[1]  # where means of draws that are 0 are so but for rounding
    assert math.isnan(interval(np.array([math.nan])).mean)


def test_holm():
    # 0.01 ≤ 0.05/4, 0.012 ≤ 0.05/3, 0.03 > 0.05/2: the last two stay, though 0.03 ≤ 0.05 alone
    assert holm({"a": 0.03, "b": 0.01, "c": 0.012, "d": 0.04, "e": math.nan}) == {"b", "c"}
    assert holm({}) == set()


def test_equal_models_do_not_differ_and_different_ones_do(setting, tmp_path, capsys):
    measured = {"a": measure(setting, system()), "b": measure(setting, system()), "c": measure(setting, system(0.75))}
    write_comparison(tmp_path / "it", setting, measured, {"sampling": {"samples": 2}})
    shown = capsys.readouterr().out
    assert "b and a: no difference." in shown
    verdict = next(line for line in shown.splitlines() if line.startswith("c against a: "))
    lower = "separation of personas, distance between samples, style fidelity"
    assert verdict == f"c against a: lower: {lower}; no difference: relevance."
    result = json.loads((tmp_path / "it.json").read_text())
    assert result["prompts"] == PROMPTS and result["answers"] == 192 and result["baseline"] == "a"
    lost = result["models"]["c"]["separation of personas"]["difference"]
    assert lost["high"] < 0 and lost["differs"] and result["models"]["b"]["words"]["difference"]["p"] == 1
    per_prompt = [result["models"][m]["separation of personas"]["per_prompt"] for m in "ac"]
    assert lost["mean"] == pytest.approx(np.mean(per_prompt[1]) - np.mean(per_prompt[0]))
    assert result["data"]["style fidelity"] == 1 and np.array(result["similarity"]["a"]).shape == (4, 4)
    table = (tmp_path / "it.md").read_text()
    assert "| style fidelity ↑ | 1.000 | 1.000 | 1.000 (+0.000 [+0.000, +0.000]) | 0.438 (−0.562 [" in table
    for name in ("it-collapse.png", "it-fidelity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_collapse_is_told_from_the_fewest_prompts(setting, tmp_path, capsys):
    few = Setting(CELLS[: 4 * FEWEST_PROMPTS], embed, 100, setting.probe)
    measured = {kind: measure(few, system(share)[: len(few.cells)]) for kind, share in (("apart", 0.0), ("one", 1.0))}
    write_comparison(tmp_path / "it", few, measured, {"sampling": {"samples": 2}})
    shown = capsys.readouterr().out
    assert "one against apart: lower: separation of personas, distance between samples" in shown
    assert all(f"{name} between samples {way}" in shown for name, way in (("distinct-2", "↑"), ("self-BLEU", "↓")))
    assert "repetition ↓" in shown and "words " in shown and "words ↑" not in shown


def test_rounding_of_embeddings_is_no_difference():
    """Models that both answer alike, whose distances of 0 differ by float32's last bits."""
    first, second = np.zeros(24), np.random.default_rng(0).uniform(1e-9, 1e-7, 24)
    found = compare({"a": {"relevance": first}, "b": {"relevance": second}}, "a")["b"]["relevance"]["difference"]
    assert found == {"mean": 0, "low": 0, "high": 0, "p": 1, "differs": False}


def test_names_are_neither_mathematics_nor_markup(tmp_path, capsys):
    names = [r"Use $\frac$ here", "[/b] and [red]"]
    collapse_matrices(names, {r"a $\x$": np.eye(2), "[/b]": np.full((2, 2), 0.5)}, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    cells = [Cell("Close [/b]!", name) for name in names]
    samples_table("All", cells, {"[/i]": ["a|b", "c\nd"]}, tmp_path / "it.md", printed=(1, 2))
    assert "Close [/b]!" in (shown := capsys.readouterr().out) and "[/i]" in shown and "[red]" in shown
    assert r"| [/b] and [red] | c<br>d |" in (tmp_path / "it.md").read_text()


def test_models_that_differ_by_chance_alone_are_called_equal():
    """Of 60 pairs of one model with itself, at most one in twenty may be told apart."""
    draw, told = np.random.default_rng(2), 0
    for _ in range(60):
        first, second = ({name: draw.normal(size=20) for name in CLAIMS} for _ in range(2))
        found = compare({"a": first, "b": second}, "a")["b"]
        told += any(row["difference"]["differs"] for row in found.values())
    assert told <= 60 * 0.05 + 3.5 * math.sqrt(60 * 0.05 * 0.95)
