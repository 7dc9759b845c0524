"""What a result file says, case by case: who was fastest, how far from the limit, what went wrong."""

from collections import Counter
from dataclasses import dataclass

from ..harness.work import LIMIT, PRODUCTS

NOT_RUN = "not run:"  # begins the reason of what is absent because the time was up
NEEDED = ("op", "label", "dtype", "provider", "kind")  # of every extra_info


@dataclass(frozen=True)
class Result:
    """One provider at one case."""

    provider: str
    kind: str  # "ours", "peer", "limit"
    ms: float  # median
    q1: float  # ms
    q3: float
    rounds: int
    extra: dict  # extra_info as it is in the file

    @property
    def error(self) -> float | None:
        """Relative L2 error against float64, at the output nearest to its bound."""
        return self.worst["ours"] if self.worst else self.extra.get("error")

    @property
    def worst(self) -> dict | None:
        """Errors of that output: "ours", "eager", "norm", "ratio"; ratio None: not a finite number."""
        return (self.extra.get("errors") or {}).get(self.extra.get("worst"))


@dataclass(frozen=True)
class Race:
    """One case, and everyone who ran it in turn."""

    op: str
    label: str
    dtype: str
    group: str
    results: list[Result]

    @property
    def title(self) -> str:
        return f"{self.label}, {self.dtype}"

    @property
    def heading(self) -> str:
        """The title, and that it is work of one CPU thread where it is."""
        alone = any(r.extra.get("threads") == 1 for r in self.results)
        return self.title + ", one thread" * alone

    def of(self, kind: str) -> list[Result]:
        return [r for r in self.results if r.kind == kind]

    @property
    def runners(self) -> list[Result]:
        """Ours, then peers; each by time."""
        return [r for kind in ("ours", "peer") for r in sorted(self.of(kind), key=lambda r: r.ms)]

    @property
    def sweeps(self) -> list[dict]:
        """The curves it is a point of: "axis", "x", "series" of each."""
        return next((r.extra["sweeps"] for r in self.results if r.extra.get("sweeps")), [])

    @property
    def is_quick(self) -> bool:
        """Whether it belongs to the five-minute selection."""
        return any(r.extra.get("quick") for r in self.results)

    @property
    def is_main(self) -> bool:
        """Whether it is shown by itself, and not only as a point of curves."""
        return any(r.extra.get("main", True) for r in self.results)

    @property
    def limit_ms(self) -> float | None:
        """Of whatever stands for the case's limit: products and bytes, the encoder alone, …"""
        return self._bound(LIMIT, [r.ms for r in self.of("limit") if r.provider != PRODUCTS])

    @property
    def products_ms(self) -> float | None:
        return self._bound(PRODUCTS, [r.ms for r in self.of("limit") if r.provider == PRODUCTS])

    def _bound(self, name: str, timed: list[float]) -> float | None:
        recorded = [r.extra.get(f"{name}_ms") for r in self.results]
        return next((ms for ms in (*recorded, *timed) if ms), None)

    @property
    def flops(self) -> int:
        """Of its matrix products; 0 if it has none."""
        return max((r.extra.get("flops") or 0 for r in self.results), default=0)

    @property
    def baseline(self) -> str | None:
        """The provider that the others are compared with, where they do not all do the same work."""
        return next((r.extra["baseline"] for r in self.results if r.extra.get("baseline")), None)

    def times_of(self, r: Result, provider: str | None) -> float | None:
        """How many times as long as `provider` a result of this race takes; None if that was not measured."""
        return next((r.ms / other.ms for other in self.results if other.provider == provider), None)

    def fastest(self, kind: str) -> Result | None:
        return min(self.of(kind), key=lambda r: r.ms, default=None)

    @property
    def of_limit(self) -> float | None:
        """Times of the limit that the best of ours takes."""
        best = self.fastest("ours")
        return best.ms / self.limit_ms if best and self.limit_ms else None

    @property
    def lead(self) -> float | None:
        """How many times as long as the best of ours the fastest peer takes; below 1 it wins. None where there is a
        baseline: the fastest of ours and the fastest peer need not do the same work."""
        best, peer = self.fastest("ours"), self.fastest("peer")
        return peer.ms / best.ms if best and peer and not self.baseline else None


