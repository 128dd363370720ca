"""Train in every precision of values and state, and see whether the result is that of float32: `fidelity.py`.

Each run goes to `benches/results/fidelity.jsonl` when it is done; from all of them come the tables of
`docs/fidelity.md` and its pictures. `--resume` goes on where the last call was interrupted. `make fidelity` calls it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import paramstate
from fidelity_report import show, write
from fidelity_training import ROWS, SEEDS, Results, Run, run

RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"

Key = tuple[str, str, int]
"""The names of task and row, and the seed."""


def versions() -> dict[str, str]:
    """Name what the numbers depend on."""
    return {
        "Python": platform.python_version(),
        "torch": str(torch.__version__).partition("+")[0],
        "paramstate": paramstate.__version__,
    }


def train_all(done: dict[Key, Run], console: Console, processes: int | None) -> None:
    """Train every row with every seed that is not done, as many at a time as there are cores, on one thread each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
    ):
        jobs: dict[Future[Run], tuple[Key, TaskID]] = {}
        for task, settings in ROWS.items():
            keys = {(task.name, setting.name, seed): setting for seed in range(SEEDS) for setting in settings}
            missing = {key: setting for key, setting in keys.items() if key not in done}
            bar = progress.add_task(task.title, total=len(keys), completed=len(keys) - len(missing))
            jobs |= {pool.submit(run, task, setting, key[2]): (key, bar) for key, setting in missing.items()}
        for job in as_completed(jobs):
            key, bar = jobs[job]
            done[key] = job.result()
            keep(key, done[key])
            progress.advance(bar)


def keep(key: Key, run: Run) -> None:
    """Append one run to the file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "run": dataclasses.asdict(run), "versions": versions()}) + "\n")


def kept() -> dict[Key, Run]:
    """Read back what was made with these versions."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    read = [json.loads(line) for line in lines]
    return {tuple(line["key"]): Run(**line["run"]) for line in read if line["versions"] == versions()}


def in_order(done: dict[Key, Run]) -> Results:
    """Set the runs into their rows, by seed."""
    return {
        task: {setting: [done[task.name, setting.name, seed] for seed in range(SEEDS)] for setting in settings}
        for task, settings in ROWS.items()
    }


def main() -> None:
    """Train, report."""
    parser = argparse.ArgumentParser(description="Train in every precision of values and state.")
    parser.add_argument("--resume", action="store_true", help="keep the runs of the last call")
    parser.add_argument("--processes", type=int, help="runs at a time; by default as many as there are cores")
    given = parser.parse_args()
    console = Console()
    if not given.resume:
        RESULTS.unlink(missing_ok=True)
    done = kept()
    train_all(done, console, given.processes)
    results = in_order(done)
    show(results, console)
    document = write(results, versions())
    console.print("all numbers, and the document with its pictures:")
    for path in (RESULTS, document):
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main()
