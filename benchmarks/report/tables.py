"""Tables of the report: what is read, and what a column is sorted by."""

from dataclasses import dataclass

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
    "case", "dtype", "provider", "median ms", "q1", "q3", "rounds", "× limit", "× best of ours", "issue ms",
    "peak memory", "TFLOP/s", "TB/s", "error", "of bound", "at",
]  # fmt: skip


def results(races: list[Race]) -> Table | None:
    """Every provider at every case, the limits too; None if there is none."""
    rows, ours = [], []
    for race in races:
        best = race.fastest("ours")
        for r in [*race.runners, *race.of("limit")]:
            rows.append([text(race.label), text(race.dtype), text(r.provider), *_numbers(race, r, best)])
            ours.append(r.kind == "ours")
    return drop_empty(Table(RESULTS, rows, ours, 3)) if rows else None


def _numbers(race: Race, r: Result, best: Result | None) -> list[Cell]:
    e, worst = r.extra, r.worst or {}
    return [
        *(numeric(v) for v in (r.ms, r.q1, r.q3)),
        numeric(r.rounds or None, str),
        numeric(r.ms / race.limit_ms if race.limit_ms else None),
        numeric(r.ms / best.ms if best else None),
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


STEPS = ["case", "provider", "step ms", "tokens/s", "peak memory", "resident"]


def steps(races: list[Race]) -> Table | None:
    """What a step takes and holds, and its parts in milliseconds; None if none was measured."""
    runs = [(race, r) for race in races for r in race.runners]
    parts = list(dict.fromkeys(name for _, r in runs for name in r.extra.get("parts") or ()))
    rows = []
    for race, r in runs:
        e = r.extra
        cells = [text(race.title), text(r.provider), numeric(r.ms), numeric(e.get("tokens_per_s"))]
        cells += [numeric(e.get(key), words.size) for key in ("peak_bytes", "resident_bytes")]
        rows.append(cells + [numeric((e.get("parts") or {}).get(name)) for name in parts])
    return Table(STEPS + parts, rows, [r.kind == "ours" for _, r in runs], 2) if rows else None


SUMMARY = ["op", "cases", "best of ours, × limit", "fastest peer / best of ours", "fastest peers",
           "worst error / bound", "goals missed", "failed, ours"]  # fmt: skip


def summary(by_op: dict[str, list[Race]], failed: list[Trouble]) -> Table:
    """A row for each op: ranges over its cases."""
    rows = []
    for op, races in by_op.items():
        leads, limits = [race.lead for race in races], [race.of_limit for race in races]
        peers = dict.fromkeys(race.fastest("peer").provider for race in races if race.lead)
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
                text(", ".join(peers) or "none measured"),
                numeric(worst, bad=None in ratios or (worst or 0) > 1),
                numeric(missed, str, missed > 0),
                numeric(wrong, str, wrong > 0),
            ]
        )
    return Table(SUMMARY, rows, [False] * len(rows), 1)
