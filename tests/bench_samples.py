"""A result file of made-up numbers, for tests of what reads such files. Nothing here was measured.

Ops, providers, labels and curves are named as the benchmarks name them: who takes part where, which cases are points of
several curves, what has a baseline. A run on a GPU is whole; one on a CPU was cut by the time.
"""

import json
import random
import statistics
from dataclasses import dataclass

from benchmarks.bench_sfr_loss import APART
from benchmarks.bench_targets import ALONE, BUILD
from benchmarks.harness.work import GRAPH, LIMIT, PRODUCTS
from benchmarks.step.parts import BACKWARD, FORWARD, LOOPS, LOSS, OPTIMIZER, TARGETS
from benchmarks.step.providers import (
    OURS,
    PUBLISHED,
    PUBLISHED_GIVEN,
    PUBLISHED_LOOPS,
    SFR_ONLINE,
    SFR_STORED,
    SFT_HF,
    SFT_OURS,
)

COPY, MATMUL = 3.0, {"bfloat16": 735.0, "float32": 60.0}  # TB/s, TFLOP/s
CPU_COPY, CPU_MATMUL = 0.02, {"float32": 0.2}
GPU = dict(
    name="NVIDIA H100 80GB HBM3", kind="cuda", capability="9.0", memory_bytes=85_014_000_000, driver="580.95.05",
    clocks=dict(sm_mhz=1755, memory_mhz=2619, max_sm_mhz=1980, max_memory_mhz=2619, power_limit_w=700), threads=16,
)  # fmt: skip
CPU = dict(name="Intel(R) Xeon(R) Processor @ 2.10GHz", kind="cpu", capability=None, memory_bytes=None, driver=None,
           clocks=None, threads=2)  # fmt: skip
VERSIONS = dict(
    python="3.12.3", torch="2.11.0", triton="3.6.0", cuda="13.0", transformers="5.17.0", liger_kernel="0.8.5",
    cut_cross_entropy="25.1.1", quack=None,
)  # fmt: skip

# Times of the limit that each provider takes, about; bytes of peak memory as a share of the logits.
LINEAR = {"triton": (1.11, 0.25), "eager": (2.6, 3.0), "torch.compile": (2.1, 1.0), "Liger": (3.6, 0.02),
          "cut-cross-entropy": (2.8, 0.01)}  # fmt: skip
HEAD = {"triton": (1.5, 0.2), "cuda": (1.3, 0.2), "eager": (4.1, 0.8), "torch.compile": (3.9, 0.5)}
GRAPHS = {f"triton{GRAPH}": (1.45, None), f"cuda{GRAPH}": (1.25, None)}
LEAF = {"triton": (1.2, 0.0), "cuda": (1.12, 0.0), "eager": (3.4, 1.0), "torch.compile": (1.5, 0.1)}
JOINT = {"triton": (1.08, 0.3), APART: (1.2, 0.4), "eager": (2.7, 3.0), "torch.compile": (2.0, 1.0),
         "Liger + published head": (3.7, 0.1)}  # fmt: skip
STEP = {SFT_HF: 1.0, SFT_OURS: 0.93, PUBLISHED: 1.5, PUBLISHED_LOOPS: 3.3, PUBLISHED_GIVEN: 1.2, SFR_STORED: 1.01,
        SFR_ONLINE: 1.3}  # fmt: skip
PARTS = {FORWARD: 0.27, LOSS: 0.14, BACKWARD: 0.55, OPTIMIZER: 0.04}
OF_TARGETS = {PUBLISHED: {TARGETS: 0.4}, PUBLISHED_LOOPS: {TARGETS: 0.5, LOOPS: 1.8}, SFR_STORED: {TARGETS: 0.01},
              SFR_ONLINE: {TARGETS: 0.3}}  # fmt: skip
LEAVES = ("flow_path", "norm_act", "norm_act_backward", "flow_mse", "softmax_xent")
STORES = {"float16": (1024, 65.6), "int8": (256, 8.6)}  # storage → target size, bytes a token
WAYS = {"padded": 1.04, "packed": 1.22, "lookup": 0.014}  # milliseconds


