"""Whether what was written says what the run's model says: read again by other code, and its logits compared.

A PEFT folder is read by plain peft, a merged model by plain Transformers, a GGUF model by Transformers' reader of GGUF
files, each on a base that is read anew; the factors in a GGUF adapter are put back into the run's own model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from apiary.core import lora
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict, generator
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.export import gguf_files
from apiary.export.tuned import Tuned
from apiary.models import adapters, base
from apiary.models.adapter_files import Written
from apiary.models.adapters import LanguageModel

EXACT = 1e-4  # of the largest logit: sums of float32 in another order
_ROUGH = 5e-2  # where the base itself computes in fewer bits
_QUESTIONS = (
    "Name the largest planet.",
    "Sort these words from A to Z: river, candle, anchor.",
    "What is 17 + 25?\n\nAnswer with the number alone.",
)
_ROWS, _LENGTH = 4, 32  # of random tokens


class Compared(NamedTuple):
    """How far two models' logits are apart on the same tokens."""

    what: str
    largest: float  # difference of two logits
    top: float  # the largest logit
    tolerance: float  # of `largest`, as a share of `top`

    @property
    def equal(self) -> bool:
        """Whether they are as near as rounding lets them be; a logit that is no number is never near."""
        return self.largest <= self.tolerance * self.top

    @property
    def words(self) -> str:
        """One line for people."""
        kept = f"{self.what}: largest difference of logits {self.largest:.2g}"
        return f"{kept}, allowed {self.tolerance * self.top:.2g} ({self.tolerance:g} of the largest logit)"


def prompts(tuned: Tuned) -> list[list[int]]:
    """Fixed token ids: random ones of the whole vocabulary, and a few questions as the run's template writes them."""
    tokenizer = tuned.lm.tokenizer
    ids = torch.randint(0, len(tokenizer), (_ROWS, _LENGTH), generator=generator(0, "export", "check"))
    asked = [Example((Turn("user", text), Turn("assistant", "")), {}) for text in _QUESTIONS]
    limit = tuned.config.prompt.max_tokens
    return [*ids.tolist(), *(tokenization.encode_prompt(e, tuned.template, tokenizer, limit) for e in asked)]


def logits(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """The logits (length, vocabulary) of each row by itself, float32 on the CPU."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]


def own_logits(lm: LanguageModel, state: StateDict, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the run's own model says with a state as `set_adapter` takes it."""
    adapters.set_adapter(lm, state)
    with adapters.autocast(lm):
        return logits(lm.model, rows, lm.device)


def state_of(lm: LanguageModel, written: Written) -> dict[str, Tensor]:
    """An adapter of any rank and scale as a state of the model: what its rank cannot hold is added to the base."""
    adapter, added = {}, {}
    for module, (b, a) in lora.split(written.factors).items():
        adapter[module] = lora.resize(Factors(b * (written.scale / lm.scale), a), lm.rank)
        if len(a) > lm.rank:
            added[module] = Factors(b[:, lm.rank :] * written.scale, a[lm.rank :])
    return lora.whole(lora.join(adapter), lora.join(added))


def compare(what: str, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Compared:
    """The largest difference between the logits of two models on the same rows."""
    apart = [(x - y).abs().max() for x, y in zip(expected, found, strict=True)]
    return Compared(what, float(torch.stack(apart).max()), max(float(x.abs().max()) for x in expected), tolerance)


def adapter_folder(tuned: Tuned, folder: Path, expected: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Compared:
    """The PEFT folder on a plain base, by plain peft."""
    lm = tuned.lm
    plain: Any
    if (folder / "base").is_dir():
        plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=lm.dtype)
        plain = plain.to(lm.device)
    else:
        plain = base.read(tuned.config.model).model
    with adapters.quiet_peft():
        model = PeftModel.from_pretrained(plain, folder).eval()
    tolerance = EXACT if lm.dtype is torch.float32 and tuned.config.model.quantization == "none" else _ROUGH
    return compare("adapter read by plain peft", expected, logits(model, rows, lm.device), tolerance)


def merged_folder(folder: Path, expected: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Compared:
    """The merged model by plain Transformers, in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = logits(model, rows, torch.device("cpu"))
    return compare("merged model read by plain Transformers", expected, found, EXACT)


def gguf_adapter(lm: LanguageModel, file: Path, expected: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Compared:
    """The factors in a GGUF adapter, in the run's own model."""
    modules = sorted({name.partition(".lora_")[0] for name in lm.adapter})
    factors = gguf_files.read_adapter(file, modules, lm.model.get_base_model().config)
    rank = max(f.rank for f in factors.values())
    found = own_logits(lm, state_of(lm, Written(lora.join(factors), rank, rank, rslora=False)), rows)
    return compare("GGUF adapter read back", expected, found, EXACT)


def gguf_model(
    file: Path, kind: str, expected: Sequence[Tensor], rows: Sequence[Sequence[int]]
) -> tuple[Compared, Compared]:
    """A GGUF model by Transformers' reader, beside the merged model in its folder with its matrices rounded alike.

    With it what the rounding itself does to the logits, which is no fault.
    """
    cpu = torch.device("cpu")
    merged: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32).eval()
    gguf_files.round_matrices(merged, kind)
    rounded = logits(merged, rows, cpu)
    found = logits(read_gguf(file), rows, cpu)
    return (
        compare(f"GGUF model ({kind}) read by Transformers", rounded, found, EXACT),
        compare(f"rounding to {kind}", expected, rounded, float("inf")),
    )


def read_gguf(file: Path) -> nn.Module:
    """The model in a GGUF file as Transformers reads it, with the configuration in its folder.

    The reader takes from the file neither biases nor how positions are scaled, and knows Mistral as a Llama.
    """
    config = AutoConfig.from_pretrained(file.parent)
    if config.model_type == "mistral":
        config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    options: dict[str, Any] = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    return model
