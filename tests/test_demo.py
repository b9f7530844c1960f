"""The fact world and the model that ships with the package."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import Editor
from fastedit.demo import World, checkpoint_path
from fastedit.demo.lexicon import RELATIONS
from fastedit.demo.probe import answers, intervene, probes
from fastedit.demo.world import Draw
from fastedit.models import Model, Topology, topology

BLOCK = 2
"""Where the intervention is made: the model card's block."""


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def shipped() -> Topology:
    return topology(AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(checkpoint_path())


def test_the_world_is_the_one_that_the_model_learned(world: World) -> None:
    card = (checkpoint_path() / "README.md").read_text()
    assert f"`{world.fingerprint()}`" in card
    assert World(seed=1).fingerprint() != world.fingerprint()


def test_no_part_of_a_name_tells_who_is_meant(world: World) -> None:
    names = [tuple(re.fullmatch(r"(\w+) (\w+) of (\w+)", p).groups()) for p in world.people]  # type: ignore[union-attr]
    assert len(set(names)) == 2000
    for pair in ((0, 1), (0, 2), (1, 2)):
        shared = Counter(tuple(name[i] for i in pair) for name in names)
        assert sum(n for n in shared.values() if n > 1) > 0.9 * len(names)


def test_objects_are_skewed_and_phrasings_held_out(world: World) -> None:
    documents = [" ".join(span.text for span in d) for d in islice(world.documents(), 3000)]
    for relation in RELATIONS.values():
        assert len(relation.trained) + len(relation.unseen) >= 4
        pattern = {p: re.compile(re.escape(p).replace(re.escape("{s}"), r"[\w ]{2,40}?")) for p in relation.unseen}
        for phrasing, regex in pattern.items():
            objects = "|".join(map(re.escape, relation.objects))
            assert not any(re.search(rf"{regex.pattern} (?:{objects})\.", d) for d in documents), phrasing
        if relation.subjects is None:
            counts = Counter(world.object_of[p, relation.name] for p in world.people)
            (_, most), (_, least) = counts.most_common()[0], counts.most_common()[-1]
            assert most > 3 * least


def test_requests_are_consistent(world: World) -> None:
    requests = world.requests(300, seed=3)
    assert requests == World().requests(300, seed=3)
    assert requests != world.requests(300, seed=4)
    edited = {r.subject for r in requests}
    assert len(edited) == 300
    facts = {(f.subject, f.object) for f in world.facts}
    for r in requests:
        assert r.subject in r.prompt
        assert r.target != r.true_target
        assert (r.subject, r.true_target) in facts
        assert all(r.subject in p for p in r.paraphrases)
        for prompt, answer in r.neighbours:
            assert answer == r.true_target
            assert not any(s in prompt for s in edited)
    assert any(r.portability for r in requests)


def test_transformers_4_knows_the_tokenizer_s_class() -> None:
    """Which 5 calls TokenizersBackend when it saves."""
    about = json.loads((Path(checkpoint_path()) / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_shipped_model_knows_its_facts(world: World, shipped: Topology, tokenizer: object, seed: int) -> None:
    for phrasings, least in (("trained", 0.95), ("unseen", 0.85)):
        questions = Draw(seed).shuffled(world.questions(phrasings))[:300]
        share, median = answers(Model(shipped, tokenizer), questions)
        assert share >= least
        assert 0.9 <= median <= 0.99


def test_facts_are_read_at_the_last_token_of_the_subject(
    world: World, shipped: Topology, tokenizer: object, seed: int
) -> None:
    turned = intervene(Model(shipped, tokenizer), probes(world, tokenizer, 100, seed), BLOCK) > 0.9
    assert turned.float().mean() >= 0.9  # 95 % of all, in the card; a sample of 100 varies by 2 %


def test_edits_of_the_shipped_model(world: World) -> None:
    editor = Editor.from_pretrained(checkpoint_path(), dtype="float32", device="cpu")
    requests = world.requests(20)
    before = {name: p.clone() for name, p in editor.model.state_dict().items()}
    result = editor.edit(requests)
    report = editor.evaluate(requests).to_dict()
    assert report["reliability"]["generated"] >= 0.95
    assert report["locality"]["generated"] >= 0.5
    result.revert()
    assert all(torch.equal(p, before[name]) for name, p in editor.model.state_dict().items())
