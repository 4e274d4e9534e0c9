"""What Apiary runs on with nothing else at hand: a tiny base model and an instruction corpus.

`load_tiny()` gives `builtin:tiny`, a Llama of about three million parameters with its own
tokenizer, from text files that lie in this package and so travel in a wheel, an editable install
and a Flower app bundle alike. `skills.rows` gives `builtin:skills`. `pretrain` is the script that
made the model; its card is `tiny/README.md`.
"""

from __future__ import annotations

import importlib.resources
import json
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Final

from apiary.data.skills.corpus import SKILLS, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SKILLS", "TINY_FILES", "load_tiny", "load_tiny_tokenizer", "rows", "tiny_folder"]

TINY_FILES: Final = (
    "config.json",
    "weights.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)
"""The files of the tiny base, all of them text."""


def tiny_folder() -> Traversable:
    """Returns the folder of the tiny base's files, wherever the package lies (also in a zip)."""
    return importlib.resources.files("apiary.models.tiny") / "checkpoint"


def load_tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a fresh copy of the tiny base in float32, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if the shipped weights are damaged or do not fit the shipped config.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_json("config.json")))
    missing, unknown = model.load_state_dict(_weights(), strict=False, assign=True)  # once in memory
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights.jsonl: missing {missing}, unknown {unknown}; reinstall the package")
    model.tie_weights()
    return model.eval(), load_tiny_tokenizer()


def load_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Returns the tiny base's tokenizer alone, with its chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = _json("tokenizer_config.json")
    for key in ("tokenizer_class", "backend"):
        settings.pop(key, None)
    core = Tokenizer.from_str(_text("tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


def _weights() -> dict[str, Any]:
    from apiary.models.tiny import weights

    return weights.unpack(_text("weights.jsonl").splitlines())


def _json(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_text(name))
    return loaded


def _text(name: str) -> str:
    return (tiny_folder() / name).read_text(encoding="utf-8")
