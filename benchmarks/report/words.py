"""Numbers as people read them: three digits, a unit, a range."""

EMPTY = "–"


def number(value: float | None) -> str:
    """Three digits or more, never an exponent above a thousandth: 225, 19.5, 1.09, 0.412, 0.0123."""
    if value is None:
        return EMPTY
    size = abs(value)
    for least, form in ((100, ",.0f"), (10, ".1f"), (1, ".2f"), (0.1, ".3f"), (0.001, ".4f")):
        if size >= least:
            return format(value, form)
    return "0" if value == 0 else f"{value:.1e}"


def milliseconds(ms: float | None) -> str:
    """With its unit; seconds from ten on."""
    if ms is None:
        return EMPTY
    return f"{number(ms)} ms" if ms < 10_000 else f"{number(ms / 1000)} s"


def size(count: int | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return EMPTY
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, _ = value / 1024, units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 100 else f"{value:.3g} {units[0]}"


def threads(count: int | None) -> list[str]:
    """Of a CPU, where they are known: ["one thread"], ["2 threads"], []."""
    return [] if not count else ["one thread" if count == 1 else f"{count} threads"]


def times(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.2f} ×"


def spread(values: list[float | None]) -> str:
    """ "1.09 to 1.21 ×"; what is unknown does not count."""
    known = [v for v in values if v is not None]
    if not known:
        return EMPTY
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def error(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.1e}"


def rate(extra: dict) -> str:
    """TFLOP/s and TB/s, those that were recorded."""
    found = [(extra.get("tflop_per_s"), "TFLOP/s"), (extra.get("tb_per_s"), "TB/s")]
    return ", ".join(f"{number(value)} {unit}" for value, unit in found if value is not None) or EMPTY