@dataclass(frozen=True)
class Trouble:
    """A provider that did not run, or was wrong, at some cases for one reason."""

    provider: str
    ours: bool
    reason: str
    ops: list[str]
    cases: list[str]

    @property
    def extent(self) -> str:
        """ "3 cases of flow_loss, sfr_loss"."""
        return f"{len(self.cases)} case{'s' * (len(self.cases) > 1)} of {', '.join(self.ops)}"


def validate(content: dict) -> None:
    """ValueError naming what keeps `content` from being a result file."""
    if not isinstance(content, dict) or not isinstance(content.get("sfr_kernels"), dict):
        raise ValueError('not a result file: no object "sfr_kernels"')
    if not isinstance(content.get("benchmarks"), list):
        raise ValueError('not a result file: no list "benchmarks"')
    if not isinstance(content["sfr_kernels"].get("device"), dict):
        raise ValueError('not a result file: "sfr_kernels" names no "device"')
    if not isinstance(content["sfr_kernels"]["device"].get("name"), str):
        raise ValueError('not a result file: its device has no "name"')
    for number, entry in enumerate(content["benchmarks"]):
        extra, stats = entry.get("extra_info") or {}, entry.get("stats") or {}
        if lacking := [key for key in NEEDED if key not in extra]:
            raise ValueError(f"benchmark {number} ({entry.get('name')}): extra_info lacks {', '.join(lacking)}")
        if not (isinstance(stats.get("median"), int | float) and stats["median"] > 0):
            raise ValueError(f"benchmark {number} ({entry.get('name')}): stats lack a positive median")


def races(content: dict) -> list[Race]:
    """Every case that anyone finished, in the order of the file."""
    found: dict[tuple[str, str, str], Race] = {}
    for entry in content["benchmarks"]:
        extra, stats = entry["extra_info"], entry["stats"]
        key = extra["op"], extra["label"], extra["dtype"]
        race = found.setdefault(key, Race(*key, entry.get("group") or "", []))
        median, q1, q3 = (1e3 * stats.get(name, stats["median"]) for name in ("median", "q1", "q3"))
        race.results.append(Result(extra["provider"], extra["kind"], median, q1, q3, stats.get("rounds") or 0, extra))
    return list(found.values())


def troubles(content: dict, key: str) -> list[Trouble]:
    """key "absent" or "failed": one entry for each provider and reason, ours first; without what was not run."""
    found: dict[tuple[str, str], Trouble] = {}
    for entry in content["sfr_kernels"].get(key) or []:
        provider, reason = entry["provider"], entry["reason"]
        if reason.startswith(NOT_RUN):
            continue
        trouble = found.setdefault((provider, reason), Trouble(provider, entry["ours"], reason, [], []))
        for names, name in ((trouble.ops, entry["op"]), (trouble.cases, entry.get("group") or entry["op"])):
            if name not in names:
                names.append(name)
    return sorted(found.values(), key=lambda t: not t.ours)


def not_run(content: dict) -> dict[str, int]:
    """Op → how many of its cases the time did not suffice for."""
    rows = [row for row in content["sfr_kernels"].get("absent") or [] if row["reason"].startswith(NOT_RUN)]
    groups = dict.fromkeys((row["op"], row.get("group")) for row in rows)
    return dict(Counter(op for op, _ in groups))


def ceilings(content: dict) -> tuple[float | None, dict[str, float]]:
    """What this device reached in the same run: TB/s of a copy, read and written, and TFLOP/s of a product by dtype."""
    copy, products = None, {}
    for race in races(content):
        for r in race.results if race.op == "ceilings" else ():
            if r.provider == "copy":
                copy = max(copy or 0.0, r.extra.get("tb_per_s") or 0.0) or None
            elif r.extra.get("tflop_per_s"):
                products[race.dtype] = max(products.get(race.dtype, 0.0), r.extra["tflop_per_s"])
    return copy, products
