"""The command line: `python -m sfr_kernels train`, `targets`, `bench` and `info`."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from ..config import SFRConfig

_CHATS = 'JSON lines of {"messages": […]}, ShareGPT\'s {"conversations": […]} or {"prompt", "completion"}'


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 after printing what was wrong with the input."""
    argv, parser = sys.argv[1:] if argv is None else argv, _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        args.rest = argv[argv.index("bench") + 1 :]  # its options are its own
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"\nsfr_kernels {args.command}: stopped; {args.again}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "bench" if args.command == "bench" else "train,demo"
        print(f"sfr_kernels {args.command}: needs {error.name}: pip install 'sfr_kernels[{extra}]'", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"sfr_kernels {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sfr_kernels", description="Semantic Flow Regularization.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="fine-tune a causal LM on chats",
        description="Fine-tunes a causal LM with cross-entropy and the flow loss, then shows what changed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train, again="--resume goes on from the last checkpoint")
    add = train.add_argument
    add("--out", type=Path, required=True, help="folder of the run")
    add("--data", type=Path, help=f"{_CHATS}; the shipped personas if left out")
    add("--model", default="smollm2-135m-instruct", help="causal LM: folder, name, or the packaged default")
    add("--encoder", help="sentence encoder: folder or name; that of the targets, else the packaged all-minilm-l6-v2")
    add("--targets", type=Path, help="folder of the targets, built there if there are none; OUT/targets if left out")
    add("--objective", choices=("sfr", "ce"), default="sfr", help="ce is plain fine-tuning on the same data and seed")
    add("--config", type=Path, help="JSON file of SFRConfig fields")
    add("--flow-weight", type=float, help="λ; overrides the config")
    add("--full", action="store_true", help="train every weight instead of LoRA adapters")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, default=-1, help="optimizer steps; overrides --epochs")
    add("--batch-size", type=int, default=4)
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    add("--lr", type=float, help="learning rate; 1e-3 for LoRA, 1e-4 with --full")
    add("--max-length", type=int, default=1024, help="tokens of context; longer examples are cut, and counted")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--samples", type=int, default=3, help="held-out prompts in the table of answers")
    add("--seed", type=int, help="of data order, adapters, noise and samples; overrides the config's, else 0")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")

    _add_targets(commands)
    bench = commands.add_parser("bench", help="what this library is worth on this machine", add_help=False)
    bench.set_defaults(run=_bench, again="what was measured is kept")
    info = commands.add_parser("info", help="versions, device, and which backends are usable")
    info.set_defaults(run=_info, again="")
    return parser


