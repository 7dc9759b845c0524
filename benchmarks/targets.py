"""What targets cost: building a store beside the encoder alone, reading it, and a training step with it.

    python -m benchmarks.targets [--encoder NAME] [--out FOLDER]      measure, and write a result file
    python -m benchmarks.targets --readme                             README's table, from the newest result files

Each comparison takes turns in one run, and its ratio is what counts. The store of the sizes quoted in README is built
with random embeddings: its bytes do not depend on what they say.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sfr_kernels import SFRConfig, attach
from sfr_kernels.targets import SampleList, TargetStore, build_targets, load_encoder
from sfr_kernels.targets.build import BATCH_SIZE
from sfr_kernels.targets.collator import sfr_inputs
from sfr_kernels.targets.segments import segments_of
from sfr_kernels.training.data import PERSONAS, read_chats, tokenize
from sfr_kernels.training.models import MINILM, SMOLLM2, encoder_path, load_model, load_tokenizer

from .results import FOLDER, ROOT, ResultFile, read

MARKS = "<!-- targets -->", "<!-- /targets -->"
BGE_LARGE = "bge-large-shaped"
BILLION = 1_000_000_000
STRIDE = SFRConfig().stride


class RandomEncoder(torch.nn.Module):
    """Unit vectors of a given size, at once."""

    prompts = truncate_dim = max_seq_length = None

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode_document(self, texts: list[str], **options) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(texts), self.size), dim=1)


class OneWord:
    """A tokenizer for which no text is worth the time."""

    is_fast = False

    def get_vocab(self) -> dict:
        return {}

    def batch_decode(self, pieces: list, skip_special_tokens: bool) -> list[str]:
        return [str(i) for i in range(len(pieces))]


def bge_large(folder: Path, device: torch.device):
    """A SentenceTransformer of bge-large's shape with random weights in bf16, and MiniLM's tokenizer, which is the
    same vocabulary."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    shape = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    BertModel(BertConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_path(MINILM)).save_pretrained(folder)
    body = Transformer(str(folder), max_seq_length=512, model_kwargs={"dtype": torch.bfloat16})
    return SentenceTransformer(modules=[body, Pooling(1024, "cls")], device=str(device))


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(functions: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds of one run each, in turn forwards and backwards."""
    found = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(seconds(functions[name], device))
    return found


def building(encoder, samples: list[dict], tokenizer, folder: Path, device: torch.device, rounds: int) -> dict:
    """The encoder alone on the texts, and the whole build, shard by shard."""
    config = SFRConfig()
    tokens = sum(sum(x >= 0 for x in s["labels"]) for s in samples)
    corpus = SampleList(samples, shard_tokens=40_000)
    shards = []
    for i in range(len(corpus.cu_samples) - 1):
        texts = segments_of(corpus.read(i), config, tokenizer).texts
        shards.append(sorted(set(texts), key=lambda text: (-len(text), text)))
    segments = sum(len(texts) for texts in shards)
    options = dict(batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False)

    def alone():
        for texts in shards:
            encoder.encode_document(texts, **options)

    def build():
        shutil.rmtree(folder, ignore_errors=True)
        build_targets(corpus, config, tokenizer, encoder, folder=folder, progress=False)

    encoder.encode_document(shards[0][:BATCH_SIZE], **options)
    times = turns({"alone": alone, "build": build}, device, rounds)
    # a build hashes the data and the encoder's weights first, once for a corpus of any size
    medians = {name: statistics.median(values) for name, values in times.items()}
    return dict(
        segments=segments,
        tokens=tokens,
        seconds=times,
        segments_per_s=segments / medians["build"],
        alone_per_s=segments / medians["alone"],
        share=statistics.median(a / b for a, b in zip(times["alone"], times["build"], strict=True)),
    )


def long_samples(tokens: int) -> list[dict]:
    """Samples of 2048 tokens, three quarters of them supervised."""
    return [{"labels": [-100] * 512 + [7] * 1536} for _ in range(-(-tokens // 1536))]


def size(folder: Path, dtype: str, target_size: int) -> dict:
    samples = long_samples(BILLION // 1000)
    build_targets(samples, SFRConfig(), OneWord(), RandomEncoder(target_size), folder=folder, dtype=dtype,
                  progress=False)  # fmt: skip
    tokens = 1536 * len(samples)
    taken = sum(path.stat().st_size for path in folder.iterdir())
    return dict(dtype=dtype, target_size=target_size, tokens=tokens, bytes=taken, bytes_per_token=taken / tokens)


def collating(store: TargetStore, rounds: int = 200) -> dict:
    """What the collator adds to a batch of B8 L2048, and a look-up of one sample, on one thread."""
    labels = torch.tensor([s["labels"] for s in long_samples(8 * 1536)])
    padded = {"labels": labels, "attention_mask": torch.ones_like(labels)}
    packed = {"labels": labels.view(1, -1), "position_ids": torch.arange(2048).repeat(8)[None]}
    threads, cpu, config = torch.get_num_threads(), torch.device("cpu"), SFRConfig()
    torch.set_num_threads(1)
    runs = {
        "padded": lambda: sfr_inputs(padded, list(range(8)), config, store, [2048] * 8),
        "packed": lambda: sfr_inputs(packed, list(range(8)), config, store, [2048] * 8),
        "lookup": lambda: store.lookup([5]),
    }
    times = turns(runs, cpu, rounds)
    torch.set_num_threads(threads)
    return {name: 1e3 * statistics.median(values[rounds // 10 :]) for name, values in times.items()}


def stepping(store: TargetStore, samples: list[dict], tokenizer, device: torch.device, rounds: int) -> dict:
    """A training step of SmolLM2 with rows and targets on the device already, and with both made and moved in it."""
    model, _ = load_model(SMOLLM2, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = SFRConfig()
    attach(model, config, store)
    batch = samples[:4]
    width = max(len(s["input_ids"]) for s in batch)
    padded = {
        name: torch.tensor([s[name] + [fill] * (width - len(s[name])) for s in batch])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    padded["attention_mask"] = torch.tensor([[1] * len(s["labels"]) + [0] * (width - len(s["labels"])) for s in batch])
    ids, lengths = [s["sample_id"] for s in batch], [len(s["labels"]) for s in batch]
    moved = {k: v.to(device) for k, v in padded.items()}
    ready = {k: v.to(device) for k, v in sfr_inputs(padded, ids, config, store, lengths).items()}

    def step(extra: dict) -> None:
        model(**moved, **extra, seed=1).loss.backward()
        model.zero_grad(set_to_none=True)

    def with_store() -> None:
        made = sfr_inputs(padded, ids, config, store, lengths)
        step({k: v.to(device, non_blocking=True) for k, v in made.items()})

    step(ready)
    times = turns({"ready": lambda: step(ready), "store": with_store}, device, rounds)
    made = turns({"made": lambda: sfr_inputs(padded, ids, config, store, lengths)}, torch.device("cpu"), 50)["made"]
    fastest = {name: 1e3 * min(values) for name, values in times.items()}
    ratio = fastest["store"] / fastest["ready"]  # medians of a shared CPU differ by more than what is looked for
    return dict(tokens=4 * width, ms=fastest, ratio=ratio, made_ms=1e3 * statistics.median(made))


def measure(encoder_name: str, out: Path, rounds: int) -> Path:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = ResultFile(out, "targets", device)
    tokenizer, _ = load_tokenizer(SMOLLM2)
    samples = tokenize(read_chats(PERSONAS), tokenizer, 1024).samples
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if encoder_name == BGE_LARGE:
            encoder = bge_large(folder / "encoder", device)
            samples = samples * 40
        else:
            encoder = load_encoder(encoder_path(encoder_name), device)
            samples = samples * 2  # in other shards, where they are encoded again
        found = building(encoder, samples, tokenizer, folder / "built", device, rounds)
        file.add("rows", dict(kind="building", ok=True, encoder=encoder_name, threads=torch.get_num_threads(), **found))
        for dtype, d in (("float16", 1024), ("int8", 256)):
            file.add("rows", dict(kind="size", ok=True, **size(folder / dtype, dtype, d)))
            file.add(
                "rows", dict(kind="collating", ok=True, dtype=dtype, ms=collating(TargetStore.open(folder / dtype)))
            )
        store = TargetStore.open(folder / "built")
        file.add("rows", dict(kind="stepping", ok=True, **stepping(store, samples, tokenizer, device, 2 * rounds + 1)))
    return file.path


def section(files: list[Path]) -> str:
    """README's account of the newest result file of every device."""
    newest = {}
    for path in sorted(files, key=lambda p: read(p)["environment"]["date"]):
        newest[read(path)["environment"]["device"]] = path
    parts = []
    for device, path in newest.items():
        content = read(path)
        rows = {}
        for row in content["rows"]:
            rows.setdefault(row["kind"], []).append(row)
        built, step = rows["building"][0], rows["stepping"][0]
        sizes = {row["dtype"]: row for row in rows["size"]}
        added = {row["dtype"]: row["ms"] for row in rows["collating"]}
        hours = BILLION / STRIDE / built["segments_per_s"] / 3600
        where = f"{device}, {built['threads']} threads" if content["environment"]["capability"] is None else device
        parts.append(
            f"Measured on {where} ({path.name}):\n\n"
            "| | |\n|---|---|\n"
            f"| building, {built['encoder']} | {built['segments_per_s']:.0f} segments/s: {built['share']:.0%} of the "
            f"encoder alone ({built['alone_per_s']:.0f}) |\n"
            f"| store, d = 1024, float16 | {sizes['float16']['bytes_per_token']:.1f} bytes a supervised token |\n"
            f"| store, d = 256, int8 | {sizes['int8']['bytes_per_token']:.1f} bytes a supervised token |\n"
            f"| the collator's part of B8 L2048, one thread | {added['float16']['padded']:.2f} ms padded, "
            f"{added['float16']['packed']:.2f} ms packed |\n"
            f"| one sample looked up | {1e3 * added['float16']['lookup']:.0f} µs |\n"
            f"| training step of SmolLM2, B4 | {step['ratio']:.3f} times that with targets on the device; rows and "
            f"targets are {step['made_ms']:.2f} of {step['ms']['ready']:.0f} ms |\n\n"
            f"One billion supervised tokens in samples like these (1536 supervised tokens, stride {STRIDE}): "
            f"{BILLION / STRIDE / 1e6:.1f} million segments, "
            f"{BILLION * sizes['float16']['bytes_per_token'] / 1e9:.0f} GB at d = 1024 in float16 or "
            f"{BILLION * sizes['int8']['bytes_per_token'] / 1e9:.0f} GB at d = 256 in int8, and with the encoder and "
            f"the device above {hours:.0f} hours, divided by the number of such devices."
        )
    return "\n\n".join(parts) or "Nothing has been measured yet: `python -m benchmarks.targets` does."


def with_section(text: str) -> str:
    """README with the account between its marks."""
    before, rest = text.split(MARKS[0])
    found = section(list(FOLDER.glob("targets-*.json")))
    return f"{before}{MARKS[0]}\n{found}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=MINILM, help=f"folder, name, or {BGE_LARGE}")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readme", action="store_true", help="write README's table from the result files")
    args = parser.parse_args()
    if args.readme:
        path = ROOT / "README.md"
        path.write_text(with_section(path.read_text()))
    else:
        print(measure(args.encoder, args.out, args.rounds))


if __name__ == "__main__":
    main()
