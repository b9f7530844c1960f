"""Files are read a piece at a time, and what is found does not depend on where the pieces end."""

from __future__ import annotations

import csv
import gzip
import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastedit import RequestError
from fastedit.requests import load_requests, records
from fastedit.requests.records import read_records

ARRAYS = [
    '[{"a": "b, ]["}, {"c": [1, {"d": "\\"]"}]}]',
    ' \n[ 12 ,\n345, -1e3 , null,"é\\u2028\u2028"\n]\n ',
    "[[],{},[[{}]]]",
    "[]",
    "[\n]",
    "[NaN, true]",
]
BROKEN = ["[", "[1", "[1,", "[1,]", "[,]", "[1 2]", '[{"a": 1}, {"b', "[1] 2", "[1]]", '["a\nb"]', "[" * 100_000]


@pytest.mark.parametrize("text", ARRAYS + BROKEN, ids=lambda text: text[:20])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 18])
def test_an_array_is_what_json_reads(piece: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_PIECE", piece)
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    if text in ARRAYS:
        found = list(read_records(path))
        assert json.dumps([record for _, record in found]) == json.dumps(json.loads(text))
        assert [where for where, _ in found] == [f"{path}, record {i} (counted from 0)" for i in range(len(found))]
    else:
        with pytest.raises(RequestError, match=r"facts\.json, record \d \(counted from 0\): not valid JSON"):
            list(read_records(path))


@pytest.mark.parametrize("kind", ["array", "lines", "table"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_large_file_is_not_held(kind: str, packed: bool, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{i} " + "x" * 200, "target": "y"}) for i in range(20_000)]
    text = {"array": "[" + ",".join(rows) + "]", "lines": "\n".join(rows)}.get(kind) or "prompt,target\n" + "\n".join(
        f"{i} {'x' * 200},y" for i in range(20_000)
    )
    path = tmp_path / "facts"
    path.write_bytes(gzip.compress(text.encode(), 1) if packed else text.encode())
    tracemalloc.start()
    try:
        count = sum(record["target"] == "y" for _, record in read_records(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < len(text) / 2  # two pieces and the line that is read; the text has 4 MB


@pytest.mark.parametrize("content", [b'[{"prompt": "p", "target": "t"}]', b'{"prompt": "p", "target": "t"}'])
def test_a_pipe_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    assert [record for _, record in read_records(path)] == [{"prompt": "p", "target": "t"}]
    writer.join()


@pytest.mark.parametrize("place", [0, 1, 3000])
@pytest.mark.parametrize("kind", ["array", "lines", "table"])
def test_the_first_byte_that_is_not_utf8_is_named(kind: str, place: int, tmp_path: Path) -> None:
    def row(i: int) -> Any:
        return f"p{i},t" if kind == "table" else f'{{"prompt": "p{i}", "target": "t"}}'

    rows = [row(i).encode() for i in range(3001)]
    rows[place] = rows[place].replace(b"p", b"\xe9", 1) if kind == "table" else rows[place].replace(b"t", b"\xe9", 1)
    head, end = {"array": (b"[\n", b"\n]"), "lines": (b"", b""), "table": (b"prompt,target\n", b"")}[kind]
    content = head + (b",\n" if kind == "array" else b"\n").join(rows) + end
    path = tmp_path / "facts"
    path.write_bytes(content)
    line = place + 1 + (kind != "lines")
    with pytest.raises(RequestError, match=rf"facts, line {line}: byte {content.index(0xE9)} is not UTF-8"):
        list(read_records(path))


@pytest.mark.parametrize(
    "text",
    [
        "prompt,target,note\np,t,\n",
        ",prompt,target\n0,p,t\n1,p,t\n",
        "\tprompt\ttarget\n0\tp\tt\n",
        "Prompt, TARGET \np,t\n",
    ],
    ids=["empty cells", "index", "index, tabs", "case"],
)
def test_names_of_columns(text: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    assert [record for _, record in read_records(path)] == [{"prompt": "p", "target": "t"}] * (text.count("\n") - 1)


CELLS: dict[str, tuple[str, Any]] = {
    "JSON": ('["it\'s", "so"]', ["it's", "so"]),
    "Python's list": ("""['p', "it's", 'say "so"']""", ["p", "it's", 'say "so"']),
    "Python's pairs": ("[('q', 'a'), ('r', 'b')]", [("q", "a"), ("r", "b")]),
    "Python's objects": (
        "{'Forgetfulness': [{'prompt': 'q', 'ground_truth': [['a', None]]}]}",
        {"Forgetfulness": [{"prompt": "q", "ground_truth": [["a", None]]}]},
    ),
    "Python's escapes": (r"['it\'s', 'a\nb', 'é']", ["it's", "a\nb", "é"]),
    "a text in brackets": ("[X] is 'so'", "[X] is 'so'"),
    "a list in a text": ("['a', 'b'] has two", "['a', 'b'] has two"),
    "code": ("[x for x in y]", "[x for x in y]"),
    "a mark": ("{subject}", "{subject}"),
    "NumPy's array": ("['p' 'q']", "column 'paraphrases': \"['p' 'q']\" is neither a list nor a text; write a list as"),
    "NaN in a list": ("['p', nan]", "is neither a list nor a text"),
    "a quote too few": ("[['q', 'a], ['r', 'b']]", "is neither a list nor a text"),
}


@pytest.mark.parametrize("name", CELLS)
def test_lists_in_the_cells_of_a_table(name: str, tmp_path: Path) -> None:
    cell, expected = CELLS[name]
    with (tmp_path / "facts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["prompt", "paraphrases"], ["p", cell]])
    ((_, record),) = read_records(tmp_path / "facts.csv")
    if isinstance(record, RequestError):
        assert expected in str(record)
        assert str(record).startswith("column 'paraphrases': ")
        with pytest.raises(RequestError, match=r"^.*/facts\.csv, line 2: column 'paraphrases': "):
            load_requests(tmp_path / "facts.csv")
    else:
        assert record == {"prompt": "p", "paraphrases": expected}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,target,subject,note\nIn Paris, people speak,German\n", "line 2: 3 cells for 4 columns; put cells"),
        ("prompt,target,Target\np,t,u\n", r"facts\.csv: target named more than once"),
    ],
)
def test_tables_that_would_be_misread_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        load_requests(path)


TWICE = {
    "flat": '{"prompt": "p", "target": "t", "target": "u"}',
    "spaces": '{"prompt":"p","target" : "t","target" : "u"}',
    "inside": '{"target": 1, "requested_rewrite": {"target": "t", "prompt": "p", "target": "u"}}',
    "in a list": '{"prompt": "p", "locality": [{"target": "q"}, {"target": "t", "target": "t"}]}',
}
ONCE = [
    {"prompt": 'say "target": or "target" : now', "target": "t"},
    {"prompt": "p", "target": "t", "locality": [{"prompt": "q", "answer": "a"}, {"prompt": 'r":', "answer": "b"}]},
]


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("way", ["line", "array", "over lines"])
def test_a_field_that_is_given_twice_is_refused(way: str, name: str, tmp_path: Path) -> None:
    path, once = tmp_path / "facts", json.dumps(ONCE[0])
    path.write_text(
        {
            "line": f"{once}\n{TWICE[name]}\n",
            "array": f"[{once},\n {TWICE[name]}]",
            "over lines": TWICE[name].replace(",", ",\n"),
        }[way]
    )
    place = {"line": "line 2", "array": r"record 1 \(counted from 0\)", "over lines": r"record 0 \(counted from 0\)"}[
        way
    ]
    with pytest.raises(RequestError, match=rf"facts, {place}: target given more than once in an object; keep one"):
        load_requests(path)


def test_fields_in_several_objects_and_in_texts_are_none_twice(tmp_path: Path) -> None:
    for text in ("\n".join(map(json.dumps, ONCE)), json.dumps(ONCE, indent=1), json.dumps(ONCE[1], indent=1)):
        (tmp_path / "facts").write_text(text)
        assert [record for _, record in read_records(tmp_path / "facts")] == (ONCE if "say" in text else ONCE[1:])


@pytest.mark.parametrize(
    ("names", "said"), [(["Prompt", "TARGET", ""], ""), (["prompt", "target", "Target"], "target named more than once")]
)
def test_names_of_columns_in_parquet(names: list[str], said: str, tmp_path: Path) -> None:
    columns = [pyarrow.array([value]) for value in ("p", "t", "u")]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "facts.parquet")
    if said:
        with pytest.raises(RequestError, match=rf"facts\.parquet: {said}"):
            load_requests(tmp_path / "facts.parquet")
    else:
        assert [record for _, record in read_records(tmp_path / "facts.parquet")] == [{"prompt": "p", "target": "t"}]
