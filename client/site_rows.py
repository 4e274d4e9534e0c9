"""Which of a site's rows a round trains on, and their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from apiary.config.schema import RunConfig
from apiary.data import injection, tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.federation import untrained
from apiary.data.tokenization import Template
from apiary.models.inference import ModelProbe
from client import curated_rows
from client.curated_rows import Choice
from client.curation import Context, Reader
from client.site import Site

_HELD_TOKENS = 50_000_000  # in memory at a time (250 MB), however many virtual clients there are


class SiteRows:
    """The rows of the sites of a worker. Owns the tokens and the choices of rows that it has made.

    Args:
        config: the run.
        tokenizer: of its base model.
        template: how an example becomes text.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._config, self._tokenizer, self._template = config, tokenizer, template
        self._corpora: OrderedDict[tuple[str, str], tuple[object, Corpus]] = OrderedDict()
        self._choices: dict[str, Choice] = {}

    def corpus(self, site: Site, part: str, examples: Sequence[Example]) -> Corpus:
        """The tokens of a part of the site's rows; made again where it has come to hold others.

        Held-out rows ("test") are measured as they are; all others are written as they are trained.
        """
        key = (site.client, part)
        if key not in self._corpora or self._corpora[key][0] != examples:
            encode = tokenization.encode_all if part == "test" else injection.encode_training
            made = encode(examples, self._template, self._tokenizer, self._config.prompt)
            self._corpora[key] = (examples, made)
            while len(self._corpora) > 1 and sum(c.tokens_in_memory for _, c in self._corpora.values()) > _HELD_TOKENS:
                self._corpora.popitem(last=False)
        self._corpora.move_to_end(key)
        return self._corpora[key][1]

    def chosen(
        self, site: Site, number: int, probe: Callable[[], ModelProbe]
    ) -> tuple[Sequence[Example], Choice | None]:
        """The rows that curation leaves for a round, and what it did; all of them where nothing is configured.

        Args:
            site: whose rows.
            number: the round, from 1.
            probe: makes the model with the adapter of this round, for steps that ask it.

        Raises:
            UserError: unknown steps or options, or nothing is left.
        """
        if not self._config.curate.steps:
            return site.train, None
        reader = Reader(self._template, self._tokenizer, self._config.prompt, probe)
        made = curated_rows.choose(
            site.train,
            self._config.curate,
            Context(self._config.seed, site.client, untrained(site.test, site.validation), reader, trained=number - 1),
            site.folder,
            number,
            self._choices.get(site.client),
            empty_ok=self._config.privacy.unit == "record" or site.fewest > 0,  # an error would tell it
        )
        self._choices[site.client] = made
        return made.examples, made
