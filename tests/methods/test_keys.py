"""Keys against plain hooks on the model, one prompt at a time; subjects among characters and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, FAMILIES, at_subject, fast_tokenizer, random_edits, tiny_model, wanted_keys
from torch import Tensor

from fastedit import ConfigError, EditError, EditRequest, ModelError, RequestError
from fastedit.methods.batch import Batch
from fastedit.methods.keys import KeyWalk
from fastedit.models import Model, last_tokens, topology


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("average", ["half", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_those_of_a_plain_hook(family: str, average: Any, tokenizer: Any, seed: int) -> None:
    model = tiny_model(family)
    parts, edits = topology(model), random_edits(5, seed)
    with KeyWalk(Batch(Model(parts, tokenizer), edits, CONTEXTS), 1, half=average == "half", batch_tokens=40) as walk:
        for layer in (1, 3):
            walk.advance(layer)
            keys = walk.keys()
            module = parts.resolve(layer, "down_proj")[1]
            assert keys.dtype == torch.float32
            assert_close(keys, wanted_keys(model, module, tokenizer, edits, average))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj", "opt"])
def test_after_a_layer_was_written_the_next_is_that_of_the_changed_model(
    family: str, tokenizer: Any, seed: int
) -> None:
    model = tiny_model(family)
    parts, edits = topology(model), random_edits(5, seed)
    with KeyWalk(Batch(Model(parts, tokenizer), edits, CONTEXTS), 0) as walk:
        for layer in (0, 1, 2):
            walk.advance(layer)
            projection = parts.resolve(layer, "down_proj")[1]
            keys = walk.keys()
            assert_close(keys, wanted_keys(model, projection, tokenizer, edits, "half"))
            for module in ("block", "down_proj"):
                site = parts.resolve(2, module)[1]
                wanted = [at_subject(model, site, tokenizer, e, "{}", output=True) for e in edits]
                assert_close(walk.outputs(2, module), torch.stack(wanted))
            with torch.no_grad():
                weight = projection.get_parameter("weight")
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))
            assert torch.equal(walk.keys(), keys)  # a layer's own weight does not touch its keys
        site = parts.blocks[2]  # the residual of the last layer, measured after it was written
        wanted = [at_subject(model, site, tokenizer, e, "{}", output=True) for e in edits]
        assert_close(walk.outputs(2), torch.stack(wanted))


def test_nothing_is_run_again_from_the_bottom_nor_behind_the_subject(tokenizer: Any) -> None:
    model = tiny_model("llama")
    parts = topology(model)
    assert parts.packs  # measured once, on block 0
    edits = [EditRequest("w10 w11 w12 w13 w14 w15", "w9", "w11"), EditRequest("w16 w17 w18", "w9", "w17")]
    tokens = [0] * 4
    for i, block in enumerate(parts.blocks):

        def count(_: Any, args: tuple[Any, ...], i: int = i) -> None:
            tokens[i] += args[0].numel() // 32

        block.mlp.register_forward_pre_hook(count)
    with KeyWalk(Batch(Model(parts, tokenizer), edits, ["w20 {}"]), 1) as walk:
        assert tokens == [12, 0, 0, 0]  # two bare prompts of 2 tokens up to the subject, padded to the longest
        walk.keys()
        assert tokens == [12, 12, 0, 0]
        walk.advance(2)
        walk.outputs(2)
        assert tokens == [12, 24, 4, 0]
        with pytest.raises(ModelError, match="cannot go back"):
            walk.advance(1)
    with pytest.raises(ModelError, match="closed"):
        walk.keys()


def test_without_contexts_the_bare_prompt_counts_alone(tokenizer: Any, seed: int) -> None:
    model = tiny_model("llama")
    parts, edits = topology(model), random_edits(3, seed)
    module = parts.resolve(2, "down_proj")[1]
    wanted = torch.stack([at_subject(model, module, tokenizer, e, "{}") for e in edits])
    for average in ("half", "uniform"):
        with KeyWalk(Batch(Model(parts, tokenizer), edits), 2, half=average == "half") as walk:
            assert_close(walk.keys(), wanted)


def test_keys_of_half_precision_models_are_fp32(tokenizer: Any, seed: int) -> None:
    parts = topology(tiny_model("llama", dtype=torch.bfloat16))
    with KeyWalk(Batch(Model(parts, tokenizer), random_edits(3, seed), CONTEXTS), 2) as walk:
        assert walk.keys().dtype == walk.outputs(2).dtype == torch.float32


def test_keys_that_are_not_finite_name_their_edit_alone(tokenizer: Any, seed: int) -> None:
    edits = random_edits(6, seed)
    edits[0] = EditRequest("You w10", "w9", "w10", id="bad")
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("You")] = torch.nan
    with KeyWalk(Batch(Model.of(model, tokenizer), edits, CONTEXTS), 1) as walk:
        with pytest.raises(EditError, match="the keys at layer 1 are not finite for edit bad; leave") as error:
            walk.keys()
        assert error.value.edits == ("edit bad",)
        with pytest.raises(EditError, match="the outputs of block 2 are not finite for edit bad; leave"):
            walk.outputs(2)


def test_wrong_input_is_named(tokenizer: Any) -> None:
    parts = topology(tiny_model("llama"))
    good = EditRequest("w10 w11 is", "w12", "w11")

    def run(edit: EditRequest, layer: int = 1, contexts: Sequence[str] = ()) -> None:
        KeyWalk(Batch(Model(parts, tokenizer), [good, edit], contexts), layer)

    with pytest.raises(RequestError, match="edit x: its subject ends at token 65, beyond the model's context of 64"):
        run(EditRequest("w10 " * 64 + "w11", "w12", "w11", id="x"))
    run(EditRequest("w10 " * 63 + "w11 w12 w13", "w12", "w11", id="x"))
    for context in ("no place", "{} {}"):
        with pytest.raises(ConfigError, match="exactly one"):
            run(good, contexts=["{}", context])
    with pytest.raises(ModelError, match="layer 4 does not exist"):
        run(good, layer=4)


def ends(*edits: EditRequest) -> tuple[list[str], list[str]]:
    """The part of each prompt that ends with the subject, and the notes."""
    batch: Any = Batch(None, edits)  # type: ignore[arg-type]  # no model has to look for subjects
    batch.require_subjects()
    return [edit.prompt[: spans[-1][1]] for edit, spans in zip(edits, batch.spans, strict=True)], batch.notes


def test_the_last_place_of_a_subject_counts() -> None:
    once = EditRequest("the home of Ann is", "x", "Ann")
    twice = EditRequest("Ann, said Ann, lives in", "x", "Ann", id="twice")
    inside = EditRequest("Ann likes Anna and", "x", "Ann")  # whole words go before parts of words
    japanese = EditRequest("東京は東京都の", "x", "東京")
    found, notes = ends(once, twice, inside, japanese)
    assert found == ["the home of Ann", "Ann, said Ann", "Ann", "東京は東京"]
    korean = EditRequest("서울 사람이 사는 서울은 서울특별시의", "x", "서울")  # a particle is no part of a word
    assert ends(korean)[0] == ["서울 사람이 사는 서울"]
    assert notes == [
        "the subject occurs more than once in the prompt, and the last occurrence is used: edit twice, edit 3"
    ]
    assert ends(once) == (["the home of Ann"], [])
    many = [EditRequest("Ann and Ann", "x", "Ann")] * 14
    assert ends(*many)[1][0].endswith("edit 8, edit 9 and 4 more")


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("राम ने रामायण", "राम", "राम"),  # a vowel sign goes on with the word
        ("রাম ও রামায়ণ", "রাম", "রাম"),
        ("Zoe met Zoe\u0301 in", "Zoe", "Zoe"),
        ("علی و علی\u200cآباد", "علی", "علی"),
        ("foo and foo_bar", "foo", "foo"),
        ("Zoe\u0308 was born in", "Zo\u00eb", "Zoe\u0308"),  # decomposed here, composed there
        ("Zo\u00eb was born in", "Zoe\u0308", "Zo\u00eb"),
        ("서울의 날씨", "\u1109\u1165\u110b\u116e\u11af", "서울"),
        ("New\u00a0York is in", "New York", "New\u00a0York"),
        ("O\u2019Brien\u2019s home", "O'Brien", "O\u2019Brien"),
        ("the \u201cX\u201d is", '"X"', "the \u201cX\u201d"),
        ("Coca\u2011Cola is", "Coca-Cola", "Coca\u2011Cola"),
        ("Al\u00adban\u200eia is", "Albania", "Al\u00adban\u200eia"),
        ("ＮＡＳＡ is", "NASA", "ＮＡＳＡ"),
        ("Zo\u00eb is", "zoe", None),
        ("Zo\u00eb is", "Zoe", None),
        ("\u1100\u1161\u11a8 is", "가나", None),
        ("é", "\u200e", None),
    ],
)
def test_subjects_are_found_as_a_reader_finds_them(prompt: str, subject: str, expected: str | None) -> None:
    edit = EditRequest(prompt, "x", subject)
    if expected is None:
        with pytest.raises(RequestError):
            ends(edit)
    else:
        assert ends(edit)[0] == [prompt[: prompt.index(expected) + len(expected)]]


def test_an_absent_subject_names_the_edit() -> None:
    with pytest.raises(RequestError, match="edit 0: it has no subject"):
        ends(EditRequest("the home of Ann is", "x"))
    wrong = EditRequest("the home of Ann is", "x", "ann", id="7")
    with pytest.raises(RequestError, match="edit 7: the subject 'ann' is not in the prompt 'the home of Ann is'"):
        ends(EditRequest("a b", "x", "a"), wrong)


class Slow:
    """A tokenizer without character offsets."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

        self.eos_token_id = inner.eos_token_id

    def __call__(self, texts: list[str], **options: Any) -> Any:
        assert not options.get("return_offsets_mapping")
        return self.inner(texts, **options)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>"])
