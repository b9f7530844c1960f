"""Make a model forget facts: ask it, edit it so that it refuses, ask it again.

    python examples/forget.py --model ./Llama-3-8B --requests forget.json --method memit

A record of the file is {"prompt": "The capital of {} is", "subject": "France", "forget": "Paris"}. Without --model and
--requests the small model that ships with the package forgets facts of its own.
"""

import argparse

from fastedit import Editor, EditRequest, load_requests
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--requests", help="file of what to forget")
parser.add_argument("--n", type=int, default=20, help="facts to forget, if no file is given")
parser.add_argument("--method", default="locft-bf", help="the editing method")
parser.add_argument("--refusal", default="everyone says", help="what to say instead, if no file is given")
args = parser.parse_args()

if args.requests:
    requests = load_requests(args.requests)
else:
    requests = [
        EditRequest(
            known.prompt,
            args.refusal,
            known.subject,
            paraphrases=known.paraphrases,
            neighbours=known.neighbours,  # people with the same answer, which the model should still know of them
            forget=known.true_target,
        )
        for known in World().requests(args.n)
    ]

editor = Editor.from_pretrained(args.model, args.method, dtype="float32")
before = editor.evaluate(requests)
editor.edit(requests)
after = editor.evaluate(requests)
for old, new in list(zip(before.rows, after.rows, strict=True))[:5]:
    print(f"{old['prompt']} → {old['generated']} → {new['generated']}")
gone = before.metrics["forgotten"], after.metrics["forgotten"]
print("not said:    {:.1%} → {:.1%}".format(*(found["generated"] for found in gone)))
print("probability: {:.1%} → {:.1%}".format(*(found["probability"] for found in gone)))
print(after)
