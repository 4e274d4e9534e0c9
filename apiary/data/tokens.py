"""Text to ids and back: by what a tokenizer's vocabulary says, and not by what a caller once set in it.

Files of tokenizers hold both. Vocabulary, merges, normaliser and decoder are the model's: other ids would be other text
to it. Padding, truncation, a greatest length, special tokens that are split or added, blanks that are cleaned up after
decoding, and merges that are left out by chance are settings of whoever saved the file. They would cut rows, double
BOS, or change answers in silence, so here they do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from apiary.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Ids", "decode", "opening", "settle", "tokenise"]

Ids = Mapping[str, np.ndarray]  # text -> its ids (t,) int32

_PLAIN: dict[str, Any] = {
    "padding": False,
    "truncation": False,
    "split_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}
_TRIES = 4  # readings of a text, to see whether they are alike
_TEXT = "Bees and other insects remember unbelievably many flowers; they even tell each other. " * 4


def tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids (t,) int32 of each distinct text, as the tokenizer reads it: control tokens and all."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    rows = tokenizer(distinct, add_special_tokens=False, **_PLAIN)["input_ids"]
    return {text: np.array(ids, np.int32) for text, ids in zip(distinct, rows, strict=True)}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """The text of ids, with every blank that they stand for.

    Args:
        tokenizer: of any kind.
        ids: of one text.
        skip_special: whether special tokens are left out.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    return str(text)


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that the tokenizer by its own rule puts before a text, mostly BOS; "" for none.

    Where they do not read back as themselves, none.
    """
    whole = tokenizer("a", **_PLAIN)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, **_PLAIN)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((n for n in starts if whole[n : n + len(bare)] == bare), 0)
    text = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    return text if start and tokenise([text], tokenizer)[text].tolist() == whole[:start] else ""


def settle(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Take the chance out of a tokenizer: with BPE dropout it would leave out some of its merges, others each time.

    Args:
        tokenizer: it is changed.
        name: of its model, for the error.

    Raises:
        UserError: it still reads the same text in several ways.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None  # type: ignore[union-attr]
    if len({tokenise([_TEXT], tokenizer)[_TEXT].tobytes() for _ in range(_TRIES)}) > 1:
        raise UserError(
            f"model.name = {name!r}: its tokenizer reads the same text in several ways, by chance; "
            "set enable_sampling = false in its tokenizer_config.json"
        )