@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed", "metaspace"])
def test_the_last_token_is_the_one_that_holds_the_last_character(kind: str, template: str) -> None:
    tokenizer = fast_tokenizer(kind, template)
    texts = ["The capital of France is", "France", "東京 is in", "naïve café", "a  b", "Franceville"]
    subjects = ["France", "France", "東京", "café", "b", "France"]
    stops = [text.index(subject) + len(subject) for text, subject in zip(texts, subjects, strict=True)]
    ids, last = last_tokens(tokenizer, texts, stops)
    encoded = tokenizer(texts, return_offsets_mapping=True)
    assert ids == encoded["input_ids"]
    for spans, stop, place in zip(encoded["offset_mapping"], stops, last, strict=True):
        assert spans[place][0] < stop <= spans[place][1]
        later = [span for span in spans[place + 1 :] if span[1] > span[0]]
        assert all(start >= stop for start, _ in later)  # of several tokens of one character the last
    assert last_tokens(Slow(tokenizer), texts[:5], stops[:5]) == (ids[:5], last[:5])


def test_many_texts_are_tokenized_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["w10", "w11 w12", "w13 w14 w15", "w16 w17", "w18"]
    stops = [len(text) for text in texts]
    whole = last_tokens(tokenizer, texts, stops)
    monkeypatch.setattr("fastedit.models.tokens._CHUNK", 2)
    assert last_tokens(tokenizer, texts, stops) == whole
    assert whole[1] == [0, 1, 2, 1, 0]
