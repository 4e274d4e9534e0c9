"""How answers are decoded, and what the base's own generation configuration has to say in it: where an answer ends.

Published models bring a `generation_config.json` with penalties, forced and suppressed tokens, beams, kinds of caches.
It is for whoever serves the model. Here answers are measured, so they are decoded greedily by a configuration made new
(`greedy`). `generate()` takes for each value that a configuration leaves unset the value of the model's own, so the
model itself is given a new one, too, when it is read; the base's file is kept aside, for a merged export.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from apiary.core.files import write_atomic
from apiary.core.formatting import first_line

_log = logging.getLogger(__name__)

FILE = "generation_config.json"
IF_THERE: dict[str, Any] = {  # for `cached_file`: None for a file that a model does not have
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
_NAMED = 8  # keys that are named, at most
# Keys that say nothing of how tokens are chosen; the ids of other special tokens are the tokenizer's to tell.
_PLAIN = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache"}


class BaseGeneration(NamedTuple):
    """What a base says of generation.

    text: its generation_config.json as it stands, None where there is none; model_config: its config.json; stops: the
    ids that end an answer; unused: what else the file sets; fault: why the file cannot be read, "" where it can.
    """

    text: str | None
    model_config: Mapping[str, Any]
    stops: tuple[int, ...]
    unused: tuple[str, ...] = ()
    fault: str = ""

    @property
    def words(self) -> str:
        """How answers are decoded, on one line."""
        if not self.unused:
            return "decoded greedily"
        named = ", ".join(self.unused[:_NAMED]) + (", ..." if len(self.unused) > _NAMED else "")
        return f"decoded greedily; the base's {FILE} counts for where they end alone, not {named}"

    @property
    def fault_line(self) -> str:
        """What a run says of a file that cannot be read."""
        return f"the base's {FILE} cannot be read ({self.fault}): answers end where its config.json says"


def read(source: str, revision: str | None, rows: int) -> BaseGeneration:
    """What a base says of generation. A file that nobody can read is as good as none.

    Args:
        source: a folder or a hub id.
        revision: on the hub.
        rows: ids that the model knows; others can't end anything.
    """
    where: dict[str, Any] = {"revision": revision}
    try:
        found = cached_file(source, FILE, **where, **IF_THERE)
        text = None if found is None else Path(found).read_text(encoding="utf-8")
        values, fault = _object(text)
    except (OSError, UnicodeDecodeError) as error:
        text, values, fault = None, {}, first_line(error)
    model_config, _ = PreTrainedConfig.get_config_dict(source, **where)
    stops = _ids(values.get("eos_token_id"), rows) or stops_of(model_config, rows)
    unused = sorted(key for key, value in values.items() if key not in _PLAIN and value is not None and key[:1] != "_")
    return BaseGeneration(text, model_config, stops, tuple(unused), fault)


def _object(text: str | None) -> tuple[dict[str, Any], str]:
    """A JSON object, or nothing and why not."""
    if text is None:
        return {}, ""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, first_line(error)
    return (values, "") if isinstance(values, dict) else ({}, "it is no JSON object")


def stops_of(model_config: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    """The ids that end an answer by a config.json; that of a model for several media tells it of its text model."""
    inner = model_config.get("text_config")
    named = model_config.get("eos_token_id")
    return _ids(named, rows) or (_ids(inner.get("eos_token_id"), rows) if isinstance(inner, dict) else ())


def _ids(value: object, rows: int) -> tuple[int, ...]:
    """Those ids among a value that is one, or a list of them, and may be anything else."""
    several = value if isinstance(value, list) else [value]
    return tuple(sorted({i for i in several if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < rows}))


def of_model(stops: Iterable[int]) -> GenerationConfig:
    """What a model is given for its own: where answers end, and nothing that `generate()` could inherit."""
    return GenerationConfig(eos_token_id=list(stops) or None)


def greedy(new: int, stops: Iterable[int], pad: int) -> GenerationConfig:
    """The most likely token each time.

    Args:
        new: tokens of an answer, at most.
        stops: ids that end it.
        pad: the id that fills rows which have ended.
    """
    return GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )


def hand_on(base: BaseGeneration, folder: Path) -> None:
    """Write the base's own generation configuration into a folder with a model, as whoever serves it expects.

    That is its file as it stands. Where it has none, or one that Transformers refuses, so that the model could not be
    loaded, it is what Transformers makes of the base's config.json.
    """
    values, fault = _object(base.text)
    if base.text is not None and not fault:
        try:
            GenerationConfig.from_dict(values)
        except Exception as error:  # checks of values raise whatever comes of them
            fault = first_line(error)
    if base.text is not None and not fault:
        write_atomic(folder / FILE, base.text)
        return
    if fault or base.fault:
        _log.warning("the base's %s is not handed on, for Transformers refuses it (%s)", FILE, fault or base.fault)
    try:
        made = GenerationConfig.from_model_config(dict(base.model_config))
    except Exception:  # values of config.json from before there was a generation_config.json
        made = of_model(base.stops)
    write_atomic(folder / FILE, made.to_json_string() + "\n")
