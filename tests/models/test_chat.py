"""Chat templates: a prompt is a user's turn, token by token as the tokenizer itself would have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from helpers import BOS, CONTEXTS, EOS, fast_tokenizer, random_edits, tiny_model

from fastedit import ConfigError, Editor, EditRequest
from fastedit.evaluation.questions import prompt_notes
from fastedit.methods.batch import Batch
from fastedit.models import Model, last_tokens, tokenize
from fastedit.models.chat import Chat
from fastedit.models.tokens import prompt_tokens

_EACH = "{% for m in messages %}"
_CHATML = (
    _EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name -> (template, what the empty thought adds, the token that ends an answer)
TEMPLATES = {
    "chatml": (_CHATML, "", "<|im_end|>"),
    "llama3": (
        "{{ bos_token }}" + _EACH + "{{ '<|head|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\n\n' }}{% endif %}",
        "",
        "<|im_end|>",
    ),
    "llama2": (
        _EACH + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "",
        EOS,
    ),
    "thinks if asked": (
        _CHATML.replace(
            "assistant\n'",
            "assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '')",
        ),
        "",
        "<|im_end|>",
    ),
    "opens a thought": (_CHATML.replace("assistant\n'", "assistant\n<think>\n'"), "\n</think>\n\n", "<|im_end|>"),
    "prompts only": (_EACH + "{{ m.content + eos_token }}{% endfor %}", "", None),
}
PROMPTS = ["The capital of Freedonia is", "Zoë's mother tongue is", "2 + 2 ="]


def chatting(name: str, kind: str = "byte-level", around: str = f"{BOS} $A") -> Any:
    tokenizer = fast_tokenizer(kind, around)
    if kind == "byte-level":  # it takes two line breaks for one token, but at the end of a text only
        tokenizer = tokenizer.train_new_from_iterator([f"{prompt} Sylvania\n\n" for prompt in PROMPTS] * 3, 700)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|head|>"]})
    tokenizer.chat_template = TEMPLATES[name][0]
    return tokenizer


def own_tokens(tokenizer: Any, prompt: str, more: str = "") -> list[int]:
    """A prompt as the tokenizer itself puts it, as text and as tokens."""
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids: list[int] = tokenizer(text + more, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_targets_are_as_the_template_has_them(name: str, kind: str) -> None:
    """Nothing stands between the template's ending and the target, and BOS stands once at most."""
    tokenizer = chatting(name, kind)
    chat, (_, thought, end) = Chat.of(tokenizer), TEMPLATES[name]
    pairs = [(prompt, "Sylvania") for prompt in PROMPTS]
    samples = tokenize(tokenizer, pairs, chat=chat)
    ending = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
    for i, (prompt, read) in enumerate(zip(PROMPTS, prompt_tokens(tokenizer, PROMPTS, chat=chat), strict=True)):
        wanted = own_tokens(tokenizer, prompt, thought)
        ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].tolist()
        start = int(samples.target_start[i])
        assert read == ids[:start] == wanted
        assert ids.count(tokenizer.bos_token_id) == wanted.count(tokenizer.bos_token_id) <= 1
        assert tokenizer.decode(ids[start:-1]) == "Sylvania"
        assert ids[-1] == ending


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_subjects_are_found_in_the_users_turn(name: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the template itself says the subject."""
    tokenizer = chatting(name)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% for", "{{ 'Freedonia: ' }}{% for", 1)
    chat = Chat.of(tokenizer)
    if slow:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    prompt = f"{BOS} The capital of Freedonia is"
    end = prompt.index(" is")
    for text in (prompt, (prompt, "Sylvania")):
        (ids,), (last,) = last_tokens(tokenizer, [text], [end], chat=chat)
        assert tokenizer.decode(ids[: last + 1]).endswith("The capital of Freedonia")


@pytest.mark.parametrize("text", [f"{BOS}The capital is", "The capital is", f"{BOS} {BOS} The capital is"])
@pytest.mark.parametrize("around", [f"{BOS} $A", "$A"])
def test_bos_is_not_put_in_front_of_bos(text: str, around: str) -> None:
    tokenizer = fast_tokenizer("byte-level", around)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = plain if text.startswith(BOS) or around == "$A" else [tokenizer.bos_token_id, *plain]
    assert prompt_tokens(tokenizer, [text]) == [wanted]
    (ids,), (last,) = last_tokens(tokenizer, [text], [len(text)])
    assert (ids, last) == (wanted, len(wanted) - 1)
    samples = tokenize(tokenizer, [(text, "Sylvania")])
    assert samples.input_ids[: int(samples.target_start[0])].tolist() == wanted


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "the tokenizer has no chat template; give prompts as plain text"),
        ("{{ raise_exception('no system') }}", "the tokenizer's chat template cannot be used: no system"),
        ("Hello", "the tokenizer's chat template holds a user's text 0 times; expected it once"),
        ("{{ messages[0].content * 2 }}", "holds a user's text 2 times; expected it once"),
    ],
)
def test_templates_that_do_not_serve_are_refused(template: str | None, said: str) -> None:
    tokenizer = fast_tokenizer("byte-level")
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=said):
        Editor(tiny_model("llama"), tokenizer, chat_template=True)


def words_chat(tokenizer: Any) -> Any:
    """The tokenizer of one token a word with a template of its words."""
    found = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token=BOS, eos_token=EOS)
    found.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + ' w9 w10 ' + m.content + ' w11\n' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return found


REQUEST = EditRequest("w20 w21 w22", "w30", "w21", paraphrases=(f"{BOS} w21",), neighbours=(("w40 w41", "w42"),))


@pytest.mark.parametrize(
    ("requests", "chat", "notes"),
    [
        ([EditRequest("w20", "w30")], True, []),
        ([EditRequest("w20", "w30")], False, ["the tokenizer has a chat template"]),
        ([REQUEST] * 2, True, ["2 prompts or answers hold special tokens of the tokenizer ('<s>')"]),
        (
            [EditRequest("w20", f"w30{EOS}")],
            True,
            [f"1 prompts or answers hold special tokens of the tokenizer ('{EOS}')"],
        ),
        ([EditRequest("w20", "w30", neighbours=(("w21", f"w{BOS}"),))], True, ["request 0, neighbour"]),
        ([REQUEST], False, ["the tokenizer has a chat template", "request 0, paraphrase"]),
    ],
)
def test_prompts_with_special_tokens_and_templates_left_out_are_noted_once(
    tokenizer: Any, requests: Sequence[EditRequest], chat: bool, notes: list[str]
) -> None:
    found = prompt_notes(Model.of(tiny_model("llama"), words_chat(tokenizer), chat_template=chat), requests)
    assert len(found) == len(notes)
    assert all(note in said for note, said in zip(notes, found, strict=True))


def test_edits_with_text_that_the_tokenizer_does_not_know_are_noted(tokenizer: Any) -> None:
    model, said = tiny_model("llama"), [("w9", "w10"), ("w9 ß", "w10"), ("w9 w11", "w10 ß"), ("w9 <unk>", "w10")]
    requests = [EditRequest(prompt, target, paraphrases=("ß",)) for prompt, target in said]
    assert [note for note in prompt_notes(Model.of(model, tokenizer), requests) if "does not know" in note] == [
        "2 edits have text that the tokenizer does not know, for which the model reads and learns '<unk>': 1, 2"
    ]
    assert prompt_notes(Model.of(model, fast_tokenizer("byte-level")), requests) == []  # it knows every byte


def test_contexts_stand_inside_the_turn(tokenizer: Any) -> None:
    model = Model.of(tiny_model("llama"), words_chat(tokenizer), chat_template=True)
    edits = random_edits(2, 0)
    batch = Batch(model, edits, CONTEXTS)
    samples, last = batch.rewriting
    for i, template in enumerate(batch.templates):
        for j, edit in enumerate(edits):
            n = 2 * i + j
            said = tokenizer.decode(samples.input_ids[samples.offsets[n] : samples.offsets[n + 1]]).split()
            assert " ".join(said) == f"{BOS} w9 w10 {template.format(edit.prompt)} w11 {edit.target}"
            assert said[: int(last[n]) + 1][-len(edit.subject.split()) :] == edit.subject.split()


def test_edits_and_measures_are_in_the_template_and_say_so(tokenizer: Any) -> None:
    """An edit in the template is the edit of the whole text without it; the answers are generated in it too."""
    config: dict[str, Any] = {"published": True, "layer": 2, "epochs": 40, "lr": 0.02}
    edit = EditRequest("w20 w21 w22", "w30 w31", neighbours=(("w40 w41", "w42"),))
    whole = EditRequest(f"{BOS} w9 w10 w20 w21 w22 w11", "w30 w31", neighbours=((f"{BOS} w9 w10 w40 w41 w11", "w42"),))
    one = Editor(tiny_model("llama"), words_chat(tokenizer), chat_template=True, **config)
    other = Editor(tiny_model("llama"), tokenizer, **config)
    result, same = one.edit([edit]), other.edit([whole])
    assert result.losses == pytest.approx(same.losses)
    assert result.delta.metadata["chat_template"] is True
    assert same.delta.metadata["chat_template"] is False
    report, wanted = one.evaluate([edit]).to_dict(), other.evaluate([whole]).to_dict()
    assert report["reliability"]["generated"] == 1.0
    assert report.pop("chat_template") is True
    assert wanted.pop("chat_template") is False
    assert report == wanted
