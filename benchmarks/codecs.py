"""What each wire codec weighs, loses and takes: a Gaussian change with the shapes of a model of 7 billion parameters.

The shapes are those of LoRA of rank 16 on all linear layers of a Llama. A real change is less even than a Gaussian one.

python benchmarks/codecs.py [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiary.config import loading
from apiary.core.tensors import StateDict, generator
from apiary.tracking import environment
from apiary.transport.codec import decode, encode, shapes_of
from apiary.transport.codecs import CODECS

RESULTS = Path(__file__).parent / "results" / "codecs.json"
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp32", {}),
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"rounding": "nearest"}),
    ("int4", {}),
    ("int4", {"rounding": "stochastic", "feedback": False}),
    ("topk", {}),
    ("topk", {"share": 0.1}),
)


def change(layers: int, rank: int = 16, hidden: int = 4096, inner: int = 11008) -> dict[str, Tensor]:
    """A Gaussian change of so many layers."""
    rng = generator(0, "codecs")
    shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden)) | dict.fromkeys(("gate", "up"), (inner, hidden))
    shapes |= {"down": (hidden, inner)}
    made = {}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            made[f"{layer}.{name}.lora_A.weight"] = 1e-3 * torch.randn(rank, d_in, generator=rng)
            made[f"{layer}.{name}.lora_B.weight"] = 1e-3 * torch.randn(d_out, rank, generator=rng)
    return made


def measure(name: str, options: dict[str, Any], delta: StateDict) -> dict[str, Any]:
    """One codec: bytes of a message, its relative squared error, and seconds of both ways."""
    codec = CODECS.build(name, options)
    began = time.perf_counter()
    message, _ = encode(delta, codec, {}, generator(1))
    encoded = time.perf_counter()
    back = decode(message, codec, shapes_of(delta))
    decoded = time.perf_counter()
    lost = sum(float((back[n].double() - t.double()).square().sum()) for n, t in delta.items())
    whole = sum(float(t.double().square().sum()) for t in delta.values())
    return {
        "codec": name,
        "options": options,
        "bytes": len(message),
        "error": lost / whole,
        "encode_s": round(encoded - began, 2),
        "decode_s": round(decoded - encoded, 2),
    }


def main() -> None:
    """Measure all codecs on one thread and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    delta = change(args.layers)
    entries = sum(tensor.numel() for tensor in delta.values())
    facts = environment.start_fields(loading.load(None, []))
    found = {
        "machine": facts["machine"],
        "versions": facts["versions"],
        "layers": args.layers,
        "entries": entries,
        "rows": [measure(name, options, delta) for name, options in WAYS],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
