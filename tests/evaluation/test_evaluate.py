"""Evaluation: batched measures against the plain model, one prompt at a time, and the report made of them."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import fastedit.evaluation.generate as generating
import fastedit.evaluation.predict as predicting
import fastedit.evaluation.questions as questions
import fastedit.evaluation.score as scoring
from fastedit.errors import EditError, FastEditError, RequestError
from fastedit.evaluation.predict import Prediction, Predictions, predict
from fastedit.evaluation.report import compare, evaluate
from fastedit.evaluation.texts import begins_with, cut, normalize
from fastedit.models import Continuations, Model, joined
from fastedit.requests import EditRequest

WORDS = "abcdefghijklmnopqrstuvwxyz ABCDSL.\n"
CONTEXT = 64
TWO = [EditRequest("p", "x", id="one"), EditRequest("p", "x", id="two")]


@lru_cache
def tokenizer(ends_texts: bool = False) -> Any:
    """97 byte-level tokens; token 0 is BOS, put before every text, 1 is EOS, put after it if wanted."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = [WORDS, "the red sea is blue", "St. Louis and D.C.", ".! !. .? ?. ... !.. ?.. ..\n \n\n"] * 9
    trainer = BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A" + " </s>" * ends_texts, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def prompts(n: int, seed: int = 0) -> Iterator[str]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n):
        letters = torch.randint(0, 26, (int(torch.randint(3, 30, (), generator=rng)),), generator=rng)
        yield "".join(WORDS[i] + " " * (i % 4 == 0) for i in letters.tolist()).strip()


def some_requests() -> list[EditRequest]:
    p = list(prompts(40))
    answers = ["one", "St. Louis", "the red sea", "D.C.", "a"]
    return [
        EditRequest(
            prompt=p[3 * i],
            target=answers[i % 5],
            id=f"r{i}",
            true_target=None if i == 3 else answers[(i + 1) % 5],
            paraphrases=(p[3 * i + 1], p[3 * i + 2])[: i % 3],
            neighbours=((p[3 * i + 2], "blue"), (p[0], "far away"))[: 1 + i % 2],
            portability=((p[3 * i + 1], "b.c.d end"),) if i % 2 else (),
        )
        for i in range(7)
    ]


def measured(model: Any, requests: list[EditRequest], **options: Any) -> Predictions:
    return predict(Model.of(model, tokenizer()), requests, **options)


def all_of(predictions: Predictions) -> list[Prediction]:
    return [p for answers in predictions.answers for found in answers.values() for p in found]


@torch.no_grad()
def alone(model: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[bool, ...], float]:
    """Argmax, hits and mean log P of an answer's tokens by the plain model on this one text."""
    encoded = tokenizer()(f"{prompt} {answer}", return_offsets_mapping=True)
    ids = encoded["input_ids"]
    n = sum(end > len(prompt) for _, end in encoded["offset_mapping"])
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -n - 1 : -1].float()
    best = tuple(logits.argmax(-1).tolist())
    logp = logits.log_softmax(-1)[range(n), ids[-n:]].mean().item()
    return best, tuple(a == b for a, b in zip(best, ids[-n:], strict=True)), logp


@torch.no_grad()
def greedy(model: Any, prompt: str, ends: tuple[int, ...], most: int) -> str:
    """The greedy continuation by the plain model, without a cache, up to so many tokens or an end token."""
    ids = ids_of(prompt)
    start = len(ids)
    for _ in range(min(most, CONTEXT + 1 - start)):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    text: str = tokenizer().decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def stopped(text: str, dots: int) -> str:
    """``text`` up to its first newline or the dot after ``dots``."""
    kept = ""
    for c in text:
        if c == "\n" or (c == "." and kept.count(".") == dots):
            break
        kept += c
    return kept.strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_teacher_forced_as_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS", 7 * VOCAB)  # several chunks of rows a batch
    model, requests = tiny_model(family), some_requests()
    predictions = measured(model, requests, generate=False, batch_tokens=150)
    for r, found in zip(requests, predictions.answers, strict=True):
        asked: list[tuple[str, str, str | None]] = [(r.prompt, r.target, r.true_target)]
        asked += [(p, r.target, r.true_target) for p in r.paraphrases]
        asked += [(p, a, r.target) for p, a in r.neighbours] + [(p, a, None) for p, a in r.portability]
        for p, (prompt, answer, other) in zip(all_of(Predictions([found], None)), asked, strict=True):
            best, hits, logp = alone(model, prompt, answer)
            assert (p.prompt, p.answer, p.argmax, p.hits, p.generated) == (prompt, answer, best, hits, None)
            assert p.logp == pytest.approx(logp, abs=2e-5)
            assert (p.other_logp is None) == (other is None)
            if other:
                assert p.other_logp == pytest.approx(alone(model, prompt, other)[2], abs=2e-5)


