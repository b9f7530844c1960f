"""The edits as token samples for LocFT-BF, tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.errors import ConfigError
from fastedit.methods.base import Edit
from fastedit.methods.contexts import sample_contexts
from fastedit.methods.locft_bf.anchors import Anchors, anchor_prompts
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.naming import edit_names, named_error
from fastedit.methods.subjects import subject_ends
from fastedit.models import (
    Budget,
    Model,
    PairError,
    PrefixCache,
    Rows,
    Samples,
    joined,
    plain_state,
    prompt_samples,
    without_rows,
)
from fastedit.progress import Progress, counter


@dataclass(frozen=True)
class TrainingSet:
    """Edits with their samples.

    Attributes:
        samples: one per (prompt, target) pair, with EOS if it is trained: every edit, then the augmented copies of
            each; then the anchors, prompts with a single target row, which predicts the token after them.
        owner: the place of each sample's edit.
        anchors: where the anchors are among the samples.
        trained: [S], the index in each sample of the one token where it trains, -1 for all tokens; None is all tokens
            of all samples.
        budget: memory for what is cached.
    """

    model: Model
    edits: Sequence[Edit]
    samples: Samples
    owner: Sequence[int]
    anchors: Anchors
    trained: Tensor | None
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
        pairs += copies
        owner = [*range(len(edits)), *(i for i in range(len(edits)) for _ in range(config.augment))]
        try:
            samples = model.tokenize(pairs, append_eos=config.eos)
        except PairError as error:

            def source(pair: int) -> tuple[int, str]:
                return owner[pair], copies[pair - len(edits)][0] if pair >= len(edits) else ""

            raise named_error(error, edits, source) from None
        anchors = Anchors(len(samples), [[] for _ in edits])
        trained = _subject_tokens(model, edits, pairs, owner) if config.tokens == "subject" else None
        if config.keeps_anchors:
            subjects = config.anchor_subjects
            found = anchor_prompts(edits, config.anchors, seed=config.seed, subjects=subjects)
            if not found:
                raise ConfigError(
                    f"preserve {config.preserve} needs the edits' prompts with other subjects, and there are none: "
                    "give the edits' subjects as they stand in their prompts, and other subjects as anchor_subjects, "
                    "or take preserve null-space or none"
                )
            texts = [text for _, text, _ in found]
            ids = model.prompt_tokens(texts)
            if missing := without_rows(model.tokenizer, [*{token for some in ids for token in some}], model.vocabulary):
                raise ConfigError(f"anchor_subjects: {missing}")
            samples = samples.join(prompt_samples(ids, [len(tokens) - 1 for tokens in ids]))
            if trained is not None:
                _, subject_last = model.last_tokens(texts, [end for *_, end in found])
                trained = torch.cat([trained, torch.tensor(subject_last)])
            for number, (place, *_) in enumerate(found):
                anchors.of[place].append(number)
                owner.append(place)
        budget = Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)
        return cls(model, edits, samples, owner, anchors, trained, budget, progress)

    @plain_state
    def prefix_cache(self, layer: int) -> PrefixCache:
        """Run the blocks below `layer` for all samples now, and return their cached output."""
        report = counter(self.progress, "prefix", len(self.samples))
        return PrefixCache(self.model.topology, self.samples, layer, budget=self.budget, progress=report)

    def trained_rows(self, rows: Rows) -> Tensor | None:
        """Flat places `b * R + r` of the tokens where training takes place, on the rows' device; None is all."""
        if self.trained is None:
            return None
        place = rows.host_index.view(-1)[rows.token_rows]
        sample = torch.searchsorted(self.samples.offsets, place, right=True) - 1
        wanted, within = self.trained[sample], place - self.samples.offsets[sample]
        return rows.token_rows[(wanted < 0) | (wanted == within)].to(rows.index.device, non_blocking=True)

    def names(self, samples: Sequence[int]) -> str:
        """Names of the edits that some samples belong to."""
        return edit_names(self.edits, [self.owner[i] for i in samples])


def _subject_tokens(
    model: Model, edits: Sequence[Edit], pairs: Sequence[tuple[str, str]], owner: Sequence[int]
) -> Tensor:
    """Index [S] of the subject's last token in each pair's sample; -1 without a subject."""
    found = [subject_ends(edit)[-1:] for edit in edits]
    places = [sample for sample, place in enumerate(owner) if found[place]]
    texts = [pairs[sample] for sample in places]
    ends = [len(pairs[i][0]) - len(edits[owner[i]].prompt) + found[owner[i]][0] for i in places]
    trained = torch.full((len(pairs),), -1)
    trained[places] = torch.tensor(model.last_tokens(texts, ends)[1], dtype=torch.int64)
    return trained


def _augmented(model: Model, edits: Sequence[Edit], config: LocFTBFConfig) -> list[tuple[str, str]]:
    """`config.augment` copies of each edit after random contexts, as (prompt, target) pairs."""
    contexts = sample_contexts(model, max(20, config.augment), seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    pairs = []
    for edit in edits:
        drawn = torch.randperm(len(contexts), generator=generator)[: config.augment].tolist()
        pairs += [(joined(contexts[c], edit.prompt), edit.target) for c in drawn]
    return pairs
