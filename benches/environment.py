"""Where the numbers come from: the machine, and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import paramstate
import peers
from scale import ROUNDS, WARM_UPS


def value_in(path: str, key: str) -> str:
    """The first value of a key in one of the system's files; nothing where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def processor() -> str:
    """Name the processor as the system does."""
    return value_in("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def memory() -> str:
    """How much memory the machine has."""
    kibibytes = value_in("/proc/meminfo", "MemTotal").removesuffix(" kB")
    return f"{int(kibibytes) / (1 << 20):.1f} GiB" if kibibytes else "unknown"


def rustc() -> str:
    """The compiler's version."""
    try:
        shown = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return shown.split()[1]


def environment() -> dict[str, str]:
    """Machine, versions and method, to be read by people."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "memory": memory(),
        "system": platform.system(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "rustc": rustc(),
        "paramstate": paramstate.__version__,
        **peers.versions(),
        "rounds": f"{ROUNDS} after {WARM_UPS} warm-ups",
    }
