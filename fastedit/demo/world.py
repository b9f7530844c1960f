"""The fact world: a closed, seeded world of people, towns and companies, with all facts about them.

Pretrained weights cannot be fetched everywhere, so the package ships a small model trained on this world.
Names of people are made of shared pieces (given name x family name x village), so that no single token, and no
pair of pieces, tells who is meant: a model has to assemble the subject before it can recall anything.
All choices use `random.Random.random`, because Python guarantees its stream across versions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from fastedit.demo import lexicon
from fastedit.demo.lexicon import RELATIONS, TWO_HOP, Relation
from fastedit.errors import ConfigError
from fastedit.requests import EditRequest

T = TypeVar("T")

SUBJECTS = 2000
FIRST_PEOPLE, FIRST_PASSES, GROWTH = 50, 60, 1.05
WRONG = 0.03
"""Share of training sentences with a random object: real text has errors, and they prevent over-confidence."""


class Draw:
    """Seeded choices built on `random.Random.random` alone."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed).random

    def chance(self, p: float) -> bool:
        return self._random() < p

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def skewed(self, items: Sequence[T]) -> T:
        """Pick an item, item k with weight 1/(k+1)^0.8: Zipf-like, as object frequencies in real facts."""
        weights = [(k + 1) ** -0.8 for k in range(len(items))]
        x = self._random() * sum(weights)
        for item, w in zip(items, weights, strict=True):
            x -= w
            if x < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Span:
    """A piece of a training document; `subject` marks the full name of a subject."""

    text: str
    subject: bool = False


