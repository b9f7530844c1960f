"""Tokens: exact target masks for fast and slow tokenizers, and rows that hold every input once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BOS, EOS, PAIRS, fast_tokenizer, ragged_samples
from transformers import AddedToken, PreTrainedTokenizer

from fastedit.errors import ModelError, RequestError, TensorError
from fastedit.models import PairError, Samples, pack, tokenize
from fastedit.models.tokens import prompt_tokens


class SlowTokenizer(PreTrainedTokenizer):
    """Bytes, in pairs where a text allows it: what a word becomes depends on what stands in front of it."""

    def __init__(self, front: bool = False, back: bool = False, **kwargs: Any) -> None:
        self._front, self._back = front, back
        super().__init__(bos_token=BOS, eos_token=EOS, **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256 + 256 * 256

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        raw = text.encode().hex(" ").split()
        return ["".join(raw[i : i + 2]) for i in range(0, len(raw), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token, 16) + (256 if len(token) == 4 else 0)

    def _convert_id_to_token(self, index: int) -> str:
        return f"{index:02x}" if index < 256 else f"{index - 256:04x}"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes.fromhex("".join(tokens)).decode(errors="replace")

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        return [self.bos_token_id] * self._front + ids + [self.eos_token_id] * self._back


def split(samples: Samples, i: int) -> tuple[list[int], list[int]]:
    """The tokens of a sample in front of its target, and those of its target."""
    ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].tolist()
    start = int(samples.target_start[i])
    return ids[:start], ids[start:]


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed", "metaspace"])
@pytest.mark.parametrize("template", ["$A", f"{BOS} $A", f"{BOS} $A {EOS}"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_targets_of_fast_tokenizers(kind: str, template: str, append_eos: bool) -> None:
    tokenizer = fast_tokenizer(kind, template)
    samples = tokenize(tokenizer, PAIRS, append_eos=append_eos)
    assert len(samples) == len(PAIRS)
    for i, (prompt, target) in enumerate(PAIRS):
        front, back = split(samples, i)
        assert tokenizer.decode(back) == (" " if kind != "metaspace" else "") + target + EOS * append_eos
        n_bos = int(BOS in template)
        assert front[:n_bos] == [tokenizer.bos_token_id] * n_bos
        assert tokenizer.decode(front[n_bos:]) == prompt


@pytest.mark.parametrize(
    ("token", "prompt", "target", "after"),
    [
        (AddedToken("is", rstrip=True), "The capital is", "Lyon", "Lyon"),  # as Phi-3's <|assistant|> does
        (AddedToken("is", rstrip=True), "is", "is", "is"),
        (AddedToken("is", lstrip=True, rstrip=True), "The capital is", "Lyon is", "Lyonis"),
        (AddedToken("is Lyon"), "The capital is", "Lyon, is Lyon", " Lyon, is Lyon"),  # a token of two words
        (AddedToken("is Lyon"), "is", "Lyon", " Lyon"),
        (AddedToken("Lyon", lstrip=True), "The capital is", "Lyon", "Lyon"),
    ],
)
@pytest.mark.parametrize("template", ["$A", f"{BOS} $A {EOS}"])
def test_no_token_of_the_prompt_is_taken_for_the_target(
    token: AddedToken, prompt: str, target: str, after: str, template: str
) -> None:
    tokenizer = fast_tokenizer("byte-level", template)
    tokenizer.add_tokens([token])
    front, back = split(tokenize(tokenizer, [(prompt, target)]), 0)
    assert front == prompt_tokens(tokenizer, [prompt])[0]
    assert tokenizer.decode(back) == after + EOS


@pytest.mark.parametrize("eos", [EOS, "Z"])
@pytest.mark.parametrize("template", [f"{BOS} $A {EOS}", f"$A {EOS} Z", f"$A Z {EOS}", "$A Z Z", f"{BOS} $A"])
def test_what_a_tokenizer_puts_behind_a_text_is_not_of_it(template: str, eos: str) -> None:
    """As BERT's [SEP]: the model is to answer after the prompt, and the target is not trained with it."""
    tokenizer, plain = (
        fast_tokenizer("byte-level", template),
        fast_tokenizer("byte-level", template[: template.index("$A") + 2]),
    )
    tokenizer.eos_token = plain.eos_token = eos
    for found, wanted in zip(
        tokenize(tokenizer, PAIRS).__dict__.values(), tokenize(plain, PAIRS).__dict__.values(), strict=True
    ):
        assert torch.equal(found, wanted)
    prompts = [prompt for prompt, _ in PAIRS]
    assert prompt_tokens(tokenizer, prompts) == prompt_tokens(plain, prompts)


