"""Token samples in flat buffers, exact target masks, and their packing into rows.

A sample is a prompt with its target (`scripts.joined`) and optionally EOS (LocFT-BF, arXiv 2509.22072, section 4). All
samples lie end to end in one buffer; a batch is a small set of rows of indices into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import ModelError, Problem, RequestError, TensorError
from fastedit.models.chat import Chat
from fastedit.models.encode import Text, encode, encode_with_spans, trailing, without_rows

_CHUNK = 8192  # texts per tokenizer call, to bound the memory of Python lists of offsets


@dataclass(frozen=True)
class Samples:
    """Tokenized samples, end to end; all tensors are int64 on the CPU.

    ``input_ids`` [T] holds all tokens of all samples, including the last one of each (EOS or the last target token).
    Sample ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``, with ``offsets`` [N+1]. ``target_start`` [N] is
    the index inside the sample of its first target token, at least 1.
    """

    input_ids: Tensor
    offsets: Tensor
    target_start: Tensor

    def __len__(self) -> int:
        return self.target_start.numel()

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each sample [N], including the last one."""
        return self.offsets.diff()

    def take(self, index: Tensor) -> Samples:
        """The samples at some places [M], in that order."""
        lengths = self.lengths[index]
        owner, within = ragged(lengths)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Samples(self.input_ids[self.offsets[index][owner] + within], offsets, self.target_start[index])

    def join(self, other: Samples) -> Samples:
        """These samples followed by the others."""
        return Samples(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            torch.cat([self.target_start, other.target_start]),
        )


@dataclass(frozen=True)
class PairProblem:
    """Why a (prompt, target) pair cannot be tokenized.

    ``too_long`` is "prompt" or "target" if that has to be shortened. Otherwise it is None, and ``remedy`` says what to
    do.
    """

    pair: int
    reason: str
    beginning: str = ""
    too_long: str | None = None
    remedy: str = "give it a text"

    def sentence(self, *, in_context: bool = False) -> str:
        """State the problem and the remedy; ``in_context`` if the prompt stands after a context."""
        if self.too_long is None:
            return f"{self.reason}; {self.remedy}"
        remedy = f"that begins {self.beginning!r}"
        if in_context:
            return f"{self.reason}; shorten the {self.too_long}, or take shorter contexts, or none"
        return f"{self.reason}; shorten the {self.too_long} {remedy}"


class PairError(RequestError):
    """Pairs that cannot be tokenized; ``problems`` lists all of them."""

    def __init__(self, problems: Sequence[PairProblem]) -> None:
        error = RequestError.of([Problem(f"pair {p.pair}", p.sentence()) for p in problems], "pairs")
        super().__init__(error.text, sentences=error.sentences)
        self.problems = tuple(problems)
        self.args = (problems,)


