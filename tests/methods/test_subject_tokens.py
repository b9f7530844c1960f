"""LocFT-BF that learns at the subjects' last tokens, in several blocks at once, against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import last_of_subject, moments, random_edits, tiny_model, values
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, Editor, EditRequest, StreamingCovariance
from fastedit.methods import LocFTBFConfig
from fastedit.methods.base import MethodResult
from fastedit.methods.locft_bf import adam, null_space
from fastedit.methods.locft_bf.method import plan
from fastedit.methods.locft_bf.null_space import NullSpace
from fastedit.methods.locft_bf.recipes import subject_batch_size_for
from fastedit.methods.locft_bf.trainer import Rests
from fastedit.models import Model, topology
from fastedit.statistics.store import statistics_path

SETTINGS: dict[str, Any] = {"layer": (1, 2), "tokens": "subject", "lr": 3e-3, "batch_size": 4, "epochs": 4}
SETTINGS |= {"skip_loss": 0.0, "stop_loss": 0.0, "shuffle": False, "null_space": 0.4, "preserve": "none"}


def run(model: nn.Module, tokenizer: Any, edits: list[EditRequest], **config: Any) -> MethodResult:
    return plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**SETTINGS | config)).run()


def plain(
    model: nn.Module,
    tokenizer: Any,
    edits: list[EditRequest],
    P: dict[int, Tensor],
    places: list[int],
    focus: float = 0.0,
    epochs: int = SETTINGS["epochs"],
    falls: bool = False,
    since: bool = False,
) -> tuple[list[Tensor], list[float]]:
    """The change D P of each block's weight, and each epoch's loss: the whole model, one edit after the other.

    D gets its gradient from the token at `places` of the edit (all tokens where it is -1). It acts at all tokens. With
    `since` it acts at that token and those after it, in the first half of the epochs and until all edits are learned.
    An edit whose loss is below `focus` gives no gradient, and sits out the next two epochs, then four, then eight, but
    not all of the last three; an epoch without any has all. A rate that `falls` comes to 0 at the end of the last
    epoch.
    """
    modules = {layer: topology(model).resolve(layer, "down_proj")[1] for layer in P}
    D: dict[int, Tensor] = {}
    for layer, module in modules.items():
        weight: Any = module.weight
        D[layer] = torch.zeros_like(weight.T if isinstance(module, Conv1D) else weight).requires_grad_()
    optimizer = torch.optim.Adam(D.values(), lr=SETTINGS["lr"])
    here = -1

    def add(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            change = args[0] @ (D[layer] @ P[layer]).T
            fixed = args[0] @ (D[layer].detach() @ P[layer]).T
            taught = torch.arange(output.shape[1])[:, None] == here if here >= 0 else torch.tensor(True)
            acts = torch.arange(output.shape[1])[:, None] >= (here if held else 0)
            return output + torch.where(taught, change, fixed) * acts

        return hook

    handles = [module.register_forward_hook(add(layer)) for layer, module in modules.items()]
    losses, last, resting, rests = [], [0.0] * len(edits), [0] * len(edits), [2] * len(edits)
    held = since
    for epoch in range(epochs):
        held = held and epoch < epochs // 2
        awake = [i for i, rest in enumerate(resting) if not rest] or [*range(len(edits))]
        resting = [max(0, rest - 1) for rest in resting]
        for first in range(0, len(awake), SETTINGS["batch_size"]):
            batch = awake[first : first + SETTINGS["batch_size"]]
            optimizer.zero_grad()
            if falls:
                optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * (epochs - epoch - first / len(awake)) / epochs
            for i in batch:
                here = places[i]
                prompt = tokenizer(edits[i].prompt).input_ids
                target = [*tokenizer(edits[i].target).input_ids, tokenizer.eos_token_id]
                said = model(input_ids=torch.tensor([[*prompt, *target][:-1]])).logits[0, len(prompt) - 1 :]
                loss = cross_entropy(said, torch.tensor(target))
                last[i] = loss.item()
                if last[i] >= focus:
                    (loss / len(batch)).backward()
                    rests[i] = 2
                else:
                    resting[i] = min(rests[i], max(2, epochs - epoch - 4))
                    rests[i] = min(2 * rests[i], 8)
            if any(last[i] >= focus for i in batch):
                optimizer.step()
        losses.append(sum(last) / len(edits))
        if len(awake) == len(edits) and max(last) < focus:
            if not held:
                break
            held, resting, rests = False, [0] * len(edits), [2] * len(edits)
    for handle in handles:
        handle.remove()
    changes = [(D[layer] @ P[layer]).detach() for layer in P]
    return [c.T if isinstance(modules[1], Conv1D) else c for c in changes], losses


@pytest.mark.parametrize(
    ("family", "preserve", "fits"),
    [
        ("llama", "null-space", True),
        ("llama", "null-space", False),
        ("llama", "none", True),
        ("gpt2", "null-space", True),
    ],
)
@pytest.mark.parametrize(
    ("focus", "size", "falls"), [(0.0, 4, False), (4.3, 4, False), (4.3, 1, False), (0.0, 3, True)]
)
def test_equals_a_plain_loop(
    family: str,
    preserve: str,
    fits: bool,
    focus: float,
    size: int,
    falls: bool,
    tokenizer: Any,
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(null_space, "_SMALLEST", 0.0)
    model, edits = tiny_model(family, seed=seed), random_edits(9, seed)
    edits[4] = EditRequest(edits[4].prompt, edits[4].target, id="without a subject")
    moments(model, tmp_path, seed)
    parts, P = topology(model), {}
    for layer in SETTINGS["layer"]:
        width = torch.eye(parts.input_width(layer, "down_proj"))
        found = StreamingCovariance.load(statistics_path(parts, tmp_path, layer)).finalize()
        P[layer] = (
            NullSpace.of(*torch.linalg.eigh(found), SETTINGS["null_space"]).of_rows(width)
            if preserve == "null-space"
            else width
        )
    places = [last_of_subject(tokenizer, edit) if edit.subject else -1 for edit in edits]
    monkeypatch.setitem(SETTINGS, "batch_size", size)
    epochs = 16 if focus else SETTINGS["epochs"]
    wanted, losses = plain(model, tokenizer, edits, P, places, focus, epochs, falls, preserve != "none" and fits)
    before = values(model)
    options = {"preserve": preserve, "statistics": tmp_path, "focus": focus, "epochs": epochs}
    options["cache_bytes"] = None if fits else 0
    options["lr_schedule"] = "linear" if falls else "constant"
    made = plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**SETTINGS | options))
    assert [note for note in made.notes if "trained at all tokens" in note and "without a subject" in note]
    result = made.run()
    assert list(result.updates) == [f"{parts.resolve(layer, 'down_proj')[0]}.weight" for layer in P]
    for update, change in zip(result.updates.values(), wanted, strict=True):
        assert isinstance(update, Tensor)
        assert (update - change).norm() <= 2e-3 * change.norm()  # Adam takes rounding of small gradients for signs
    assert result.losses == pytest.approx(losses, rel=1e-4)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == set(result.updates)  # gpt2's bias stays


def test_the_kernel_makes_the_same_edit(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    edits, found = random_edits(9, seed), []
    for backend in ("torch", "triton"):
        monkeypatch.setattr("fastedit.ops.localized_adam.choose", lambda *_, backend=backend, **__: backend)
        model = tiny_model("llama", seed=seed)
        moments(model, tmp_path, seed)
        result = run(model, tokenizer, edits, preserve="null-space", statistics=str(tmp_path), lr=1e-3, epochs=2)
        found.append(next(iter(result.updates.values())))
    assert (found[1] - found[0]).norm() <= 1e-3 * found[0].norm()


def test_only_the_subjects_rows_make_the_gradient(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row an edit, so that a step costs as little as it can."""
    rows: list[int] = []
    step = adam.ops.localized_adam_
    monkeypatch.setattr(
        adam.ops, "localized_adam_", lambda w, G, X, *a, **k: rows.append(len(X)) or step(w, G, X, *a, **k)
    )
    run(tiny_model("llama", seed=seed), tokenizer, random_edits(8, seed))
    assert set(rows) == {4}