@dataclass
class Maker:
    """Fills one file's `benchmarks`."""

    kind: str
    random: random.Random
    benchmarks: list

    @property
    def gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpu else "float32"

    def rates(self) -> tuple[float, dict[str, float]]:
        return (COPY, MATMUL) if self.gpu else (CPU_COPY, CPU_MATMUL)

    def entry(self, op: str, label: str, provider: str, kind: str, ms: float, **extra) -> None:
        """One provider at one case, its times spread a little around `ms`."""
        rounds = self.random.randint(20, 60)
        data = [1e-3 * ms * (1 + abs(self.random.gauss(0, 0.01 if self.gpu else 0.04))) for _ in range(rounds)]
        q1, median, q3 = statistics.quantiles(data, n=4)
        stats = dict(min=min(data), max=max(data), mean=statistics.fmean(data), stddev=statistics.stdev(data))
        stats |= dict(
            rounds=rounds, median=median, iqr=q3 - q1, q1=q1, q3=q3, ops=1 / statistics.fmean(data), data=data
        )
        own = dict(op=op, label=label, dtype=self.dtype, case={}, provider=provider, kind=kind)
        own |= dict(sweeps=[], main=True, quick=True)
        own |= ({} if self.gpu else dict(threads=2)) | extra
        group, name = f"{op}: {label}, {own['dtype']}", f"test_{op}[{label}-{provider}]"
        fullname = f"benchmarks/bench_{op}.py::{name}"
        entry = dict(group=group, name=name, fullname=fullname, params=None, param=f"{label}-{provider}", options={})
        self.benchmarks.append(entry | dict(stats=stats, extra_info=own))

    def race(
        self,
        op: str,
        label: str,
        providers: dict[str, tuple[float, float | None]],
        case: dict,
        flops: int,
        moved: int,  # bytes besides the products
        *,
        sweeps: tuple[dict, ...] = (),
        main: bool = True,
        room: int = 0,
    ) -> None:
        """Every provider at one case, and the limit."""
        copy, matmul = self.rates()
        products, besides = flops / matmul[self.dtype] / 1e9, moved / copy / 1e9
        traffic = moved + flops // 500  # operands and results: hundreds of FLOP for each of their bytes
        common = dict(case=case, sweeps=list(sweeps), main=main, quick=main, flops=flops, bytes=moved, traffic=traffic)
        common |= dict(limit_ms=products + besides, products_ms=products if flops else None)

        def rates(ms: float) -> dict:
            return dict(tflop_per_s=flops / ms / 1e9 if flops else None, tb_per_s=traffic / ms / 1e9)

        for provider, (factor, share) in self.able(providers).items():
            ours = provider.removesuffix(GRAPH) in ("triton", "cuda", "torch", APART)
            ms = (products + besides) * factor * self.random.uniform(0.97, 1.05) + 0.002
            extra = common | rates(ms) | dict(issue_ms=0.05)
            if share is not None:
                extra["peak_bytes"] = int(share * room)
            if ours:
                extra["goals"] = []
                if products and ms > 1.1 * (products + besides) and op == "linear_cross_entropy":
                    extra["goals"] = [f"{ms / products:.2f} x products, wanted 1.09"]
            if ours and share is not None:
                outputs = {name: self.random.uniform(0.3, 0.7) for name in ("loss", "hidden", "weight")}
                made = {n: dict(ours=3e-3 * x, eager=2e-3, norm=3.0, ratio=round(x, 3)) for n, x in outputs.items()}
                extra |= dict(errors=made, worst=max(outputs, key=outputs.get))
            elif not ours:
                extra["error"] = 2e-3
            self.entry(op, label, provider, "ours" if ours else "peer", ms, **extra)
        for provider, ms in {PRODUCTS: products, LIMIT: products + besides}.items():
            if ms:
                self.entry(op, label, provider, "limit", ms, **common | rates(ms))

    def able(self, found: dict) -> dict:
        """On a CPU torch stands in for the kernels, and the libraries do not run."""
        if self.gpu:
            return found
        return {"torch": found["triton"]} | {n: v for n, v in found.items() if n in ("eager", APART)}

    def cross_entropy(
        self,
        model: str | None = "Llama-3-8B",
        tokens: int = 8192,
        hidden_size: int = 4096,
        vocab: int = 128256,
        supervised: float = 0.5,
        *,
        frozen: bool = False,
        axes: tuple[str, ...] = (),  # of the curves that it is a point of
    ) -> None:
        if not self.gpu:
            tokens, hidden_size, vocab = tokens // 16, hidden_size // 8, vocab // 16
        case = dict(model=model, tokens=tokens, hidden_size=hidden_size, vocab=vocab, supervised=supervised)
        size = dict(model=model) if model else dict(hidden_size=f"H {hidden_size}", vocab=f"V {vocab}")
        said = size | _said(case) | dict(trained="frozen" if frozen else "trained")
        n = int(tokens * supervised)
        flops, logits = 2 * n * hidden_size * vocab * (2 if frozen else 3), 2 * n * vocab
        op, label, points = "linear_cross_entropy", ", ".join(said.values()), self.points
        self.race(op, label, LINEAR, case | dict(frozen=frozen), flops, 2 * logits, main=not axes, room=logits,
                  sweeps=points(op, said, case, axes))  # fmt: skip

    def flow_loss(self, tokens: int = 8192, supervised: float = 0.75, *, axes: tuple[str, ...]) -> None:
        """A point of the curves along `axes`; where they cross, it is shown by itself, too."""
        tokens //= 1 if self.gpu else 16
        case = dict(model=None, tokens=tokens, hidden_size=4096, supervised=supervised, width=1024)
        said, n, crossing = dict(size="H 4096") | _said(case), int(tokens * supervised), len(axes) > 1
        self.race("flow_loss", ", ".join(said.values()), HEAD | GRAPHS if crossing else HEAD, case, 40 * n * 1024**2,
                  60 * n * 1024, sweeps=self.points("flow_loss", said, case, axes), main=crossing,
                  room=40 * n * 1024)  # fmt: skip

    def points(self, op: str, said: dict[str, str], case: dict, axes: tuple[str, ...]) -> list[dict]:
        """One of each curve; its series says what is held."""
        held = {axis: [text for name, text in said.items() if name != axis] for axis in axes}
        return [dict(axis=a, x=case[a], series=f"{op}: {', '.join([*held[a], self.dtype])}") for a in axes]

    def steps(self) -> None:
        some = {name: STEP[name] for name in (SFT_HF, SFT_OURS, PUBLISHED_LOOPS, SFR_STORED)}
        if self.gpu:
            cases = ("Qwen2-1.5B", "B4 L2048", 8192, 225.0, STEP), ("Llama-3-8B", "B2 L2048", 4096, 790.0, some)
        else:
            cases = ("Qwen2 in small", "B2 L64", 128, 11.0, STEP), ("Llama-3 in small", "B2 L64", 128, 15.0, some)
        for model, batch, tokens, ms, providers in cases:
            for provider, factor in providers.items():
                shares = PARTS | OF_TARGETS.get(provider, {})
                parts = {part: ms * factor * share / sum(shares.values()) for part, share in shares.items()}
                extra = dict(baseline=SFT_HF, parts=parts, tokens_per_s=1e3 * tokens / (ms * factor))
                extra |= dict(flops=0, bytes=0, traffic=0, resident_bytes=16 * 2**30, peak_bytes=int(9e9 * factor))
                extra |= dict(case=dict(model=model, tokens=tokens)) | ({} if self.gpu else dict(threads=1))
                if provider in OURS:
                    errors = {"loss": dict(ours=1e-3, eager=2e-3, norm=3.0, ratio=0.33)}
                    extra |= dict(goals=[], errors=errors, worst="loss")
                label, kind = (
                    f"{model}, {batch}, 75% supervised, LoRA r8, AdamW",
                    "ours" if provider in OURS else "peer",
                )
                self.entry("training_step", label, provider, kind, ms * factor, **extra)

    def targets(self) -> None:
        for samples, ms, segments in ((100, 1000.0, 200), (828, 4000.0, 720)):
            case = dict(model=None, encoder="all-minilm-l6-v2", samples=samples)
            for provider, share in ((BUILD, 1.0), (ALONE, 0.93)):
                extra = dict(encoder="all-minilm-l6-v2", threads=2, segments=segments, dtype="float16", case=case)
                extra |= dict(segments_per_s=1e3 * segments / (share * ms), quick=samples == 100)
                kind = "limit" if provider == ALONE else "ours"
                self.entry("targets", f"all-minilm-l6-v2, {samples} samples", provider, kind, share * ms, **extra)
        for dtype, (target_size, taken) in STORES.items():
            for way, ms in WAYS.items():
                case = dict(model=None, way=way, storage_dtype=dtype, target_size=target_size, tokens=16384)
                provider = "store" if way == "lookup" else "collator"
                extra = dict(threads=1, bytes_per_token=taken, quick=dtype == "float16", dtype=dtype, goals=[])
                label = f"{way}, B8 L2048, d {target_size}"
                self.entry("collation", label, provider, "ours", ms * (2 - (dtype == "float16")), case=case, **extra)


