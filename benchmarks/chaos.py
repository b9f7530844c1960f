"""An edit that is killed at random moments, with its state damaged now and then, against one that is left alone.

    python -m benchmarks.chaos [--edits 20000] [--kills 20] [--damages 5] [--method locft-bf] [--seed 0]

Kills are SIGKILL, at a random moment after the process has started to work. Damage is one flipped bit, or a cut, in the
newest state. Every resumed edit has to end with the same bits as the undisturbed one; the exit code says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
from fastedit.weights import LowRank

FLAGS: dict[str, list[str]] = {
    "locft-bf": ["--published", "--epochs", "2", "--stop-loss", "0", "--batch-size", "100"],
    "memit": ["--batch-size", "50", "--steps", "8"],
}


def facts(n: int) -> list[dict[str, Any]]:
    """Different prompts about the people of the fact world, each with some object of its relation as its target."""
    people, rng, found = World().people, random.Random(0), []
    relations = [relation for relation in RELATIONS.values() if relation.subjects is None]
    phrasings = [(r, phrase) for r in relations for phrase in (*r.trained, *r.unseen)]
    for i in range(n):
        relation, phrase = phrasings[i // len(people) % len(phrasings)]
        before = f"Note {i // (len(people) * len(phrasings))}. " if i >= len(people) * len(phrasings) else ""
        subject = people[i % len(people)]
        prompt = before + phrase.format(s=subject)
        found.append({"prompt": prompt, "target": rng.choice(relation.objects), "subject": subject})
    return found


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
        sys.exit(f"the edit failed: {errors.decode()[-500:]}")


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


def bits(path: Path) -> dict[str, torch.Tensor]:
    found = WeightDelta.load(path / "delta.safetensors").updates
    return {name: torch.cat([u.left.T, u.right], 1) if isinstance(u, LowRank) else u for name, u in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=5)
    parser.add_argument("--method", choices=FLAGS, default="locft-bf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="fastedit-chaos-") as name:
        folder = Path(name)
        (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts(args.edits)))
        began = time.perf_counter()
        finish(edit(folder, "whole", args.method))
        whole = time.perf_counter() - began
        print(f"undisturbed: {whole:.1f} s", flush=True)
        wanted, kills, damages, rounds = bits(folder / "whole"), 0, 0, 0
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
                    if (
                        damages < args.damages
                        and rng.random() < 0.5
                        and list((folder / "out.run").glob("*.safetensors"))
                    ):
                        done, damages = damage(folder, rng), damages + 1
                    print(f"kill {kills} {done}", flush=True)
                    if (folder / "out.run" / "command.json").exists():
                        process = start(folder, ["edit", "--resume", "out"])
                    else:
                        process = edit(folder, "out", args.method)
                else:
                    finish(process)
            found = bits(folder / "out")
            same = found.keys() == wanted.keys() and all(torch.equal(found[path], wanted[path]) for path in wanted)
            print(f"round {rounds}: {'the same bits' if same else 'OTHER BITS'}", flush=True)
            if not same:
                sys.exit(1)
            for file in (folder / "out").iterdir():
                file.unlink()
            (folder / "out").rmdir()
    print(f"{kills} kills, {damages} damaged states, {rounds} edits: all ended with the same bits")


if __name__ == "__main__":
    main()
