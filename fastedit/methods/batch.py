"""Edits with facts about them that are computed once: where their subjects are, and their token samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from fastedit.errors import ConfigError, Problem, RequestError, listed
from fastedit.methods.base import Edit
from fastedit.methods.contexts import BARE
from fastedit.methods.naming import edit_name, named_error
from fastedit.methods.subjects import no_subject, subject_spans
from fastedit.models import Budget, Model, PairError, Samples, prompt_samples
from fastedit.progress import Progress, no_progress


class Batch:
    """N edits of a model in T templates: the bare prompt first, then the contexts.

    `split` and `select` take along what was already computed for all edits.

    Args:
        contexts: templates with one "{}" each, where the prompt goes; they are used beside the bare prompt.
        budget: memory for prefix caches.

    Attributes:
        spans: all places of each edit's subject in its prompt, in characters, ascending; the last one counts.

    Raises:
        ConfigError: a context does not hold "{}" exactly once.
    """

    def __init__(
        self,
        model: Model,
        edits: Sequence[Edit],
        contexts: Sequence[str] = (),
        *,
        budget: Budget | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.model, self.edits, self.templates = model, list(edits), checked_templates(contexts)
        self.budget, self.progress = budget or Budget(), progress
        self._names = [edit_name(edit, place) for place, edit in enumerate(edits)]
        self.spans = [subject_spans(edit) for edit in edits]

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def notes(self) -> list[str]:
        """Notes on these edits for the user."""
        repeated = [place for place, spans in enumerate(self.spans) if len(spans) > 1]
        note = "the subject occurs more than once in the prompt, and the last occurrence is used"
        return [f"{note}: {self.names(repeated)}"] if repeated else []

    @property
    def without_subject(self) -> list[int]:
        """The places of the edits without a subject, or with one that is not in the prompt."""
        return [place for place, spans in enumerate(self.spans) if not spans]

    def require_subjects(self) -> None:
        """Raise RequestError if there are edits without a subject, or with one that is not in the prompt; names all."""
        problems = [Problem(self._names[place], no_subject(self.edits[place])) for place in self.without_subject]
        if problems:
            raise RequestError.of_edits(problems)

    def reporting(self, progress: Progress) -> Batch:
        """The same batch with another progress callback."""
        batch = copy(self)
        batch.progress = progress
        return batch

    def name_list(self, places: Sequence[int]) -> list[str]:
        """Names of the edits at these places."""
        return [self._names[place] for place in places]

    def names(self, places: Sequence[int]) -> str:
        """Names for a message: the first ten, and how many more there are."""
        return listed(self.name_list(places))

    @cached_property
    def prompts(self) -> Samples:
        """The prompts up to the subject's last token, which is the only target row of each.

        [T·N], template by template: all edits in the first one, then all in the second, …

        Raises:
            RequestError: edits without a subject, or with one that ends after the model's context; names all of them.
        """
        texts, ends = self._in_templates()
        ids, last = self.model.last_tokens(texts, ends)
        n, context = len(self), self.model.topology.context_length
        problems: dict[int, Problem] = {}
        for sample, place in enumerate(last):
            if place >= context:
                cause = f"its subject ends at token {place + 1}, beyond the model's context of {context}"
                problems.setdefault(sample % n, Problem(self._names[sample % n], f"{cause}; shorten the prompt"))
        if problems:
            raise RequestError.of_edits(list(problems.values()))
        return prompt_samples(ids, last)

    @cached_property
    def rewriting(self) -> tuple[Samples, Tensor]:
        """Prompts with their targets, then "{subject} is a", and where the subject ends in each.

        Samples [(T + 1)·N], template by template, the rows of the KL term last; token indices [(T + 1)·N].

        Raises:
            RequestError: edits that cannot be tokenized, have no subject, or do not fit the model's context; names all
                of them.
        """
        texts, ends = self._in_templates()
        n, model = len(self), self.model
        pairs = [(text, self.edits[i % n].target) for i, text in enumerate(texts)]
        try:
            samples = model.tokenize(pairs, append_eos=False)
        except PairError as error:

            def source(pair: int) -> tuple[int, str]:
                template, place = divmod(pair, n)
                return place, self.templates[template] if template else ""

            raise named_error(error, self.edits, source) from None
        _, last = model.last_tokens(pairs, ends)
        # these rows end with the subject, since nothing after it is read
        subjects = [str(edit.subject) for edit in self.edits]
        ids, kl_last = model.last_tokens([f"{s} is a" for s in subjects], [len(s) for s in subjects])
        return samples.join(prompt_samples(ids, kl_last)), torch.tensor(last + kl_last)

    def make_samples(self) -> None:
        """Tokenize now, also for all batches made from this one; raises what `prompts` and `rewriting` raise."""
        _ = self.rewriting, self.prompts

    def within(self, contexts: Sequence[str]) -> Batch:
        """The same edits in other contexts. Raises ConfigError as the class does."""
        batch = copy(self)
        for made_once in ("prompts", "rewriting"):
            batch.__dict__.pop(made_once, None)
        batch.templates = checked_templates(contexts)
        return batch

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive batches of at most `size` edits."""
        for first in range(0, len(self), size):
            yield self.select(range(first, min(first + size, len(self))))

    def select(self, places: Sequence[int]) -> Batch:
        """The batch of the edits at these places."""
        return self._part(places, list(range(len(self.templates))))

    def bare(self) -> Batch:
        """The batch of the bare prompts, without contexts."""
        return self._part(range(len(self)), [0])

    def _part(self, places: Sequence[int], templates: list[int]) -> Batch:
        part = self.within(())
        part.edits, part._names = [self.edits[i] for i in places], [self._names[i] for i in places]
        part.spans = [self.spans[i] for i in places]
        part.templates = tuple(self.templates[t] for t in templates)
        index = torch.tensor(list(places), dtype=torch.int64)
        rows = (torch.tensor([*templates, len(self.templates)])[:, None] * len(self) + index).view(-1)
        if "prompts" in self.__dict__:
            part.__dict__["prompts"] = self.prompts.take(rows[: len(templates) * len(index)])
        if "rewriting" in self.__dict__:
            samples, last = self.rewriting
            part.__dict__["rewriting"] = samples.take(rows), last[rows]
        return part

    def _in_templates(self) -> tuple[list[str], list[int]]:
        """All prompts in the first template, then all in the second, …, and the end of the subject in each text."""
        self.require_subjects()
        texts, ends = [], []
        for template in self.templates:
            before, after = template.split(BARE)
            texts += [before + edit.prompt + after for edit in self.edits]
            ends += [len(before) + spans[-1][1] for spans in self.spans]
        return texts, ends


def checked_templates(contexts: Sequence[str]) -> tuple[str, ...]:
    """The bare template and the contexts. Raises ConfigError if a context does not hold "{}" exactly once."""
    for context in contexts:
        if context.count(BARE) != 1:
            raise ConfigError(f'the context {context!r} needs exactly one "{BARE}", where the prompt goes')
    return (BARE, *contexts)
