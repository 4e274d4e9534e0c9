"""The boundary between the template's text and everybody else's: no text of a row becomes a control token.

A tokenizer reads `</s>` or `<|im_end|>` as one token wherever it finds it, in a template and in a pasted log alike. So
that a row cannot open turns or end answers, three things are done for each conversation:

1. The same turns are written with words that say nothing (`neutral`), once for each sequence of roles; with tools, once
   for each shape of calls and declarations. What stands around the words is the template's own text, and its control
   tokens are the only ones that a conversation of that shape may have.
2. The conversation is tokenised as it stands. If no turn spells a control token, and each segment has just the control
   tokens of step 1, those are the ids: text that does no harm costs one search and one comparison.
3. Otherwise it is tokenised by a copy of the tokenizer in which every control token has a secret name. The template's
   own control tokens are written by these names; what a row spells is ordinary text to the copy, in its vocabulary and
   merges too. The result must pass step 2, or the row is left out, with a reason.

Chen et al., "StruQ: Defending Against Prompt Injection with Structured Queries" (2024), section 4.2, asks for this
filter of a secure front end; here nothing is deleted, for a row about chat templates is to be learnt as it is.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from apiary.data.neutral import NUMBERED, neutral, variants
from apiary.data.templates import Segment, Template, Unwritable, literal_text
from apiary.data.tokens import Ids, tokenise
from apiary.data.turns import Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["UNSAFE", "Boundary", "ControlTokens", "Tokens", "boundary_of", "control_tokens"]

_log = logging.getLogger(__name__)

UNSAFE = "its text spells control tokens and cannot be kept apart from the template's"

_SHAPES = 4096  # layouts held for a template: one for each sequence of roles
_PLAIN_WORD = re.compile(r"[\w\s\u2581]+")  # U+2581 stands for a space in SentencePiece
_MARK = re.compile(r"<[|\uff5c][^<>\s]*\w[^<>\s]*[|\uff5c]>")
_BRACKETED = re.compile(r"</?[^<>\s]*\w[^<>\s]*>|\[/?[^\[\]\s]*\w[^\[\]\s]*\]")
_SPACE = "\u2581\u0120"  # how vocabularies write a space before a word


class Tokens(NamedTuple):
    """A conversation's ids, an array for each segment; spelled: its text would have become control tokens."""

    parts: Sequence[np.ndarray]
    spelled: bool


class _Piece(NamedTuple):
    """A stretch of a segment that the template wrote, or that stands in the row."""

    text: str
    template: bool


# --- which tokens are control tokens


class ControlTokens:
    """The control tokens of a tokenizer. Owns the copy of it that knows them by secret names, made when first needed.

    Args:
        tokenizer: it is not changed.
        texts: id -> how the token is spelled.
        by_chance: an id that ordinary text may come to, that of an unknown character; -1 for none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Mapping[int, str], by_chance: int = -1) -> None:
        self.texts = texts
        self._tokenizer = tokenizer
        self._table = np.zeros(max((len(tokenizer), *(i + 1 for i in texts))), bool)
        self._table[[i for i in texts if i != by_chance]] = True
        self._by_chance = by_chance
        added = tokenizer.added_tokens_decoder
        # Of two tokens that are spelled alike, text becomes the added one.
        self.ids = {text: i for i, text in sorted(texts.items(), key=lambda item: item[0] in added)}
        self.pattern = _any_of(self.ids)

    def within(self, ids: np.ndarray) -> np.ndarray:
        """Those of the ids that are control tokens, in order."""
        return np.asarray(ids[self._table[ids]])

    def spelled(self, text: str) -> bool:
        """Whether the text spells a control token; what it becomes by normalisation shows in its ids alone."""
        return self.pattern.search(text) is not None

    def hides_unknown(self, texts: Iterable[str], parts: Iterable[np.ndarray]) -> bool:
        """Whether the token of an unknown character may have come of its name, in forms that a normaliser turns back.

        Other control tokens show in the ids; this one may stand there rightly.
        """
        if self._by_chance < 0 or not any((part == self._by_chance).any() for part in parts):
            return False
        name = self.texts[self._by_chance].casefold()
        return any(name in unicodedata.normalize("NFKC", text).casefold() for text in texts)

    @cached_property
    def renamed(self) -> Renamed | None:
        """The copy; None where the tokenizer is no fast one, or of a kind that cannot be copied."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else _rename(backend, self.texts)

    def apart(self, segments: Sequence[Sequence[_Piece]]) -> list[np.ndarray]:
        """The ids of each segment, in which no text of a turn is a control token so far as the tokenizer allows."""
        if (copy := self.renamed) is not None:
            written = ["".join(copy.written(piece, self) for piece in pieces) for pieces in segments]
            rows = copy.tokenizer.encode_batch(written, add_special_tokens=False)
            return [np.array(row.ids, np.int32) for row in rows]
        return [np.array(_in_pieces(pieces, self, self._tokenizer), np.int32) for pieces in segments]


