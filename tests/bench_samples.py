"""A result file of made-up numbers, for tests of what reads such files. Nothing here was measured."""

import random
import statistics
from dataclasses import dataclass

COPY, MATMUL = 3.0, {"bfloat16": 735.0, "float32": 60.0}  # TB/s, TFLOP/s
CPU_COPY, CPU_MATMUL = 0.02, {"float32": 0.2}
GPU = dict(
    name="NVIDIA H100 80GB HBM3", kind="cuda", capability="9.0", memory_bytes=85_014_000_000, driver="580.95.05",
    clocks=dict(sm_mhz=1980, memory_mhz=2619, max_sm_mhz=1980, max_memory_mhz=2619, power_limit_w=700),
)  # fmt: skip
CPU = dict(name="x86_64, 2 threads", kind="cpu", capability=None, memory_bytes=None, driver=None, clocks=None)
VERSIONS = dict(
    python="3.12.3", torch="2.11.0", triton="3.6.0", cuda="13.0", transformers="5.17.0", liger_kernel="0.8.5",
    cut_cross_entropy="25.1.1", quack=None,
)  # fmt: skip

# Times of the limit that each provider takes, about; bytes of peak memory as a share of the logits.
LINEAR = {"triton": (1.11, 0.25), "eager": (2.6, 3.0), "torch.compile": (2.1, 1.0), "Liger": (3.6, 0.02),
          "cut-cross-entropy": (2.8, 0.01)}  # fmt: skip
HEAD = {"triton": (1.5, 0.2), "cuda": (1.3, 0.2), "eager": (4.1, 0.8), "torch.compile": (3.9, 0.5)}
LEAF = {"triton": (1.2, 0.0), "cuda": (1.12, 0.0), "torch": (3.4, 1.0), "torch.compile": (1.5, 0.1)}
STEP = {"triton": (1.0, 0.3), "eager": (1.25, 1.0), "torch.compile": (1.12, 0.6), "Liger": (1.2, 0.1)}
PARTS = {"targets": 0.002, "trunk forward": 0.27, "loss": 0.14, "backward": 0.55, "optimizer": 0.04}
LEAVES = ("flow_path", "norm_act", "norm_act_backward", "flow_mse", "softmax_xent")
SWEEPS = {"tokens": (1024, 2048, 4096, 8192, 16384), "vocab": (32000, 64000, 128256, 256000),
          "hidden_size": (1024, 2048, 4096, 8192), "supervised": (0.125, 0.25, 0.5, 1.0)}  # fmt: skip


def curve(sweep: dict | None) -> dict:
    """The fields of a case that is a point of a curve, or none."""
    return dict(sweeps=[sweep] if sweep else [], main=sweep is None, quick=sweep is None)


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
        extra = dict(quick=True) | extra
        extra = dict(op=op, label=label, dtype=extra.pop("dtype", self.dtype), case=extra.pop("case", {}), **extra)
        group = f"{op}: {label}, {extra['dtype']}"
        name = f"test_{op}[{label}-{provider}]"
        fullname = f"benchmarks/bench_{op}.py::{name}"
        entry = dict(group=group, name=name, fullname=fullname, params=None, param=f"{label}-{provider}", options={})
        self.benchmarks.append(entry | dict(stats=stats, extra_info=extra | dict(provider=provider, kind=kind)))

    def race(
        self, op: str, label: str, providers: dict, case: dict, flops: int, moved: int, *, sweep=None, room=0
    ) -> None:
        """Every provider at one case, and the limit."""
        copy, matmul = self.rates()
        products, besides = flops / matmul[self.dtype] / 1e9, moved / copy / 1e9
        common = dict(case=case, **curve(sweep), flops=flops, bytes=moved, limit_ms=products + besides)
        common["products_ms"] = products if flops else None
        for provider, (factor, share) in providers.items():
            ours = provider in ("triton", "cuda", "torch")
            ms = (products + besides) * factor * self.random.uniform(0.97, 1.05) + 0.002
            extra = common | dict(issue_ms=0.05, peak_bytes=int(share * room), goals=[])
            extra["tflop_per_s"] = flops / ms / 1e9 if flops else None
            extra["tb_per_s"] = None if flops else moved / ms / 1e9
            if ours:
                outputs = {name: self.random.uniform(0.3, 0.7) for name in ("loss", "hidden", "weight")}
                made = {n: dict(ours=3e-3 * x, eager=2e-3, norm=3.0, ratio=round(x, 3)) for n, x in outputs.items()}
                extra |= dict(errors=made, worst=max(outputs, key=outputs.get))
                if products and ms > 1.1 * (products + besides) and op == "linear_cross_entropy":
                    extra["goals"] = [f"{ms / products:.2f} x products, wanted 1.09"]
            else:
                extra["error"] = 2e-3
            self.entry(op, label, provider, "ours" if ours else "peer", ms, **extra)
        self.entry(op, label, "limit", "limit", products + besides, case=case, **curve(sweep))
        if flops:
            self.entry(op, label, "products", "limit", products, case=case, **curve(sweep))

    def providers(self, found: dict) -> dict:
        """On a CPU torch stands in for the kernels, and the libraries do not run."""
        if self.gpu:
            return found
        return {"torch": found["triton"]} | {n: v for n, v in found.items() if n in ("eager", "torch.compile")}

    def cross_entropy(
        self, tokens=8192, hidden_size=4096, vocab=128256, supervised=0.5, *, frozen=False, sweep=None
    ) -> None:
        model = "Llama-3-8B"
        if not self.gpu:
            tokens, hidden_size, vocab = tokens // 16, hidden_size // 8, vocab // 16
        n, lm_head = int(tokens * supervised), "frozen" if frozen else "trained"
        label = f"{model}, {tokens} tokens, {100 * supervised:.3g}% supervised, {lm_head}"
        if sweep and sweep["axis"] not in ("tokens", "supervised"):
            label += f", {sweep['axis']} {sweep['x']}"
        if sweep:
            label += f" ({sweep['axis']})"
        case = dict(
            model=model, tokens=tokens, hidden_size=hidden_size, vocab=vocab, supervised=supervised, frozen=frozen
        )
        if sweep:
            sweep = sweep | dict(x=case[sweep["axis"]])
        flops, logits = 2 * n * hidden_size * vocab * (2 if frozen else 3), 2 * n * vocab
        providers = self.providers(LINEAR)
        self.race("linear_cross_entropy", label, providers, case, flops, 2 * logits, sweep=sweep, room=logits)


