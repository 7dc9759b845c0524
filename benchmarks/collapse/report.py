"""Writes the tables and plots of README.md beside this file from the committed result files; with --check, only says
whether they are current, with exit status 1 if not."""

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfr_kernels.atomic import write_atomically
from sfr_kernels.evaluation.compare import Interval, holm

from .arms import AGAIN, CE, FORMER, SFR, SHARE, SHARE_SHUFFLED, SHUFFLED, THIRD, TRUTH, arms
from .compare import PRIMARY, Runs, by_prompt, differences, over_worlds, proven
from .personas import BASE, KINDS
from .run import results_of

HERE = Path(__file__).parent
RESULTS, TOP = HERE.parent / "results", HERE.parents[1] / "README.md"
WORLD, PERSONAS = RESULTS / "collapse-world.jsonl", RESULTS / "collapse-personas.jsonl"
FIRST_ROUND = RESULTS / "collapse-world-first.jsonl"
FITTED = "MTP: norm, head first", "MTP, 3 tokens: norm, head first", "mse: norm, head first"
SHOWN = CE.name, SFR, SHUFFLED, SHARE, "MTP", FORMER, *FITTED, TRUTH.name
VALIDITY = "validity at equal overlap"
MEASURES = "style fidelity", "separation of personas", "distance between samples", "relevance", "repetition"


def about(path: Path) -> str:
    """Where the results of a file come from: a line for each start."""
    heads = [line for line in map(json.loads, path.read_text().splitlines()) if "device" in line]
    days = " to ".join(dict.fromkeys(head["date"][:10] for head in (heads[0], heads[-1])))
    versions = (f"{name} {heads[-1]['versions'][name]}" for name in ("python", "torch", "transformers"))
    where = f"{heads[-1]['device']['name']}, {heads[-1]['device']['kind']}, {', '.join(versions)}"
    return f"Measured on {where}, {days} (benchmarks/results/{path.name})."


def world_runs(path: Path) -> Runs:
    return {(x["arm"], x["world"], x["seed"]): x["history"] for x in results_of(path)}


def histories(runs: Runs, arm: str) -> list:
    return [history for key, history in runs.items() if key[0] == arm]


