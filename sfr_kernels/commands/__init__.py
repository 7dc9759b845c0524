"""The command line: `python -m sfr_kernels train`, `targets`, `evaluate`, `futures`, `curate`, `bench` and
`info`.

Here are the options of every command. What a command does is `run(args)` in the file of its name, which is imported
when it is called, so that `--help` imports neither transformers nor Triton.
"""

import argparse
import importlib
import sys
from pathlib import Path

from ..config import SFRConfig

_CHATS = 'JSON lines of {"messages": […]}, ShareGPT\'s {"conversations": […]} or {"prompt", "completion"}'
_COUNTS = (
    "accumulate", "batch_size", "max_length", "max_new_tokens", "max_prompts", "samples", "save_every", "steps",
    "workers",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 after printing what was wrong with the input."""
    argv, parser = sys.argv[1:] if argv is None else argv, _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        args.rest = argv[argv.index("bench") + 1 :]  # benchmarks/ parses its own options
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _check(args)
        return importlib.import_module(f".{args.command}", __package__).run(args) or 0
    except KeyboardInterrupt:
        print(f"\nsfr_kernels {args.command}: stopped; {args.again}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = {"ray": "ray", "pyarrow": "code"}.get(error.name, "bench" if args.command == "bench" else "train,demo")
        print(f"sfr_kernels {args.command}: needs {error.name}: pip install 'sfr_kernels[{extra}]'", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"sfr_kernels {args.command}: {error}", file=sys.stderr)
        return 2


def _weight(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def _check(args: argparse.Namespace) -> None:
    """ValueError for a count below 1; reads the configuration."""
    for name in _COUNTS:
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not hasattr(args, "config"):
        return
    try:
        config = SFRConfig() if args.config is None else SFRConfig.from_json(args.config.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--config {args.config}: {error}") from error
    given = {name: getattr(args, name, None) for name in ("flow_weight", "head_steps", "seed")}
    args.config = SFRConfig.from_dict(config.to_dict() | {k: v for k, v in given.items() if v is not None})


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
    train.set_defaults(again="--resume goes on from the last checkpoint")
    add = train.add_argument
    add("--out", type=Path, required=True, help="folder of the run")
    add("--data", type=Path, help=f"{_CHATS}; the shipped personas if left out")
    add("--model", default="smollm2-135m-instruct", help="causal LM: folder, name, or the packaged default")
    add("--encoder", help="sentence encoder of targets and of the comparison: folder or name; if left out, the store's "
        "own, and the packaged all-minilm-l6-v2")  # fmt: skip
    add("--targets", type=Path, help="folder of the targets, built there if there are none; OUT/targets if left out")
    add("--objective", choices=("sfr", "mtp", "ce"), default="sfr", help="on the same data and seed, mtp is "
        "multi-token prediction, ce plain fine-tuning")  # fmt: skip
    add("--config", type=Path, help="JSON file of SFRConfig fields")
    add("--flow-weight", type=_weight, help="λ, or auto; overrides the config")
    add("--head-steps", type=int, help="steps of the velocity head alone, before training; overrides the config")
    add("--full", action="store_true", help="train every weight instead of LoRA adapters")
    add("--epochs", type=float, default=2.0, help="passes over the data")
    add("--steps", type=int, default=-1, dest="max_steps", metavar="STEPS", help="optimizer steps; overrides --epochs")
    add("--batch-size", type=int, default=4, help="samples in a micro-batch")
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    add("--lr", type=float, dest="learning_rate", metavar="LR", help="learning rate; 1e-3 for LoRA, 1e-4 with --full")
    add("--max-length", type=int, default=1024, help="tokens of context; longer examples are cut, and counted")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add(
        "--max-prompts", type=int, default=8, help="held-out prompts that are answered before and after, the first ones"
    )
    add("--seed", type=int, help="of data order, adapters, noise and samples; overrides the config's, else 0")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")

    targets = commands.add_parser(
        "targets",
        help="embed the text ahead of every token of a corpus, once",
        description="Builds the target store of a corpus. Started again, it goes on where it was stopped; where the "
        "store is whole, it checks every byte and makes damaged shards again. Under torchrun or accelerate launch "
        "every process takes its share.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    targets.set_defaults(again="the same command goes on from there")
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

    evaluate = commands.add_parser(
        "evaluate",
        help="compare the answers of models: diversity, style, pass@k",
        description="Lets several models answer the same prompts and compares them, in pairs over prompts: the first "
        "model is what the others are compared with. Started again, it goes on where it was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.set_defaults(again="the same command goes on from there")
    add = evaluate.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL", help="causal LMs: folders, runs of train, names")
    what = evaluate.add_mutually_exclusive_group()
    what.add_argument("--data", type=Path, help=f"{_CHATS}; the shipped personas if left out")
    what.add_argument("--code", metavar="humaneval|FILE", help="problems in the form of HumanEval, MBPP or "
                      "LiveCodeBench; programs run in a sandbox, which needs Linux and bubblewrap")  # fmt: skip
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder of answers, table and plots")
    add("--samples", type=int, default=2, help="answers to each prompt, or persona and prompt")
    add("--prompts", choices=("held-out", "all"), help="of --data; if left out, those that train leaves out")
    add("--max-prompts", type=int, help="prompts that are answered, the first ones; 64 if left out, all of --code")
    add("--max-new-tokens", type=int, help="of an answer; 96 if left out, 512 of --code")
    add("--temperature", type=float, default=0.7, help="0: the likeliest token at each step")
    add("--top-p", type=float, default=0.9, help="share of the probability that is sampled from")
    add("--seed", type=int, default=0, help="of the samples, the same for every model")
    add("--batch-size", type=int, default=32, help="answers that are generated at once")
    add(
        "--encoder",
        default="all-minilm-l6-v2",
        help="sentence encoder: folder, name, or the packaged default",
    )
    add("--engine", choices=("transformers", "vllm"), default="transformers", help="what generates")
    add("--overwrite", action="store_true", help="drop the answers in --out that were made otherwise")

    futures = commands.add_parser(
        "futures",
        help="show where in a text what follows is open",
        description="Samples, at every token of a response, embeddings of the text ahead from the velocity head that "
        "was trained with the model, and shows how far they are apart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    futures.set_defaults(again="nothing was written; the same command starts anew")
    add = futures.add_argument
    add("model", metavar="MODEL", help="run of train, or a folder with a model and its velocity head")
    text = futures.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the response")
    text.add_argument("--file", type=Path, help="text file of the response")
    add("--prompt", help="what the user said before it; if left out, the text alone is read, in no chat")
    add("--system", help="system message, such as a persona; needs --prompt")
    add("--noises", type=int, default=16, help="samples at each token, 2 or more")
    add("--steps", type=int, default=16, help="Euler steps from noise to embedding")
    add("--seed", type=int, default=0, help="of the noise, the same at every token")
    add("--out", type=Path, default=Path("runs/futures"), help="folder of page, plot and numbers; replaces those there")

    curate = commands.add_parser(
        "curate",
        help="filter public code sets into chats to train on",
        description="Keeps of OpenCodeInstruct's or rStar-Coder's parquet files the answers that are judged best or "
        "verified, one to a question, and says how many rows it dropped for which reason.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    curate.set_defaults(again="nothing was written; the same command starts anew")
    add = curate.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="parquet files of the set, in the order of the chats")
    add("--format", choices=("opencodeinstruct", "rstar-coder"), required=True, help="whose columns the files have")
    add("--out", type=Path, required=True, help='file of the chats, JSON lines of {"messages": […]}')
    add("--model", help="causal LM whose tokenizer counts rStar-Coder's answers; 4 characters a token if left out")
    add("--overwrite", action="store_true", help="replace the file of the chats")

    bench = commands.add_parser("bench", help="what this library is worth on this machine", add_help=False)
    bench.set_defaults(again="what was measured is kept")
    info = commands.add_parser("info", help="versions, device, and which backends are usable")
    info.set_defaults(again="")
    return parser
