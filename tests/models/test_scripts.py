"""Scripts: where a space stands between a prompt and its target, and tokens that keep to the border."""

from __future__ import annotations

import pytest
from helpers import BOS, EOS
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fastedit.models import joined, last_tokens, tokenize

SPACELESS = [
    ("甲国的首都是", "东城"),
    ("甲国的首都是：", "《东城》"),
    ("「光の国」の首都は", "東京"),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ"),
    ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ"),
    ("រដ្ឋធានីគឺ", "ភ្នំពេញ"),
    ("မြို့တော်မှာ", "နေပြည်တော်"),
    ("他出生于", "1984年"),
    ("他出生于", "1984"),
    ("甲国的首都是哪里?", "东城"),
]
SPACED = [
    ("The capital of Freedonia is", "Sylvania"),
    ("What is 東京?", "Tokyo"),
    ("The capital of China is", "北京"),
    ("美国的首都是", "Washington"),
    ("भारत की राजधानी", "दिल्ली है"),
    ("دارالحکومت ہے", "اسلام آباد"),
    ("대한민국의 수도는", "서울"),
    ("Столица России —", "Москва"),
    ("He works on", ".NET"),
    ("They are called", "!!!"),
    ("It is", '"Weird Al"'),
    ("He was born in", "1984"),
    ("1 + 1 =", "2"),
]


@pytest.mark.parametrize(("prompt", "target"), SPACELESS)
def test_scripts_without_spaces_are_joined_without_one(prompt: str, target: str) -> None:
    assert joined(prompt, target) == prompt + target


@pytest.mark.parametrize(("prompt", "target"), SPACED)
def test_other_texts_are_joined_with_a_space(prompt: str, target: str) -> None:
    assert joined(prompt, target) == f"{prompt} {target}"


@pytest.mark.parametrize("target", [", the capital", ".", "? No", "، والعاصمة", "。", "）"])
def test_no_space_stands_before_a_mark_that_closes(target: str) -> None:
    assert joined("He lives in Paris", target) == "He lives in Paris" + target


def greedy_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that merges whole texts of scripts without spaces, and so across borders."""
    core = Tokenizer(BPE(byte_fallback=kind == "metaspace"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS]
    if kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        special, alphabet = special + [f"<0x{byte:02X}>" for byte in range(256)], []
    trainer = BpeTrainer(vocab_size=900, show_progress=False, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator([(prompt + target)[3:] for prompt, target in SPACELESS] * 4, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(s, core.token_to_id(s)) for s in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("template", ["$A", f"{BOS} $A {EOS}"])
def test_a_prompt_has_the_tokens_that_it_has_alone(kind: str, template: str) -> None:
    tokenizer = greedy_tokenizer(kind, template)
    crossed = [tokenizer(prompt + target).input_ids for prompt, target in SPACELESS]
    samples = tokenize(tokenizer, SPACELESS)
    own = [tokenizer(prompt).input_ids for prompt, _ in SPACELESS]
    if EOS in template:
        own, crossed = [ids[:-1] for ids in own], [ids[:-1] for ids in crossed]
    n_crossed = 0
    for i, (_, target) in enumerate(SPACELESS):
        ids, start = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].tolist(), samples.target_start[i]
        assert ids[:start] == own[i]
        assert tokenizer.decode(ids[start:]) == target + EOS
        n_crossed += ids[:-1] != crossed[i]
    assert n_crossed > 3  # or the tokenizer would test nothing
    # a subject at the end of its prompt ends in front of the target
    ids_of_pairs, last = last_tokens(tokenizer, SPACELESS, [len(prompt) for prompt, _ in SPACELESS])
    assert last == [len(ids) - 1 for ids in own]
    assert [ids[: end + 1] for ids, end in zip(ids_of_pairs, last, strict=True)] == own