def world_table(runs: Runs) -> str:
    names = [arm.name for arm in arms({}, 1) if arm != CE and any(key[0] == arm.name for key in runs)]
    found = {name: differences(runs, name, CE.name) for name in names}
    stars = {outcome: proven(found, outcome) for outcome in next(iter(found.values()))}
    columns = {
        "NLL, equal overlap": PRIMARY, "validity, equal overlap": VALIDITY,
        "NLL, end": "nll at the end", "overlap, end": "overlap at the end", "validity, end": "validity at the end",
    }  # fmt: skip
    lines = ["| arm | runs | share | " + " | ".join(columns) + " |", "| --- | ---: | ---: |" + " ---: |" * len(columns)]
    for name in names:
        own = histories(runs, name)
        shares = [point["share"] for history in own for point in history if "share" in point]
        cells = [f"{_text(found[name][x])}{' ★' if name in stars[x] else ''}" for x in columns.values()]
        share = f"{np.mean(shares):.2f}" if shares else "–"
        lines.append(f"| {name} | {len(own)} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def world_claims(runs: Runs, first: Runs) -> str:
    """The default, and the share that is an option, against the arms that they were to be better than, and against
    those that turned out better."""
    lines = ["| SFR | less | NLL | NLL, over worlds | NLL, first round | validity |", "| --- | --- |" + " ---: |" * 4]
    for title, arm, shuffled in (("λ 1", SFR, SHUFFLED), ("share 0.3", SHARE, SHARE_SHUFFLED)):
        against = {name: name for name in (CE.name, "MTP", FORMER, *FITTED)}
        for text, other in {"its targets shuffled": shuffled, **against}.items():
            found, known = differences(runs, arm, other), any(key[0] == other for key in first)
            cells = [_text(found[PRIMARY]), _text(over_worlds(runs, arm, other))]
            cells += [_text(differences(first, arm, other)[PRIMARY]) if known else "–", _text(found[VALIDITY])]
            lines.append(f"| {title} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planted(runs: Runs, first: Runs) -> str:
    pairs = (TRUTH, CE), (AGAIN, CE), (THIRD, CE), (THIRD, AGAIN)
    lines = ["| | NLL | NLL, first round | validity |", "| --- | ---: | ---: | ---: |"]
    for arm, other in pairs:
        found, before = (differences(each, arm.name, other.name) for each in (runs, first))
        cells = _text(found[PRIMARY]), _text(before[PRIMARY]), _text(found[VALIDITY])
        lines.append(f"| {arm.name}, less {other.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def world_levels(runs: Runs) -> str:
    """Where the models begin and end, in means over runs."""
    lines = ["| | NLL | overlap | validity | coverage |", "| --- | ---: | ---: | ---: | ---: |"]
    rows = {"before fine-tuning": [h[0] for h in histories(runs, CE.name)]}
    for name in (CE.name, SFR, SHUFFLED, SHARE, "MTP", TRUTH.name):
        rows[f"{name}, end"] = [h[-1] for h in histories(runs, name)]
    for name, points in rows.items():
        means = [np.mean([point[x] for point in points]) for x in ("nll", "overlap", "validity", "coverage")]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


def world_curves(runs: Runs) -> dict[str, list]:
    """By arm the mean course of overlap, NLL and validity."""
    mean = lambda name, x: np.mean([[p[x] for p in h] for h in histories(runs, name)], 0)  # noqa: E731
    return {name: [mean(name, x) for x in ("overlap", "nll", "validity")] for name in SHOWN}


def tuned_points(results: Sequence[dict], measures: Sequence[str]) -> dict[str, np.ndarray]:
    """By arm, (1 + measures + 1, seeds): cross-entropy, the measures' means over prompts, the flow's share at h."""
    ends = {(x["arm"], x["rate"], x["seed"]): x["history"][-1] for x in results if x["kind"] == "training"}
    points: dict[str, list] = {}
    for x in results:
        if x["kind"] == "answers":
            means = [np.nanmean(np.array(x["values"][m], float)) for m in measures]
            end = ends.get((x["arm"], x["rate"], x["seed"]), {"asked": None, "share": None})
            points.setdefault(x["arm"], []).append([end["asked"], *means, end["share"]])
    return {name: np.array(rows, float).T for name, rows in points.items()}


def tuned_table(results: Sequence[dict], measures: Sequence[str]) -> str:
    if not results:
        return "Not run yet: it needs a GPU."
    answers = [x for x in results if x["kind"] == "answers"]
    rates = {x["arm"]: x["rate"] for x in answers}
    lines = ["| arm | rate | seeds | share | held-out CE | " + " | ".join(measures) + " |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(measures))
    for name, points in tuned_points(results, measures).items():
        loss, *cells, share = ("–" if np.isnan(mean) else f"{mean:.3f}" for mean in points.mean(1))
        if name not in (CE.name, BASE):
            found = by_prompt(answers, name, CE.name)
            stars = holm({m: found[m].p for m in measures})
            marks = [" ★" if m in stars else "" for m in measures]
            cells = [f"{c} ({_text(found[m])}{mark})" for c, m, mark in zip(cells, measures, marks, strict=True)]
        lines.append(f"| {name} | {rates[name] or '–'} | {points.shape[1]} | {share} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def control(results: Sequence[dict]) -> str:
    found = by_prompt([x for x in results if x["kind"] == "answers"], SHARE, SHARE_SHUFFLED)
    cells = ", ".join(f"{m} {_text(found[m])}" for m in MEASURES)
    return textwrap.fill(f"Share 0.3, less the same with its targets shuffled: {cells}.", 120, break_on_hyphens=False)


def plot(path: Path, curves: dict, style: str, *labels: str) -> None:
    """Panels side by side. The first row of a curve is their common x, of the first label; each other is one's y."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(labels) - 1, figsize=(11, 5), layout="constrained")
    for i, axis in enumerate(axes, 1):
        for name, values in curves.items():
            axis.plot(values[0], values[i], style, markersize=4, label=name)
        axis.set(xlabel=labels[0], ylabel=labels[i])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def summary(runs: Runs, personas: Sequence[dict]) -> str:
    """What the README at the top says."""
    others = {CE.name: "plain fine-tuning", "MTP": "multi-token prediction", SHUFFLED: "shuffled targets"}
    found = [f"{_text(over_worlds(runs, SFR, name))} from {text}" for name, text in others.items()]
    better = [_text(over_worlds(runs, SFR, name)) for name in FITTED]
    overlap = _text(differences(runs, SFR, CE.name)["overlap at the end"])
    measured = by_prompt([x for x in personas if x["kind"] == "answers"], SFR, CE.name)
    styles = ", ".join(f"{m} {_text(measured[m])}" for m in MEASURES[:4])
    gained, lost = [m for m in MEASURES[:4] if measured[m].low > 0], [m for m in MEASURES[:4] if measured[m].high < 0]
    shown = f"{' and '.join(gained) or 'nothing'} is gained, {' and '.join(lost) or 'nothing'} lost"
    shown += "" if holm({m: measured[m].p for m in MEASURES}) else "; none of it holds with all measures counted"
    of = [key for key in runs if key[0] == SFR]
    count = f"{len({world for _, world, _ in of})} worlds, {len(of)} runs, intervals over worlds"
    seeds = sum(x["arm"] == SFR for x in personas if x["kind"] == "answers")
    return (
        f"In a world with a known truth ({count}) the NLL of held-out answers, of which less is better, differs at "
        f"equal collapse by {', '.join(found)} (nats). After as many steps styles overlap more than with plain "
        f"fine-tuning ({overlap}). Multi-token prediction and the mean squared error that have SFR's norm and fitted "
        f"head are better than SFR, which differs by {better[0]} from that of one token, {better[1]} of three, "
        f"{better[2]} from the mean squared error. In a short fine-tuning of SmolLM2-135M on the shipped personas "
        f"({seeds} seeds, six prompts) {shown}. Differences from plain fine-tuning there: {styles}."
    )


def _text(x: Interval) -> str:
    if np.isnan(x.low):
        return f"{x.mean:+.3f}"
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def main(argv: Sequence[str]) -> int:
    runs, first, tuned = world_runs(WORLD), world_runs(FIRST_ROUND), results_of(PERSONAS)
    of = {data: [x for x in tuned if x["data"] == data] for data in KINDS}
    personas = of["personas"]
    parts = {
        "levels": world_levels(runs), "planted": planted(runs, first), "claims": world_claims(runs, first),
        "world": f"{world_table(runs)}\n\n{about(WORLD)}",
        "personas": f"{tuned_table(personas, MEASURES)}\n\n{control(personas)}\n\n{about(PERSONAS)}",
        "humaneval": tuned_table(of["humaneval"], ("pass@1", "pass@10")),
    }  # fmt: skip
    helps = textwrap.fill(summary(runs, personas), 120, break_on_hyphens=False)
    current = _fill(HERE / "README.md", parts, "--check" in argv)
    current &= _fill(TOP, {"helps": helps}, "--check" in argv)
    if "--check" in argv:
        return int(not current)
    labels = "overlap of styles (training goes left)", "NLL of held-out answers, beyond the truth's", "validity"
    plot(HERE / "world.png", world_curves(runs), "o-", *labels)
    points = {name: x for name, x in tuned_points(personas, MEASURES[:2]).items() if name != BASE}
    plot(HERE / "personas.png", points, "o", "held-out cross-entropy (nats a token)", *MEASURES[:2])
    return 0


def _fill(path: Path, parts: dict[str, str], check: bool) -> bool:
    """Puts each part between its marks; whether they were there already."""
    old = new = path.read_text()
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        new, count = re.subn(f"{begin}.*?{end}", lambda _, t=f"{begin}\n{text}\n{end}": t, new, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{path} needs {begin} and {end} once each")
    if not check:
        write_atomically(path, new.encode())
    return old == new


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
