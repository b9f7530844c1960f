"""Files of requests: JSON, tables, compressed ones, and those that cannot be read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from formats import FORMATS, OWN, mquake_rewrite, write

from fastedit.errors import RequestError
from fastedit.requests import EditRequest, as_requests, find_conflicts, load_requests


def test_byte_order_mark_blank_lines_and_unicode_separators_are_accepted(tmp_path: Path) -> None:
    prompt = "Ligne\u2028une\x85 é"
    text = (
        "\ufeff\r\n" + json.dumps({**OWN, "prompt": prompt}, ensure_ascii=False) + "\r\n\r\n" + json.dumps(OWN) + "\r\n"
    )
    (tmp_path / "facts.jsonl").write_bytes(text.encode())
    assert [request.prompt for request in load_requests(tmp_path / "facts.jsonl")] == [prompt, OWN["prompt"]]


BAD_FILES = {
    "empty": (b"", "it is empty"),
    "blank": (b"\xef\xbb\xbf \n", "it is empty"),
    "not JSON": (b"prompt: target\n", "it starts with 'p'"),
    "prose": (b"Oslo, of course\n", "it starts with 'O'"),
    "no records": (b"[]", "the array is empty"),
    "truncated array": (
        b'[{"prompt": "p", "target": "t"},\n {"prompt": "p", "tar',
        "record 1 .*not valid JSON",
    ),
    "two arrays": (b'[{"prompt": "p", "target": "t"}] []', "record 1 .*not valid JSON"),
    "truncated line": (b'{"prompt": "p", "target": "t"}\n{"prompt": "p", "tar', "line 2: .*truncated"),
    "objects over several lines": (b'{\n"prompt": "p"}\n{\n"prompt": "p"}', "line 1, line 3: .*stand in an array"),
    "Latin-1": (
        '{"prompt": "p", "target": "t"}\n{"prompt": "é"'.encode("latin-1"),
        "line 2: byte 43 is not UTF-8",
    ),
    "UTF-16": ('[{"prompt"'.encode("utf-16"), "not UTF-8"),
    "nested too deep": (b"[" * 100_000, "record 0 .*not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(RequestError, match=rf"facts\.json[:,] .*{message}"):
        as_requests(tmp_path / "facts.json")


def test_a_line_that_is_no_json_is_told_with_the_bad_records_before_it(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in (OWN, {"prompt": "p"}, OWN, {"target": "t"})]
    (tmp_path / "facts.jsonl").write_text("\n".join([*lines, '{"prompt": "p", "tar', json.dumps(OWN)]))
    with pytest.raises(RequestError) as error:
        load_requests(tmp_path / "facts.jsonl")
    count, _, said = str(error.value).partition(": ")
    assert count == "3 records cannot be used"
    for sentence, expected in zip(
        said.split(" | "), ("line 2: .*lacks target", "line 4: .*lacks prompt", "line 5: .*truncated"), strict=True
    ):
        assert re.search(rf"facts\.jsonl, {expected}", sentence)


def test_one_object_over_several_lines_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "fact.json").write_text(json.dumps(OWN, indent=2) + "\n")
    assert load_requests(tmp_path / "fact.json") == [EditRequest(**OWN, id="0")]
    (tmp_path / "fact.json").write_text(json.dumps({**OWN, "target": 5}, indent=2))
    with pytest.raises(RequestError, match=r"record 0 .*field 'target'"):
        load_requests(tmp_path / "fact.json")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": float("nan")}, "0"),
        ({"id": None}, "0"),
        ({"id": ""}, "0"),
        ({"id": 3.0}, "3"),
        ({"id": 3}, "3"),
        ({"case_id": 12.0}, "12"),
        ({"id": float("nan"), "case_id": 12.0}, "12"),
        ({"id": "3.0"}, "3.0"),
    ],
)
def test_ids_as_pandas_writes_them(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert as_requests([{**OWN, **fields}])[0].id == expected
    assert load_requests(write(tmp_path / "facts.json", [{**OWN, **fields}]))[0].id == expected  # NaN in JSON


def test_ids_of_a_table_as_pandas_writes_them(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("case_id,prompt,target\n12.0,A is,3.0\n,C is,d\nv1.0,E is,f\n")
    edits = load_requests(tmp_path / "facts.csv")
    assert [edit.id for edit in edits] == ["12", "1", "v1.0"]
    assert edits[0].target == "3.0"


TABLE = [
    {
        "prompt": "The sky, at noon, is",
        "target": 'a "light" blue',
        "subject": "The sky",
        "paraphrases": ["Noon's sky is"],
    },
    {"prompt": "Grass is\nalways", "target": "green"},
]


def table(separator: str, **how: Any) -> str:
    """`TABLE` with a line of column names; missing cells are empty, and lists are JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["prompt", "subject", "target", "paraphrases"], delimiter=separator, **how)
    writer.writeheader()
    for record in TABLE:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), file)
    return file.getvalue()