def control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> ControlTokens:
    """The tokens that no text of a row may become.

    They are: the special tokens; tokens such as <|user|>, by their form; other added tokens that the template writes,
    but white space and plain words (Gemma adds runs of line breaks, and people add words of their trade); and
    bracketed entries of the vocabulary itself that the template writes.

    Args:
        tokenizer: of any kind.
        written: all literal text of the template.
    """
    return _control(tokenizer, _state(tokenizer), written)


@lru_cache(maxsize=16)
def _control(tokenizer: PreTrainedTokenizerBase, state: object, written: str) -> ControlTokens:
    special = {*map(str, tokenizer.all_special_tokens), *(getattr(tokenizer, "chat_control_tokens", None) or ())}
    texts: dict[int, str] = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        writes = text in written and not _PLAIN_WORD.fullmatch(text)
        if text.strip(f" \t\r\n{_SPACE}") and (token.special or text in special or _MARK.fullmatch(text) or writes):
            texts[int(i)] = text
    for word, i in tokenizer.get_vocab().items():
        text = word.lstrip(_SPACE)
        if text in special or (text[-1:] in (">", "]") and _is_mark(text, written)):
            texts.setdefault(int(i), text)
    return ControlTokens(tokenizer, texts, _unknown(tokenizer))


def _is_mark(text: str, written: str) -> bool:
    return bool(_MARK.fullmatch(text)) or (text in written and _BRACKETED.fullmatch(text) is not None)


