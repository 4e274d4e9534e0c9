"""Conversations as token ids with a loss mask that is right by construction.

Every segment of a template is tokenised by itself and the pieces are joined, so no boundary can
fall inside a token, and what training puts before a response is, id by id, the generation prompt.
Control tokens are the template's alone: what a turn spells stays text (`boundary`).

A conversation that is longer than `prompt.max_tokens` ends after the last answer that fits as a whole. Only where not
even the first one does is that cut, and never within a control token or a word that spells one.
"""

from __future__ import annotations

import json
import weakref
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np

from apiary.config.schema import PromptConfig
from apiary.core.errors import UserError
from apiary.data.batches import Batch, Corpus, CorpusStats, Dropped, Encoded, collate, gather, plan_batches
from apiary.data.boundary import UNSAFE, Boundary, Tokens, boundary_of
from apiary.data.examples import Counts, Example, Source, rows_text
from apiary.data.templates import Segment, Template, Unwritable, asking, make_template, short_digest
from apiary.data.tokens import decode, tokenise
from apiary.data.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Corpus",
    "CorpusStats",
    "Encoded",
    "Segment",
    "Template",
    "check_template",
    "collate",
    "encode",
    "encode_all",
    "encode_prompt",
    "make_template",
    "plan_batches",
    "preview",
    "rows_lost",
    "tokenizer_digest",
]

_CHUNK, _LETTERS = 4096, 2**20  # the most rows and letters that are tokenised in one call
_AHEAD, _AHEAD_LETTERS = 64, 2**22  # the most rows, and letters in all their cuts, that a chat template knows of ahead
SPELLED = "spell control tokens of the tokenizer, which stay plain text"
NO_THINKING = "have thinking that the chat template does not write, so it is not trained"
EARLIER = (
    "have earlier answers that the chat template writes in another way once more turns follow; they are not trained"
)
UNSAID = "have text beside a tool call that the chat template does not write"
TRIMMED = "lose white space around answers to the chat template"


