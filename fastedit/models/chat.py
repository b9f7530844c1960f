"""Put prompts into a tokenizer's chat template as a user's turn, as instruct models were trained to read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.errors import ConfigError, reason

_MARK, _SPACE = "Xq7ZkW", "\t\t"  # placeholders for the user's text, to see what a template puts around it
_OPEN_THOUGHT = re.compile(r"<((?:\w+:)?think(?:ing)?)>\s*$")


@dataclass(frozen=True)
class Chat:
    """The texts of a chat template around a prompt: before it, and after it up to the model's answer.

    If the template lets a model think, ``after`` holds an empty thought. ``trims``: the template removes whitespace
    around the prompt. ``bos`` is not repeated if a prompt begins with it. ``end`` is the token that ends an answer,
    None if that is EOS.
    """

    before: str
    after: str
    trims: bool
    bos: str
    end: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Chat:
        """Read the template of a tokenizer.

        Raises:
            ConfigError: it has none, or one that cannot be used for a single prompt.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template; give prompts as plain text, without chat_template (--chat), or "
                "set tokenizer.chat_template, as instruct models have it"
            )
        user = {"role": "user", "content": _SPACE + _MARK + _SPACE}
        try:
            # templates that do not know enable_thinking ignore it
            text = _rendered(tokenizer, [user], add_generation_prompt=True, enable_thinking=False)
        except Exception as error:  # whatever a template raises
            raise ConfigError(f"the tokenizer's chat template cannot be used: {reason(error)}") from error
        before, *others = text.split(_MARK)
        if len(others) != 1:
            raise ConfigError(
                f"the tokenizer's chat template holds a user's text {len(others)} times; expected it once. Does it "
                "take a text, or only lists of parts?"
            )
        after = others[0]
        trims = not (before.endswith(_SPACE) and after.startswith(_SPACE))
        before, after = before.removesuffix(_SPACE), after.removeprefix(_SPACE)
        if thought := _OPEN_THOUGHT.search(after):
            after = f"{after.rstrip()}\n\n</{thought[1]}>\n\n"
        return cls(before, after, trims, tokenizer.bos_token or "", _end(tokenizer, user))

    def turn(self, prompt: str) -> str:
        """The whole text up to the model's answer."""
        return self.before + self._said(prompt) + self.after

    def place(self, prompt: str, character: int) -> int:
        """The place in `turn(prompt)` of a character of the prompt."""
        said = self._said(prompt)
        return len(self.before) + min(max(0, character - prompt.index(said)), len(said))

    def _said(self, prompt: str) -> str:
        said = prompt.removeprefix(self.bos)
        return said.strip() if self.trims else said


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return text


def _end(tokenizer: Any, user: dict[str, str]) -> int | None:
    """The special token that a template puts after an answer; None if it puts none."""
    try:
        text = _rendered(tokenizer, [user, {"role": "assistant", "content": _MARK}])
    except Exception:  # some templates are for prompts only
        return None
    ending = tokenizer(text.rpartition(_MARK)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return int(ending[0]) if ending and ending[0] in special_tokens(tokenizer).values() else None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer -> their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {str(token): int(token_id) for token_id, token in added.items() if token.special}
    return ids | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
