"""What README says of one result file, in markdown: the benchmarks of kernels, losses and steps, and those of targets.

Every number is read from the file or reckoned from it. Shown are the cases of the five-minute selection; the others,
and the points of sweeps, are left to the report.
"""

from sfr_kernels.config import SFRConfig

from ..harness.work import GRAPH
from . import words
from .reading import Race, Result, ceilings, races, troubles
from .resultfile import LEAVES, WHOLES, described, is_gpu, missed_goals, races_by_op

PLAIN = "SFT, HF's loss"  # the step that others are compared with
OF_TARGETS = ("targets", "per-token loops")  # parts of a step
ALONE = "encoder alone"  # what building targets is measured beside
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
    by_op = {op: [r for r in found if r.is_main and r.is_quick] for op, found in races_by_op(content).items()}
    blocks = [where(name, content), LEGEND]
    if leaves := [race for op in LEAVES for race in by_op.get(op, ())]:
        blocks.append(_leaves(leaves))
    for op, found in by_op.items():
        if found and op not in (*LEAVES, *WHOLES):
            blocks.append(f"**{op}**\n\n{_op(found)}")
    if steps := by_op.get("training_step"):
        blocks.append(f"**A training step**\n\n{_steps(steps)}\n\n{OF_STEPS}")
    blocks += [f"![{shown}]({path})" for path, shown in images.items()]
    blocks += _ceilings(content) + _missing(content)
    return "\n\n".join(blocks)


def _leaves(found: list[Race]) -> str:
    rows = []
    for race in found:
        best = race.fastest("ours")
        moved = f"{best.extra['tb_per_s']:.2f}" if best and best.extra.get("tb_per_s") else words.EMPTY
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
    rows = []
    for race in found:
        plain = next((r for r in race.results if r.provider == PLAIN), None)
        for r in race.runners:
            parts, memory = r.extra.get("parts") or {}, (r.extra.get("resident_bytes"), r.extra.get("peak_bytes"))
            targets = [parts[name] for name in OF_TARGETS if name in parts]
            rows.append([
                race.title,
                r.provider,
                words.milliseconds(r.ms),
                words.number(r.extra.get("tokens_per_s")),
                words.times(r.ms / plain.ms) if plain else words.EMPTY,
                words.EMPTY if None in memory else words.size(sum(memory)),
                f"{sum(targets) / sum(parts.values()):.1%}" if targets else words.EMPTY,
            ])  # fmt: skip
    return table(["case", "step", "time", "tokens/s", f"of {PLAIN}", "peak memory", "share of targets"], rows)


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
    stores = [race for race in races(content) if race.op == "collation"]
    bytes_per_token = {}
    for race in stores:
        case = race.results[0].extra["case"]
        store = f"d = {case['target_size']}, {case['storage_dtype']}"
        taken = next((r.extra["bytes_per_token"] for r in race.results if r.extra.get("bytes_per_token")), None)
        if taken:
            bytes_per_token[store] = taken
            rows.append([f"store, {store}", f"{taken:.1f} bytes a supervised token"])
        ms = {r.provider: r.ms for r in race.of("ours")}
        if collated := [f"{ms[way]:.2f} ms {way}" for way in ("padded", "packed") if way in ms]:
            rows.append([f"the collator's part, {race.label}", ", ".join(collated)])
        if "lookup" in ms:
            rows.append([f"one sample looked up, {store}", f"{1e3 * ms['lookup']:.0f} µs"])
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
    rate, alone = build.extra["segments_per_s"], next((r for r in race.results if r.provider == ALONE), None)
    threads = f", {build.extra['threads']} threads" if build.extra.get("threads") else ""
    share = f": {alone.ms / build.ms:.0%} of the encoder alone ({rate * build.ms / alone.ms:.0f})" if alone else ""
    return [f"building, {race.label}{threads}", f"{rate:.0f} segments/s{share}"]
