"""Probe what the fact world's model knows and where: `python -m fastedit.demo.probe --picture FILE.png`.

Prints how many questions it answers, and two tests that a fact is read at the last token of its subject, as
locate-then-edit needs:
an intervention (a vector added there after some block turns the answer to a chosen target) and the causal trace of
ROME (Meng et al. 2022, section 2: corrupt the subject, restore one hidden state, see how much of the answer returns).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.demo import checkpoint_path
from fastedit.demo.lexicon import RELATIONS
from fastedit.demo.world import Draw, Fact, World
from fastedit.evaluation.predict import predict
from fastedit.models import Model, PrefixCache, hooked, pack, resume, tokenize
from fastedit.ops import target_cross_entropy
from fastedit.requests import EditRequest

PARTS = ("before", "subject, first", "subject, middle", "subject, last", "after", "last token")


@dataclass(frozen=True)
class Probe:
    """A fact as a prompt; its subject has the tokens from `first` to `last`, both included, counting BOS."""

    prompt: str
    answer: str
    target: str
    first: int
    last: int


def probes(world: World, tokenizer: Any, n: int, seed: int = 0) -> list[Probe]:
    """`n` facts about people in trained phrasings, each with another object of its relation as target."""
    draw = Draw(f"probes {seed}")
    people = [f for f in world.facts if RELATIONS[f.relation].subjects is None]
    return [_probe(f, tokenizer, draw) for f in draw.shuffled(people)[:n]]


def _probe(fact: Fact, tokenizer: Any, draw: Draw) -> Probe:
    relation = RELATIONS[fact.relation]
    prompt = draw.pick(relation.trained).format(s=fact.subject)
    start = prompt.index(fact.subject)
    end = start + len(fact.subject)
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    inside = [t for t, (a, b) in enumerate(spans) if a < end and b > start]
    target = draw.pick([o for o in relation.objects if o != fact.object])
    return Probe(prompt, fact.object, target, inside[0], inside[-1])


def all_questions(world: World) -> dict[str, list[tuple[str, str]]]:
    """(prompt, answer) pairs by the kind of question."""
    return {
        "trained phrasings": world.questions("trained"),
        "unseen phrasings": world.questions("unseen"),
        "two hops, taught": world.two_hop_questions(taught=True),
        "two hops, untaught": world.two_hop_questions(taught=False),
    }


def answers(model: Model, questions: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Share of questions answered by greedy generation, and the median probability of the true answer."""
    asked = [EditRequest(prompt=q, target=a) for q, a in questions]
    probes = [p["rewrite"][0] for p in predict(model, asked, kinds=("rewrite",)).answers]
    probability = torch.tensor([p.logp * len(p.argmax) for p in probes]).exp().median()
    return sum(bool(p.matches) for p in probes) / len(probes), float(probability)


