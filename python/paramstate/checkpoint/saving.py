"""``save``: the state of an optimizer in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from paramstate.identified import IdentifiedOptimizer

from .container import write
from .content import by_name
from .encoding import Encoder
from .replacement import replacing

FORMAT = "paramstate.optimizer"
VERSION = 1


def save(opt: IdentifiedOptimizer, path: str | os.PathLike[str]) -> None:
    """Write the state of an optimizer to one safetensors file, under the names of its parameters.

    The file holds what ``opt.state_dict(compact=True)`` does: moments and steps, bit for bit and in their dtypes, IDs,
    the options of the groups, and what was declared (constraints, frozen parameters and rows, steps of rows, state
    dtypes). The same state gives the same bytes. A constraint that is a function is not saved; the report of a load
    names it.

    The file appears under its name at once, when it is whole and on the disk: after an error, or a crash, what was
    there before is there still. Threads that step this optimizer wait meanwhile.

    Args:
        opt: an ``Adam`` or ``AdamW`` of this package.
        path: where; the folder must exist, a file there is replaced. It gets the permissions of any new file.

    Raises:
        SaveError: the optimizer holds what a file cannot; the message names the parameter or group, and the key.
        TypeError: it is an optimizer of another kind.
        KeyError: ``opt.state`` holds state of a tensor that is in no group.
        OSError: the system could not write.

    Example:
        >>> import os, tempfile, torch
        >>> from paramstate import AdamW, load, save
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = AdamW(model, lr=0.1)
        >>> opt.materialize_state()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "opt.safetensors")
        ...     save(opt, path)
        ...     load(AdamW(model), path).loaded
        ['weight', 'bias']
    """
    require_ours(opt, "save")
    with opt._lock:
        encoder = Encoder()
        content = {key: encoder.encoded(value, key) for key, value in by_name(opt.state_dict(compact=True)).items()}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "content": json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")),
        }
        with replacing(Path(path)) as file:
            write(file, encoder.tensors, metadata)


def require_ours(opt: object, function: str) -> None:
    """Refuse an optimizer that has no names and IDs.

    Raises:
        TypeError: it is one.
    """
    if not isinstance(opt, IdentifiedOptimizer):
        raise TypeError(
            f"{function} takes a paramstate.Adam or AdamW, got {type(opt).__module__}.{type(opt).__qualname__}; of a "
            "wrapper give the optimizer inside; torch's own state goes on in one of ours: "
            "paramstate.AdamW(model).load_state_dict(opt.state_dict())"
        )
