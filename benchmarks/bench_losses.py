"""The losses and their gradients: a linear layer's cross-entropy, the flow-matching loss, and both together.

Ours are judged at times and with an upstream gradient that make errors show; and the call that is timed must give the
same as float64 to a sixteenth. They are bounded by their matrix products and by what lies between them (limit.py).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sfr_kernels.kernels.backend import kernels_of, unavailable
from sfr_kernels.rows import IGNORE_INDEX

from .case import GRAPH, LIMIT, MAIN, MORE, OURS, PRODUCTS, SWEEP, WHOLE, Case, Gemm, Run, Suite, Work
from .limit import bytes_of, gemms_of
from .oracle import Oracle
from .peers import cross_entropy, flow
from .peers.cross_entropy import COMPILED, EAGER, EAGER_ROWS, LIBRARIES, TORCH
from .peers.flow import WITH_HEAD
from .problem import UPSTREAM, Problem, Shape, check_replay

CE, FLOW, JOINT = "linear_cross_entropy", "flow_loss", "sfr_loss"
MODELS = {  # H and V of the public configurations
    "Llama-3-8B": (4096, 128256), "Qwen3-0.6B": (1024, 151936), "Qwen3-1.7B": (2048, 151936),
    "Gemma-3-4B": (2560, 262208), "SmolLM2-135M": (576, 49152),
}  # fmt: skip
APART = "one after the other"  # our two losses in turn
LIBRARIES_WITH_HEAD = tuple(name + WITH_HEAD for name in (TORCH, *LIBRARIES))
ENTERED = {
    CE: (*OURS, EAGER, COMPILED, TORCH, *LIBRARIES),
    FLOW: (*OURS, f"triton{GRAPH}", f"cuda{GRAPH}", EAGER, COMPILED),
    JOINT: (*OURS, APART, EAGER, COMPILED, *LIBRARIES_WITH_HEAD),
}
NOT_IN_CURVES = (COMPILED, *LIBRARIES_WITH_HEAD)  # compiling would take longer than all the rest
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cases(device: torch.device) -> list[Case]:
    """Each once: one that is also a point of curves serves them all."""
    found: dict[str, Case] = {}
    for case in _on_gpu() if device.type == "cuda" else _on_cpu():
        same = found.get(case.name, case)
        assert same.shape == case.shape, "one name, one shape"
        found[case.name] = replace(same, axes=tuple(dict.fromkeys((*same.axes, *case.axes))))
    return list(found.values())


def _on_gpu() -> Iterable[Case]:
    llama, qwen, heads = "Llama-3-8B", "Qwen3-1.7B", {False: {"lm_heads": 2.5}, True: {"lm_heads": 0.5}}
    for frozen, goals in heads.items():  # times of the products alone and of the fastest peer that are wanted
        fast = {"of products": 1.10 if frozen else 1.09, "of peer": 1 / 1.9}
        yield _case(CE, llama, 8192, frozen=frozen, goals=goals | fast, worth=MAIN)
        full = {"of products": 1.10, "of peer": 1.0}
        small = {"of products": 1.15} if frozen else {"of products": 1.12, "of peer": 1 / 1.9}
        yield _case(CE, llama, 8192, 1.0, frozen=frozen, goals=goals | full, worth=MORE if frozen else MAIN)
        yield _case(CE, qwen, 4096, frozen=frozen, goals=goals | small)
        yield _case(CE, (2048, 248320), 16384, frozen=frozen, goals=goals | {"of products": 1.15 if frozen else 1.2})
        yield _case(CE, "Gemma-3-4B", 8192, frozen=frozen, goals=goals)
        joint = {"of products": 1.10, f"of {APART}": 1.0}
        yield _case(JOINT, llama, 8192, frozen=frozen, goals=joint, worth=MORE if frozen else WHOLE)
        yield _case(JOINT, "Qwen3-0.6B", 8192, frozen=frozen, goals=joint)
    yield _case(FLOW, (4096, 0), 8192, 0.75, goals={"ms": 0.55, "of peer": 1 / 3.5}, worth=MAIN)
    yield _case(FLOW, (4096, 0), 1024, 0.75, goals={"ms": 0.25}, graph_ms=0.15, worth=MAIN)  # launch-bound
    yield _case(FLOW, (4096, 0), 8192, 1.0)
    yield _case(FLOW, (5120, 0), 16384, 0.75)
    for dtype in (FP16, FP32):
        yield _case(CE, "Qwen3-0.6B", 8192, dtype=dtype)
        yield _case(FLOW, (4096, 0), 1024, 0.75, dtype=dtype)
        yield _case(JOINT, "Qwen3-0.6B", 4096, dtype=dtype)
    shares, tokens = (0.1, 0.25, 0.5, 0.75, 1.0), [1024 * 2**i for i in range(6)]
    for op, model, share in ((CE, qwen, 0.5), (JOINT, qwen, 0.5), (FLOW, (4096, 0), 0.75)):
        yield from (_curve("supervised", op, model, 8192, s) for s in shares)
        yield from (_curve("tokens", op, model, n, share) for n in tokens if op != JOINT)
    yield from (_curve("vocab", CE, (2048, v), 8192) for v in (32000, 64000, 128256, 262144))
    yield from (_curve("hidden_size", CE, (h, 128256), 8192) for h in (1024, 2048, 4096, 8192))
    yield from (_curve("hidden_size", FLOW, (h, 0), 8192, 0.75) for h in (1024, 2048, 4096, 8192))


def _on_cpu() -> Iterable[Case]:
    """A small model at its own size; targets are MiniLM's."""
    small = dict(model="SmolLM2-135M", dtype=FP32, target_size=384, seconds=3.0, rounds=5)
    fast = {"of products": 1.12, "of peer": 1.0}
    for frozen in (False, True):
        for n in (512, 2048):
            own = small | dict(tokens=n, frozen=frozen)
            main = not frozen and n == 512
            yield _case(CE, **own, goals=fast, providers=("torch", EAGER, EAGER_ROWS), worth=MAIN if main else MORE)
            yield _case(JOINT, **own, goals={"of peer": 1.0}, providers=("torch", EAGER), worth=WHOLE if main else MORE)
        own = small | dict(tokens=512, frozen=frozen, goals={"of eager": 1.0})
        for share in (0.1, 0.25, 0.5, 1.0):
            yield _curve("supervised", CE, **own, supervised=share, providers=("torch", EAGER, EAGER_ROWS))
    for n in (512, 2048):
        for share in (0.5, 1.0):
            yield _case(FLOW, **small | dict(tokens=n, supervised=share), goals={"of peer": 1.0},
                        providers=("torch", EAGER), worth=MAIN if n == 2048 and share == 0.5 else MORE)  # fmt: skip


