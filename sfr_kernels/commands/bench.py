"""The `bench` command, which benchmarks/ has: a part of an installed package, beside it in a checkout."""

import importlib
import importlib.util
import sys
from pathlib import Path


def run(args) -> int:
    name = f"{__package__.rpartition('.')[0]}.benchmarks"
    if importlib.util.find_spec(name) is None:
        name = "benchmarks"
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the processes it starts import it, too
    return importlib.import_module(f"{name}.command").main(args.rest)
