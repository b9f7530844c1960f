"""The edits as token samples for LocFT-BF, tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastedit.errors import ConfigError
from fastedit.methods.batch import Batch
from fastedit.methods.contexts import sample_contexts
from fastedit.methods.locft_bf.anchors import Anchors, anchor_prompts
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.naming import named_error
from fastedit.models import (
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
    """A batch of edits with the samples to train on.

    Attributes:
        samples: one per (prompt, target) pair, with EOS if it is trained: every edit, then the augmented copies of
            each; then the anchors, prompts with a single target row, which predicts the token after them.
        owner: the place of each sample's edit.
        anchors: where the anchors are among the samples.
        trained: [S], the index in each sample of the one token where it trains, -1 for all tokens; None is all tokens
            of all samples.
    """

    batch: Batch
    samples: Samples
    owner: Sequence[int]
    anchors: Anchors
    trained: Tensor | None

    @classmethod
    def of(cls, batch: Batch, config: LocFTBFConfig) -> TrainingSet:
        """Tokenize all edits.

        Raises:
            RequestError: edits that are empty or do not fit the model's context; names all of them.
        """
        model, edits = batch.model, batch.edits
        pairs = [(edit.prompt, edit.target) for edit in edits]
        copies = _augmented(batch, config) if config.augment else []
        pairs += copies
        owner = [*range(len(edits)), *(i for i in range(len(edits)) for _ in range(config.augment))]
        try:
            samples = model.tokenize(pairs, append_eos=config.eos)
        except PairError as error:

            def source(pair: int) -> tuple[int, str]:
                return owner[pair], copies[pair - len(edits)][0] if pair >= len(edits) else ""

            raise named_error(error, edits, source) from None
        anchors = Anchors(len(samples), [[] for _ in edits])
        trained = _subject_tokens(batch, pairs, owner) if config.tokens == "subject" else None
        if config.keeps_anchors:
            subjects = config.anchor_subjects
            prompts = anchor_prompts(edits, batch.spans, config.anchors, seed=config.seed, subjects=subjects)
            if not prompts:
                raise ConfigError(
                    f"preserve {config.preserve} needs the edits' prompts with other subjects, and there are none: "
                    "give the edits' subjects as they stand in their prompts, and other subjects as anchor_subjects, "
                    "or take preserve null-space or none"
                )
            texts = [text for _, text, _ in prompts]
            ids = model.prompt_tokens(texts)
            if missing := without_rows(model.tokenizer, [*{token for some in ids for token in some}], model.vocabulary):
                raise ConfigError(f"anchor_subjects: {missing}")
            samples = samples.join(prompt_samples(ids, [len(tokens) - 1 for tokens in ids]))
            if trained is not None:
                _, subject_last = model.last_tokens(texts, [end for *_, end in prompts])
                trained = torch.cat([trained, torch.tensor(subject_last)])
            for number, (place, *_) in enumerate(prompts):
                anchors.by_edit[place].append(number)
                owner.append(place)
        return cls(batch, samples, owner, anchors, trained)

    def reporting(self, progress: Progress) -> TrainingSet:
        """The same set with another progress callback."""
        return replace(self, batch=self.batch.reporting(progress))

    @plain_state
    def prefix_cache(self, layer: int) -> PrefixCache:
        """Run the blocks below `layer` for all samples now, and return their cached output."""
        batch = self.batch
        report = counter(batch.progress, "prefix", len(self.samples))
        return PrefixCache(batch.model.topology, self.samples, layer, budget=batch.budget, progress=report)

    def trained_rows(self, rows: Rows) -> dict[int, Tensor] | None:
        """The rows of an input where training takes place, by the number of its rows, on their device; None is all.

        A module's input has either all places `b * R + r` or those of tokens alone.
        """
        if self.trained is None:
            return None
        place = rows.host_index.view(-1)[rows.token_rows]
        sample = torch.searchsorted(self.samples.offsets, place, right=True) - 1
        wanted, within = self.trained[sample], place - self.samples.offsets[sample]
        tokens = ((wanted < 0) | (wanted == within)).nonzero()[:, 0]
        trained = {len(rows.token_rows): tokens, rows.index.numel(): rows.token_rows[tokens]}
        return {n: x.to(rows.index.device, non_blocking=True) for n, x in trained.items()}

    def names(self, samples: Sequence[int]) -> str:
        """Names of the edits that some samples belong to."""
        return self.batch.names([self.owner[i] for i in samples])


def _subject_tokens(batch: Batch, pairs: Sequence[tuple[str, str]], owner: Sequence[int]) -> Tensor:
    """Index [S] of the subject's last token in each pair's sample; -1 without a subject."""
    chosen = [sample for sample, place in enumerate(owner) if batch.spans[place]]
    ends = []
    for sample in chosen:
        place, text = owner[sample], pairs[sample][0]  # which ends with the edit's prompt
        ends.append(len(text) - len(batch.edits[place].prompt) + batch.spans[place][-1][1])
    trained = torch.full((len(pairs),), -1)
    _, last = batch.model.last_tokens([pairs[sample] for sample in chosen], ends)
    trained[chosen] = torch.tensor(last, dtype=torch.int64)
    return trained


def _augmented(batch: Batch, config: LocFTBFConfig) -> list[tuple[str, str]]:
    """`config.augment` copies of each edit after random contexts, as (prompt, target) pairs."""
    contexts = sample_contexts(batch.model, max(20, config.augment), seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    pairs = []
    for edit in batch.edits:
        drawn = torch.randperm(len(contexts), generator=generator)[: config.augment].tolist()
        pairs += [(joined(contexts[c], edit.prompt), edit.target) for c in drawn]
    return pairs