def _said(case: dict) -> dict[str, str]:
    return dict(tokens=f"{case['tokens']} tokens", supervised=f"{100 * case['supervised']:.3g}% supervised")


def crossing(held: dict[str, float], **curves: tuple[float, ...]) -> list[tuple[tuple[str, ...], dict]]:
    """(axes, sizes) of every point of curves that cross at `held`, the crossing first."""
    found = [(tuple(curves), held)]
    return found + [((axis,), held | {axis: x}) for axis, xs in curves.items() for x in xs if x != held[axis]]


def sample(kind: str = "cuda") -> dict:
    """A whole file, every op in it; kind "cuda" or "cpu". The same numbers at every call."""
    m = Maker(kind, random.Random(0), [])
    copy, matmul = m.rates()
    m.entry("ceilings", "copy", "copy", "peer", 2**31 / copy / 1e9, tb_per_s=copy, dtype="uint8")
    for dtype, rate in matmul.items():
        ms = 2 * 8192**3 / rate / 1e9
        m.entry("ceilings", "8192 x 8192 matrices", "matmul", "peer", ms, tflop_per_s=rate, dtype=dtype)
    for frozen in (False, True):
        m.cross_entropy(frozen=frozen)
    m.cross_entropy(supervised=1.0)
    tokens, supervised = (1024, 2048, 4096, 8192, 16384), (0.125, 0.25, 0.5, 1.0)
    for axes, sizes in crossing(dict(tokens=8192, supervised=0.5), tokens=tokens, supervised=supervised):
        m.cross_entropy("Qwen3-1.7B", hidden_size=2048, vocab=151936, axes=axes, **sizes)
    vocab, hidden_size = (32000, 64000, 128256, 256000), (1024, 2048, 4096, 8192)
    for axes, sizes in crossing(dict(vocab=128256, hidden_size=4096), vocab=vocab, hidden_size=hidden_size):
        m.cross_entropy(None, axes=axes, **sizes)
    for axes, sizes in crossing(dict(tokens=8192, supervised=0.75), tokens=tokens[:4], supervised=(0.25, 0.5, 0.75)):
        m.flow_loss(axes=axes, **sizes)
    case = dict(model="Llama-3-8B", tokens=8192, hidden_size=4096, vocab=128256, supervised=0.5)
    m.race("sfr_loss", "Llama-3-8B, 8192 tokens, 50% supervised, trained", JOINT, case, 10**13, 10**9, room=10**9)
    m.steps()
    for leaf in LEAVES:
        for n, width in ((4096, 128256), (1024, 32000)) if leaf == "softmax_xent" else ((8192, 1024), (512, 1024)):
            moved = n * width * (4 if leaf == "softmax_xent" else 6)
            m.race(leaf, f"{n} rows, width {width}", LEAF, dict(rows=n, width=width), 0, moved, room=moved)
    for n in (1024, 8192):
        case = dict(model=None, tokens=n, hidden_size=4096, supervised=1.0, width=1024)
        label = f"H 4096, {n} tokens, 100% supervised"
        m.race("velocity_head", label, HEAD, case, 40 * n * 1024**2, 60 * n * 1024, room=40 * n * 1024)
    m.targets()
    content = dict(
        machine_info=dict(
            node="made-up", machine="x86_64", python_version="3.12.3", system="Linux", cpu=dict(count=16)
        ),
        commit_info=dict(
            id="0123456789abcdef0123456789abcdef01234567", dirty=True, project="sfr_kernels", branch="main"
        ),
        benchmarks=m.benchmarks,
        datetime="2026-01-02T03:04:05+00:00",
        version="5.3.1",
        sfr_kernels=about(m),
    )
    return json.loads(json.dumps(content))  # as from a file: nothing in it is shared