def _curve(axis: str, op: str, model, tokens: int, supervised: float = 0.5, **options) -> Case:
    options = dict(providers=tuple(n for n in ENTERED[op] if n not in NOT_IN_CURVES), seconds=1.0) | options
    return _case(op, model, tokens, supervised, axes=(axis,), worth=SWEEP, **options)


def _case(op: str, model: str | tuple[int, int], tokens: int, supervised: float = 0.5, *, frozen: bool = False,
          target_size: int = 1024, dtype: torch.dtype = BF16, goals: dict | None = None,
          graph_ms: float | None = None, providers: tuple[str, ...] | None = None, **options) -> Case:  # fmt: skip
    name, (hidden_size, vocab) = (model, MODELS[model]) if isinstance(model, str) else (None, model)
    vocab, length = 0 if op == FLOW else vocab, min(2048, tokens // 2)  # two sequences at least
    shape = Shape(tokens // length, length, hidden_size, supervised, vocab, frozen, target_size)
    label = name or f"H {hidden_size}" + f", V {vocab}" * bool(vocab)
    label += f", {tokens} tokens, {supervised:.0%} supervised" + (", frozen" if frozen else ", trained") * bool(vocab)
    sizes = dict(model=name, tokens=tokens, hidden_size=hidden_size, vocab=vocab, supervised=supervised, frozen=frozen,
                 target_size=target_size, width=shape.width)  # fmt: skip
    graphs = {own + GRAPH: {"ms": graph_ms} for own in ("triton", "cuda") if graph_ms}
    options |= dict(goals=dict.fromkeys(OURS, goals or {}) | graphs, providers=providers or ENTERED[op])
    return Case(op, label, sizes, dtype, shape, **options)


def providers(device: torch.device) -> dict[str, str | None]:
    """Of all ops. The torch backend is for where there is no GPU."""
    cuda = device.type == "cuda"
    found = {name: unavailable(name, device) for name in ("triton", "cuda")}
    found |= {name + GRAPH: why if cuda else "a CUDA graph needs a GPU" for name, why in list(found.items())}
    found |= {"torch": "on a GPU it is the others' oracle, not a way to train" if cuda else None, APART: None}
    peers = {name: cross_entropy.absent(name, device) for name in (EAGER, COMPILED, TORCH, *LIBRARIES)}
    found |= peers | {EAGER_ROWS: "on a GPU it waits for the number of rows" if cuda else None}
    return found | {name + WITH_HEAD: why for name, why in peers.items()}


def make(case: Case, device: torch.device) -> Work:
    op, on_its_own = "flow_matching_loss" if case.op == FLOW else case.op, case.op == CE  # draws nothing
    problem = Problem(op, case.shape, case.dtype, device, published=not on_its_own)
    oracles: dict[str, Oracle] = {}

    def ours(name: str, judged: bool) -> Tensor:
        if name == APART:
            return problem.apart("triton" if device.type == "cuda" else "torch", judged=judged)
        return problem.loss(name, judged=judged)

    def run_of(name: str) -> Run:
        if name in (*OURS, APART):
            return lambda: problem.with_gradients(ours(name, False))
        return (cross_entropy if on_its_own else flow).run_of(problem, name)

    def judge(name: str, run: Run) -> dict:
        if not oracles:
            oracles["judged"] = Oracle.of(problem)
        problem.redraw(0)
        if name not in (*OURS, APART):  # a peer that draws noise of its own is given ours
            found = run() if on_its_own else flow.run_of(problem, name, judged=True)()
            return oracles["judged"].peer_verdict(found, UPSTREAM if on_its_own else 1.0)
        if "timed" not in oracles:  # at the times that the call draws
            drawn = None if on_its_own else Oracle(["loss", *problem.leaves], problem.exact(judged=False), None)
            oracles["timed"] = drawn or oracles["judged"]
        fields = oracles["judged"].verdict(problem.with_gradients(ours(name, True), UPSTREAM))
        oracles["timed"].peer_verdict(run(), UPSTREAM)
        return fields

    return Work(
        run=run_of, judge=judge, judged=oracles.clear, gemms=gemms_of(problem), factors=partial(factors_of, problem),
        bytes=bytes_of(problem), check_graph=partial(check_replay, problem), draw=lambda: problem.seed.add_(1),
        fields={} if problem.weight is None else dict(weight_bytes=problem.weight.nbytes),
    )  # fmt: skip


def factors_of(problem: Problem) -> dict[Gemm, tuple[Tensor, Tensor]]:
    """The problem's own tensors, for the products with the lm_head: what a GPU draws for a product, and so its clocks,
    depends on the numbers. Those of the head are random."""
    if problem.weight is None:
        return {}
    with torch.no_grad():
        labels, joint = problem.labels.flatten(), problem.rows
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        labels = labels[rows]
        if problem.op == JOINT:  # which predicts the next token
            rows, labels = joint.rows[joint.ce_start :], joint.labels[joint.ce_start :]
        h, w = problem.hidden.detach().flatten(0, 1)[rows], problem.weight.detach()
        dlogits = h @ w.T
        weight = torch.full((len(labels),), 1.0 / len(labels), dtype=torch.float32, device=h.device)
        kernels_of("torch").softmax_xent(dlogits, labels, weight)
    logits, dh, *dw = gemms_of(problem)[-2 if problem.shape.frozen else -3 :]
    return {logits: (h, w.T), dh: (dlogits, w)} | ({dw[0]: (dlogits.T, h)} if dw else {})


SUITE = Suite(cases, make, providers, ours=(*OURS, APART), bounds=(PRODUCTS, LIMIT))
