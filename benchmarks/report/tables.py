"""Tables of the report: what is read, and what a column is sorted by."""

from dataclasses import dataclass

from ..step.providers import PUBLISHED_LOOPS
from . import words
from .reading import Race, Result, Trouble


@dataclass(frozen=True)
class Cell:
    text: str
    order: float | str | None = None  # None: at the end
    bad: bool = False


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Cell]]
    ours: list[bool]  # of each row
    texts: int = 0  # so many columns at the left are text


def numeric(value: float | None, form=words.number, bad: bool = False) -> Cell:
    return Cell(form(value), value, bad)


def text(value: str) -> Cell:
    return Cell(value, value)


def drop_empty(table: Table) -> Table:
    """Without the columns that nothing fills."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text not in ("", words.EMPTY) for row in table.rows)]
    texts = sum(i < table.texts for i in kept)
    return Table([table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.rows], table.ours, texts)


RESULTS = [
    "case", "dtype", "provider", "median ms", "q1", "q3", "rounds", "× limit", "× best of ours", "× baseline",
    "issue ms", "peak memory", "TFLOP/s", "TB/s", "error", "of bound", "at",
]  # fmt: skip


def of_baseline(races: list[Race]) -> str:
    """Head of the column of times in units of the baseline's."""
    names = dict.fromkeys(race.baseline for race in races if race.baseline)
    return f"× {' or '.join(names) or 'baseline'}"


def results(races: list[Race]) -> Table | None:
    """Every provider at every case, the limits too; None if there is none."""
    rows, ours = [], []
    for race in races:
        best = None if race.baseline else race.fastest("ours")
        for r in [*race.runners, *race.of("limit")]:
            rows.append([text(race.label), text(race.dtype), text(r.provider), *_numbers(race, r, best)])
            ours.append(r.kind == "ours")
    columns = [of_baseline(races) if name == "× baseline" else name for name in RESULTS]
    return drop_empty(Table(columns, rows, ours, 3)) if rows else None


def _numbers(race: Race, r: Result, best: Result | None) -> list[Cell]:
    e, worst = r.extra, r.worst or {}
    return [
        *(numeric(v) for v in (r.ms, r.q1, r.q3)),
        numeric(r.rounds or None, str),
        numeric(r.ms / race.limit_ms if race.limit_ms else None),
        numeric(r.ms / best.ms if best else None),
        numeric(race.times_of(r, race.baseline)),
        numeric(e.get("issue_ms")),
        numeric(e.get("peak_bytes"), words.size),
        numeric(e.get("tflop_per_s")),
        numeric(e.get("tb_per_s")),
        numeric(r.error, words.error),
        numeric(worst.get("ratio")),
        text((e.get("worst") if worst else "") or ""),
    ]


ERRORS = ["op", "case", "dtype", "provider", "worst at", "error", "eager's", "of bound"]


def errors(races: list[Race]) -> Table | None:
    """The worst output of every case of ours; None if nothing was recorded."""
    rows = []
    for race in races:
        for r in race.of("ours"):
            if (worst := r.worst) is not None:
                names = [text(name) for name in (race.op, race.label, race.dtype, r.provider, r.extra["worst"])]
                ratio = numeric(worst["ratio"], bad=worst["ratio"] is None or worst["ratio"] > 1)
                rows.append([*names, *(numeric(worst[key], words.error) for key in ("ours", "eager")), ratio])
    return Table(ERRORS, rows, [True] * len(rows), 5) if rows else None


STEPS = ["case", "provider", "step ms", "× baseline", "tokens/s", "peak memory", "resident"]


def steps(races: list[Race]) -> Table | None:
    """What a step takes and holds, and its parts in milliseconds; None if none was measured."""
    runs = [(race, r) for race in races for r in race.runners]
    parts = list(dict.fromkeys(name for _, r in runs for name in r.extra.get("parts") or ()))
    rows = []
    for race, r in runs:
        e = r.extra
        cells = [text(race.heading), text(r.provider), numeric(r.ms), numeric(race.times_of(r, race.baseline))]
        cells.append(numeric(e.get("tokens_per_s")))
        cells += [numeric(e.get(key), words.size) for key in ("peak_bytes", "resident_bytes")]
        rows.append(cells + [numeric((e.get("parts") or {}).get(name)) for name in parts])
    columns = [of_baseline(races) if name == "× baseline" else name for name in STEPS]
    return drop_empty(Table(columns + parts, rows, [r.kind == "ours" for _, r in runs], 2)) if rows else None


def against(races: list[Race]) -> Table | None:
    """Every step in units of the baseline and of what was published, ranges over the cases; None without a baseline."""
    races = [race for race in races if race.baseline]
    kinds = {r.provider: r.kind for kind in ("ours", "peer") for race in races for r in race.of(kind)}
    rows = []
    for name in kinds:
        mine = [(race, r) for race in races for r in race.results if r.provider == name]
        units = [[race.times_of(r, unit or race.baseline) for race, r in mine] for unit in (None, PUBLISHED_LOOPS)]
        cells = [Cell(words.spread(values), min((v for v in values if v), default=None)) for values in units]
        rows.append([text(name), numeric(len(mine), str), *cells])
    columns = ["step", "cases", of_baseline(races), f"× {PUBLISHED_LOOPS}"]
    return drop_empty(Table(columns, rows, [kind == "ours" for kind in kinds.values()], 1)) if rows else None


SUMMARY = ["op", "cases", "best of ours, × limit", "fastest peer / best of ours", "fastest peers",
           "worst error / bound", "goals missed", "failed, ours"]  # fmt: skip


def summary(by_op: dict[str, list[Race]], failed: list[Trouble]) -> Table:
    """A row for each op: ranges over its cases. Where there is a baseline, `against` compares."""
    rows = []
    for op, races in by_op.items():
        leads, limits = [race.lead for race in races], [race.of_limit for race in races]
        peers = dict.fromkeys(race.fastest("peer").provider for race in races if race.lead)
        compared = ", ".join(peers) or "none measured"
        if any(race.baseline for race in races):
            compared = "see the steps below"
        ratios = [r.worst["ratio"] for race in races for r in race.of("ours") if r.worst]
        worst = max((r for r in ratios if r is not None), default=None)
        missed = sum(len(r.extra.get("goals") or ()) for race in races for r in race.of("ours"))
        wrong = sum(op in t.ops for t in failed if t.ours)
        known = [lead for lead in leads if lead]
        slower = sum(lead < 1 for lead in known)
        rows.append(
            [
                text(op),
                numeric(len(races), str),
                Cell(words.spread(limits), min((v for v in limits if v), default=None)),
                Cell(
                    words.spread(leads) + (f", a peer wins {slower}" if slower else ""),
                    min(known, default=None),
                    slower > 0,
                ),
                text(compared),
                numeric(worst, bad=None in ratios or (worst or 0) > 1),
                numeric(missed, str, missed > 0),
                numeric(wrong, str, wrong > 0),
            ]
        )
    return Table(SUMMARY, rows, [False] * len(rows), 1)
