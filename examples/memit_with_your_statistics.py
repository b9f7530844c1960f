"""Collect the statistics of a model from a text file, as `fastedit covariance` does, then edit it with MEMIT.

    python examples/memit_with_your_statistics.py --folder ./kept --model ./Llama-3-8B --text wiki.txt --layers 4-8

Without --model and --text it takes the small model that ships with the package. Statistics are collected once for each
model. Give as --tokens at least ten times the number of inputs of the edited matrix, such as 150000 for Llama-3-8B.
"""

import argparse
from itertools import islice
from pathlib import Path

from fastedit import Editor, load_requests
from fastedit.demo import World, checkpoint_path
from fastedit.statistics.collect import collect

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, required=True, help="where the statistics are kept")
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--text", type=Path, help="UTF-8, blank lines between documents")
parser.add_argument("--requests", help="file of edits, with subjects")
parser.add_argument("--n", type=int, default=20, help="edits to make, if no file is given")
parser.add_argument("--layers", default="1-3", help="blocks to edit, such as 4-8")
parser.add_argument("--tokens", type=int, default=10_000, help="to collect statistics from, at least")
args = parser.parse_args()

if args.text:
    documents = args.text.read_text(encoding="utf-8").split("\n\n")
else:
    drawn = islice(World().documents(curriculum=False), 1000)
    documents = [" ".join(span.text for span in document) for document in drawn]
first, _, last = args.layers.partition("-")
layers = range(int(first), int(last or first) + 1)
requests = load_requests(args.requests) if args.requests else World().requests(args.n)

editor = Editor.from_pretrained(args.model, "memit", dtype="float32", layers=layers, statistics=args.folder)
collect(editor.parts, documents, layers, max_tokens=args.tokens, directory=args.folder)
editor.edit(requests)
print(editor.evaluate(requests))