def sample(kind: str = "cuda") -> dict:
    """A whole file, every op in it; kind "cuda" or "cpu". The same numbers at every call."""
    m = Maker(kind, random.Random(0), [])
    copy, matmul = m.rates()
    m.entry("ceilings", "1 GiB", "copy", "limit", 2**31 / copy / 1e9, tb_per_s=copy, dtype="uint8")
    for dtype, rate in matmul.items():
        m.entry(
            "ceilings", "8192 x 8192 x 8192", "matmul", "limit", 2 * 8192**3 / rate / 1e9, tflop_per_s=rate, dtype=dtype
        )
    for leaf in LEAVES:
        for n, width in ((4096, 128256), (1024, 32000)) if leaf == "softmax_xent" else ((512, 1024), (8192, 1024)):
            moved = n * width * (4 if leaf == "softmax_xent" else 6)
            case = dict(rows=n, width=width)
            m.race(leaf, f"{n} rows of {width}", m.providers(LEAF), case, 0, moved, room=moved)
    for op in ("velocity_head", "flow_loss"):
        for batch, length, hidden in ((4, 2048, 4096), (2, 512, 4096)):
            n = batch * length * 3 // 4
            case = dict(model="Llama-3-8B", tokens=batch * length, hidden_size=hidden, supervised=0.75, width=1024)
            label = f"Llama-3-8B, {batch * length} tokens, 75% supervised"
            m.race(op, label, m.providers(HEAD), case, 40 * n * 1024**2, 60 * n * 1024, room=40 * n * 1024)
    for frozen in (False, True):
        m.cross_entropy(frozen=frozen)
    m.cross_entropy(supervised=1.0)
    for axis, xs in SWEEPS.items():
        for x in xs:
            series = f"linear_cross_entropy, trained, {m.dtype}"
            m.cross_entropy(**{axis: x}, sweep=dict(axis=axis, x=x, series=series))
    joint = {"triton": (1.08, 0.3), "torch.compile": (2.0, 1.0)}
    case = dict(model="Llama-3-8B", tokens=8192, hidden_size=4096, vocab=128256, supervised=0.5)
    m.race("sfr_loss", "Llama-3-8B, 8192 tokens, 50% supervised", m.providers(joint), case, 10**13, 10**9, room=10**9)
    for label, ms in (("Qwen2-1.5B, LoRA, 4096 tokens", 225.0), ("Llama-3-8B, LoRA, 8192 tokens", 790.0)):
        tokens = int(label.split()[-2])
        for provider, (factor, share) in m.providers(STEP).items():
            took = ms * factor * (1 if m.gpu else 40)
            parts = {name: part * took for name, part in PARTS.items()}
            extra = dict(parts=parts, tokens_per_s=1e3 * tokens / took, resident_bytes=16 * 2**30, goals=[])
            extra |= dict(case=dict(model=label.split(",")[0], tokens=tokens), peak_bytes=int(9e9 * (0.5 + share)))
            m.entry(
                "training_step", label, provider, "ours" if provider in ("triton", "torch") else "peer", took, **extra
            )
    for op, label, ms in (("targets", "all-minilm-l6-v2, 512 segments", 900.0), ("collation", "B8 L2048, packed", 1.2)):
        limit = dict(limit_ms=0.93 * ms, case=dict(tokens=16384), dtype="float32")
        m.entry(op, label, "store", "ours", ms, peak_bytes=2**26, goals=[], **limit)
        m.entry(op, label, "limit", "limit", 0.93 * ms, case=dict(tokens=16384), dtype="float32")
    return dict(
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


def about(m: Maker) -> dict:
    group = f"linear_cross_entropy: Llama-3-8B, {8192 if m.gpu else 512} tokens, 100% supervised, trained, {m.dtype}"
    absent = [
        dict(op="linear_cross_entropy", group=group, provider="quack", ours=False,
             reason="quack is not installed"),
        dict(op="softmax_xent", group="softmax_xent: 4096 rows of 128256, float16", provider="cuda", ours=True,
             reason="no nvcc"),
    ]  # fmt: skip
    failed = [
        dict(op="linear_cross_entropy", group=group, provider="F.linear_cross_entropy", ours=False,
             reason="RuntimeError: CUDA out of memory" if m.gpu else "RuntimeError: out of memory"),
        dict(op="sfr_loss", group=f"sfr_loss: Llama-3-8B, 8192 tokens, 50% supervised, {m.dtype}", provider="cuda",
             ours=True, reason="WrongResultError: hidden: error 4.1e-03, allowed 3.0e-03"),
    ]  # fmt: skip
    return dict(
        version="0.1.0", selection="full", complete=m.gpu, device=GPU if m.gpu else CPU,
        versions=VERSIONS if m.gpu else VERSIONS | dict(cuda=None, liger_kernel=None, cut_cross_entropy=None),
        revision="0123456789abcdef0123456789abcdef01234567", modified=True, date="2026-01-02T03:04:05+00:00",
        absent=absent, failed=failed,
    )  # fmt: skip
