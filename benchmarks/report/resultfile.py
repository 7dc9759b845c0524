"""Result files of the benchmarks, opened; `reading` says what is in them."""

import json
from pathlib import Path

from . import words
from .reading import Race, not_run, races, validate

OPS = {  # what each op is; in this order, others after them
    "linear_cross_entropy": "lm_head and cross-entropy, forward and backward",
    "sfr_loss": "cross-entropy and flow loss together, forward and backward",
    "flow_loss": "flow-matching loss, forward and backward",
    "velocity_head": "the velocity head, forward and backward",
    "softmax_xent": "cross-entropy and its gradient, in place, from logits",
    "flow_path": "noise, x_t and velocity of every row",
    "norm_act": "LayerNorm, SiLU and residual",
    "norm_act_backward": "backward of LayerNorm, SiLU and residual",
    "flow_mse": "weighted squared error and its gradient",
    "training_step": "a whole optimizer step",
    "targets": "building targets from text",
    "collation": "the collator's part of a batch, and a look-up",
    "ceilings": "what the device can do",
}
WHOLES = ("training_step", "targets", "collation", "ceilings")  # no kernels, and no losses
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
    return {op: found[op] for op in [*OPS, *found] if op in found}


def shown_by_op(content: dict) -> dict[str, list[Race]]:
    """What README shows, op by op: the cases of the five-minute selection, or of a run without any all main ones."""
    main = {op: [race for race in found if race.is_main] for op, found in races_by_op(content).items()}
    any_quick = any(race.is_quick for found in main.values() for race in found)
    return {op: [race for race in found if race.is_quick or not any_quick] for op, found in main.items()}


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
    """Its name; of a CPU also the threads."""
    device = content["sfr_kernels"]["device"]
    return device["name"] if is_gpu(content) else ", ".join([device["name"], *words.threads(device.get("threads"))])


def shortfall(content: dict) -> str | None:
    """In words, what keeps a run from being a whole one; None if nothing does."""
    own, lacking = content["sfr_kernels"], not_run(content)
    if own.get("complete"):
        return None
    if not own.get("cut"):
        return "INCOMPLETE: the run did not end; this is what it had."
    cases = ", ".join(f"{count} of {op}" for op, count in lacking.items())
    return f"CUT SHORT: the time was up before all cases were run. Not run: {cases or 'unknown'}."


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