def intervene(
    model: Model,
    facts: Sequence[Probe],
    block: int,
    *,
    steps: int = 25,
    clamp: float = 4.0,
    relative_lr: float = 0.2,
) -> Tensor:
    """P(target) [N] after at most `steps` Adam steps on a vector added to the output of `block`.

    The vector δ is added at the subject's last token, with ‖δ‖ ≤ clamp·‖h₀‖; the learning rate is
    `relative_lr` times the median root mean square of h₀. The best probability of each fact counts.
    """
    topology = model.topology
    samples = tokenize(model.tokenizer, [(p.prompt, p.target) for p in facts], append_eos=False)
    rows = pack(samples, range(len(facts)), packed=False)
    owner = rows.sample_of
    with PrefixCache(topology, samples, block + 1) as cache:
        hidden = cache.hidden(rows)  # [N, R, h]
    place = torch.arange(len(facts)), torch.tensor([p.last for p in facts])
    h0 = hidden[place]  # [N, h]
    limit = clamp * h0.norm(dim=1, keepdim=True)
    delta = torch.zeros_like(h0, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=relative_lr * h0.square().mean(1).sqrt().median().item())
    best = torch.zeros(len(facts))
    head = topology.head.weight
    assert isinstance(head, Tensor)
    for step in range(steps + 1):
        states = resume(topology, hidden.index_put(place, h0 + delta), rows, block + 1)
        with torch.no_grad():
            logp = topology.logits(states).log_softmax(1).gather(1, rows.labels[:, None])[:, 0]
            best = best.maximum(torch.zeros(len(facts)).index_add(0, owner, logp).exp())
        if step == steps:
            break
        _, grad = target_cross_entropy(states.detach(), head, rows.labels, torch.ones(len(owner)))
        optimizer.zero_grad()
        states.backward(grad, inputs=[delta])
        optimizer.step()
        with torch.no_grad():
            delta *= (limit / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return best


@torch.no_grad()
def causal_trace(model: Model, facts: Sequence[Probe], noise: float = 3.0) -> dict[str, Tensor]:
    """Mean P(first answer token) with the subject corrupted and one hidden state restored: part -> [blocks].

    "clean" and "corrupted" hold the probabilities without and with corruption, []. The noise is Gaussian, `noise` times
    the standard deviation of the token embedding.
    """
    network: Any = model.network
    topology, tokenizer = model.topology, model.tokenizer
    embedding = network.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    n_blocks = topology.n_blocks
    total = {part: torch.zeros(n_blocks) for part in PARTS}
    count = dict.fromkeys(PARTS, 0)
    ends = torch.zeros(2)
    for probe in facts:
        ids = torch.tensor([tokenizer(probe.prompt).input_ids])
        answer = tokenizer(f" {probe.answer}", add_special_tokens=False).input_ids[0]
        width = ids.shape[1]
        clean = network(ids, output_hidden_states=True)
        states = torch.stack(clean.hidden_states[1:n_blocks])[:, 0]  # [blocks - 1, T, h], before the final norm
        embedded = embedding(ids).repeat(n_blocks * width + 1, 1, 1)
        spoilt = slice(probe.first, probe.last + 1)
        scale = noise * embedding.weight.std()
        embedded[:, spoilt] += scale * torch.randn(embedded[0, spoilt].shape, generator=generator)
        handles = (
            topology.blocks[block + 1].register_forward_pre_hook(_restore(states[block], block), with_kwargs=True)
            for block in range(n_blocks - 1)
        )
        with hooked(handles):
            probability = network(inputs_embeds=embedded).logits[:, -1].softmax(1)[:, answer]
        clean_p = clean.logits[0, -1].softmax(0)[answer]
        ends += torch.stack([clean_p, probability[-1]])
        grid = probability[:-1].view(n_blocks, width).clone()  # [block, token]
        grid[-1, -1] = clean_p  # after the last block only the last token is read
        for t in range(width):
            part = _part(t, probe, width)
            total[part] += grid[:, t]
            count[part] += 1
    means = {part: total[part] / max(1, count[part]) for part in PARTS}
    return means | {"clean": ends[0] / len(facts), "corrupted": ends[1] / len(facts)}


def _restore(clean: Tensor, block: int) -> Any:
    """A hook that puts token t's clean state [T, h] into row block·T + t of the batch, for each t."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        at = torch.arange(len(clean))
        hidden[block * len(clean) + at, at] = clean
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return hook


def _part(t: int, probe: Probe, width: int) -> str:
    if t == width - 1:
        return "last token"
    if t < probe.first:
        return "before"
    if t > probe.last:
        return "after"
    if t == probe.last:
        return "subject, last"
    return "subject, first" if t == probe.first else "subject, middle"


def draw_trace(trace: dict[str, Tensor], path: Path) -> None:
    """Draw the causal trace, tokens by blocks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid = torch.stack([trace[part] for part in PARTS])
    figure, axes = plt.subplots(figsize=(7, 3.2), constrained_layout=True)
    image = axes.imshow(grid, aspect="auto", cmap="Purples", vmin=float(trace["corrupted"]), vmax=float(trace["clean"]))
    axes.set_yticks(range(len(PARTS)), PARTS)
    axes.set_xticks(range(grid.shape[1]))
    axes.set_xlabel("block whose output is restored")
    axes.set_title("Probability of the answer, subject corrupted, one state restored")
    figure.colorbar(image, label="P(answer)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=checkpoint_path())
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--n", type=int, default=500, help="facts to change; asked: 10 n, traced: n / 5")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = Model.of(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(), tokenizer)
    facts = probes(World(), tokenizer, args.n)
    print("questions           greedy generation  median P(answer)")
    for name, questions in all_questions(World()).items():
        answered, probability = answers(parts, Draw("probe").shuffled(questions)[: 10 * args.n])
        print(f"{name:18}  {answered:17.4f}  {probability:16.3f}")
    print("block  share of facts turned (P(target) > 0.9)  median P(target)")
    for block in range(parts.topology.n_blocks - 1):
        p = intervene(parts, facts, block)
        print(f"{block:5d}  {(p > 0.9).float().mean():38.3f}  {p.median():16.3f}")
    trace = causal_trace(parts, facts[: args.n // 5])
    print(f"causal trace: clean {trace['clean']:.3f}, corrupted {trace['corrupted']:.3f}")
    for part in PARTS:
        print(f"{part:>16}  " + " ".join(f"{p:.2f}" for p in trace[part].tolist()))
    if args.picture:
        draw_trace(trace, args.picture)


if __name__ == "__main__":
    main()