def test_copies_in_contexts_and_anchors_are_taught_at_their_own_subjects(tokenizer: Any, seed: int) -> None:
    model, edits = tiny_model("llama", seed=seed), random_edits(6, seed)
    config = LocFTBFConfig(**SETTINGS | {"augment": 2, "preserve": "anchors", "anchors": 2})
    data = plan(Model.of(model, tokenizer), edits, config).data
    assert data.trained is not None
    assert len(data.trained) == len(data.samples) == len(data.owner)
    for sample, place in enumerate(data.trained.tolist()):
        first, last = data.samples.offsets[sample : sample + 2].tolist()
        words = tokenizer.decode(data.samples.input_ids[first : first + place + 1]).split()
        edit = edits[data.owner[sample]]
        others = [other.subject for other in edits if other is not edit]
        others = others if sample >= data.anchors.first else [edit.subject]
        assert first + place < last
        assert any(words[-len(str(s).split()) :] == str(s).split() for s in others), (words, others)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layer": 3}, "layer 3 is the last block"),
        ({"layer": (0, 3)}, "layer 3 is the last block"),
        ({"module": "mlp"}, "tokens subject is about a linear map's inputs"),
        ({"layer": ()}, "at least one layer"),
        ({"preserve": "anchors", "anchor_subjects": ("Ann", " ")}, "anchor_subjects holds an empty text"),
    ],
)
def test_what_cannot_be_taught_is_refused(config: dict[str, Any], words: str, tokenizer: Any, seed: int) -> None:
    with pytest.raises(ConfigError, match=words):
        run(tiny_model("llama", seed=seed), tokenizer, random_edits(4, seed), **config)


