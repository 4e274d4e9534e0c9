"""What servers take of an adapter: its form, its rank, its names, and the commands that serve it.

Facts about servers are those of docs/serving.md, which names the source of each.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apiary.core import lora
from apiary.core.lora import Factors
from apiary.models.adapter_files import Written
from apiary.models.adapters import PREFIX

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
# Classes that vLLM serves, but without adapters.
_VLLM_WITHOUT_LORA = frozenset(
    {
        *("BloomForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM"),
        *("GPTNeoXForCausalLM", "Jais2ForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "MptForCausalLM"),
        *("OlmoeForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM"),
    }
)
_TGI_KINDS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_EXPERT = re.compile(r"\.\d+$")  # a module of ours for one expert


class Cut(NamedTuple):
    """What a lower rank costs, in the Frobenius norm of the products B A."""

    before: int
    rank: int
    error: float  # of all modules together, relative to their norm
    worst: float  # of the module that loses most
    module: str  # its name

    @property
    def words(self) -> str:
        """One line for people."""
        return (
            f"rank {self.before} was cut to {self.rank}: the adapter's products lose {100 * self.error:.2g}% "
            f"(relative Frobenius norm), those of {self.module.removeprefix(PREFIX)!r}, the worst module, "
            f"{100 * self.worst:.2g}%"
        )


def cut(written: Written, rank: int) -> tuple[Written, Cut | None]:
    """The adapter in a lower rank, and what that costs; the same one and None where its rank is no higher.

    Each module gets the best approximation of its product in the Frobenius norm (Eckart and Young 1936), computed in
    float64. The scale stays.
    """
    if written.rank <= rank:
        return written, None
    made: dict[str, Factors] = {}
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for module, factors in lora.split(written.factors).items():
        spectrum = lora.svd(Factors(factors.b.double(), factors.a.double()))
        b, a = lora.balanced(spectrum, rank)
        made[module] = Factors(b.float(), a.float())
        whole[module], lost[module] = float(spectrum.s.norm()), float(spectrum.s[rank:].norm())
    share = {module: lost[module] / whole[module] if whole[module] else 0.0 for module in made}
    worst = max(share, key=lambda module: share[module])
    total = math.hypot(*whole.values())
    error = math.hypot(*lost.values()) / total if total else 0.0
    alpha = written.scale * (math.sqrt(rank) if written.rslora else rank)
    narrow = Written(lora.join(made), rank, alpha, written.rslora)
    return narrow, Cut(written.rank, rank, error, share[worst], worst)


def plain_scale(written: Written) -> tuple[Written, str]:
    """The same products under the scale alpha / rank with a whole alpha, and a line about how.

    Servers that know no rsLoRA, as llama.cpp, divide alpha by the rank whatever the folder says. Where scale * rank is
    a whole number it becomes the alpha, and the factors stay as they are, bit for bit. Else alpha is the rank, and B
    takes the scale: rounded once, to float32.
    """
    alpha = written.scale * written.rank
    if round(alpha) >= 1 and math.isclose(alpha, round(alpha), rel_tol=1e-12):
        plain = written._replace(alpha=round(alpha), rslora=False)
        return plain, f"plain scale: lora_alpha = {plain.alpha}, r = {plain.rank}; the factors are as they were"
    scaled = {name: tensor * written.scale if lora.is_b(name) else tensor for name, tensor in written.factors.items()}
    plain = Written(scaled, written.rank, written.rank, rslora=False)
    return plain, f"plain scale: lora_alpha = r = {plain.rank}; the scale {written.scale:.6g} is in the factors B"


def remarks(base: PreTrainedModel, written: Written) -> list[str]:
    """A line for each server that cannot take this adapter, or would drop some of it in silence."""
    modules = [name.removesuffix(".lora_A.weight") for name in written.factors if name.endswith(".lora_A.weight")]
    kinds = {module.rpartition(".")[2] for module in modules if not _EXPERT.search(module)}
    kind = type(base).__name__
    experts = any(map(_EXPERT.search, modules))
    head = next((n for n, m in base.named_modules() if m is base.get_output_embeddings()), "")
    on_head = any(module.removeprefix(PREFIX) == head for module in modules)
    found = []
    if experts:
        found.append("the adapters of experts are in peft's own form, which no server takes for all models")
    elif any(isinstance(module, Conv1D) for module in base.modules()):
        found.append(f"{kind} keeps its weights transposed (Conv1D), and neither vLLM nor TGI takes adapters for it")
    elif kind in _VLLM_WITHOUT_LORA:
        found.append(f"vLLM takes no adapters for {kind}")
    if written.rank > VLLM_RANKS[-1]:
        found.append(f"rank {written.rank}: vLLM takes none above {VLLM_RANKS[-1]} (--max-rank cuts it)")
    if on_head:
        found.append(f"an adapter is on the head {head!r}, which vLLM takes for some models alone")
    if not experts and (unknown := sorted(kinds - _TGI_KINDS - {head})):
        found.append(f"TGI passes adapters on {', '.join(unknown)} by without a word")
    elif partial := _partial(modules, base.config.get_text_config().num_hidden_layers):
        found.append(f"TGI passes adapters on {', '.join(partial)} by without a word, as not every layer has one")
    if not found:
        return []
    return [*(f"for servers: {line}" for line in found), "where a server cannot take the adapter, export with --merge"]


def _partial(modules: Sequence[str], layers: int) -> list[str]:
    """The kinds of modules of decoder layers that not all layers have an adapter on."""
    counts: dict[str, int] = {}
    for module in modules:
        if re.search(r"\.\d+\.", module):
            kind = module.rpartition(".")[2]
            counts[kind] = counts.get(kind, 0) + 1
    return sorted(kind for kind, count in counts.items() if count < layers and not kind.isdigit())


def vllm_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that holds this rank; None where there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def adapter_command(folder: Path, base: str, revision: str | None, rank: int) -> str:
    """The command with which vLLM serves an exported adapter on its base."""
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else [])]
    words += ["--enable-lora", "--lora-modules", f"{folder.name}={folder}", "--max-lora-rank", str(vllm_rank(rank))]
    return shlex.join(words)


def model_command(folder: Path) -> str:
    """The command with which vLLM serves a merged model."""
    return shlex.join(["vllm", "serve", str(folder)])


def llama_command(model: Path | str, adapter: Path | None = None) -> str:
    """The command with which llama.cpp serves a GGUF model, or one with a GGUF adapter on it."""
    return shlex.join(["llama-server", "-m", str(model), *(["--lora", str(adapter)] if adapter else [])])
