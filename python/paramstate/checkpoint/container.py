"""The bytes of a safetensors file: written tensor by tensor, read through the ``safetensors`` package.

That package's own writer wants all tensors contiguous and on the host at once, refuses those that share memory, as the
learning rate of two groups may, and, since 0.8, leaves a file that only its owner may read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from paramstate.errors import LoadError, SaveError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the package reads into torch's tensors."""
_COMPLEX = {torch.complex128, torch.complex64}
_LONGEST_HEADER = 100_000_000
"""In bytes: what the package reads."""
_METADATA = "__metadata__"


def obstacle(tensor: Tensor) -> str | None:
    """Why a tensor cannot be written, and what to do about it; ``None`` where it can, a complex one in its parts."""
    if type(tensor) not in {Tensor, nn.Parameter}:
        return f"is a {type(tensor).__name__}; put the ordinary tensor there that it stands for"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; put tensor.to_dense() there"
    if tensor.is_meta:
        return "is on the meta device, which keeps no values; materialize it"
    if tensor.dtype not in _DTYPES and tensor.dtype not in _COMPLEX:
        return f"has dtype {tensor.dtype}, which the format lacks; convert it"
    return None


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file. The same tensors and metadata give the same bytes.

    Args:
        file: open for writing.
        tensors: by their keys; none of them is complex or has an :func:`obstacle`.
        metadata: what stands beside them.

    Raises:
        SaveError: there are too many tensors for one file. Nothing is written.
    """
    # From wide to narrow elements, so that each tensor is aligned and can be used where it is mapped.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise SaveError(
            f"the names and settings of {len(ordered)} tensors take {len(text)} bytes, a safetensors file holds "
            f"{_LONGEST_HEADER} of them; train with several optimizers, or save opt.state_dict() with torch.save"
        )
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in ordered:
        file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    dense = tensor.detach().resolve_neg().cpu().contiguous()
    # Not `reshape(-1)`: that leaves a single element the stride it has, and then it cannot be viewed as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, over memory that it is mapped to, and the metadata. Nothing in the file is executed.

    Raises:
        LoadError: it is no safetensors file, or not a whole one.
        OSError: it cannot be opened.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ImportError("paramstate.load needs safetensors: pip install 'paramstate[torch]'") from error
    with path.open("rb") as file:  # an error of the system's is then Python's own, and names the path
        begin, size = file.read(9), os.fstat(file.fileno()).st_size
    try:
        with safe_open(str(path), framework="pt") as mapped:
            return {key: mapped.get_tensor(key) for key in mapped.keys()}, mapped.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        what = "is damaged, or only the beginning of a file" if begin[8:] == b"{" else "is no safetensors file"
        raise LoadError(f"{path}: {what} ({size} bytes; {error}); give a file that paramstate.save wrote") from error
