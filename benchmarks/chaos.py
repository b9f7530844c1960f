"""Kill an edit at random moments, damage its state now and then, and compare the result with an undisturbed edit.

    python -m benchmarks.chaos [--edits 20000] [--kills 20] [--damages 5] [--method locft-bf] [--seed 0]
    python -m benchmarks.chaos --ledger [--kills 20] [--method locft-bf] [--seed 0]

Kills are SIGKILL, at a random moment after the process has started to work. Damage is one flipped bit, or a cut, in the
newest state. Every resumed edit has to end with the same bits as the undisturbed one; the exit code says so.

With --ledger the operations of a ledger are killed at any moment. After each kill the ledger has to open to a complete
entry, that of the operation or the one before, with the bits of the undisturbed ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fastedit import WeightDelta
from fastedit.demo import World, checkpoint_path
from fastedit.demo.lexicon import RELATIONS
from fastedit.ledger import Records
from fastedit.weights import LowRank

FLAGS: dict[str, list[str]] = {
    "locft-bf": ["--published", "--epochs", "2", "--stop-loss", "0", "--batch-size", "100"],
    "memit": ["--batch-size", "50", "--steps", "8"],
}


def facts(n: int) -> list[dict[str, Any]]:
    """Different prompts about the people of the fact world, each with a random object of its relation as target."""
    people, rng, records = World().people, random.Random(0), []
    relations = [relation for relation in RELATIONS.values() if relation.subjects is None]
    phrasings = [(r, phrase) for r in relations for phrase in (*r.trained, *r.unseen)]
    for i in range(n):
        relation, phrase = phrasings[i // len(people) % len(phrasings)]
        before = f"Note {i // (len(people) * len(phrasings))}. " if i >= len(people) * len(phrasings) else ""
        subject = people[i % len(people)]
        prompt = before + phrase.format(s=subject)
        records.append({"prompt": prompt, "target": rng.choice(relation.objects), "subject": subject})
    return records


def edit(folder: Path, output: str, method: str) -> subprocess.Popen[bytes]:
    command = ["edit", "--model", checkpoint_path(), "--requests", "facts.jsonl", "--output", output, "--delta-only"]
    command += [
        "--no-evaluate",
        "--method",
        method,
        "--save-every",
        "0.2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *FLAGS[method],
    ]
    return start(folder, command)


def start(folder: Path, command: list[Any]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fastedit", *map(str, command)]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    return subprocess.Popen(words, cwd=folder, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"it failed: {errors.decode()[-500:]}")


def damage(folder: Path, rng: random.Random) -> str:
    """Flip a bit of the newest state, or cut it."""
    *_, newest = sorted((folder / "out.run").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    if rng.random() < 0.5:
        newest.write_bytes(content[: rng.randrange(len(content))])
        return f"{newest.name} cut"
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    newest.write_bytes(content)
    return f"a bit of {newest.name} flipped"


def bits(delta: WeightDelta | None) -> dict[str, torch.Tensor]:
    found = delta.updates if delta else {}
    return {name: torch.cat([u.left.T, u.right], 1) if isinstance(u, LowRank) else u for name, u in found.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def operations(folder: Path, method: str) -> list[list[Any]]:
    """The ledger commands to run, each of which makes one entry; without the ledger's folder."""
    model, everything = ["--model", checkpoint_path(), "--device", "cpu"], facts(120)
    for number, name in enumerate("abc"):
        chunk = everything[40 * number : 40 * number + 40]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in chunk))
    other = next(fact["target"] for fact in everything if fact["target"] != everything[4]["target"])
    first = ["--method", method, "--dtype", "float32", *FLAGS[method]]
    return [
        ["add", *model, "--requests", "a.jsonl", *first],
        ["add", *model, "--requests", "b.jsonl"],
        ["forget", "f3", *model],
        ["replace", "f5", other, *model],
        ["add", *model, "--requests", "c.jsonl"],
        ["rollback", "2"],
        ["forget", "f41", "f42", *model],
    ]


