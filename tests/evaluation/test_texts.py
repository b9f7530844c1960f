"""Generated texts: where an answer ends, and when it begins with what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from asking import ids_of, tokenizer
from helpers import VOCAB, tiny_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import fastedit.evaluation.generate as generating
from fastedit.evaluation.report import evaluate
from fastedit.evaluation.texts import begins_with, cut, normalize
from fastedit.models import joined
from fastedit.requests import EditRequest

LONG = {
    "longer than 32 tokens": " ".join("zyxwvutsrqponmlkjih"),
    "two lines": "red sea\nblue sea",
    "paragraphs and full stops": "a b. c d\n\ne f. g h",
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    ("more", "matches", "remaining"),
    [("</s>", 1, ""), (". b", 1, ""), ("\nb", 1, ""), (" b a a a a a a a a a", 0, " b")],
)
def test_an_answer_is_read_to_its_end_and_no_further(
    name: str, more: str, matches: float, remaining: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that says it, and then something else."""
    answer = LONG[name]
    said = ids_of(f"a {answer}{more}")[len(ids_of("a")) :]

    class Says:
        def __init__(self, _: Any, prompts: Any, limits: list[int], ended: Any, **options: Any) -> None:
            self.limit, self.ended = limits[0], ended

        def __iter__(self) -> Iterator[tuple[int, list[int]]]:
            over = (i for i, token in enumerate(said, 1) if self.ended(torch.tensor([0]), torch.tensor([token])))
            yield 0, said[: min(next(over, self.limit), self.limit)]

    monkeypatch.setattr(generating, "Continuations", Says)
    report = evaluate(tiny_model("llama"), tokenizer(), [EditRequest("a", answer)])
    assert report.metrics["reliability"]["generated"] == matches
    assert report.metrics["generated_begins"]["reliability"] == 1
    assert report.rows[0]["generated"].startswith(answer.removesuffix(".") + remaining)


SCRIPTS = {  # prompt, answer, and what the model goes on with
    "Chinese": ("甲国的首都是", "东城", "。乙国"),
    "Japanese": ("甲国の首都は", "東京", "！乙国"),
    "half width": ("乙国の首都は", "京東", "｡甲国"),
    "full width": ("丙国的首都是", "1984", "．乙国"),
    "Hindi": ("राजधानी", "नई दिल्ली", "। यह"),
    "Urdu": ("دارالحکومت", "لاہور", "۔ یہ"),
    "Arabic": ("العاصمة", "دمشق", "؟ هي"),
    "Russian": ("Столица", "Тверь", "! Это"),
    "Russian, with a mark inside": ("Игра", "Что? Где", "? Это"),
    "Greek": ("Πόλη", "1821", "! Και"),
    "a newline": ("नदी", "पटना", "\nयह"),
    "another newline": ("The road", "1984", "\u2028It"),
    "Tibetan": ("རྒྱལ་ས་", "ལྷ་ས", "།བོད"),
    "Javanese": ("ꦏꦸꦛ", "ꦗꦏꦂꦠ", "꧉ ꦭꦤ"),
    "English": ("The city", "St. Louis", ". It"),
}


