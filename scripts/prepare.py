"""Make the environment of the checkout: `prepare.py dependencies`, then `prepare.py build`.

`prepare.py oldest` makes a second one, in which the wheel stands beside the oldest releases that are supported, and
`prepare.py peers` a third, with the optimizers of others that the benchmark compares with.

Needs nothing but Python's standard library, since it runs before anything is installed. `make` calls it; both commands
are safe to repeat.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pip_settings import as_uv_environment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
VENV = ROOT / ".venv"
OLDEST_VENV = ROOT / ".venv-oldest"
PRIVATE_UV = ROOT / ".venv-uv"
WHEELS = ROOT / "dist" / "oldest"
OLDEST_PYTHON = (3, 10)
OLDEST_RELEASES = ("torch==2.10.*", "numpy==2.0.*", "safetensors==0.6.*")
WHEEL_TAG = "-cp310-abi3-"
PEERS_VENV = ROOT / ".venv-peers"
NOT_INSTALLED = PEERS_VENV / "not-installed.json"  # peer to reason, for the benchmark's table
PEERS = {
    "torch-optimi": ("torch-optimi",),
    "torchao": ("torchao",),
    "bitsandbytes": ("bitsandbytes",),
    "deepspeed": ("deepspeed", "ninja"),  # ninja compiles its step when it is first used
}


class MissingError(Exception):
    """Something that this script cannot install itself; the text says what to install."""


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command, shown before it starts; its failure ends this script with the same status."""
    print("+", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def importable(module: str) -> bool:
    """Whether this interpreter can import a module, asked in a new process so that nothing stays loaded here."""
    probe = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False)
    return probe.returncode == 0


def bootstrap_uv() -> Path:
    """Install uv into a private folder of the checkout, with whatever this Python offers."""
    if importable("venv, ensurepip"):
        run(sys.executable, "-m", "venv", "--clear", PRIVATE_UV)
        run(PRIVATE_UV / SCRIPTS / "python", "-m", "pip", "install", "--quiet", "uv")
    elif importable("pip"):
        run(sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", PRIVATE_UV, "uv")
    else:
        msg = (
            f"uv is not installed, and {sys.executable} has neither `ensurepip` nor `pip` to fetch it with.\n"
            "Install one of them (Debian, Ubuntu: apt install python3-venv; Fedora: dnf install python3-pip) "
            "or uv itself, then try again."
        )
        raise MissingError(msg)
    return PRIVATE_UV / SCRIPTS / "uv"


def find_uv() -> Path:
    """The user's uv if there is one that runs, else the checkout's own."""
    for candidate in (shutil.which("uv"), shutil.which("uv", path=str(PRIVATE_UV / SCRIPTS))):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return Path(candidate)
    return bootstrap_uv()


def environment() -> dict[str, str]:
    """The variables that uv and maturin run under: the user's, and what the user told pip about indexes."""
    return {"UV_NO_PROGRESS": "1", **os.environ, **as_uv_environment(), "VIRTUAL_ENV": str(VENV)}


def oldest_rust() -> str:
    """The version that the workspace asks for."""
    manifest = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    stated = re.search(r'^rust-version = "(\d+\.\d+)', manifest, re.MULTILINE)
    if stated is None:
        msg = "Cargo.toml states no rust-version"
        raise MissingError(msg)
    return stated[1]


def check_rust() -> None:
    """Refuse early, and by name, what the build would otherwise fail on with a long log."""
    wanted = oldest_rust()
    cargo = shutil.which("cargo")
    if cargo is None:
        msg = (
            f"cargo is not on PATH. paramstate's core is written in Rust: install Rust {wanted} or later "
            "(rustup is the usual way, and needs no root), open a new shell, and try again."
        )
        raise MissingError(msg)
    shown = subprocess.run([cargo, "--version"], capture_output=True, text=True, check=False, cwd=ROOT)
    found = re.match(r"cargo (\d+)\.(\d+)", shown.stdout)
    if found is None:
        msg = f"`{cargo} --version` failed; the Rust toolchain is not usable:\n{shown.stderr.strip()}"
        raise MissingError(msg)
    if tuple(map(int, found.groups())) < tuple(map(int, wanted.split("."))):
        msg = f"{shown.stdout.strip()} is too old: paramstate needs Rust {wanted} or later (`rustup update stable`)."
        raise MissingError(msg)


def dependencies() -> None:
    """Make `.venv` with this interpreter and install everything the checkout's commands use."""
    uv = find_uv()
    env = environment()
    python = VENV / SCRIPTS / "python"
    if not python.exists():
        run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, VENV, env=env)
    groups = ("--requirement", "pyproject.toml", "--extra", "torch", "--group", "dev")
    run(uv, "pip", "install", "--python", python, *groups, env=env)