def tokenize(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    append_eos: bool = True,
    max_length: int | None = None,
    vocabulary: int | None = None,
    chat: Chat | None = None,
) -> Samples:
    """Tokenize (prompt, target) pairs, joined as `scripts.joined` says (+ EOS), and find where each target begins.

    The target begins at the first token that covers a character after the prompt: by character offsets in
    the joint text for fast tokenizers, otherwise where the joint text's tokens differ from those of the prompt.
    BOS is added if the tokenizer adds it. An EOS that the tokenizer adds is not doubled, and is removed without
    ``append_eos``.

    Args:
        max_length: the most tokens that the model can read; it reads all tokens of a sample but the last.
        vocabulary: how many tokens have rows in the model (`Model.vocabulary`).
        chat: treat prompts as a user's turn, and append the token that ends an answer there instead of EOS.

    Raises:
        PairError: targets that are empty or only special tokens, prompts without tokens (nothing could predict the
            target), samples longer than ``max_length``, or tokens outside ``vocabulary``; lists all of them.
        ModelError: with ``append_eos``, the tokenizer has no EOS token, or one outside ``vocabulary``.
    """
    eos: int | None = tokenizer.eos_token_id
    last = eos if chat is None or chat.end is None else chat.end
    if append_eos and last is None:
        raise ModelError("the tokenizer has no EOS token: set tokenizer.eos_token, or do not append EOS")
    if append_eos and vocabulary is not None and (missing := without_rows(tokenizer, [last or 0], vocabulary)):
        raise ModelError(f"the tokenizer's EOS token cannot be trained: {missing}")
    special = {*getattr(tokenizer, "all_special_ids", ())} - {getattr(tokenizer, "unk_token_id", None)}
    encode = _starts_by_offsets if getattr(tokenizer, "is_fast", False) else _starts_by_prompt
    flat: list[int] = []
    offsets, starts = [0], list[int]()
    problems: list[PairProblem] = []
    for first in range(0, len(pairs), _CHUNK):
        chunk = [(chat.turn(p) if chat else p, target) for p, target in pairs[first : first + _CHUNK]]
        for i, (ids, start) in enumerate(zip(*encode(tokenizer, chunk, chat is not None), strict=True), first):
            end = len(ids) - trailing(ids, eos)
            n_read = end - 1 + append_eos
            if vocabulary is not None and (missing := without_rows(tokenizer, ids[:end], vocabulary)):
                problems.append(PairProblem(i, missing.reason, remedy=missing.remedy))
                continue
            problem = _problem(i, *pairs[i], start, end, n_read, max_length)
            shown = [token for token in ids[start:end] if token not in special]
            # an EOS of the target has been taken from the end, and may have left the space in front of it
            if problem is None and not tokenizer.decode(shown).strip():
                problem = PairProblem(i, f"the target {pairs[i][1]!r} is special tokens alone, which no text shows")
            if problem:
                problems.append(problem)
                continue
            flat += ids[:end]
            if append_eos:
                flat.append(last)  # type: ignore[arg-type]  # checked above
            offsets.append(len(flat))
            starts.append(start)
    if problems:
        raise PairError(problems)
    return Samples(torch.tensor(flat, dtype=torch.int64), torch.tensor(offsets), torch.tensor(starts).long())


def _problem(
    pair: int, prompt: str, target: str, start: int, end: int, n_read: int, max_length: int | None
) -> PairProblem | None:
    """The problem of a pair, or None; its target has the tokens from ``start`` up to, not including, ``end``."""
    if start >= end or not target.strip():
        return PairProblem(pair, f"the target {target!r} is empty")
    if start == 0:
        return PairProblem(pair, f"the prompt {prompt!r} has no tokens, so nothing predicts its target")
    if max_length is not None and n_read > max_length:
        reason = f"prompt and target take {n_read} tokens, more than the model's context of {max_length}"
        longer, text = ("prompt", prompt) if start > end - start else ("target", target)
        return PairProblem(pair, reason, text[:60], longer)
    return None


def _starts_by_offsets(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], templated: bool
) -> tuple[list[list[int]], list[int]]:
    all_ids, all_spans = encode_with_spans(tokenizer, pairs, templated=templated)
    starts = []
    for (prompt, _), spans in zip(pairs, all_spans, strict=True):
        edge = len(prompt)  # special tokens span (0, 0) and never pass it
        starts.append(next((t for t, (_, end) in enumerate(spans) if end > edge), len(spans)))
    return all_ids, starts


def _starts_by_prompt(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], templated: bool
) -> tuple[list[list[int]], list[int]]:
    alone = [prompt for prompt, _ in pairs]
    joint, prompts = (encode(tokenizer, texts, templated=templated) for texts in (pairs, alone))
    starts = []
    for ids, prompt_ids in zip(joint, prompts, strict=True):
        both = enumerate(zip(ids, prompt_ids, strict=False))
        starts.append(next((t for t, (a, b) in both if a != b), min(len(ids), len(prompt_ids))))
    return joint, starts


def prompt_tokens(tokenizer: Any, prompts: Sequence[str], *, chat: Chat | None = None) -> list[list[int]]:
    """The tokens of each prompt that a model reads before it answers: at least one, without EOS at the end."""
    if chat is not None:
        return encode(tokenizer, [chat.turn(prompt) for prompt in prompts], templated=True)
    return [ids[: max(1, len(ids) - trailing(ids, tokenizer.eos_token_id))] for ids in encode(tokenizer, prompts)]