def test_sentences_end_in_every_script() -> None:
    core = Tokenizer(BPE())  # one token a character
    core.decoder = decoders.Fuse()
    texts = [joined(prompt, answer) + more for prompt, answer, more in SCRIPTS.values()]
    trainer = BpeTrainer(vocab_size=VOCAB + 100, special_tokens=["<s>", "</s>"], show_progress=False)
    core.train_from_iterator(list("".join(texts)), trainer)
    own = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    model = tiny_model("llama")
    model.resize_token_embeddings(len(own), mean_resizing=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rows = own(texts).input_ids
    width = max(map(len, rows))
    labels = torch.tensor([ids + [-100] * (width - len(ids)) for ids in rows])
    for _ in range(45):
        optimizer.zero_grad()
        model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
    requests = [EditRequest(prompt, answer, id=script) for script, (prompt, answer, _) in SCRIPTS.items()]
    rows_of_report = evaluate(model, own, requests).rows
    assert {row["id"]: row["reliability"] for row in rows_of_report} == {
        script: {"teacher_forced": 1, "generated": 1} for script in SCRIPTS
    }


@pytest.mark.parametrize(
    ("text", "answer", "kept"),
    [
        ("Yahoo! is old! Yes", "Yahoo", "Yahoo"),
        ("Yahoo! is old! Yes", "Yahoo!", "Yahoo"),
        ("Yahoo! Inc! Yes", "Yahoo! Inc", "Yahoo! Inc"),  # a mark in the answer is no end
        ("Тверь! Это", "Тверь", "Тверь"),
        ("1984? It", "1984", "1984"),
        ("甲。乙。丙", "甲。乙", "甲。乙"),
        ("甲。乙。丙", "甲。", "甲"),
        ("दिल्ली॥ यह", "दिल्ली", "दिल्ली"),
        ("ལྷ་ས།བོད", "ལྷ་ས", "ལྷ་ས"),
        ("ᠤᠯᠠᠭᠠᠨ᠃ ᠪᠠ", "ᠤᠯᠠᠭᠠᠨ", "ᠤᠯᠠᠭᠠᠨ"),
        ("ᱨᱟᱺᱪᱤ᱾ ᱟᱨ", "ᱨᱟᱺᱪᱤ", "ᱨᱟᱺᱪᱤ"),
        ("ꯏꯝꯐꯥꯜ꯫ ꯑ", "ꯏꯝꯐꯥꯜ", "ꯏꯝꯐꯥꯜ"),
        ("东城︒乙", "东城", "东城"),
        ("one\r\ntwo\nthree", "one\ntwo", "one\r\ntwo"),
        ("one. Two\n\nthree. Four. Five", "One. Two\n\nThree.", "one. Two\n\nthree"),
        ("\ntwo", "one", ""),
        *((f"Paris{end}London", "Paris", "Paris") for end in ("\r\n", "\r", "\x0b", "\x85", "\u2028", "\u2029")),
    ],
)
def test_where_texts_are_cut(text: str, answer: str, kept: str) -> None:
    assert cut(text, answer) == kept


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" The  Red Sea", "red sea", True),
        ("D.C", "D.C.", True),
        ("“Lo”\tLo!", "lo lo", True),
        ("Cafe\u0301", "caf\u00e9", True),
        ("theatre", "atre", False),
        ("A", "The", False),
        ("A", "", False),
        ("１９８４年", "1984年", True),
        ("ﾄｳｷｮｳ", "トウキョウ", True),
        ("《东城》", "东城", True),
        ("Straße", "STRASSE", True),
        ("ΟΔΟΣ", "οδος", True),
        ("İstanbul.", "istanbul", True),
        ("«دمشق»", "دمشق", True),
        ("\u200fدمشق", "دمشق", True),
        ("दिल", "दिल्ली", False),
        ("कि", "क", False),
        ("กำ", "กา", False),
        ("a\u0331b", "b", False),
    ],
)
def test_normalize(one: str, other: str, same: bool) -> None:
    assert (normalize(one) == normalize(other)) is same


@pytest.mark.parametrize(
    ("text", "answer", "begins"),
    [
        ("English, and French", "English", True),
        ("English", "english.", True),
        ("Englishman", "English", False),
        ("Old English", "English", False),
        ("the Red Sea and more", "A red sea", True),
        ("“Paris”—the city", "Paris", True),
        ("Paris's river", "Paris", True),
        ("Par", "Paris", False),
        ("1,000 men", "1", False),
        ("3.5", "3", False),
        ("3, 5", "3", True),
        ("5 € only", "5 €", True),
        ("U.S.A", "U.S", False),
        ("St. Louis on the river", "St. Louis", True),
        ("Cafe\u0301 au lait", "Caf\u00e9", True),
        ("Cafe\u0301", "Cafe", False),
        ("東京都にある", "東京", True),
        ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("日々の", "日々", True),
        ("می\u200cخواهم", "می", False),
        ("दिल्ली में", "दिल्ली", True),
        ("दिल्ली", "दिल", False),
        ("½ cup", "1", False),
        ("서울입니다.", "서울", True),
        ("서울이다", "서울", True),
        ("서울에서는 비가", "서울", True),
        ("서울입니", "서울", True),  # cut off by the limit of tokens
        ("파리였습니다", "파리", True),
        ("서울특별시에", "서울", False),
        ("이탈리아입니다", "이", False),
        ("한국어가", "한국", False),
        ("Paris입니다", "Paris", True),
        ("1984년에", "1984", True),
        ("Parisian입니다", "Paris", False),
        ("서울", "서울입니다", False),
        ("", "A", False),
        ("An apple", "an", True),
    ],
)
def test_begins_with(text: str, answer: str, begins: bool) -> None:
    assert begins_with(text, answer) is begins


def test_tokens_that_go_on_behind_a_stop_are_cut() -> None:
    texts = [cut("red sea.\n\nSt. L", "red"), cut(" St. L\n. red", "b.c.d end")]
    assert texts == ["red sea", "St. L"]
