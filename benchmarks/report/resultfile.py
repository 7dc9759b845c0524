"""Result files of the benchmarks, opened; `reading` says what is in them."""

import json
from pathlib import Path

from .reading import Race, races, validate

LEAVES = ("flow_path", "norm_act", "norm_act_backward", "flow_mse", "softmax_xent")
WHOLES = ("training_step", "targets", "collation", "ceilings")  # no kernels, and no losses
OPS = (*LEAVES, "velocity_head", "linear_cross_entropy", "flow_loss", "sfr_loss", *WHOLES)
MIB = 2**20
SHOWN_VERSIONS = dict(torch="torch", triton="Triton", cuda="CUDA", python="Python", transformers="transformers",
                      liger_kernel="Liger", cut_cross_entropy="cut-cross-entropy", quack="quack")  # fmt: skip


def load(path: Path | str) -> dict:
    """A result file's content. ValueError, naming the file, where it is not there or is not one."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def races_by_op(content: dict) -> dict[str, list[Race]]:
    """Op by op in the order of `OPS`, others after them."""
    found = {}
    for race in races(content):
        found.setdefault(race.op, []).append(race)
    return {op: found[op] for op in sorted(found, key=lambda op: OPS.index(op) if op in OPS else len(OPS))}


def missed_goals(content: dict) -> list[str]:
    found = []
    for entry in content["benchmarks"]:
        extra = entry["extra_info"]
        where = f"{extra['op']}: {extra['label']}, {extra['dtype']}, {extra['provider']}"
        found += [f"{where}: {goal}" for goal in extra.get("goals") or []]
    return found


def is_gpu(content: dict) -> bool:
    return content["sfr_kernels"]["device"].get("kind") != "cpu"


def device_of(content: dict) -> str:
    return content["sfr_kernels"]["device"]["name"]


def date_of(content: dict) -> str:
    return content["sfr_kernels"].get("date") or ""


def described(content: dict) -> str:
    """Device, versions and date, in one line."""
    run = content["sfr_kernels"]
    versions = run.get("versions") or {}
    parts = [f"driver {run['device']['driver']}"] if run["device"].get("driver") else []
    parts += [f"{name} {versions[key]}" for key, name in SHOWN_VERSIONS.items() if versions.get(key)]
    parts += [f"sfr_kernels {run['version']}"] if run.get("version") else []
    return ", ".join([device_of(content), *parts, *filter(None, [date_of(content)[:10]])])