def encode(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Encoded | None:
    """One example as tokens; None when the template cannot write it, or `prompt.max_tokens` leaves nothing to train."""
    (encoded,) = _encode([example], template, tokenizer, config)
    return encoded if isinstance(encoded, Encoded) else None


def encode_all(
    examples: Iterable[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> Corpus:
    """All examples that can be used as one corpus, in order; it tells which of them were cut or dropped, and why."""
    chunks = _stretches(examples, _CHUNK, _LETTERS, _letters)
    return gather(chain.from_iterable(_encode(chunk, template, tokenizer, config) for chunk in chunks))


def _stretches(
    examples: Iterable[Example], most: int, room: int, size: Callable[[Example], int]
) -> Iterator[list[Example]]:
    """The examples in order, in stretches of at most `most` that take at most `room` together, or of a larger one."""
    stretch, taken = list[Example](), 0
    for example in examples:
        own = size(example)
        if stretch and (len(stretch) == most or taken + own > room):
            yield stretch
            stretch, taken = [], 0
        stretch.append(example)
        taken += own
    if stretch:
        yield stretch


def _letters(example: Example) -> int:
    """Those that are tokenised: the tokenizer takes some 50 bytes for each in one call."""
    return sum([len(turn.text) + len(turn.thinking) for turn in example.turns])


def _letters_in_cuts(example: Example) -> int:
    """Those that a chat template writes, which writes a conversation anew for each turn."""
    return sum([len(turn.text) for turn in example.turns]) * len(example.turns)


def _encode(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> list[Encoded | Dropped]:
    """The tokens of each example, or why there are none."""
    boundary = boundary_of(template, tokenizer)
    written = []
    for some in _stretches(examples, _AHEAD, _AHEAD_LETTERS, _letters_in_cuts):
        template.render_ahead((example.turns, example.tools) for example in some)
        written += [_write(example, template) for example in some]
    texts = (segment.text for part in written if not isinstance(part, Dropped) for segment in part[1])
    ids = tokenise(texts, tokenizer)

    def encoded(example: Example, part: tuple[Sequence[Turn], list[Segment]] | Dropped) -> Encoded | Dropped:
        if isinstance(part, Dropped):
            return part
        turns, segments = part
        tokens = boundary.tokens(turns, segments, ids, template.declared(example.tools))
        if tokens is None:
            return Dropped(UNSAFE)
        made = _assemble(turns, segments, tokens, config, boundary, tokenizer)
        return made if isinstance(made, Dropped) else made._replace(notes=_notes(turns, segments))

    return [encoded(example, part) for example, part in zip(examples, written, strict=True)]


def _write(example: Example, template: Template) -> tuple[Sequence[Turn], list[Segment]] | Dropped:
    try:
        return template.write(example.turns, example.tools)
    except Unwritable as refusal:
        return Dropped(refusal.reason)


def _notes(turns: Sequence[Turn], segments: Sequence[Segment]) -> tuple[str, ...]:
    """What of the turns the template did not write, or not as something to train."""
    odd: list[Turn] = []
    answers = 0
    for turn in turns:  # in a loop, for this is done to each row
        if turn.role == "assistant":
            answers += turn.trained
            if turn.thinking or turn.calls or turn.text[:1].isspace() or turn.text[-1:].isspace():
                odd.append(turn)
    notes = []
    if odd:
        text = "".join(segment.text for segment in segments)
        if any(turn.thinking.strip() not in text for turn in odd):
            notes.append(NO_THINKING)
        if any(turn.calls and turn.text.strip() not in text for turn in odd):
            notes.append(UNSAID)
        elif any(turn.trained and turn.text not in text for turn in odd):
            notes.append(TRIMMED)
    if answers > sum([segment.trained for segment in segments]):
        notes.append(EARLIER)
    return tuple(notes)


def check_template(examples: Iterable[Example], template: Template) -> None:
    """Check that the template can write one of the examples at least.

    Raises:
        UserError: it can write none of them; what it says of the first.
    """
    first: UserError | None = None
    for example in examples:
        try:
            template.segments(example.turns, example.tools)
        except Unwritable as refusal:
            first = first or refusal
        else:
            return
    if first is not None:
        raise first


def rows_lost(
    parts: Iterable[tuple[Sequence[Example], Corpus]], sources: Sequence[Source], max_tokens: int
) -> list[str]:
    """What encoding cut, dropped, left untrained and read as plain text: a line for each file, with counts and rows.

    Args:
        parts: examples, and what `encode_all` made of them.
        sources: where they came from, for an example does not know its row.
        max_tokens: their limit.
    """
    fates = _Fates()
    for examples, corpus in parts:
        fates.add(examples, _fates_of(corpus, max_tokens))
    if not len(fates):
        return []
    lines: list[str] = []
    placed, unplaced = fates.counted(sources)
    for source, files in zip(sources, placed, strict=True):
        for file, counts in sorted(files.items()):
            name, total = source.reports[file].name, source.reports[file].rows
            found = counts.found().items()
            losses = (f"{count} of {total} rows {fate} ({rows_text(rows, count)})" for fate, (count, rows) in found)
            lines.append(f"{name}: {'; '.join(losses)}")
    if unplaced:
        lines.append("test part of data.source: " + "; ".join(f"{count} {fate}" for fate, count in unplaced.items()))
    return lines


def _fates_of(corpus: Corpus, max_tokens: int) -> dict[int, tuple[str, ...]]:
    """What became of the rows of a corpus that encoding did not keep as they were."""
    of: dict[int, tuple[str, ...]] = dict.fromkeys(
        corpus.cut, (f"cut at prompt.max_tokens = {max_tokens} after a whole answer",)
    )
    of |= dict.fromkeys(corpus.within, (f"cut at prompt.max_tokens = {max_tokens} within an answer",))
    same: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal ones once
    for i, notes in chain(corpus.notes.items(), ((i, (SPELLED,)) for i in corpus.spelled)):
        fate = (*of.get(i, ()), *notes)
        of[i] = same.setdefault(fate, fate)
    return of | {i: (f"left out: {why}",) for i, why in corpus.dropped.items()}


class _Fates:
    """What became of conversations. Owns a hash of each that something became of, and no text: they may be many."""

    def __init__(self) -> None:
        self._kinds: list[tuple[str, ...]] = []  # each combination of fates
        self._talks, self._codes = array("q"), array("q")  # in the order in which they came; numbers of combinations

    def __len__(self) -> int:
        return len(self._talks)

    def add(self, examples: Sequence[Example], fates: Mapping[int, tuple[str, ...]]) -> None:
        """Note the fates of examples, by their places."""
        numbers = {kind: number for number, kind in enumerate(self._kinds)}
        for i, kind in fates.items():
            self._talks.append(_talk(examples[i]))
            self._codes.append(numbers.setdefault(kind, len(numbers)))
        self._kinds = list(numbers)

    def counted(self, sources: Iterable[Source]) -> tuple[list[dict[int, Counts]], dict[str, int]]:
        """The rows of each fate, by file, for each source; and how many conversations of each fate are in none."""
        talks, first = np.unique(np.frombuffer(self._talks, np.int64), return_index=True)
        known, found = array("q", talks.tobytes()), np.zeros(len(talks), bool)  # bisect is slow on an array of numpy
        counts = list[dict[int, Counts]]()
        for source in sources:
            counts.append({})
            for place, example in zip(source.places, source.examples, strict=True):
                talk = _talk(example)
                at = bisect_left(known, talk)
                if at < len(known) and known[at] == talk:
                    found[at] = True
                    for fate in self._kinds[self._codes[first[at]]]:
                        counts[-1].setdefault(place.file, Counts()).add(fate, place.row)
        missing = (self._kinds[self._codes[i]] for i in np.sort(first[~found]))
        return counts, Counter(chain.from_iterable(missing))


def _talk(example: Example) -> int:
    """A hash of a conversation, on which alone its fates depend; 64 bits, for this process."""
    return hash((example.turns, example.tools))


def encode_prompt(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> list[int]:
    """The ids before the last assistant turn: exactly those that training puts before it.

    A long chat loses its oldest exchanges (never the system message) until a response token fits. The prompt of an
    example of bare text is BOS alone, or EOS where the tokenizer uses no BOS.

    Raises:
        UserError: the last question alone is too long, the template cannot write the conversation, or its text
            cannot be kept from becoming control tokens.
    """
    turns = asking(example.turns)
    think = any(turn.thinking for turn in example.turns[len(turns) :])
    while True:
        whole, segments = template.write(turns, example.tools, think)
        ids = tokenise((segment.text for segment in segments), tokenizer)
        tokens = boundary_of(template, tokenizer).tokens(whole, segments, ids, template.declared(example.tools), think)
        if tokens is None:
            raise UserError(f"the conversation cannot be put to the model: {UNSAFE}; leave these words out")
        prompt = [int(i) for part in tokens.parts for i in part]
        if len(prompt) < max_tokens:
            return prompt
        starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
        if len(starts) < 2:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and prompt.max_tokens = {max_tokens} leaves "
                "no room for an answer; shorten it or raise prompt.max_tokens"
            )
        turns = (*turns[: starts[0]], *turns[starts[1] :])


def preview(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
) -> list[tuple[str, bool]]:
    """The text that the model sees in stretches, and whether each is trained; [] if dropped.

    Decoded from the ids, so that it shows what the tokens say and not what they should say.
    """
    if (encoded := encode(example, template, tokenizer, config)) is None:
        return []
    pairs = zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True)
    return [
        (decode(tokenizer, [i for i, _ in stretch]), trained)
        for trained, stretch in groupby(pairs, key=lambda pair: pair[1])
    ]


def _assemble(
    turns: Sequence[Turn],
    segments: Sequence[Segment],
    tokens: Tokens,
    config: PromptConfig,
    boundary: Boundary,
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded | Dropped:
    """The segments' ids end to end, up to the last trained token, or up to what of them fits; or why none is left."""
    sizes = [len(part) for part in tokens.parts]
    ids = np.concatenate(tokens.parts)
    trained = np.repeat([segment.trained for segment in segments], sizes)
    trained[:1] = False  # nothing comes before the first token to predict it from
    whole = _end(trained)
    if not whole:
        return Dropped("no token of it is trained")
    if whole <= config.max_tokens:
        return Encoded(ids[:whole], trained[:whole], False, tokens.spelled)
    count = int(trained.sum())
    too_long = Dropped(f"too long for prompt.max_tokens = {config.max_tokens}", whole, count)
    if config.on_long == "drop":
        return too_long
    ends = np.cumsum(sizes)
    fitting = [int(end) for end, segment in zip(ends, segments, strict=True) if segment.trained]
    end = max((end for end in fitting if end <= config.max_tokens), default=0)
    end = _end(trained[:end])
    within = not end
    if within:
        first = next(i for i, segment in enumerate(segments) if segment.trained)
        begin = int(ends[first]) - sizes[first]
        said = (turn.text.strip() for turn in turns if turn.role == "assistant" and turn.trained)
        answer = next((text for text in said if text and text in segments[first].text), "")
        room = config.max_tokens - begin
        end = begin + _before_marks(tokens.parts[first], segments[first].text, answer, room, boundary, tokenizer)
        end = _end(trained[:end]) if room > 0 else 0
    if not end:
        return too_long
    lost = count - int(trained[:end].sum())
    return Encoded(ids[:end], trained[:end], True, tokens.spelled, within, whole, lost)


def _before_marks(
    ids: np.ndarray, written: str, answer: str, room: int, boundary: Boundary, tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many of an answer's ids to keep of those that there is room for: none that begin a mark and do not end it.

    A mark is a control token that the answer spells as plain text, or the template's own end of an answer.

    Args:
        ids: of the answer.
        written: its text with the template's end.
        answer: its text without outer white space, "" where it is not known.
        room: how many ids fit, fewer than there are.
        boundary: knows the control tokens.
        tokenizer: decodes the ids.
    """
    if room <= 0:
        return 0

    def text_of(count: int) -> str:
        return decode(tokenizer, ids[:count].tolist())

    text = text_of(len(ids))
    end = written.rpartition(answer)[2] if answer else ""
    marks = [match.span() for match in boundary.control.pattern.finditer(text)]
    marks += [(len(text) - len(end.strip()), len(text))] if end.strip() and text.endswith(end.strip()) else []
    kept = room
    while kept and any(start < len(text_of(kept).rstrip("\ufffd")) < stop for start, stop in marks):
        kept -= 1
    return kept


def _end(trained: np.ndarray) -> int:
    """One past the last trained token; what follows it cannot change any loss."""
    places = np.flatnonzero(trained)
    return int(places[-1]) + 1 if len(places) else 0


_digests: weakref.WeakKeyDictionary[object, tuple[object, str]] = weakref.WeakKeyDictionary()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 (16 hex digits) over vocabulary, merges, normaliser and special tokens.

    Padding and truncation are a caller's passing wishes and do not count. Computed once for each
    tokenizer (big ones take a second, and every client is asked) until tokens are added to it.
    """
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    state = (len(tokenizer), str(special))
    known, digest = _digests.get(tokenizer, (None, ""))
    if known == state:
        return digest
    parts: dict[str, object] = {"special": special, "vocab": sorted(tokenizer.get_vocab().items())}
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        parts["backend"] = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    digest = short_digest(json.dumps(parts, sort_keys=True))
    _digests[tokenizer] = (state, digest)
    return digest