def test_log_probabilities_of_a_bf16_model_are_fp32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    for request in some_requests():
        one = [EditRequest(request.prompt, request.target)]  # alone in its row: nothing else may differ
        (found,) = all_of(measured(model, one, generate=False))
        assert found.logp == pytest.approx(alone(model, found.prompt, found.answer)[2], abs=1e-5)


@pytest.mark.parametrize(("family", "ends_texts"), [("llama", False), ("llama", True), ("gpt2", False), ("opt", False)])
def test_generated_text_as_one_at_a_time(family: str, ends_texts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests, most = tiny_model(family, seed=3), some_requests(), 32
    if family != "llama":  # they repeat themselves
        monkeypatch.setattr(questions, "_NEW_TOKENS", most := 16)
    end_of_turn = ids_of(" Lo")[1]
    own = model.generation_config
    own.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, min_new_tokens=9, suppress_tokens=[5])
    own.eos_token_id = [1, end_of_turn]
    model.train()  # dropout would show
    predictions = predict(Model.of(model, tokenizer(ends_texts)), requests, batch_tokens=60)
    assert model.training
    assert model.generation_config is own
    model.eval()
    cases, asked = set(), {p.prompt for p in all_of(predictions)}  # by several questions each
    texts = {prompt: greedy(model, prompt, (1, end_of_turn), most) for prompt in asked}
    for p in all_of(predictions):
        dots = {"St. Louis": 1, "D.C.": 1, "b.c.d end": 2}.get(p.answer, 0)
        text = texts[p.prompt]
        kept = stopped(text, dots)
        assert p.generated == kept
        limit = min(most, CONTEXT + 1 - len(ids_of(p.prompt)))
        if kept != text.strip():
            cases.add("newline" if text.strip()[len(kept)] == "\n" else f"{dots} dots")
        else:
            cases.add("EOS" if len(ids_of(text)) - 1 < limit else "context" if limit < 32 else "32 tokens")
    if family == "llama":
        assert cases >= {"32 tokens", "EOS", "context", "newline", "0 dots", "1 dots", "2 dots"}


