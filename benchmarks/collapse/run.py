"""Runs jobs side by side, one process each, and keeps every result in a file as it ends; started again, it goes on."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from sfr_kernels.atomic import write_atomically

from ..machine import described


def results_of(path: Path) -> list[dict]:
    """The results in a file, each a job and what came of it. Before those of a start stands where it ran."""
    return [line for line in map(json.loads, _whole_lines(path)) if "device" not in line]


def _whole_lines(path: Path) -> list[str]:
    """Without a last one that was cut short."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def run(path: Path, folder: Path, jobs: Sequence[dict], work: Callable[[Path, dict], dict], workers: int) -> list[dict]:
    """The results of all jobs, in their order. `work`, a function of a module, is given the folder of what is kept.
    RuntimeError for a job that failed, once the others have ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {_key(job, result): result for job in jobs[:1] for result in results_of(path)}
    write_atomically(path, "".join(f"{line}\n" for line in _whole_lines(path)).encode())
    todo, failed = [job for job in jobs if _key(job, job) not in done], []
    threads = max(torch.get_num_threads() // workers, 1)
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (threads,)) as pool,
        path.open("a") as out,
    ):
        if todo:
            print(json.dumps(described(_device())), file=out, flush=True)
        running = {pool.submit(work, folder, job): job for job in todo}
        try:
            for future in tqdm(as_completed(running), total=len(running), desc=path.stem):
                job = running[future]
                if error := future.exception():
                    failed.append((job, error))
                    continue
                done[_key(job, job)] = result = job | future.result()
                print(json.dumps(result), file=out, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun
            raise
    if failed:
        job, error = failed[0]
        raise RuntimeError(f"{len(failed)} of {len(todo)} jobs failed, the first {job}: {error}") from error
    return [done[_key(job, job)] for job in jobs]


def _key(job: dict, result: dict) -> tuple:
    return tuple(result.get(name) for name in job)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