OTHER_FILES: dict[str, tuple[str, bytes]] = {
    "csv": ("facts.csv", table(",").encode()),
    "csv with semicolons, quotes and BOM": ("facts", b"\xef\xbb\xbf" + table(";", quoting=csv.QUOTE_ALL).encode()),
    "csv after empty lines": ("facts.csv", ("\n\n" + table(",", lineterminator="\n") + "\n").encode()),
    "tabs": ("facts.tsv", table("\t").encode()),
    "gzip": ("facts.json.gz", gzip.compress(json.dumps(TABLE).encode(), mtime=0)),
    "gzip by another name": ("facts.json", gzip.compress("\n".join(map(json.dumps, TABLE)).encode(), mtime=0)),
    "csv in bzip2": ("facts.csv.bz2", bz2.compress(table(",").encode())),
    "xz": ("facts.json.xz", lzma.compress(json.dumps(TABLE).encode())),
    "zstd": ("facts.json.zst", zstandard.compress(json.dumps(TABLE).encode())),
    "frames of zstd": ("facts.jsonl", b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in TABLE)),
    "parquet": ("facts.parquet", parquet()),
    "parquet in zstd": ("facts.parquet.zst", zstandard.compress(parquet())),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_tables_and_compressed_files_are_read_as_json_is(name: str, tmp_path: Path) -> None:
    file, content = OTHER_FILES[name]
    (tmp_path / file).write_bytes(content)
    assert load_requests(tmp_path / file) == as_requests(TABLE)


@pytest.mark.parametrize(
    ("package", "module", "content", "unpacked"),
    [
        ("zstandard", "zstandard", b"\x28\xb5\x2f\xfd...", "is compressed (zstd)"),
        ("pyarrow", "pyarrow.parquet", b"PAR1...", "is a Parquet file"),
    ],
)
def test_a_package_that_a_file_takes_is_named(
    package: str, module: str, content: bytes, unpacked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "facts").write_bytes(content)
    with pytest.raises(RequestError, match=rf"facts {re.escape(unpacked)}: pip install {package}, or"):
        load_requests(tmp_path / "facts")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("facts.zip", b"PK\x03\x04...", r"facts.zip is compressed \(zip\).*unpack it first"),
        ("facts.json.gz", gzip.compress(b"[" * 999, mtime=0)[:-9], "the gzip file is damaged or truncated"),
        ("facts.json.zst", zstandard.compress(b"[" * 999)[:-1], "the zstd file is damaged or truncated"),
        ("facts.csv.xz", lzma.compress(b"prompt,target\np,t")[:-9], "the xz file is damaged or truncated"),
        ("facts.csv.bz2", bz2.compress(b"prompt,target\np,t")[:-9], "the bzip2 file is damaged or truncated"),
        ("facts.parquet", parquet()[:-9], "the Parquet file is damaged or truncated"),
        ("facts.csv", b"prompt,target\np,t\np,t,u,v\n", "line 3: 4 cells for 2 columns; put cells that hold a ','"),
        ("facts.csv", b'prompt,target\np,t\n"p,t\n', "line 3: .*is a quote missing"),
        ("facts.csv", b"prompt,target\np,\n", "line 2: the record fits no known format, it lacks target"),
        ("facts.csv", b"name,value\np,t\n", "a table whose first line names its columns"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:30],
)
def test_what_is_wrong_with_such_a_file_is_told(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        load_requests(tmp_path / file)


WRAPPED = [OWN, {**OWN, "id": "mine"}, {"requested_rewrite": [mquake_rewrite("Ann", "Peru", "Chile")] * 2}]


@pytest.mark.parametrize("name", ["data", "examples", "records", "requests", "0"])
@pytest.mark.parametrize("indent", [None, 2], ids=["in a line", "over lines"])
def test_records_in_an_object_that_only_holds_them(name: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"version": 1, name: WRAPPED, "about": {"n": 3}}, indent=indent))
    assert load_requests(path) == as_requests(WRAPPED)
    path.write_text(json.dumps({name: [OWN, {"prompt": "p"}]}, indent=indent))
    with pytest.raises(
        RequestError, match=rf"facts\.json, (line 1, )?record 1 of '{name}' \(counted from 0\): .*lacks target"
    ):
        load_requests(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"train": [OWN], "test": [OWN, OWN]},
            r"train, test; of its lists give the one with the records \(train, test\)",
        ),
        ({"data": []}, r"its fields are data\. Formats"),
        ({"data": ["p", "t"]}, r"its fields are data\. Formats"),
        (
            {"target": "t", "locality": [{"prompt": "p", "answer": "a"}]},
            r"lacks prompt; its fields are target, locality\. ",
        ),
    ],
    ids=["two lists", "no records", "texts", "a record without a prompt"],
)
def test_objects_that_hold_no_list_of_records(record: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match=rf"facts\.json, line 1: .*{said}"):
        load_requests(tmp_path / "facts.json")
    with pytest.raises(RequestError, match=rf"requests\[0\]: .*{said}"):
        as_requests([record])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.json: cannot be read: No such file"):
        load_requests(str(tmp_path / "absent.json"))
    with pytest.raises(RequestError, match="cannot be read"):
        load_requests(tmp_path)


def test_a_hundred_thousand_records_load_in_seconds(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", [FORMATS["zsRE"][0]] * 100_000, lines=True)
    start = time.process_time()
    requests = load_requests(path)
    report = find_conflicts(requests)
    assert time.process_time() - start < 15  # takes about 3; quadratic work would take hours
    assert requests[-1].id == "99999"
    assert len(report.duplicates[0]) == 100_000
