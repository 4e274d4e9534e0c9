"""Model weights as JSON lines, for places that carry text files only (a Flower app bundle is one).

One line a tensor: name, shape, dtype, sha256 of the raw bytes, and the data: bfloat16 bytes split
into a plane of high bytes and a plane of low bytes (signs and exponents repeat, mantissas do
not), deflated, then written in base 85.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields one JSON line for each tensor, rounded to bfloat16."""
    import torch

    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        planes = raw[1::2] + raw[0::2]
        line = {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(raw).hexdigest(),
            "data": base64.b85encode(zlib.compress(planes, 9)).decode("ascii"),
        }
        yield json.dumps(line)


def unpack(lines: Iterable[str]) -> dict[str, Tensor]:
    """Returns the tensors of `pack`'s lines in float32.

    Raises:
        ValueError: if a tensor's bytes do not have the sum written beside them.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for line in lines:
        entry = json.loads(line)
        planes = zlib.decompress(base64.b85decode(entry["data"]))
        raw, half = bytearray(len(planes)), len(planes) // 2
        raw[1::2], raw[0::2] = planes[:half], planes[half:]
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            damage = f"tensor {entry['name']}: sha256 differs from the one written beside it"
            raise ValueError(f"{damage}; the package is damaged, install it again")
        flat = torch.frombuffer(raw, dtype=torch.bfloat16)
        tensors[entry["name"]] = flat.reshape(entry["shape"]).to(torch.float32)
    return tensors