def about(m: Maker) -> dict:
    group = f"linear_cross_entropy: Llama-3-8B, {8192 if m.gpu else 512} tokens, 100% supervised, trained, {m.dtype}"
    joint = f"sfr_loss: Llama-3-8B, 8192 tokens, 50% supervised, trained, {m.dtype}"
    absent = [
        dict(op="linear_cross_entropy", group=group, provider="quack", ours=False, reason="quack is not installed"),
        dict(op="softmax_xent", group="softmax_xent: 4096 rows, width 128256, float16", provider="cuda", ours=True,
             reason="no nvcc"),
    ]  # fmt: skip
    if not m.gpu:
        groups = [f"velocity_head: H 512, {n} tokens, 100% supervised, float32" for n in (32, 64)]
        absent += [
            dict(op="velocity_head", group=group, provider=provider, ours=provider == "torch",
                 reason="not run: the time was up (--minutes)")
            for group in groups for provider in ("torch", "eager")
        ]  # fmt: skip
    failed = [
        dict(op="linear_cross_entropy", group=group, provider="F.linear_cross_entropy", ours=False,
             reason="RuntimeError: CUDA out of memory" if m.gpu else "RuntimeError: out of memory"),
        dict(op="sfr_loss", group=joint, provider="cuda", ours=True,
             reason="WrongResultError: hidden: error 4.1e-03, allowed 3.0e-03"),
    ]  # fmt: skip
    return dict(
        version="0.1.0", selection="full" if m.gpu else "quick", full=m.gpu, only=[], complete=m.gpu, cut=not m.gpu,
        device=GPU if m.gpu else CPU,
        versions=VERSIONS if m.gpu else VERSIONS | dict(cuda=None, liger_kernel=None, cut_cross_entropy=None),
        revision="0123456789abcdef0123456789abcdef01234567", modified=True, date="2026-01-02T03:04:05+00:00",
        absent=absent, failed=failed,
    )  # fmt: skip


HOSTILE = (
    '</script><script>document.body.dataset.injected=1</script><img src=x onerror="document.body.dataset.injected=2">'
)


def hostile() -> dict:
    """Names that would run if any of them were taken for more than text."""
    content = sample()
    for entry in content["benchmarks"]:
        extra = entry["extra_info"]
        extra["label"] += HOSTILE
        extra["provider"] += HOSTILE if extra["provider"] in ("Liger", SFT_HF) else ""
        if "baseline" in extra:
            extra["baseline"] += HOSTILE
        for point in extra.get("sweeps") or []:
            point["series"] += HOSTILE
    about = content["sfr_kernels"]
    about["failed"].append(about["failed"][0] | dict(provider=HOSTILE, reason=HOSTILE))
    about["device"] = about["device"] | dict(name=HOSTILE)
    about["absent"].append(about["absent"][0] | dict(op=HOSTILE, reason="not run: the time was up"))
    about |= dict(complete=False, cut=True)
    about["versions"] = about["versions"] | {HOSTILE: HOSTILE}
    return content
