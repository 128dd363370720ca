"""What the user told pip about where packages come from, in the words that uv understands.

uv does not read pip's configuration. Somebody behind a mirror has usually set up pip only, so its settings are handed
on as environment variables. Settings made for uv win: where there are any, nothing about indexes is handed on.
"""

from __future__ import annotations

import ast
import os
import ssl
import subprocess
import sys
from pathlib import Path

PIP_SECTIONS = ("global", "install", ":env:")  # a later one overrides an earlier one
UV_INDEX_VARIABLES = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_NO_INDEX",
    "UV_CONFIG_FILE",
)
UV_FILES = (Path("~/.config/uv/uv.toml"), Path("/etc/uv/uv.toml"))


def pip_settings() -> dict[str, list[str]]:
    """What `pip install` would use, from pip's files and environment variables; empty where pip is missing."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    sections: dict[str, dict[str, list[str]]] = {section: {} for section in PIP_SECTIONS}
    for line in shown.stdout.splitlines():
        key, separator, quoted = line.partition("=")
        section, _, name = key.strip().rpartition(".")
        if separator and section in sections:
            sections[section][name] = str(ast.literal_eval(quoted)).split()
    return {name: value for section in sections.values() for name, value in section.items()}


def index_variables(settings: dict[str, list[str]]) -> dict[str, str]:
    """The variables in which uv takes indexes and folders of wheels."""
    variables: dict[str, str] = {}
    if settings.get("index-url"):
        variables["UV_DEFAULT_INDEX"] = settings["index-url"][0]
    if settings.get("extra-index-url"):
        variables["UV_INDEX"] = " ".join(settings["extra-index-url"])
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip takes the best version of all its indexes
    if settings.get("find-links"):
        variables["UV_FIND_LINKS"] = ",".join(settings["find-links"])
    if settings.get("no-index", ["false"])[0].lower() in {"1", "true", "yes", "on"}:
        variables["UV_NO_INDEX"] = "1"
    if settings.get("trusted-host"):
        variables["UV_INSECURE_HOST"] = " ".join(settings["trusted-host"])
    return variables


def system_has_certificates() -> bool:
    """Whether there is a store of certificates to use; a small Linux image may have none."""
    if not sys.platform.startswith("linux"):
        return True
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile) or bool(paths.capath and any(Path(paths.capath).iterdir()))


def as_uv_environment() -> dict[str, str]:
    """Environment variables to add, none of which the user has set."""
    settings = pip_settings()
    by_variable = any(name in os.environ for name in UV_INDEX_VARIABLES)
    by_file = any(path.expanduser().exists() for path in UV_FILES)
    variables = {} if by_variable or by_file else index_variables(settings)
    if system_has_certificates():
        # As pip does: a company's own certificate is usually installed there. Two names, for newer and older uv.
        variables["UV_SYSTEM_CERTS"] = variables["UV_NATIVE_TLS"] = "1"
    if settings.get("cert"):
        variables["SSL_CERT_FILE"] = settings["cert"][0]
    if settings.get("proxy"):
        variables["ALL_PROXY"] = settings["proxy"][0]
    return {name: value for name, value in variables.items() if name not in os.environ}