@pytest.mark.parametrize("special", [False, True])
def test_targets_of_slow_tokenizers(special: bool) -> None:
    tokenizer = SlowTokenizer(front=special, back=special)
    assert not tokenizer.is_fast
    samples = tokenize(tokenizer, PAIRS)
    for i, (prompt, target) in enumerate(PAIRS):
        front, back = split(samples, i)
        assert back[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in back[:-1]
        text = f"{prompt} {target}"
        begin = len(prompt.encode()) // 2 * 2  # a pair of bytes across the border belongs to the target
        assert tokenizer.decode(back[:-1]) == text.encode()[begin:].decode()
        assert front[0] == tokenizer.bos_token_id or not special
        assert tokenizer.decode(front[special:]) == text.encode()[:begin].decode()


def test_unusable_pairs_are_named() -> None:
    tokenizer = fast_tokenizer("byte-level")
    with pytest.raises(RequestError, match=r"pair 1: the prompt '' has no tokens"):
        tokenize(tokenizer, [("a", "b"), ("", "b")])
    with pytest.raises(RequestError, match=r"pair 1: prompt and target take \d+ tokens.*context of 9"):
        tokenize(tokenizer, [("a", "b"), ("a " * 20, "b")], max_length=9)
    for pair, longer in ((("a " * 20, "b"), "prompt that begins 'a"), (("a", "b " * 20), "target that begins 'b")):
        with pytest.raises(RequestError, match=f"context of 9; shorten the {longer}"):
            tokenize(tokenizer, [pair], max_length=9)
    for kind in ("byte-level", "metaspace"):
        with pytest.raises(RequestError, match="pair 0: the target ' ' is empty"):
            tokenize(fast_tokenizer(kind), [("a", " ")])
        with pytest.raises(RequestError, match=r"^2 pairs .*pair 1: the target '<s>' is special .*2: .*'<s> <s>'"):
            tokenize(fast_tokenizer(kind), [("a", "<s>b"), ("a", "<s>"), ("a", "<s> <s>")])
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        tokenize(tokenizer, PAIRS)
    assert len(tokenize(tokenizer, PAIRS, append_eos=False)) == len(PAIRS)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("target", [EOS, EOS * 2, f" {EOS} ", BOS, f"{BOS}{EOS}"])
def test_special_tokens_alone_are_no_target(kind: str, target: str) -> None:
    """Else a lone space would be trained."""
    for append_eos in (True, False):
        with pytest.raises(PairError, match=r"is special tokens alone|is empty"):
            tokenize(fast_tokenizer(kind), [("The capital is", target)], append_eos=append_eos)


def test_all_unusable_pairs_are_named() -> None:
    with pytest.raises(PairError, match=r"^2 pairs cannot be used: pair 0: .*no tokens.* \| pair 2: .*empty") as error:
        tokenize(fast_tokenizer("byte-level"), [("", "b"), ("a", "b"), ("a", " ")])
    assert [problem.pair for problem in error.value.problems] == [0, 2]


def test_the_longest_sample_that_fits_is_taken() -> None:
    tokenizer = fast_tokenizer("byte-level")
    samples = tokenize(tokenizer, PAIRS)
    longest = int(samples.lengths.max()) - 1  # the last token is never read
    assert len(tokenize(tokenizer, PAIRS, max_length=longest)) == len(PAIRS)
    with pytest.raises(RequestError):
        tokenize(tokenizer, PAIRS, max_length=longest - 1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("min_row", [1, 24])
def test_rows_hold_every_input_once(packed: bool, min_row: int) -> None:
    samples = ragged_samples([2, 18, 7, 3, 12, 9, 18, 5, 2, 4])
    select = [9, 3, 0, 6, 1, 8]
    rows = pack(samples, select, packed=packed, min_row=min_row)
    index, positions = rows.index.view(-1), rows.position_ids.view(-1)
    expected = [torch.arange(int(samples.offsets[i]), int(samples.offsets[i + 1]) - 1) for i in select]
    real = index[rows.token_rows]
    assert torch.equal(real, torch.cat(expected))
    assert torch.equal(positions[rows.token_rows], torch.cat([torch.arange(len(e)) for e in expected]))
    pads = torch.ones_like(index, dtype=torch.bool)
    pads[rows.token_rows] = False
    own = torch.zeros(len(rows.index), 1) if packed else samples.offsets[select][:, None]
    assert (rows.index == own)[pads.view(rows.index.shape)].all()
    assert not positions[pads].any()
    assert torch.equal(rows.input_ids.view(-1), samples.input_ids[index])
    for b, row in enumerate(rows.position_ids.tolist()):  # a sequence goes on or begins at 0
        assert all(now in (0, before + 1) for before, now in zip([-1, *row], row, strict=False)), b
    if not packed:
        assert rows.index.shape == (len(select), 17)
    else:
        assert rows.index.shape[1] <= max(17, min_row)
        assert len(rows.index) < len(select)


@pytest.mark.parametrize("packed", [True, False])
def test_labels_follow_the_rows_that_predict_them(packed: bool) -> None:
    samples = ragged_samples([2, 18, 7, 3, 12, 9, 18, 5, 2, 4])
    select = torch.tensor([9, 3, 0, 6, 1, 8, 3])  # one of them twice
    rows = pack(samples, select, packed=packed)
    at = rows.index.view(-1)[rows.target_rows]  # flat place of the token that predicts
    assert torch.equal(samples.input_ids[at + 1], rows.labels)
    wanted_at, wanted_of = [], []
    for place, i in enumerate(select.tolist()):
        first, last = int(samples.offsets[i]), int(samples.offsets[i + 1])
        targets = range(first + int(samples.target_start[i]), last)
        wanted_at += [t - 1 for t in targets]
        wanted_of += [place] * len(targets)
    assert at.tolist() == wanted_at
    assert rows.sample_of.tolist() == wanted_of


def test_packing_fills_rows() -> None:
    rng = torch.Generator().manual_seed(0)
    samples = ragged_samples(torch.randint(8, 28, (2_000,), generator=rng).tolist())
    rows = pack(samples, range(len(samples)))
    assert rows.token_rows.numel() / rows.index.numel() > 0.95
    with pytest.raises(TensorError, match="no samples"):
        pack(samples, [])


def test_rows_keep_their_shapes_on_another_device() -> None:
    rows = pack(ragged_samples([5, 9, 3]), [2, 0, 1], min_row=8)
    moved = rows.to("meta")
    for name in ("index", "input_ids", "position_ids", "target_rows", "labels", "sample_of"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(rows, name).shape
    assert torch.equal(moved.host_index, rows.index)
    assert rows.to("cpu") is rows
