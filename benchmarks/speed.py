"""Time and memory of one problem: every backend, its floor, and what people would use instead, all in turn."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import decoder_peers
from .errors import message
from .floor import Floor, gemms_of
from .peers import COMPILED, EAGER, PublishedFlowLoss
from .problems import Problem
from .timing import Candidate, Graph, Timing, compare, peak_extra

FLOOR = "floor"


def measure(
    problem: Problem,
    backends: Iterable[str],
    *,
    peers: bool = False,  # what people would use instead
    graphs: bool = False,  # the same calls in a CUDA graph
    seconds: float = 2.0,
) -> tuple[dict[str, dict], dict[str, str]]:
    """What was measured of each candidate, by the names of the fields of a result row, and what the others raised."""
    device, runs = problem.device, {b: lambda b=b: problem.run(b) for b in backends}
    if peers:
        torch.compiler.reset()
        runs |= peers_of(problem)
    raised, memory, ours = {}, {}, None
    floor = Floor(gemms_of(problem), problem.dtype, device)
    for name, run in list(runs.items()):
        try:
            outputs = run()  # compiles
            ours = outputs if ours is None else ours  # which float64 has judged
            if name not in backends and problem.op != "flow_matching_loss":  # whose peers have noise of their own
                check_peer(outputs, ours)
            del outputs
            memory[name] = peak_extra(run, device)
        except Exception as error:  # one candidate that fails must not hide the others
            raised[name] = message(error)
            del runs[name]
    del ours
    candidates = {name: Candidate(run) for name, run in runs.items()} | {FLOOR: Candidate(floor.run)}
    captured = {}
    for name in [n for n in runs if graphs and n != COMPILED]:
        try:
            captured[name] = Graph(runs[name])
            if name != EAGER:
                check_replay(problem, captured[name], runs[name])
        except Exception as error:
            raised[f"{name} in a graph"] = message(error)
            captured.pop(name, None)
            continue
        draw = None if name == EAGER else lambda: problem.seed.add_(1)
        candidates[f"{name} in a graph"] = Candidate(captured[name].replay, draw)
    failed = {}
    times = compare(candidates, device, seconds, failed)
    raised |= {name: message(error) for name, error in failed.items()}
    found = {}
    for name in [n for n in runs if n in times]:
        found[name] = row(times[name], times[FLOOR], floor.flops) | dict(extra_bytes=memory[name])
        found[name]["floor_blocks"] = [floor.blocks[gemm] for gemm in floor.chain]
        found[name]["peer"] = name not in backends
        if memory[name] is not None and problem.head is not None:
            found[name]["extra_buffers"] = round(memory[name] / buffer_bytes(problem), 2)
        if memory[name] is not None and problem.weight is not None:
            weight = problem.weight.numel() * problem.weight.element_size()
            found[name]["weight_units"] = round(memory[name] / weight, 3)
        if f"{name} in a graph" in times:
            replayed = times[f"{name} in a graph"]
            found[name] |= dict(graph_ms=round(replayed.ms, 5), graph_spread_ms=round(replayed.spread_ms, 5))
    return found, raised


def row(time: Timing, floor: Timing, flops: int) -> dict[str, float]:
    times = dict(ms=time.ms, spread_ms=time.spread_ms, issue_ms=time.issue_ms, floor_ms=floor.ms)
    return {name: round(ms, 5) for name, ms in times.items()} | dict(runs=time.runs, floor_flops=flops)


def buffer_bytes(problem: Problem) -> int:
    """One buffer of (n, max(d, D)) in the input's dtype."""
    s = problem.shape
    return problem.num_flow * max(s.target_size, s.width) * problem.hidden.element_size()


def check_peer(outputs: list[Tensor], ours: list[Tensor]) -> None:
    """A peer that computes something else has no time to compare with."""
    for theirs, mine in zip(outputs, ours, strict=True):
        wrong = (theirs.float() - mine.float()).norm() / mine.float().norm().clamp(min=1e-30)
        if not wrong <= 0.05:
            raise AssertionError(f"differs from ours by {wrong:.1e}")


APART = "one after the other"


def peers_of(problem: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of every peer on the problem's tensors."""
    if problem.op == "flow_matching_loss":
        return published(problem)
    if problem.op == "sfr_loss":
        backend = "triton" if problem.device.type == "cuda" else "torch"
        return {APART: lambda: problem.apart(backend)}
    hidden, labels, leaves = problem.hidden.flatten(0, 1), problem.labels.flatten(), list(problem.leaves.values())

    def through(loss_of):
        def run():
            loss = loss_of(problem.hidden.flatten(0, 1), problem.weight, labels)
            return [loss, *torch.autograd.grad(loss, leaves)]

        return run

    return {name: through(loss_of) for name, loss_of in decoder_peers.installed(hidden.device).items()}


def published(problem: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of the published loss, eager and compiled, on the problem's batch; its targets, one for
    every position, are given for free."""
    s, rows = problem.shape, problem.rows
    peer = PublishedFlowLoss(s.hidden_size, s.target_size, s.width, s.num_layers, source_std=problem.config.source_std)
    peer.load_state_dict(problem.head.state_dict())
    peer.to(problem.device, problem.dtype)
    index = rows.rows[: rows.num_flow]
    x_1 = problem.targets.new_zeros(s.batch * s.length, s.target_size)
    x_1[index] = problem.config.scale_for(s.target_size) * problem.targets[rows.anchor[: rows.num_flow].long()]
    x_1 = x_1.view(s.batch, s.length, -1).to(problem.dtype)
    weight = problem.targets.new_zeros(s.batch * s.length)
    weight[index] = rows.weight[: rows.num_flow]
    weight = weight.view(s.batch, s.length)
    leaves = [problem.hidden, *peer.parameters()]
    # the harness can be tried on a CPU, where generating code would take longer than all the rest
    compiled = torch.compile(peer, dynamic=False, backend="inductor" if problem.device.type == "cuda" else "eager")

    def through(module):
        def run():
            loss = module(problem.hidden, x_1, weight)
            return [loss, *torch.autograd.grad(loss, leaves)]

        return run

    return {EAGER: through(peer), COMPILED: through(compiled)}


def check_replay(problem: Problem, graph: Graph, run: Callable[[], list[Tensor]]) -> None:
    """A replay is the launched call with the seed that the device holds at that moment."""
    losses = []
    for seed in (11, 12):
        problem.seed.fill_(seed)
        graph.replay()
        losses.append(graph.outputs[0].item())
        for replayed, launched in zip(graph.outputs, run(), strict=True):
            # cuBLAS may choose another kernel under capture: the same up to rounding
            wrong = (replayed.double() - launched.double()).norm() / launched.double().norm().clamp(min=1e-30)
            if not wrong <= 4 * torch.finfo(problem.dtype).eps + 1e-5:
                raise AssertionError(f"a graph replay differs from the launched call by {wrong:.1e}")
    if losses[0] == losses[1]:
        raise AssertionError("two replays with different seeds gave the same loss")
