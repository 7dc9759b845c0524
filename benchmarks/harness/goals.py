"""What the project wants of its own backends, and what of it was missed, in words."""

from .timing import Timing
from .work import LIMIT, PRODUCTS, Goal, Suite


def misses(
    goal: Goal,
    provider: str,  # one of ours
    times: dict[str, Timing],  # of every candidate of the race
    suite: Suite,
    peak_bytes: int | None,
    weight_bytes: int | None,
) -> list[str]:
    """What this provider should have reached and did not, or nobody knows."""
    if goal.backends is not None and provider not in goal.backends:
        return []
    ms, found = times[provider].ms, []
    for most, bound in ((goal.of_products, PRODUCTS), (goal.of_limit, LIMIT)):
        if most is None:
            continue
        if bound not in times:
            found.append(f"{bound} was not measured, wanted {most:g} × it at most")
        elif ms > most * times[bound].ms:
            found.append(f"{ms / times[bound].ms:.2f} × {bound}, wanted {most:g}")
    if goal.ms is not None and ms > goal.ms:
        found.append(f"{ms:.3f} ms, wanted {goal.ms:g}")
    if goal.peer is not None:
        peers = [t.ms for n, t in times.items() if suite.kind(n) == "peer"]
        if not peers:
            found.append(f"no peer was measured, wanted {goal.peer:g} × our time of the fastest")
        elif min(peers) < goal.peer * ms:
            found.append(f"fastest peer / ours {min(peers) / ms:.2f}, wanted {goal.peer:g}")
    for rival, least in goal.rivals:
        if rival not in times:
            found.append(f"{rival} was not measured, wanted {least:g} × our time")
        elif times[rival].ms < least * ms:
            found.append(f"{rival} / ours {times[rival].ms / ms:.2f}, wanted {least:g}")
    if goal.weights is not None and peak_bytes is not None and peak_bytes > goal.weights * weight_bytes:
        found.append(f"{peak_bytes / weight_bytes:.2f} lm_heads of memory, wanted {goal.weights:g}")
    return found
