"""Count each kernel's instructions and compare with the record: `instructions.py [--record] [KERNEL ...]`.

Runs `rust/core/examples/instructions.rs` under valgrind's callgrind, which counts instructions, not seconds: the same
program gives the same counts however busy the machine is. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benches" / "instructions.json"
GREATEST_GROWTH = 0.02
CALLGRIND = ("valgrind", "--tool=callgrind", "--toggle-collect=*counted*", f"--callgrind-out-file={os.devnull}")
COLLECTED = re.compile(r"Collected : (\d+)")


@dataclass(frozen=True)
class Program:
    """The built example: where it is, what it can run, on how many elements and with which instruction set."""

    path: Path
    elements: int
    isa: str
    kernels: tuple[str, ...]


def output(*command: str | Path) -> str:
    """What a command prints; its failure ends this script with what it said."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(str(part) for part in command)}\n{done.stderr}")
    return done.stdout


def build() -> Program:
    """Build the example and ask it, under valgrind's own idea of the processor, what it has."""
    built = output("cargo", "build", "--quiet", "--release", "--package", "paramstate", "--example", "instructions",
                   "--message-format", "json")  # fmt: skip
    paths = [json.loads(line).get("executable") for line in built.splitlines() if line.startswith("{")]
    path = Path(next(path for path in paths if path))
    head, *kernels = output("valgrind", "--quiet", "--tool=none", path).splitlines()
    elements, isa = head.split(" elements on ")
    return Program(path, int(elements), isa, tuple(kernels))


def count(program: Program, kernel: str) -> int:
    """Instructions of one run of a kernel."""
    done = subprocess.run([*CALLGRIND, program.path, kernel], capture_output=True, text=True, check=False)
    collected = COLLECTED.search(done.stderr)
    if done.returncode or collected is None or not int(collected[1]):
        raise SystemExit(f"error: {kernel} could not be counted:\n{done.stderr}")
    return int(collected[1])


def count_all(program: Program, kernels: list[str]) -> dict[str, float]:
    """Instructions per element of each kernel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(lambda kernel: count(program, kernel), kernels))
    return {kernel: round(found / program.elements, 4) for kernel, found in zip(kernels, counts, strict=True)}


def compare(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """Print a table; returns the kernels that grew too much."""
    width = max(map(len, found))
    print(f"{'instructions per element':{width}}  recorded     found   change")
    grown = []
    for kernel, number in found.items():
        before = recorded.get(kernel)
        if before is None:
            print(f"{kernel:{width}}  {'-':>8}  {number:8.4f}   not on record")
            continue
        change = number / before - 1
        verdict = "grew" if change > GREATEST_GROWTH else ""
        print(f"{kernel:{width}}  {before:8.4f}  {number:8.4f}  {change:+7.2%}  {verdict}".rstrip())
        if verdict:
            grown.append(kernel)
    return grown


def check(found: dict[str, float], here: dict[str, str]) -> None:
    """Compare with the record, and fail where a kernel grew or has no count there."""
    if not RECORD.exists():
        raise SystemExit(f"error: {RECORD.relative_to(ROOT)} is missing: `make instructions RECORD=1` writes it")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["isa"] != here["isa"]:
        raise SystemExit(f"error: recorded for {record['isa']}, but valgrind runs {here['isa']} here: not comparable")
    grown = compare(found, record["per_element"])
    if record["rustc"] != here["rustc"]:
        print(f"recorded with {record['rustc']}, found with {here['rustc']}: a difference may be the compiler's")
    missing = [kernel for kernel in found if kernel not in record["per_element"]]
    if grown or missing:
        what = [f"grew by more than {GREATEST_GROWTH:.0%}: {', '.join(grown)}"] * bool(grown)
        what += [f"not on record: {', '.join(missing)}"] * bool(missing)
        raise SystemExit(f"error: {'; '.join(what)}. If that is wanted: make instructions RECORD=1")


def main() -> None:
    """Build, count, then record or compare."""
    parser = argparse.ArgumentParser(description="instructions per element of each kernel")
    parser.add_argument("--record", action="store_true", help="write the counts instead of comparing")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="parts of names; all without any")
    asked = parser.parse_args()
    if shutil.which("valgrind") is None:
        raise SystemExit("error: valgrind is missing. Install it (Debian, Ubuntu: apt install valgrind).")
    program = build()
    kernels = [name for name in program.kernels if not asked.kernels or any(part in name for part in asked.kernels)]
    if not kernels:
        raise SystemExit(f"error: no such kernel. There are: {', '.join(program.kernels)}")
    found = count_all(program, kernels)
    here = {"rustc": " ".join(output("rustc", "--version").split()[:2]), "isa": program.isa}
    if not asked.record:
        check(found, here)
        return
    old = json.loads(RECORD.read_text(encoding="utf-8"))["per_element"] if RECORD.exists() else {}
    compare(found, old)
    kept = {name: number for name, number in old.items() if name in program.kernels}
    per_element = {name: found.get(name, kept.get(name)) for name in program.kernels if name in {**kept, **found}}
    content = {**here, "elements": program.elements, "per_element": per_element}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
