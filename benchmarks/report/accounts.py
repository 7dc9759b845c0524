"""What README says of one result file, in markdown: the benchmarks of kernels, losses and steps, and those of targets.

Every number is read from the file or reckoned from it. Shown is what `shown_by_op` chooses; the rest is left to the
report.
"""

from sfr_kernels.config import SFRConfig

from ..harness.work import GRAPH
from ..step.parts import LOOPS, TARGETS
from . import words
from .reading import Race, Result, ceilings, races, troubles
from .resultfile import WHOLES, described, is_gpu, missed_goals, shown_by_op

BILLION = 1_000_000_000
STRIDE = SFRConfig().stride
LEGEND = (
    "Ours: the fastest of our backends, by the median. Fastest peer: the fastest of what others offer, and how many "
    "times as long it takes. Limit: the matrix products and a copy of the bytes that must move besides. Peak memory: "
    "beyond inputs and results, ours / that peer's. What is compared took turns in one run."
)
OF_STEPS = (
    "Peak memory: with the model and the optimizer's state. Ours make the gradients with respect to the hidden states "
    "together with the loss: of their parts, only loss and backward together can be compared with those of others."
)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def where(name: str, content: dict) -> str:
    """Device, versions, date and file; and what a reader should know of the run."""
    run = content["sfr_kernels"]
    parts = [f"{described(content)} ([{name}](benchmarks/results/{name}))"]
    if run.get("selection") not in ("full", None):
        parts.append(f"selection: {run['selection']}")
    if run.get("modified"):
        parts.append("of a working tree with changes")
    line = ", ".join(parts) + "."
    return line if is_gpu(content) else f"{line} **These are times of a CPU**: they say nothing of a GPU."


def account(name: str, content: dict, images: dict[str, str]) -> str:
    """The benchmarks other than those of targets. images: file below the root → what it shows."""
    by_op = shown_by_op(content)
    blocks = [where(name, content), LEGEND]
    kernels = {op: found for op, found in by_op.items() if op not in WHOLES}
    if leaves := [race for found in kernels.values() for race in found if not race.flops]:
        blocks.append(_leaves(leaves))
    for op, found in kernels.items():
        if composites := [race for race in found if race.flops]:
            blocks.append(f"**{op}**\n\n{_op(composites)}")
    if steps := by_op.get("training_step"):
        blocks.append(f"**A training step**\n\n{_steps(steps)}\n\n{OF_STEPS}")
    blocks += [f"![{shown}]({path})" for path, shown in images.items()]
    blocks += _ceilings(content) + _missing(content)
    return "\n\n".join(blocks)


def _leaves(found: list[Race]) -> str:
    rows = []
    for race in found:
        best = race.fastest("ours")
        moved = words.number(best.extra.get("tb_per_s")) if best else words.EMPTY
        share = f"{1 / race.of_limit:.0%}" if race.of_limit else words.EMPTY
        rows.append([race.op, race.title, _best(race), moved, share, _peer(race)])
    return table(["kernel", "case", "ours", "TB/s", "of a copy's bandwidth", "fastest peer"], rows)


def _op(found: list[Race]) -> str:
    rows = []
    for race in found:
        peaks = [_peak(race, r) for r in (race.fastest("ours"), race.fastest("peer"))]
        rows.append([race.title, _best(race), words.times(race.of_limit), _peer(race), " / ".join(peaks)])
    return table(["case", "ours", "of the limit", "fastest peer", "peak memory"], rows)


def _best(race: Race) -> str:
    best = race.fastest("ours")
    return f"{best.provider} {words.milliseconds(best.ms)}" if best else words.EMPTY


def _peer(race: Race) -> str:
    peer = race.fastest("peer")
    return f"{peer.provider} {words.times(race.lead)}".removesuffix(f" {words.EMPTY}") if peer else words.EMPTY


def _peak(race: Race, result: Result | None) -> str:
    """Of a graph, that of the calls it was captured from."""
    if result is None:
        return words.EMPTY
    launched = next((r for r in race.results if r.provider == result.provider.removesuffix(GRAPH)), result)
    return words.size(launched.extra.get("peak_bytes"))


def _steps(found: list[Race]) -> str:
    rows, baselines = [], dict.fromkeys(race.baseline for race in found if race.baseline)
    for race in found:
        for r in race.runners:
            parts, memory = r.extra.get("parts") or {}, (r.extra.get("resident_bytes"), r.extra.get("peak_bytes"))
            targets = [parts[name] for name in (TARGETS, LOOPS) if name in parts]
            rows.append([
                race.heading,
                r.provider,
                words.milliseconds(r.ms),
                words.number(r.extra.get("tokens_per_s")),
                words.times(race.times_of(r, race.baseline)),
                words.EMPTY if None in memory else words.size(sum(memory)),
                f"{sum(targets) / sum(parts.values()):.1%}" if targets else words.EMPTY,
            ])  # fmt: skip
    of = f"of {' or '.join(baselines) or 'the baseline'}"
    return table(["case", "step", "time", "tokens/s", of, "peak memory", "share of targets"], rows)


