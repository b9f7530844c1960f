"""Collect the statistics of a model from a text file, then edit it with MEMIT.

    python examples/memit_with_your_statistics.py --folder ./kept --model ./Llama-3-8B --text wiki.txt --layers 4-8

Without --model and --text it takes the small model that ships with the package. Statistics are collected once for each
model. Give as --tokens at least ten times the number of inputs of the edited matrix, such as 150000 for Llama-3-8B.
"""

import argparse
import subprocess
import sys
from itertools import islice
from pathlib import Path

from fastedit import Editor, load_requests
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, required=True, help="where the statistics are kept")
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--text", type=Path, help="UTF-8, blank lines between documents")
parser.add_argument("--requests", help="file of edits, with subjects")
parser.add_argument("--n", type=int, default=20, help="edits to make, if no file is given")
parser.add_argument("--layers", default="1-3", help="blocks to edit, such as 4-8")
parser.add_argument("--tokens", default="10000", help="to collect statistics from, at least")
args = parser.parse_args()

args.folder.mkdir(parents=True, exist_ok=True)
if args.text is None:
    args.text = args.folder / "text.txt"
    documents = islice(World().documents(curriculum=False), 1000)
    args.text.write_text("\n\n".join(" ".join(span.text for span in document) for document in documents))
command = ["covariance", "--model", args.model, "--text", args.text, "--layers", args.layers, "--tokens", args.tokens]
subprocess.run([sys.executable, "-m", "fastedit", *command, "--output", args.folder, "--dtype", "float32"], check=True)

first, _, last = args.layers.partition("-")
layers = range(int(first), int(last or first) + 1)
requests = load_requests(args.requests) if args.requests else World().requests(args.n)
editor = Editor.from_pretrained(args.model, "memit", dtype="float32", layers=layers, statistics=args.folder)
editor.edit(requests)
print(editor.evaluate(requests))