def last_tokens(
    tokenizer: Any, texts: Sequence[Text], ends: Sequence[int], *, chat: Chat | None = None
) -> tuple[list[list[int]], list[int]]:
    """Tokens of each text, and the index of the last one that begins before character ``ends[i]``.

    Found by character offsets for fast tokenizers. Otherwise it is the last token of the text cut at that character,
    or the first one in which the whole text differs from the cut text. For a pair, ``ends[i]`` counts in its prompt;
    with ``chat``, in the prompt without the template.
    """
    templated = chat is not None
    if chat is not None:
        said = [text if isinstance(text, str) else text[0] for text in texts]
        ends = [chat.place(prompt, end) for prompt, end in zip(said, ends, strict=True)]
        texts = [chat.turn(text) if isinstance(text, str) else (chat.turn(text[0]), text[1]) for text in texts]
    all_ids: list[list[int]] = []
    last: list[int] = []
    fast = getattr(tokenizer, "is_fast", False)
    for first in range(0, len(texts), _CHUNK):
        chunk, cuts = texts[first : first + _CHUNK], ends[first : first + _CHUNK]
        if fast:
            some_ids, some_spans = encode_with_spans(tokenizer, chunk, templated=templated)
            for spans, end in zip(some_spans, cuts, strict=True):
                last.append(max(t for t, (a, b) in enumerate(spans) if a < min(b, end)))
        else:
            some_ids = encode(tokenizer, chunk, templated=templated)
            whole = (text if isinstance(text, str) else text[0] for text in chunk)
            beginnings = [text[:end] for text, end in zip(whole, cuts, strict=True)]
            parts = encode(tokenizer, beginnings, templated=templated)
            eos = tokenizer.eos_token_id
            last += [_last_shared(ids, part, eos) for ids, part in zip(some_ids, parts, strict=True)]
        all_ids += some_ids
    return all_ids, last


def _last_shared(ids: list[int], part: list[int], eos: int | None) -> int:
    """Index of the last token of ``part``, without EOS, or of the first of ``ids`` that differs from it."""
    length = len(part) - trailing(part, eos)
    return next((t for t in range(min(length, len(ids))) if ids[t] != part[t]), length - 1)


def prompt_samples(ids: Sequence[Sequence[int]], last: Sequence[int]) -> Samples:
    """Samples that end with a token, such as a subject's last one; it is their only target row, without a label."""
    rows = [[*tokens[: end + 1], 0] for tokens, end in zip(ids, last, strict=True)]  # the 0 is only a label
    flat = torch.tensor([token for tokens in rows for token in tokens])
    offsets = torch.tensor([0, *(len(tokens) for tokens in rows)]).cumsum(0)
    return Samples(flat, offsets, torch.tensor(last) + 1)


