"""Documents from files of text and of JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastedit.errors import RequestError
from fastedit.statistics.documents import read_documents


def test_documents_come_from_plain_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n one\ntwo\n\n \n\nthree", "utf-8")
    assert list(read_documents(path)) == ["one\ntwo", "three"]
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "ä\\nb", "body": "x"}\n\n{"text": "", "body": "y"}\n', "utf-8")
    assert list(read_documents(path)) == ["ä\nb", ""]
    assert list(read_documents(path, "body")) == ["x", "y"]
    shutil.copy(path, tmp_path / "lines.json")
    assert list(read_documents(tmp_path / "lines.json")) == ["ä\nb", ""]
    array = tmp_path / "array.json"
    array.write_text('[\n "one\\n\\ntwo",\n {"text": "three", "body": 3}]')
    assert list(read_documents(array)) == ["one\n\ntwo", "three"]
    with pytest.raises(RequestError, match=r"array.json: record 1 .* no text in the field 'body'; its fields are text"):
        list(read_documents(array, "body"))
    for line, message in (("[]", "no text in the field 'text'"), ("{", "not JSON"), ('{"text": 3}', "no text")):
        path.write_text(json.dumps({"text": "a"}) + "\n" + line)
        with pytest.raises(RequestError, match=f"line 2 .*{message}"):
            list(read_documents(path))
    path.write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert list(read_documents(path)) == ["a"]
    path.write_bytes(b'{"text": "a"}\n\xff')
    with pytest.raises(RequestError, match="UTF-8"):
        list(read_documents(path))