def spy_on_generation(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Lists that will hold the prompts that are run, and the number of tokens after each."""
    run, steps = [], []

    class Spy(Continuations):
        def __iter__(self) -> Iterator[tuple[int, list[int]]]:
            run.extend(map(tuple, self._prompts))
            found = dict(super().__iter__())
            steps.extend(len(found[i]) for i in range(len(self._prompts)))
            yield from found.items()

    monkeypatch.setattr(generating, "Continuations", Spy)
    return run, steps


def test_every_prompt_is_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = spy_on_generation(monkeypatch)
    measured(tiny_model("llama"), TWO, generate=False)
    assert not run
    predictions = measured(tiny_model("llama"), some_requests() * 2)
    assert sorted(run) == sorted({tuple(ids_of(p.prompt)) for p in all_of(predictions)})


def test_a_model_that_knows_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [  # and what the model goes on with; after nothing, EOS
        ("capital a", "St. Louis", ". is the sea"),
        ("capital of b", "A D.C.", " is the sea"),
        ("a capital of c", "Lo Lo", "\nSt"),
        ("the a capital of d", "red sea", ""),
    ]
    model = tiny_model("llama")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        prompt, answer, more = facts[step % 4]
        ids = torch.tensor([[*ids_of(f"{prompt} {answer}{more}"), 1]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    requests = [EditRequest(p, a, None, None, "blue", (p,), ((p, "blue"),)) for p, a, _ in facts]
    wrong = replace(requests[0], target="St. is")
    steps = spy_on_generation(monkeypatch)[1]
    report = evaluate(model, tokenizer(), [*requests, wrong])
    sizes = [len(ids_of(f"{p} {a}")) - len(ids_of(p)) for p, a, _ in facts]
    assert steps == [sizes[0] + 1, sizes[1], sizes[2] + 1, sizes[3] + 1]  # none after its stop
    assert report.metrics["reliability"]["generated"] == 4 / 5
    assert [row["reliability"]["generated"] for row in report.rows] == [1, 1, 1, 1, 0]
    assert [row["generated"] for row in report.rows[:4]] == ["St. Louis", "A D.C", "Lo Lo", "red sea"]
    assert report.metrics["generalization"] == report.metrics["reliability"]
    hits = alone(model, wrong.prompt, wrong.target)[1]
    assert 0 < sum(hits) < len(hits) == 4
    assert report.metrics["reliability"]["teacher_forced"] == pytest.approx((4 + sum(hits) / 4) / 5)
    assert [report.metrics[name] for name in ("es", "ps", "ns", "score")] == [1, 1, 0, 0]
    assert report.metrics["locality"] == {"teacher_forced": None, "generated": None}
    assert report.metrics["neighbour_accuracy"]["generated"] == 0


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
    ("text", "answer", "prompt", "kept"),
    [
        ("Wham! and more", "Wham", "The band is", "Wham! and more"),  # "!" and "?" stand in English names
        ("Тверь! Это", "Тверь", "The city is", "Тверь"),
        ("1984! Это", "1984", "Год", "1984"),
        ("1984! It", "1984", "The year", "1984! It"),
        ("甲。乙。丙", "甲。乙", "", "甲。乙"),
        ("甲。乙。丙", "甲。", "", "甲"),
        ("दिल्ली॥ यह", "दिल्ली", "", "दिल्ली"),
        ("ལྷ་ས།བོད", "ལྷ་ས", "", "ལྷ་ས"),
        ("ᠤᠯᠠᠭᠠᠨ᠃ ᠪᠠ", "ᠤᠯᠠᠭᠠᠨ", "", "ᠤᠯᠠᠭᠠᠨ"),
        ("ᱨᱟᱺᱪᱤ᱾ ᱟᱨ", "ᱨᱟᱺᱪᱤ", "", "ᱨᱟᱺᱪᱤ"),
        ("ꯏꯝꯐꯥꯜ꯫ ꯑ", "ꯏꯝꯐꯥꯜ", "", "ꯏꯝꯐꯥꯜ"),
        ("东城︒乙", "东城", "", "东城"),
        ("one\r\ntwo\nthree", "one\ntwo", "", "one\r\ntwo"),
        ("one. Two\n\nthree. Four. Five", "One. Two\n\nThree.", "", "one. Two\n\nthree"),
        ("\ntwo", "one", "", ""),
        *((f"Paris{end}London", "Paris", "", "Paris") for end in ("\r\n", "\r", "\x0b", "\x85", "\u2028", "\u2029")),
    ],
)
def test_where_texts_are_cut(text: str, answer: str, prompt: str, kept: str) -> None:
    assert cut(text, answer, prompt) == kept


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


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_perplexity(family: str) -> None:
    model = tiny_model(family)
    text = [" ".join(prompts(6)), next(prompts(1, seed=5)), "", " ".join(prompts(2, seed=6))]
    assert len(ids_of(text[0])) > 2 * CONTEXT
    nll = []
    for ids in map(ids_of, text):
        for t in range(1, len(ids)):
            window = torch.tensor([ids[(t - 1) // CONTEXT * CONTEXT : t]])
            logits = model(input_ids=window, use_cache=False).logits[0, -1]
            nll.append(-logits.log_softmax(-1)[ids[t]].item())
    found = measured(model, [], text=text, batch_tokens=100)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert measured(model, [], text=text[1]).perplexity == measured(model, [], text=text[1:2]).perplexity
    assert measured(model, []).perplexity is None


def test_a_model_without_settings_of_generation_is_measured() -> None:
    model, wanted = tiny_model("llama"), evaluate(tiny_model("llama"), tokenizer(), TWO).to_dict()
    model.generation_config = None
    assert evaluate(model, tokenizer(), TWO).to_dict() == wanted


def test_nan_is_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = math.nan
    for requests, text in (some_requests(), []), ([], ["the red sea"]):
        with pytest.raises(EditError, match="the model gives NaN"):
            measured(model, requests, text=text)


def test_a_prompt_longer_than_the_context_is_named() -> None:
    long = " ".join("x" * 70)
    model, fine = tiny_model("gpt2"), some_requests()
    with pytest.raises(RequestError, match=r"^request r7, rewrite: .*context of 64"):
        measured(model, [*fine[:3], replace(fine[3], id="r7", prompt=long)])
    with pytest.raises(RequestError, match=r"^request 3, neighbour: .*context of 64"):
        measured(model, [*fine[:3], replace(fine[3], id=None, neighbours=((long, "x"),))])
    # all of them, and a prompt that is asked with two answers once
    spoiled = [replace(fine[0], prompt=long), *fine[1:4], replace(fine[4], paraphrases=(f"y{long}",))]
    named = r"^2 prompts cannot be used: request r0, rewrite: [^|]* \| request r4, paraphrase: [^|]*$"
    with pytest.raises(RequestError, match=named):
        measured(model, spoiled)


def test_progress_reaches_its_end() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        seen.setdefault(stage, []).append((done, total))

    options = {"text": ["the sea"] * 3, "batch_tokens": 150, "progress": progress}
    found = measured(tiny_model("llama"), some_requests(), **options)
    assert list(seen) == ["answers", "text", "generation"]
    assert seen["text"][-1] == (3, 3)
    assert seen["generation"][-1][1] == len({p.prompt for p in all_of(found)})
    for steps in seen.values():
        done = [n for n, _ in steps]
        assert done == sorted({*done, steps[0][1]})  # rises to the total
    assert len(seen["answers"]) > 2


def said(hits: str = "1", text: str | None = "x", best: Any = (5,), other: float | None = None) -> Prediction:
    return Prediction("p", "x", best, tuple(c == "1" for c in hits), -1.0, other, text)


def answers(**kinds: list[Prediction]) -> dict[str, list[Prediction]]:
    return {kind: kinds.get(kind, []) for kind in predicting.KINDS}


def test_shares_are_means_over_requests() -> None:
    rephrased = [said("10"), said("0", "y"), said("0", "y"), said("00")]
    one = answers(rewrite=[said("1100")], paraphrase=rephrased)
    two = answers(rewrite=[said("1", "y")], paraphrase=[said("1")], portability=[said("10", "The X.")])
    report = compare(TWO, Predictions([one, two], 7.0))
    assert report.metrics["reliability"] == {"teacher_forced": 0.75, "generated": 0.5}
    assert report.metrics["generalization"] == {"teacher_forced": (1 / 8 + 1) / 2, "generated": 0.75}
    assert report.metrics["portability"] == {"teacher_forced": 0.5, "generated": 1.0}
    assert (report.metrics["perplexity"], report.before, report.n["paraphrase"]) == (7.0, None, 5)
    assert [(row["id"], row["reliability"]["generated"]) for row in report.rows] == [("one", 1), ("two", 0)]


def test_what_begins_with_the_answer_counts_beside_the_strict_match() -> None:
    more = [said(text="X, and y"), said(text="xy"), said(text=None)]
    one = answers(rewrite=[said(text="x of y")], paraphrase=more, neighbour=[said(text="y x")])
    two = answers(rewrite=[said(text="y")], portability=[said(text="The X")])
    report = compare(TWO, Predictions([one, two], None), Predictions([two, one], None))
    begins = {"reliability": 0.5, "generalization": 0.5, "portability": 1, "neighbour_accuracy": 0}
    assert report.metrics["generated_begins"] == begins
    assert report.before is not None
    assert report.before["generated_begins"] == begins
    assert report.metrics["reliability"]["generated"] == report.metrics["generalization"]["generated"] == 0
    assert [row["generated_begins"]["reliability"] for row in report.rows] == [1, 0]
    lines = [line.split() for line in str(report).splitlines()]
    assert [line[3:] for line in lines if line[:3] == ["begins", "with", "it"]] == [
        ["50.0%", "→", "50.0%"], ["50.0%", "→", "50.0%"], ["100.0%", "→", "100.0%"], ["0.0%", "→", "0.0%"]
    ]  # fmt: skip


def test_scores() -> None:
    def report(es: float | None, ps: float | None, ns: list[float | None]) -> Any:
        neighbours = [said(other=x) for x in ns]
        both = answers(rewrite=[said(other=es)], paraphrase=[said(other=ps)], neighbour=neighbours)
        return compare([EditRequest("p", "x")], Predictions([both], None))

    found = report(-1.5, -3.0, [-2.0, -0.5, -1.0, None]).metrics  # a tie is no preference
    assert (found["es"], found["ps"], found["ns"]) == (1, 1, pytest.approx(1 / 3))
    assert found["score"] == pytest.approx(3 / (1 + 1 + 3))
    assert report(-1.5, -0.5, [-2.0]).metrics["score"] == 0
    absent = report(None, -2.0, [-2.0])
    assert (absent.metrics["es"], absent.metrics["score"]) == (None, None)
    assert (absent.n["es"], absent.n["ps"], absent.n["ns"]) == (0, 1, 1)


def test_an_answer_does_not_compete_with_itself() -> None:
    request = EditRequest("ab", "sea", true_target="sea", neighbours=(("cd", "sea"), ("cd", "red")))
    found = measured(tiny_model("llama"), [request], generate=False).answers[0]
    assert found["rewrite"][0].other_logp is None
    assert [p.other_logp is None for p in found["neighbour"]] == [True, False]


def test_locality_is_agreement_with_the_model_before() -> None:
    one = answers(neighbour=[said("00", "Red sea.", (1, 2)), said("1", "y", (3,))])
    after = [one, answers(neighbour=[said("1", None, (4,))])]
    one = answers(neighbour=[said("11", "the red  sea", (9, 2)), said("1", "z", (3,))])
    before = [one, answers(neighbour=[said("0", "y", (8,))])]
    report = compare(TWO, Predictions(after, 8.0), Predictions(before, 6.5))
    assert report.metrics["locality"] == {"teacher_forced": (0.75 + 0) / 2, "generated": 0.5}
    assert report.metrics["neighbour_accuracy"]["teacher_forced"] == (0.5 + 1) / 2
    assert report.before is not None
    assert (report.before["neighbour_accuracy"]["teacher_forced"], report.before["perplexity"]) == (0.5, 6.5)
    assert "6.5 → 8" in str(report)
    assert "50.0% → 75.0%" in str(report)
    other = [answers(neighbour=[replace(p, prompt="q") for p in a["neighbour"]]) for a in before]
    with pytest.raises(RequestError, match="not of the same requests"):
        compare(TWO, Predictions(after, None), Predictions(other, None))


def test_the_same_model_before_and_after_is_local() -> None:
    model, requests = tiny_model("llama"), some_requests()[:3]
    before = measured(model, requests, kinds=("neighbour",))
    assert {kind for a in before.answers for kind, found in a.items() if found} == {"neighbour"}
    same = compare(requests, measured(model, requests), before)
    assert same.metrics["locality"] == {"teacher_forced": 1.0, "generated": 1.0}
    changed = compare(requests, measured(tiny_model("llama", seed=1), requests), before)
    assert changed.metrics["locality"]["teacher_forced"] < 0.5


def test_what_is_absent_is_a_dash() -> None:
    table = str(compare([EditRequest("p", "x")], Predictions([answers(rewrite=[said("10")])], None)))
    cells = {line.strip().split("  ")[0]: line.split()[-2:] for line in table.splitlines()[2:]}
    assert cells["reliability"] == ["50.0%", "100.0%"]
    assert all(cells[name] == ["—", "—"] for name in ("generalization", "locality", "neighbour accuracy"))
    assert all(cells[name][-1] == "—" for name in ("portability", "ES", "PS", "NS", "score", "perplexity"))


def test_the_saved_report_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [answers(rewrite=[said()]), answers(rewrite=[said("0")])]
    report = compare(TWO, Predictions(found, 3.0))
    report.save(path := tmp_path / "report.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [row["reliability"]["teacher_forced"] for row in saved.pop("requests")] == [1, 0]
    assert saved == report.to_dict() == json.loads(json.dumps(report.to_dict()))

    def full_disk(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(FastEditError, match=r"report\.json.*No space left"):
        report.save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
