"""The edits as LocFT-BF trains on them: token samples, tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastedit.errors import ConfigError
from fastedit.methods.base import Edit
from fastedit.methods.contexts import sample_contexts
from fastedit.methods.locft_bf.anchors import Anchors, anchor_prompts
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.naming import edit_names, named_error
from fastedit.models import (
    Budget,
    Model,
    PairError,
    PrefixCache,
    Samples,
    last_tokens,
    no_autocast,
    prompt_samples,
    tokenize,
)
from fastedit.progress import Progress, counter


@dataclass(frozen=True)
class TrainingSet:
    """Edits with their samples.

    Attributes:
        samples: one a (prompt, target) pair with EOS: every edit, then the augmented copies of each; then the anchors,
            prompts whose one target row predicts what comes after them.
        owner: the place of the edit of each sample.
        anchors: where the anchors are among the samples.
        budget: of what is cached.
    """

    model: Model
    edits: Sequence[Edit]
    samples: Samples
    owner: Sequence[int]
    anchors: Anchors
    budget: Budget
    progress: Progress

    @classmethod
    def of(cls, model: Model, edits: Sequence[Edit], config: LocFTBFConfig, progress: Progress) -> TrainingSet:
        """Tokenize all edits.

        Raises:
            RequestError: edits that are empty or do not fit the model's context; names all of them.
        """
        pairs = [(edit.prompt, edit.target) for edit in edits]
        copies = _augmented(model, edits, config) if config.augment else []
        owner = [*range(len(edits)), *(i for i in range(len(edits)) for _ in range(config.augment))]
        length = model.topology.context_length
        try:
            samples = tokenize(model.tokenizer, [*pairs, *copies], append_eos=True, max_length=length)
        except PairError as error:

            def source(pair: int) -> tuple[int, str]:
                return owner[pair], copies[pair - len(edits)][0] if pair >= len(edits) else ""

            raise named_error(error, edits, source) from None
        anchors = Anchors(len(samples), [[] for _ in edits])
        if config.keeps_anchors:
            subjects = config.anchor_subjects
            found = anchor_prompts(edits, config.anchors, seed=config.seed, subjects=subjects)
            if not found:
                raise ConfigError(
                    f"preserve {config.preserve} needs the edits' prompts with other subjects, and there are none: "
                    "give the edits' subjects as they stand in their prompts, and other subjects as anchor_subjects, "
                    "or take preserve null-space or none"
                )
            ids, last = last_tokens(model.tokenizer, [text for _, text in found], [len(text) for _, text in found])
            samples = samples.join(prompt_samples(ids, last))
            for number, (place, _) in enumerate(found):
                anchors.of[place].append(number)
                owner.append(place)
        budget = Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)
        return cls(model, edits, samples, owner, anchors, budget, progress)

    @no_autocast
    def prefix_cache(self, layer: int) -> PrefixCache:
        """The state of all samples in front of a block, whose frozen prefix runs now."""
        report = counter(self.progress, "prefix", len(self.samples))
        return PrefixCache(self.model.topology, self.samples, layer, budget=self.budget, progress=report)

    def names(self, samples: Sequence[int]) -> str:
        """Names of the edits that some samples belong to."""
        return edit_names(self.edits, [self.owner[i] for i in samples])


def _augmented(model: Model, edits: Sequence[Edit], config: LocFTBFConfig) -> list[tuple[str, str]]:
    """`config.augment` copies of each edit after random contexts, as (prompt, target) pairs."""
    contexts = sample_contexts(model, max(20, config.augment), seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    pairs = []
    for edit in edits:
        drawn = torch.randperm(len(contexts), generator=generator)[: config.augment].tolist()
        pairs += [(f"{contexts[c]} {edit.prompt}", edit.target) for c in drawn]
    return pairs