def build() -> None:
    """Compile the extension in release mode into the checkout, so that tests use the checkout's Python files."""
    check_rust()
    env = environment()
    env["PATH"] = os.pathsep.join([str(VENV / SCRIPTS), env.get("PATH", "")])
    install = (find_uv(), "pip", "install", "--python", VENV / SCRIPTS / "python")
    run(*install, "--no-deps", "--no-build-isolation", "--reinstall-package", "paramstate", "--editable", ".", env=env)


def oldest_python(uv: Path) -> str:
    """The oldest supported Python if there is one on this machine, else the one that runs this script."""
    wanted, own = ".".join(map(str, OLDEST_PYTHON)), f"{sys.version_info.major}.{sys.version_info.minor}"
    # pyenv shows only the versions that it is told of; without it the variable means nothing.
    for env in (None, {**os.environ, "PYENV_VERSION": f"{own}:{wanted}"}):
        found = subprocess.run([uv, "python", "find", wanted], capture_output=True, text=True, check=False, env=env)
        if found.returncode == 0:
            return found.stdout.strip()
    print(f"no Python {wanted} here: its wheel is tried on {sys.version.split()[0]}", flush=True)
    return sys.executable


def wheel() -> Path:
    """Build the wheel and check that its tag admits the oldest supported Python."""
    check_rust()
    shutil.rmtree(WHEELS, ignore_errors=True)
    run(VENV / SCRIPTS / "maturin", "build", "--release", "--out", WHEELS, env=environment())
    (built,) = WHEELS.glob("*.whl")
    if WHEEL_TAG not in built.name:
        msg = f"{built.name} does not carry the tag {WHEEL_TAG.strip('-')}: it would not install on the oldest Python"
        raise MissingError(msg)
    return built


def oldest() -> None:
    """Make `.venv-oldest`: the wheel with what it asks for, in the oldest releases that are supported."""
    uv = find_uv()
    env = {**environment(), "VIRTUAL_ENV": str(OLDEST_VENV)}
    python = OLDEST_VENV / SCRIPTS / "python"
    run(uv, "venv", "--quiet", "--clear", "--python", oldest_python(uv), OLDEST_VENV, env=env)
    run(uv, "pip", "install", "--python", python, f"{wheel()}[torch]", *OLDEST_RELEASES, "--group", "test", env=env)


def try_to_install(uv: Path, requirements: tuple[str, ...], env: dict[str, str]) -> str:
    """Install what may not be to be had here; returns what was in the way, nothing if nothing was."""
    # Without isolation: an sdist that asks for torch while it is built then finds the one that is here.
    install = (str(uv), "pip", "install", "--no-build-isolation", "--python", str(PEERS_VENV / SCRIPTS / "python"))
    print("+", *install, *requirements, flush=True)
    done = subprocess.run([*install, *requirements], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    print(done.stderr, flush=True)
    lines = [line.strip(" ×│╰─▶") for line in done.stderr.splitlines()]
    return next((line for line in lines if line), f"exit status {done.returncode}")


def peers() -> None:
    """Make `.venv-peers`: torch, and each optimizer of others that can be installed here; the rest is written down."""
    uv = find_uv()
    env = {**environment(), "VIRTUAL_ENV": str(PEERS_VENV), "DS_BUILD_OPS": "0"}
    python = PEERS_VENV / SCRIPTS / "python"
    run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, PEERS_VENV, env=env)
    project = ("--requirement", "pyproject.toml", "--extra", "torch", "--group", "bench")
    run(uv, "pip", "install", "--python", python, *project, "setuptools", "wheel", env=env)
    failed = {name: try_to_install(uv, requirements, env) for name, requirements in PEERS.items()}
    NOT_INSTALLED.write_text(json.dumps({name: why for name, why in failed.items() if why}, indent=1) + "\n")
    (site,) = (PEERS_VENV / "lib").glob("python*/site-packages")
    (site / "paramstate.pth").write_text(f"{ROOT / 'python'}\n")


COMMANDS = {"dependencies": dependencies, "build": build, "check-rust": check_rust, "oldest": oldest, "peers": peers}


def main() -> None:
    """Run the command named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"usage: prepare.py {' | '.join(COMMANDS)}")
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(f"Python {sys.version.split()[0]} is too old: paramstate needs Python 3.10 or later.")
    try:
        COMMANDS[sys.argv[1]]()
    except MissingError as missing:
        raise SystemExit(f"\nerror: {missing}") from None


if __name__ == "__main__":
    main()