def _add_targets(commands) -> None:
    targets = commands.add_parser(
        "targets",
        help="embed the text ahead of every token of a corpus, once",
        description="Builds the target store of a corpus. Started again, it goes on where it was stopped; where the "
        "store is whole, it checks every byte and makes damaged shards again. Under torchrun or accelerate launch "
        "every process takes its share.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    targets.set_defaults(run=_targets, again="the same command goes on from there")
    add = targets.add_argument
    add("--data", type=Path, required=True, help=f'{_CHATS}, or of {{"labels": […]}}')
    add("--out", type=Path, required=True, help="folder of the store")
    add("--model", default="smollm2-135m-instruct", help="causal LM whose tokenizer it is: folder or name")
    add("--encoder", default="all-minilm-l6-v2", help="sentence encoder: folder, name, or the packaged default")
    add("--config", type=Path, help="JSON file of SFRConfig fields")
    add("--max-length", type=int, default=1024, help="tokens of context, as in train")
    add("--dtype", choices=("float16", "float32", "int8"), default="float16", help="of the stored embeddings")
    add("--truncate-dim", type=int, help="coordinates to keep, for encoders trained for it")
    add("--batch-size", type=int, default=64, help="texts the encoder embeds at once")
    add("--devices", nargs="+", help="of the encoder; several share the work; every GPU if left out, else the CPU")
    add("--engine", choices=("local", "ray"), default="local", help="ray: tasks and actors of a Ray cluster")
    add("--workers", type=int, default=1, help="with ray: how many encoders")
    add("--overwrite", action="store_true", help="replace a store that was made differently")


def _config(path: Path | None) -> SFRConfig:
    if path is None:
        return SFRConfig()
    try:
        return SFRConfig.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from error


def _train(args) -> int:
    config = _config(args.config)
    given = {"flow_weight": args.flow_weight, "seed": args.seed}
    config = SFRConfig.from_dict(config.to_dict() | {k: v for k, v in given.items() if v is not None})
    rate = (1e-4 if args.full else 1e-3) if args.lr is None else args.lr
    from ..training.data import PERSONAS
    from .train import TrainOptions, finetune

    finetune(
        TrainOptions(
            data=args.data or PERSONAS, out=args.out, model=args.model, encoder=args.encoder, targets=args.targets,
            config=config,
            objective=args.objective, full=args.full, epochs=args.epochs, max_steps=args.steps,
            batch_size=args.batch_size, accumulate=args.accumulate,
            learning_rate=rate, max_length=args.max_length,
            save_every=args.save_every, seed=config.seed, resume=args.resume, overwrite=args.overwrite,
            samples=args.samples,
        )
    )  # fmt: skip
    return 0


def _targets(args) -> int:
    from .targets import StoreOptions, build_store

    build_store(
        StoreOptions(
            data=args.data, out=args.out, model=args.model, encoder=args.encoder, config=_config(args.config),
            max_length=args.max_length, dtype=args.dtype, truncate_dim=args.truncate_dim, batch_size=args.batch_size,
            devices=args.devices, engine=args.engine, workers=args.workers, overwrite=args.overwrite,
        )
    )  # fmt: skip
    return 0


def _bench(args) -> int:
    return _benchmarks().main(args.rest)


def _benchmarks():
    """The command of benchmarks/: a part of an installed package, beside it in a checkout."""
    name = f"{__package__.rpartition('.')[0]}.benchmarks"
    if importlib.util.find_spec(name) is None:
        name = "benchmarks"
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of the processes that it starts, too
    return importlib.import_module(f"{name}.command")


def _info(args) -> int:
    import torch

    from .._version import __version__
    from ..kernels.backend import BACKENDS, ENVIRONMENT, automatic, measured, resolve_backend, unavailable

    versions = {"sfr_kernels": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    versions |= {"triton": _version_of("triton"), "CUDA": torch.version.cuda or "none"}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        print(f"device: {properties.name}, compute capability {properties.major}.{properties.minor}, {memory}")
    else:
        print(f"device: CPU ({platform.machine()}, {torch.get_num_threads()} threads); torch sees no GPU")
    print("backends:")
    for backend in BACKENDS:
        reason = unavailable(backend)
        print(f"  {backend:10} {'usable' if reason is None else f'not usable: {reason}'}{_compiled(backend, reason)}")
    print(f"auto picks: {automatic(device)}")
    if device.type == "cuda":
        rows = measured(torch.cuda.get_device_capability(device))
        for row in rows:
            times = ", ".join(f"{name} {ms:.4f} ms" for name, ms in row["ms"].items())
            print(f"  {row['kernel']}, {row['size']}: {row['backend']} ({times}; {row['origin']})")
        if not rows:
            print("  no kernel has been measured on this kind of GPU (`bench`, then `bench choose`)")
    if chosen := os.environ.get(ENVIRONMENT):
        try:
            resolve_backend(None, device)
            print(f"{ENVIRONMENT}={chosen} overrides it")
        except (ValueError, RuntimeError) as error:
            print(f"{ENVIRONMENT} is wrong: {error}")
            return 1
    return 0


def _compiled(backend: str, reason: str | None) -> str:
    """Of the cuda backend, where its kernels are, or will be."""
    if backend != "cuda" or reason is not None:
        return ""
    from ..kernels.build import built, nvcc

    return f", {built()}" if built() else f", once it has been compiled at the first call, with {nvcc()}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