def test_several_blocks_are_one_edit(tokenizer: Any, seed: int) -> None:
    """Blocks in any order, each once; the delta holds all of them and takes them back."""
    model = tiny_model("llama", seed=seed)
    before = values(model)
    editor = Editor(model, tokenizer, layer=[2, 0, 2], lr=1e-3, epochs=2)
    result = editor.edit(random_edits(5, seed))
    assert result.delta.metadata["config"]["layer"] == (0, 2)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{topology(model).resolve(layer, 'down_proj')[0]}.weight" for layer in (0, 2)}
    result.delta.revert()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_dtype_is_taught(family: str, dtype: torch.dtype, tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """As in fp32, to what the dtype holds of the losses; the model gets the rounded weights."""
    edits, losses = random_edits(6, seed), []
    for kind in (torch.float32, dtype):
        model = tiny_model(family, dtype=kind, seed=seed)
        moments(model, tmp_path / str(kind), seed)
        before = values(model)
        result = run(model, tokenizer, edits, preserve="null-space", statistics=tmp_path / str(kind), lr=1e-3)
        losses.append(result.losses)
        for path, update in result.updates.items():
            now = (before[path].float() + update).to(kind) if kind != torch.float64 else None
            assert now is None or torch.equal(values(model)[path], now)
            assert not torch.equal(values(model)[path], before[path])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float64 else 0.03)


def test_a_prompt_that_begins_with_a_space_and_has_no_subject(tokenizer: Any, seed: int) -> None:
    edits = [*random_edits(3, seed), EditRequest(" w20 w21", "w22")]
    data = plan(Model.of(tiny_model("llama", seed=seed), tokenizer), edits, LocFTBFConfig(**SETTINGS)).data
    assert data.trained is not None
    assert (data.trained < 0).tolist() == [False, False, False, True]


def test_batches_of_subjects() -> None:
    expected = {3: 1, 60: 6, 100: 10, 500: 50, 1000: 100, 100_000: 100}
    assert {n: subject_batch_size_for(n) for n in expected} == expected


@pytest.mark.parametrize(
    ("options", "rate", "schedule", "epochs", "chosen"),
    [
        ({"augment": 0}, 0.016, "constant", 80, None),
        ({"augment": 8}, 0.016, "constant", 80, None),  # 198 samples
        ({"augment": 9}, 0.016, "linear", 60, "lr_schedule linear, epochs 60"),  # 220 samples
        ({"augment": 9, "lr_schedule": "constant"}, 0.016, "constant", 60, "epochs 60"),
        ({"augment": 9, "epochs": 7}, 0.016, "linear", 7, "lr_schedule linear"),
        ({"lr_schedule": "linear"}, 0.016, "linear", 80, None),
        ({"augment": 9, "tokens": "all"}, 0.025, "constant", 25, None),
    ],
)
def test_with_many_subjects_the_rate_falls(
    options: dict[str, Any], rate: float, schedule: str, epochs: int, chosen: str | None, tokenizer: Any, seed: int
) -> None:
    model = tiny_model("llama", seed=seed)
    settings = SETTINGS | {"layer": 1, "lr": None, "epochs": None} | options
    made = plan(Model.of(model, tokenizer), random_edits(22, seed), LocFTBFConfig(**settings))
    weight = topology(model).resolve(1, "down_proj")[1].weight.detach()
    assert (made.config.lr_schedule, made.config.epochs) == (schedule, epochs)
    assert made.config.lr == pytest.approx(rate * float(weight.square().mean().sqrt()), rel=1e-4)
    notes = [note.partition(" (")[0] for note in made.notes if "from 200 edits" in note]
    assert notes == ([chosen] if chosen else [])


