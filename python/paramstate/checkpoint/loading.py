"""``load``: the state of an optimizer from the file that ``save`` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from paramstate.errors import LoadError, listed
from paramstate.identified import IdentifiedOptimizer
from paramstate.loading.matching import LoadReport

from .container import read
from .content import by_position
from .encoding import decoded
from .saving import FORMAT, VERSION, require_ours


def load(
    opt: IdentifiedOptimizer,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    strict_names: bool = False,
    names: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load the state of an optimizer from a file that :func:`save` wrote.

    As ``opt.load_state_dict``, with the same matching by name, checks and report: the order of the model's attributes
    does not count, the file's IDs are taken over, and state goes to the device of its parameter. Nothing in the file is
    executed, so one of an unknown source is safe to load. It is mapped into memory; what was loaded is a copy.

    Args:
        opt: an ``Adam`` or ``AdamW`` of this package.
        path: the file.
        strict: refuse what is missing, unexpected or reshaped, as ``load_state_dict`` does.
        strict_names: refuse to match by position.
        names: saved name to our name, for parameters that were renamed.

    Returns:
        LoadReport: what was matched, and how.

    Raises:
        LoadError: it is no such file, damaged, or of a later version, and then the message names the path; or it does
            not fit the optimizer. Nothing is changed.
        TypeError: it is an optimizer of another kind.
        OSError: the file cannot be opened.

    Example:
        >>> import os, tempfile, torch
        >>> from paramstate import AdamW, load, save
        >>> opt = AdamW(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "opt.safetensors")
        ...     save(opt, path)
        ...     report = load(AdamW(torch.nn.Linear(2, 1, bias=False)), path, strict=False)
        >>> report.matched_by, report.loaded, report.unexpected
        ('name', ['weight'], ['bias'])
    """
    require_ours(opt, "load")
    return opt.load_state_dict(state_dict_at(Path(path)), strict=strict, strict_names=strict_names, names=names)


def state_dict_at(path: Path) -> dict[str, Any]:
    """The state dict in a file, its tensors of parameters over memory that the file is mapped to.

    Raises:
        LoadError: it is not one that :func:`save` wrote, or damaged, or of a later version.
        OSError: it cannot be opened.
    """
    tensors, metadata = read(path)
    if metadata.get("format") != FORMAT:
        raise LoadError(
            f"{path}: its metadata says format {metadata.get('format')!r}, a file that paramstate.save wrote says "
            f"{FORMAT!r}; what others wrote is read by what wrote it, and goes into opt.load_state_dict(...)"
        )
    try:
        version = int(metadata["version"])
        if version <= VERSION:
            return _state_dict(metadata["content"], tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # RecursionError is one
        raise LoadError(f"{path}: is damaged ({error!r}); give a file as paramstate.save wrote it") from error
    raise LoadError(
        f"{path}: has version {version} of the format, this release reads up to {VERSION}; update paramstate"
    )


def _state_dict(content: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state_dict = by_position(decoded(json.loads(content), tensors))
    if tensors:
        raise ValueError(f"tensors that nothing refers to: {listed(list(tensors))}")
    return state_dict