@dataclass(frozen=True)
class Rows:
    """A batch of samples laid out in B rows of R tokens; all tensors int64.

    ``index`` [B, R]: place of each token in the flat buffers (pads point to 0, or to the first token of the
    sample if the row has only one); ``input_ids`` [B, R];
    ``position_ids`` [B, R], counted from the beginning of each sample and 0 at every pad, so that a pad is a
    separate sequence; ``target_rows`` [M]: flat places ``b * R + r`` that predict a target token, sample after
    sample; ``labels`` [M]: those target tokens; ``sample_of`` [M]: the place in ``select`` of each one's sample.

    Two tensors stay on the CPU, whatever the device: ``host_index`` [B, R], a copy of ``index`` for caches in
    host memory, and ``token_rows`` [K], the flat places that hold a token and not a pad. ``packed``: several
    samples may share a row; otherwise each has its own row and begins at its first place.
    """

    index: Tensor
    input_ids: Tensor
    position_ids: Tensor
    target_rows: Tensor
    labels: Tensor
    sample_of: Tensor
    host_index: Tensor = field(repr=False)
    token_rows: Tensor = field(repr=False)
    packed: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on ``device``, in one copy; from pinned memory if ``non_blocking`` and to a GPU."""
        device = torch.device(device)
        if self.index.device.type == device.type and device.index in (None, self.index.device.index):
            return self
        parts = [getattr(self, name) for name in _MOVED]
        flat = torch.cat([part.reshape(-1) for part in parts])
        if non_blocking and device.type == "cuda" and flat.device.type == "cpu":
            flat = flat.pin_memory()
        flat = flat.to(device, non_blocking=non_blocking)
        moved = torch.split(flat, [part.numel() for part in parts])
        views: Iterable[Any] = (new.view(part.shape) for new, part in zip(moved, parts, strict=True))
        return replace(self, **dict(zip(_MOVED, views, strict=True)))


_MOVED = ("index", "input_ids", "position_ids", "target_rows", "labels", "sample_of")


def pack(
    samples: Samples,
    select: Sequence[int] | Tensor,
    *,
    packed: bool = True,
    min_row: int = 64,
    multiple: int = 1,
    start: Tensor | None = None,
    stop: Tensor | None = None,
) -> Rows:
    """Lay the selected samples out in rows, without their last tokens, which are labels and never inputs.

    Args:
        select: indices of samples; one sample may occur more than once.
        packed: put several samples into a row (first-fit decreasing into rows of max(longest, ``min_row``) tokens, cut
            to the fullest row); otherwise one sample per row, padded at its end.
        min_row: rows are filled up to this many tokens. Longer rows mean fewer pads and more attention.
        multiple: of which the length of packed rows is one, by pads at their ends.
        start: [N], how many tokens at the beginning of each selected sample to leave out, none of which predicts its
            target; positions still count them.
        stop: [N], after how many tokens each selected sample ends; None is all its inputs.

    Returns:
        Rows on the CPU.

    Raises:
        TensorError: nothing selected.
    """
    chosen = torch.as_tensor(select, dtype=torch.int64)
    if not chosen.numel():
        raise TensorError("pack: no samples selected")
    left_out = torch.zeros_like(chosen) if start is None else start
    first = samples.offsets[chosen] + left_out  # [N] place of each sample in the flat buffer
    inputs = (samples.lengths[chosen] - 1 if stop is None else stop) - left_out  # [N]
    if packed:
        bins, starts, n_rows, width = first_fit_decreasing(inputs, min_row)
        width = -(-width // multiple) * multiple
        corner = bins * width + starts  # [N] flat place of each sample's first token
    else:
        n_rows, width = len(chosen), int(inputs.max())
        corner = torch.arange(n_rows) * width

    owner, within = ragged(inputs)  # [K]
    token_rows = corner[owner] + within
    # a sample alone in its row is padded with its own first token, so that no other sample's values get there
    index = torch.zeros(n_rows * width, dtype=torch.int64) if packed else first.repeat_interleave(width)
    index[token_rows] = first[owner] + within
    position_ids = torch.zeros_like(index)
    position_ids[token_rows] = within + left_out[owner]

    begins = samples.target_start[chosen] - left_out
    sample_of, nth = ragged((inputs + 1 - begins).clamp(min=0))  # [M]
    target = begins[sample_of] + nth  # index of the target token in its sample: the token before predicts it
    shape = (n_rows, width)
    return Rows(
        index=index.view(shape),
        input_ids=samples.input_ids[index].view(shape),
        position_ids=position_ids.view(shape),
        target_rows=corner[sample_of] + target - 1,
        labels=samples.input_ids[first[sample_of] + target],
        sample_of=sample_of,
        host_index=index.view(shape),
        token_rows=token_rows,
        packed=packed,
    )


def ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The piece of each element, and its place in the piece, for consecutive pieces of the given lengths [N]."""
    owner = torch.repeat_interleave(lengths)
    within = torch.arange(owner.numel()) - (lengths.cumsum(0) - lengths)[owner]
    return owner, within


def first_fit_decreasing(lengths: Tensor, min_row: int) -> tuple[Tensor, Tensor, int, int]:
    """The bin of each length, its start in the bin, the number of bins, and the fill of the fullest bin."""
    ordered, order = lengths.sort(descending=True, stable=True)
    sizes = ordered.tolist()
    capacity = max(sizes[0], min_row)
    filled: list[int] = []
    bins, starts = [], []
    current, previous = 0, 0
    for size in sizes:
        if size != previous:  # bins that were too full for this size stay too full
            current, previous = 0, size
        while current < len(filled) and filled[current] + size > capacity:
            current += 1
        if current == len(filled):
            filled.append(0)
        bins.append(current)
        starts.append(filled[current])
        filled[current] += size
    assignment = torch.empty((2, len(sizes)), dtype=torch.int64)
    assignment[:, order] = torch.tensor([bins, starts])
    return assignment[0], assignment[1], len(filled), max(filled)