def _unknown(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of an unknown character, -1 where it also begins or ends texts: byte-level tokenizers know every one."""
    if tokenizer.unk_token is None or tokenizer.unk_token in (tokenizer.bos_token, tokenizer.eos_token):
        return -1
    return int(tokenizer.unk_token_id)


def _state(tokenizer: PreTrainedTokenizerBase) -> object:
    """What changes when tokens or another chat template are given to a tokenizer."""
    return len(tokenizer), str(tokenizer.special_tokens_map), str(tokenizer.chat_template)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


# --- fast tokenizers: a copy that knows the control tokens by other names


class Renamed(NamedTuple):
    """A copy of a fast tokenizer; names: id of a control token -> what the copy calls it."""

    tokenizer: Tokenizer
    names: Mapping[int, str]

    def written(self, piece: _Piece, control: ControlTokens) -> str:
        """A piece as the copy is to read it: with the template's control tokens under their new names."""
        if not piece.template:
            return piece.text
        return control.pattern.sub(lambda match: self.names[control.ids[match[0]]], piece.text)


def _rename(backend: Tokenizer, texts: Mapping[int, str]) -> Renamed | None:
    """The copy: same ids, merges and normaliser, but no way from an old name to a control token."""
    # A new name has the first and last character of the old one, for a neighbour may look at them, and between them
    # letters that no normaliser touches. They are drawn anew in each process, so no row can hold them.
    names = {i: text[0] + _letters() + text[-1] for i, text in texts.items()}
    spec = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
    added = {token["id"]: token for token in spec["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for i, name in names.items():
        added[i] = {**flags, **added.get(i, {}), "id": i, "content": name}
    spec["added_tokens"] = [added[i] for i in sorted(added)]
    from tokenizers import Tokenizer

    try:
        _rename_model(spec["model"], names)
        copy = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises this class itself, for any kind that it cannot read back
        _log.debug("no copy of the tokenizer: %s", type(error).__name__)
        return None
    same = all(copy.token_to_id(name) == i for i, name in names.items())
    return Renamed(copy, names) if same and copy.get_vocab_size() == backend.get_vocab_size() else None


def _letters() -> str:
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(28))  # 131 bits


def _rename_model(model: dict[str, Any], names: Mapping[int, str]) -> None:
    """Give the control tokens other names in the vocabulary, and drop the merges that lead to them or through them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: the id is the place
        model["vocab"] = [[names.get(i, word), score] for i, (word, score) in enumerate(vocab)]
        return
    renamed = {word: names[i] for word, i in vocab.items() if i in names}
    model["vocab"] = {renamed.get(word, word): i for word, i in vocab.items()}
    model["unk_token"] = renamed.get(model.get("unk_token"), model.get("unk_token"))
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [
            merge for merge, (left, right) in pairs if not renamed.keys() & {left, right, left + right[prefix:]}
        ]


# --- other tokenizers: the template's control tokens by their ids, and between them text in pieces


def _in_pieces(pieces: Sequence[_Piece], control: ControlTokens, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a segment of which each stretch between two control tokens is tokenised without added tokens."""
    added = tokenizer.added_tokens_decoder
    ids: list[int] = []
    strip = False  # the token before takes the white space that follows it
    for stretch, mark in _stretches(pieces, control):
        token = added.get(mark)
        if strip:
            stretch = [stretch[0].lstrip(), *stretch[1:]]
        if token is not None and token.lstrip:
            stretch = [*stretch[:-1], stretch[-1].rstrip()]
        ids += _plain("".join(stretch), stretch, control, tokenizer)
        if mark >= 0:
            ids.append(mark)
        strip = token is not None and token.rstrip
    return ids


def _stretches(pieces: Sequence[_Piece], control: ControlTokens) -> Iterator[tuple[list[str], int]]:
    """Each text between the template's control tokens with the token after it, -1 for none.

    The text is cut after the first character of whatever spells a control token.
    """
    stretch: list[str] = [""]
    starts = re.compile(f"(?={control.pattern.pattern})")
    for piece in pieces:
        if not piece.template:
            cuts = [match.start() + 1 for match in starts.finditer(piece.text)]
            first, *rest = (piece.text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True))
            stretch = [*stretch[:-1], stretch[-1] + first, *rest]
            continue
        at = 0
        for match in control.pattern.finditer(piece.text):
            yield [*stretch[:-1], stretch[-1] + piece.text[at : match.start()]], control.ids[match[0]]
            stretch, at = [""], match.end()
        stretch[-1] += piece.text[at:]
    yield stretch, -1


def _plain(text: str, cut: Sequence[str], control: ControlTokens, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text without added tokens: whole, or cut where the vocabulary itself holds a control token."""
    ids: list[int] = []
    for parts in ([text], cut):
        rows = [
            tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            for part in parts
            if part
        ]
        ids = [int(i) for row in rows for i in row]
        if not len(control.within(np.array(ids, np.int64))):
            break
    return ids


# --- what a template writes of its own


class _Layout(NamedTuple):
    """A shape of conversation as the template writes it: by segment, its text around the turns, and its control tokens.

    texts: for each segment, literal text and numbers of the row's texts in turn; control: the control ids of each,
    (n,) int32 as bytes, which are compared in a tenth of the time.
    """

    texts: tuple[tuple[str, ...], ...]
    control: tuple[bytes, ...]

    def agrees(self, control: ControlTokens, parts: Sequence[np.ndarray]) -> bool:
        """Whether the segments have the template's control tokens, in order, and no others."""
        return len(parts) == len(self.control) and all(
            control.within(part).tobytes() == own for part, own in zip(parts, self.control, strict=True)
        )

    def pieces(self, segments: Sequence[Segment], texts: Sequence[str]) -> list[list[_Piece]] | None:
        """Each segment in pieces, by whose they are; None where there is text of neither the layout nor the row."""
        if len(segments) != len(self.texts):
            return None
        found = [_split(s.text, parts, texts) for s, parts in zip(segments, self.texts, strict=True)]
        return None if None in found else [pieces for pieces in found if pieces is not None]


def _split(text: str, parts: Sequence[str], texts: Sequence[str]) -> list[_Piece] | None:
    """The text as literal text (parts 0, 2, ...) and text of the row (parts 1, 3, ...: its numbers), or None.

    Of several ways in which a text of the row can stand there, one is taken back if what follows does not fit.
    """
    if not text.startswith(parts[0]):
        return None
    found: list[str] = []
    ends = [len(parts[0])]  # of the literal text after each
    open_: list[Iterator[str]] = []  # for each, the ways that are not tried yet
    dead: set[tuple[int, int]] = set()
    while True:
        place = 2 * len(found) + 1
        if place == len(parts):
            if ends[-1] == len(text):
                break
        elif len(open_) == len(found):
            open_.append(variants(texts[int(parts[place])]))
        for variant in open_[-1] if len(open_) > len(found) else ():
            end = ends[-1] + len(variant)
            after = end + len(parts[place + 1])
            fits = text.startswith(variant, ends[-1]) and text.startswith(parts[place + 1], end)
            if fits and (place, after) not in dead:
                found.append(variant)
                ends.append(after)
                break
        else:
            if not found:
                return None
            if len(open_) > len(found):
                open_.pop()
            dead.add((place - 2, ends.pop()))
            found.pop()
    pieces = [_Piece(parts[0], True)]
    for said, literal in zip(found, parts[2::2], strict=True):
        pieces += [_Piece(said, False), _Piece(literal, True)]
    return pieces


class Boundary:
    """Keeps a template's text apart from the text of the turns. Owns the layouts of the shapes that it has seen.

    Args:
        template: how conversations are written.
        tokenizer: of any kind.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer
        self.control = control_tokens(tokenizer, literal_text(template, tokenizer))
        self._layout: Callable[[tuple[Turn, ...], str, bool], _Layout | None] = lru_cache(_SHAPES)(self._read)

    def tokens(
        self, turns: Sequence[Turn], segments: Sequence[Segment], ids: Ids, tools: str = "", think: bool = False
    ) -> Tokens | None:
        """The ids of a conversation with no control tokens but the template's, at its places; None if there are none.

        Args:
            turns: all of them, a configured system turn included.
            segments: what the template makes of them.
            ids: `tokenise` of the segments' texts.
            tools: what the assistant may call, a JSON list as text; "" for none.
            think: whether the answer that is asked for is to begin with thinking.
        """
        parts = [ids[segment.text] for segment in segments]
        shape, declared, texts = neutral(turns, tools)
        spelled = any(map(self.control.spelled, texts)) or self.control.hides_unknown(texts, parts)
        layout = self._layout(shape, declared, think)
        if layout is not None:
            if not spelled and layout.agrees(self.control, parts):
                return Tokens(parts, False)
            if (pieces := layout.pieces(segments, texts)) is not None:
                apart = self.control.apart(pieces)
                same = all(map(np.array_equal, apart, parts))
                return Tokens(apart, not same) if layout.agrees(self.control, apart) else None
        # The template writes something else about these words than about others. That is its own affair so long as
        # no control token can have come from the row.
        return None if spelled or any(map(self._could_join, texts)) else Tokens(parts, False)

    def _could_join(self, said: str) -> bool:
        """Whether the text has a control token in it, or could be part of one together with what is around it."""
        text = said.strip()
        if len(self.control.within(tokenise([said], self._tokenizer)[said])):
            return True
        return any(
            text.endswith(mark[:n]) or text.startswith(mark[n:]) or (text and text in mark)
            for mark in self.control.ids
            for n in range(1, len(mark))
        )

    def _read(self, turns: tuple[Turn, ...], tools: str, think: bool) -> _Layout | None:
        try:
            segments = self._template.split(turns, tools, think)
        except Unwritable:
            return None
        ids = tokenise((segment.text for segment in segments), self._tokenizer)
        return _Layout(
            tuple(tuple(NUMBERED.split(segment.text)) for segment in segments),
            tuple(self.control.within(ids[segment.text]).tobytes() for segment in segments),
        )


def boundary_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> Boundary:
    """The boundary of a template and a tokenizer, made once until tokens are added."""
    return _boundary(template, tokenizer, _state(tokenizer))


@lru_cache(maxsize=16)
def _boundary(template: Template, tokenizer: PreTrainedTokenizerBase, state: object) -> Boundary:
    return Boundary(template, tokenizer)