def newest(ledger: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The number of the newest entry of a ledger, and its bits."""
    if not (ledger / "ledger.sqlite").exists():
        return 0, {}
    records = Records(ledger, write=True)
    newest_entry = records.last, bits(records.delta(records.last))
    records.close()
    return newest_entry


def disturb_ledger(folder: Path, args: argparse.Namespace, rng: random.Random) -> None:
    planned, wanted, took = operations(folder, args.method), [bits(None)], [0.0]

    def do(number: int, ledger: str) -> subprocess.Popen[bytes]:
        name, *arguments = planned[number - 1]
        before = [arguments.pop(0)] if name in ("forget", "replace", "rollback") else []
        return start(folder, ["ledger", name, ledger, *before, *arguments])

    for number in range(1, len(planned) + 1):
        began = time.perf_counter()
        finish(do(number, "whole"))
        took.append(time.perf_counter() - began)
        wanted.append(newest(folder / "whole")[1])
    print(f"undisturbed: {len(planned)} operations, {sum(took):.1f} s", flush=True)
    kills = rounds = committed = 0
    while kills < args.kills:
        rounds += 1
        entry = 0
        while entry < len(planned):
            process = do(entry + 1, "out")
            killed = False
            try:
                process.wait(rng.uniform(0.1, 1.1) * took[entry + 1] if kills < args.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills, killed = kills + 1, True
            else:
                finish(process)
            now, theirs = newest(folder / "out")
            if now not in ((entry, entry + 1) if killed else (entry + 1,)) or not same(theirs, wanted[now]):
                sys.exit(f"after kill {kills}, in operation {entry + 1}: entry {now}, OTHER BITS or another entry")
            committed += killed and now > entry
            if killed:
                print(f"kill {kills}, in operation {entry + 1}: entry {now}, the same bits", flush=True)
            entry = now
        shutil.rmtree(folder / "out")
    print(f"{kills} kills ({committed} after the commit), {rounds} rounds: every ledger opened to a whole entry")


def disturb_edit(folder: Path, args: argparse.Namespace, rng: random.Random) -> None:
    def delta_of(output: str) -> dict[str, torch.Tensor]:
        return bits(WeightDelta.load(folder / output / "delta.safetensors"))

    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts(args.edits)))
    began = time.perf_counter()
    finish(edit(folder, "whole", args.method))
    whole = time.perf_counter() - began
    print(f"undisturbed: {whole:.1f} s", flush=True)
    wanted, kills, damages, rounds = delta_of("whole"), 0, 0, 0
    while kills < args.kills or damages < args.damages:
        rounds += 1
        process = edit(folder, "out", args.method)
        while not (folder / "out").exists():
            try:
                process.wait(rng.uniform(0.3, 1.0) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                done = ""
                if damages < args.damages and rng.random() < 0.5 and list((folder / "out.run").glob("*.safetensors")):
                    done, damages = damage(folder, rng), damages + 1
                print(f"kill {kills} {done}", flush=True)
                if (folder / "out.run" / "command.json").exists():
                    process = start(folder, ["edit", "--resume", "out"])
                else:
                    process = edit(folder, "out", args.method)
            else:
                finish(process)
        alike = same(delta_of("out"), wanted)
        print(f"round {rounds}: {'the same bits' if alike else 'OTHER BITS'}", flush=True)
        if not alike:
            sys.exit(1)
        for file in (folder / "out").iterdir():
            file.unlink()
        (folder / "out").rmdir()
    print(f"{kills} kills, {damages} damaged states, {rounds} edits: all ended with the same bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=5)
    parser.add_argument("--method", choices=FLAGS, default="locft-bf")
    parser.add_argument("--ledger", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastedit-chaos-") as name:
        disturb = disturb_ledger if args.ledger else disturb_edit
        disturb(Path(name), args, random.Random(args.seed))


if __name__ == "__main__":
    main()