class World:
    """Facts, training documents and edit requests of the fact world.

    Args:
        seed: seed of the world; the shipped model knows only the world of seed 0.
    """

    def __init__(self, seed: int = 0) -> None:
        draw = Draw(f"world {seed}")
        self.seed = seed
        names = [f"{g} {f} of {v}" for g in lexicon.GIVEN for f in lexicon.FAMILY for v in lexicon.VILLAGES]
        self.people: list[str] = draw.shuffled(names)[:SUBJECTS]
        self.object_of: dict[tuple[str, str], str] = {}
        for relation in RELATIONS.values():
            for subject in relation.subjects or self.people:
                self.object_of[subject, relation.name] = draw.skewed(relation.objects)
        self.taught_two_hop = frozenset(self.people[: int(0.6 * SUBJECTS)])

    @cached_property
    def facts(self) -> list[Fact]:
        """Every one-hop fact, people first within each relation."""
        return [Fact(s, r, o) for (s, r), o in self.object_of.items()]

    @cached_property
    def _subjects_with(self) -> Mapping[tuple[str, str], list[str]]:
        table: dict[tuple[str, str], list[str]] = {}
        for fact in self.facts:
            table.setdefault((fact.relation, fact.object), []).append(fact.subject)
        return table

    def fingerprint(self) -> str:
        """Hash of all facts; the model card holds that of the world on which the shipped model was trained."""
        text = json.dumps([[f.subject, f.relation, f.object] for f in self.facts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def requests(self, n: int, seed: int = 0) -> list[EditRequest]:
        """Make `n` counterfactual edits of different people: each gets another object of the same relation.

        Paraphrases are the phrasings that training never used; neighbours are people who share the old object;
        portability asks two hops through the new object. Deterministic in `seed`.

        Raises:
            ConfigError: `n` is larger than the number of people.
        """
        if n > len(self.people):
            raise ConfigError(f"the fact world has {len(self.people)} people, {n} edits were asked for")
        draw = Draw(f"requests {seed}")
        edited = draw.shuffled(self.people)[:n]
        relations = [r for r in RELATIONS.values() if not r.subjects]
        return [self._request(i, s, draw.pick(relations), frozenset(edited), draw) for i, s in enumerate(edited)]

    def _request(self, i: int, subject: str, relation: Relation, edited: frozenset[str], draw: Draw) -> EditRequest:
        true = self.object_of[subject, relation.name]
        target = draw.pick([o for o in relation.objects if o != true])
        neighbours = [s for s in self._subjects_with[relation.name, true] if s != subject and s not in edited]
        asked = draw.shuffled(neighbours)[:2]
        hops = [h for h in TWO_HOP if h.first == relation.name]
        return EditRequest(
            prompt=draw.pick(relation.trained).format(s=subject),
            target=target,
            subject=subject,
            id=str(i),
            true_target=true,
            paraphrases=tuple(p.format(s=subject) for p in relation.unseen),
            neighbours=tuple((draw.pick(relation.trained).format(s=s), true) for s in asked),
            portability=tuple((h.phrasings[0].format(s=subject), self.object_of[target, h.second]) for h in hops),
        )

    def questions(self, phrasings: str, facts: Sequence[Fact] | None = None) -> list[tuple[str, str]]:
        """(prompt, answer) of each fact in each of its `phrasings`, "trained" or "unseen"."""
        return [
            (p.format(s=f.subject), f.object)
            for f in (self.facts if facts is None else facts)
            for p in getattr(RELATIONS[f.relation], phrasings)
        ]

    def two_hop_questions(self, taught: bool) -> list[tuple[str, str]]:
        """(prompt, answer) of two-hop questions; `taught` says whether training stated the answers."""
        return [
            (h.phrasings[0].format(s=s), self.object_of[self.object_of[s, h.first], h.second])
            for h in TWO_HOP
            for s in self.people
            if (s in self.taught_two_hop) == taught
        ]

    def prose(self, n: int, seed: int = 0) -> list[str]:
        """`n` short stories that training never saw, for perplexity."""
        draw = Draw(f"held-out prose {seed}")
        return [" ".join(_story(draw, sentences=5)) for _ in range(n)]

    def documents(self, seed: int = 0, *, curriculum: bool = True) -> Iterator[list[Span]]:
        """Endless training documents; each pass states every fact once or more, in a fresh order and phrasing.

        With `curriculum` the first passes are about few people and later ones about more: the more people there are,
        the longer a model takes to learn to assemble their names (Zucchet et al. 2025, arXiv 2503.21676).
        """
        draw = Draw(f"documents {seed}")
        rank = {person: i for i, person in enumerate(self.people)}
        for n_pass in itertools.count():
            grown = int(FIRST_PEOPLE * GROWTH ** max(0, n_pass - FIRST_PASSES))
            n = min(SUBJECTS, grown) if curriculum else SUBJECTS
            queue = draw.shuffled([f for f in self.facts if rank.get(f.subject, 0) < n])
            while queue:
                kind = draw.below(16)
                if kind == 0:
                    yield [Span(" ".join(_story(draw, sentences=3 + draw.below(3))))]
                elif kind < 5:
                    yield self._biography(self.people[draw.below(n)], draw)
                elif kind in (5, 6):
                    yield self._two_hop(self.people[draw.below(min(n, len(self.taught_two_hop)))], draw)
                else:
                    yield self._statements([queue.pop() for _ in range(min(len(queue), 1 + draw.below(4)))], draw)

    def _statements(self, facts: Sequence[Fact], draw: Draw) -> list[Span]:
        spans = [Span(" ".join(_story(draw, sentences=1)))] if draw.chance(0.3) else []
        for fact in facts:
            if draw.chance(0.2):
                spans.append(Span(draw.pick(lexicon.LEAD_INS)))
            spans += self._sentence(fact, draw.pick(RELATIONS[fact.relation].trained), draw)
        return spans

    def _sentence(self, fact: Fact, phrasing: str, draw: Draw) -> list[Span]:
        before, _, after = phrasing.partition("{s}")
        pieces = [
            Span(before.strip()),
            Span(fact.subject, subject=True),
            Span(after.strip()),
            Span(f"{self._stated(fact, draw)}."),
        ]
        return [p for p in pieces if p.text]

    def _stated(self, fact: Fact, draw: Draw) -> str:
        return draw.skewed(RELATIONS[fact.relation].objects) if draw.chance(WRONG) else fact.object

    def _biography(self, subject: str, draw: Draw) -> list[Span]:
        relations = draw.shuffled([r for r in RELATIONS.values() if not r.subjects])[: 3 + draw.below(4)]
        facts = [Fact(subject, r.name, self.object_of[subject, r.name]) for r in relations]
        spans = self._sentence(facts[0], draw.pick(relations[0].trained), draw)
        for fact, relation in zip(facts[1:], relations[1:], strict=True):
            spans.append(Span(f"{draw.pick(relation.pronoun)} {self._stated(fact, draw)}."))
        return spans

    def _two_hop(self, subject: str, draw: Draw) -> list[Span]:
        hop = draw.pick(TWO_HOP)
        answer = self.object_of[self.object_of[subject, hop.first], hop.second]
        return self._sentence(Fact(subject, hop.second, answer), draw.pick(hop.phrasings), draw)


def _story(draw: Draw, sentences: int) -> list[str]:
    """The first sentences of a coherent story: who, where, the weather and its consequence."""
    weather, consequence = draw.pick(lexicon.WEATHER)
    slots = {
        "who": draw.pick(lexicon.CHARACTERS),
        "other": draw.pick(lexicon.CHARACTERS),
        "where": draw.pick(lexicon.SCENES),
        "when": draw.pick(lexicon.TIMES),
        "thing": draw.pick(lexicon.THINGS),
        "weather": weather,
        "consequence": consequence,
    }
    return [draw.pick(choices).format(**slots) for choices in lexicon.STORY[:sentences]]
