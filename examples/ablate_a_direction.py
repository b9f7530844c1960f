"""Find the direction of a behaviour between two sets of prompts, take it out of a model, and ask the model again.

    python examples/ablate_a_direction.py --model ./Llama-3-8B --having angry.txt --lacking calm.txt

The files hold a prompt a line; half of each finds the direction, the other half is asked. Without them the small model
that ships with the package unlearns to name trades where it is asked for them, and still names instruments.
"""

import argparse
from pathlib import Path

from fastedit import EditRequest
from fastedit.demo import World, checkpoint_path
from fastedit.demo.lexicon import RELATIONS
from fastedit.directions import ablate, find
from fastedit.evaluation.predict import predict
from fastedit.loading import load_model
from fastedit.models import Model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--having", type=Path, help="prompts that show the behaviour, one a line")
parser.add_argument("--lacking", type=Path, help="prompts that do not, one a line")
parser.add_argument("--layer", type=int, help="after which block to read the direction; by default the middle one")
parser.add_argument("--output", type=Path, help="file for the delta")
args = parser.parse_args()

if args.having and args.lacking:
    sets = [
        [(line, "?") for line in file.read_text("utf-8").splitlines() if line] for file in (args.having, args.lacking)
    ]
else:
    world = World()
    of = {relation: [f for f in world.facts if f.relation == relation][:24] for relation in ("trade", "instrument")}
    sets = [[(RELATIONS[name].trained[0].format(s=f.subject), f.object) for f in facts] for name, facts in of.items()]
having, lacking = sets

network, tokenizer = load_model(args.model, dtype="float32")
found = find(network, tokenizer, [p for p, _ in having[::2]], [p for p, _ in lacking[::2]])
chosen = found[len(found) // 2 if args.layer is None else args.layer]
print(f"block {chosen.layer}: the two sets are {chosen.separation:.1f} standard deviations apart")


def answers() -> list[list[str]]:
    asked = [[EditRequest(prompt, answer) for prompt, answer in some[1::2]] for some in sets]
    both = (predict(Model.of(network, tokenizer), some, kinds=("rewrite",)).answers for some in asked)
    return [[found["rewrite"][0].generated or "" for found in some] for some in both]


delta = ablate(network, chosen.vector)
before = answers()
delta.apply(network)  # delta.revert() takes it back
after = answers()
for name, pairs, old, new in zip(("having", "lacking"), sets, before, after, strict=True):
    for (prompt, _), was, now in list(zip(pairs[1::2], old, new, strict=True))[:3]:
        print(f"{prompt} → {was} → {now}")
    same = sum(was == now for was, now in zip(old, new, strict=True))
    print(f"{name}: {same} of {len(old)} answers are as before")
if args.output:
    delta.save(args.output)