def test_published_is_the_papers_recipe(tokenizer: Any, seed: int) -> None:
    """The same as the paper's places and rules, given in full."""
    model, edits = tiny_model("llama", seed=seed), random_edits(60, seed)
    config = plan(Model.of(model, tokenizer), edits, LocFTBFConfig(published=True)).config
    weight = topology(model).resolve(2, "down_proj")[1].weight.detach()
    assert (config.layer, config.module, config.batch_size) == (2, "down_proj", 2)  # 22/32 of 4 blocks; 30 steps
    assert config.lr == pytest.approx(0.025 * float(weight.square().mean().sqrt()), rel=1e-4)
    assert (config.tokens, config.preserve, config.epochs) == ("all", "none", 25)
    with pytest.raises(ConfigError, match="published is the papers' recipe"):
        LocFTBFConfig(published=True, preserve="both")


def test_an_edit_that_stays_learned_sits_out_longer() -> None:
    """The first one stays learned, the second is undone once, the third is never learned."""
    rests, took_part = Rests(3, 30), [list[int](), list[int](), list[int]()]
    for epoch in range(1, 31):
        awake = rests.awake(torch.arange(3), epoch)
        for sample in awake.tolist():
            took_part[sample].append(epoch)
        rests.note(
            awake, torch.tensor([sample == 0 or (sample == 1 and epoch != 4) for sample in awake.tolist()]), epoch
        )
    assert took_part[0] == [1, 4, 9, 18, 27, 30]
    assert took_part[1] == [1, 4, 5, 8, 13, 22, 28]
    assert took_part[2] == [*range(1, 31)]
    often, rests = [list[int](), list[int]()], Rests(2, 80)
    for epoch in range(1, 81):
        for sample in rests.awake(torch.arange(2), epoch).tolist():
            often[sample].append(epoch)
            rests.note(torch.tensor([sample]), torch.tensor([sample == 0]), epoch)
    assert often[0] == [1, 4, 9, 18, 35, 52, 69, 78]  # a fifth of the epochs, at most
    rests = Rests(3, 30)
    assert Rests(2, 9).awake(torch.tensor([1]), 1).tolist() == [1]
    rests.note(torch.arange(3), torch.ones(3, dtype=torch.bool), 1)
    assert rests.awake(torch.arange(3), 2).tolist() == [0, 1, 2]  # an epoch without any has all


def test_it_ends_when_every_edit_is_learned(tokenizer: Any, seed: int) -> None:
    options: dict[str, Any] = {"focus": 2.0, "epochs": 200, "tokens": "all", "lr": 1e-2}
    result = run(tiny_model("llama", seed=seed), tokenizer, random_edits(1, seed), **options)
    assert len(result.losses) < 200
    assert 0.0 < result.losses[-1] < 2.0


def test_the_published_recipe_has_no_focus(tokenizer: Any, seed: int) -> None:
    options: dict[str, Any] = {"tokens": "all", "layer": 1, "focus": None}
    assert run(tiny_model("llama", seed=seed), tokenizer, random_edits(3, seed), **options).config["focus"] == 0.0
    options["tokens"] = "subject"
    assert run(tiny_model("llama", seed=seed), tokenizer, random_edits(3, seed), **options).config["focus"] == 0.1


@pytest.mark.parametrize("focus", [-0.1, float("nan"), float("inf")])
def test_a_focus_that_is_no_loss_is_refused(focus: float) -> None:
    with pytest.raises(ConfigError, match="focus is"):
        LocFTBFConfig(focus=focus)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preserve", ["none", "null-space", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_gpu_it_is_the_edit_of_a_cpu(
    family: str, preserve: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    edits = random_edits(9, seed)
    moments(tiny_model(family, seed=seed), tmp_path, seed)
    options: dict[str, Any] = {"preserve": preserve, "statistics": tmp_path}
    here, there = (
        run(tiny_model(family, seed=seed).to(device), tokenizer, edits, **options) for device in ("cpu", "cuda")
    )
    assert there.losses == pytest.approx(here.losses, rel=1e-3)
    for path, update in here.updates.items():
        assert isinstance(update, Tensor)
        assert isinstance(found := there.updates[path], Tensor)
        assert found.is_cuda
        assert (found.cpu() - update).norm() <= 1e-2 * update.norm()  # Adam takes rounding of small gradients for signs