def _ceilings(content: dict) -> list[str]:
    copy, products = ceilings(content)
    parts = [f"{copy:.2f} TB/s, read and written, by a copy"] if copy else []
    parts += [f"{words.number(rate)} TFLOP/s by a matrix product in {dtype}" for dtype, rate in products.items()]
    return [f"What this device reached in the same run: {'; '.join(parts)}."] if parts else []


def _missing(content: dict) -> list[str]:
    """What is not in the tables, and what in them is not as it should be."""
    blocks = []
    if absent := troubles(content, "absent"):
        blocks.append(f"Not run: {'; '.join(f'{t.provider} ({t.reason}; {_names(t.ops)})' for t in absent)}.")
    if failed := troubles(content, "failed"):
        lines = [f"- {'ours, ' if t.ours else ''}{t.provider}: {t.reason} ({_names(t.cases)})" for t in failed]
        blocks.append("\n".join(["**Failed**, and left out of the tables:", "", *lines]))
    if missed := missed_goals(content):
        title = f"<details><summary>Goals of this project that were missed: {len(missed)}</summary>"
        blocks.append("\n".join([title, "", *(f"- {goal}" for goal in missed), "", "</details>"]))
    return blocks


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def targets_account(name: str, content: dict) -> str:
    """Building a store beside the encoder alone, a store's size, what using it costs, and a billion tokens of it."""
    rows, largest = [], {}  # the largest build with each encoder
    for race in races(content):
        if race.op == "targets" and (build := race.fastest("ours")):
            rows.append(_building(race, build))
            encoder = build.extra["encoder"]
            largest[encoder] = max(largest.get(encoder, build), build, key=lambda b: b.extra["segments"])
    hours = {e: BILLION / STRIDE / build.extra["segments_per_s"] / 3600 for e, build in largest.items()}
    of_stores, bytes_per_token = _stores(content)
    rows += of_stores
    blocks = [where(name, content)]
    blocks += [table(["", ""], rows)] if rows else []
    if hours or bytes_per_token:
        facts = [f"{BILLION / STRIDE / 1e6:.1f} million segments"]
        facts += [f"{BILLION * taken / 1e9:.0f} GB at {store}" for store, taken in bytes_per_token.items()]
        facts += [f"{words.number(h)} hours of such a device with {encoder}" for encoder, h in hours.items()]
        blocks.append(f"One billion supervised tokens in long responses, a segment every {STRIDE} of them: "
                      f"{', '.join(facts)}.")  # fmt: skip
    return "\n\n".join(blocks)


def _building(race: Race, build: Result) -> list[str]:
    """Its limit is the encoder alone."""
    rate, alone = build.extra["segments_per_s"], race.fastest("limit")
    share = f": {alone.ms / build.ms:.0%} of the encoder alone ({rate * build.ms / alone.ms:.0f})" if alone else ""
    threads = words.threads(build.extra.get("threads"))
    return [", ".join(["building", race.label, *threads]), f"{rate:.0f} segments/s{share}"]


def _stores(content: dict) -> tuple[list[list[str]], dict[str, float]]:
    """Rows on every store that was collated from, the ways of one batch in one row; and store → bytes per token."""
    rows, bytes_per_token = [], {}
    batches: dict[tuple[str, str], dict[str, Result]] = {}  # (store, batch) → way → result
    for race in races(content):
        if race.op != "collation" or (ours := race.fastest("ours")) is None:
            continue
        case = ours.extra["case"]
        store = f"d = {case['target_size']}, {case['storage_dtype']}"
        batch = ", ".join([race.title.removeprefix(f"{case['way']}, "), *words.threads(ours.extra.get("threads"))])
        batches.setdefault((store, batch), {})[case["way"]] = ours
    for (store, batch), ways in batches.items():
        known = [r.extra["bytes_per_token"] for r in ways.values() if r.extra.get("bytes_per_token")]
        if known and store not in bytes_per_token:
            bytes_per_token[store] = known[0]
            rows.append([f"store, {store}", f"{known[0]:.1f} bytes a supervised token"])
        if collated := [f"{r.ms:.2f} ms {way}" for way, r in ways.items() if way != "lookup"]:
            rows.append([f"the collator's part, {batch}", ", ".join(collated)])
        if lookup := ways.get("lookup"):
            one = ", ".join([store, *words.threads(lookup.extra.get("threads"))])
            rows.append([f"one sample looked up, {one}", f"{1e3 * lookup.ms:.0f} µs"])
    return rows, bytes_per_token
