"""The examples run as a user runs them, on the small model that ships with the package."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import StreamingCovariance
from fastedit.demo import World, checkpoint_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example in this process, which has what it imports; gives what it prints."""

    def run(name: str, *arguments: str | Path) -> str:
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_saved_edit_is_known_to_plain_transformers(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("edit_and_save", "--n", "3", "--output", tmp_path / "edited")
    answers = re.findall(r"→ (.+?) +\(wanted: (.+)\)", printed)
    assert [wanted for _, wanted in answers] == [request.target for request in World().requests(3)]
    assert [answer for answer, _ in answers] == [wanted for _, wanted in answers]


def test_memit_edits_with_statistics_of_ones_own(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("memit_with_your_statistics", "--n", "3", "--layers", "2-3", "--folder", tmp_path, "--tokens", "7100")
    assert {path.name for path in tmp_path.glob("*_proj.safetensors")} == {
        "2.down_proj.safetensors",
        "3.down_proj.safetensors",
    }
    assert re.search(r"reliability +3 +100\.0% +100\.0%", printed), printed


def test_facts_are_forgotten(run: Callable[..., str]) -> None:
    printed = run("forget", "--n", "3")
    assert re.search(r"not said: +[\d.]+% → 100\.0%", printed), printed
    was, now = map(float, re.findall(r"probability: +([\d.]+)% → ([\d.]+)%", printed)[0])
    assert now < was / 4


def test_an_ablated_direction_takes_one_behaviour_away(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("ablate_a_direction", "--output", tmp_path / "delta.safetensors")
    having, lacking = (int(n) for n in re.findall(r"ing: (\d+) of 12 answers", printed))
    assert having <= 3
    assert lacking >= 9
    assert (tmp_path / "delta.safetensors").is_file()


def test_a_plain_training_loop_learns_with_the_operations(run: Callable[..., str]) -> None:
    losses = [
        float(loss) for loss in re.findall(r"loss ([\d.]+)", run("kernels_in_your_training_loop", "--steps", "9"))
    ]
    assert len(losses) == 9
    assert losses[-1] < losses[0] / 2


def test_a_trainer_learns_without_a_gradient(run: Callable[..., str]) -> None:
    answers = re.findall(r"→ (.+) \(wanted: (.+)\)", run("localized_in_a_trainer"))
    assert [answer for answer, _ in answers] == [request.target for request in World().requests(10)]


@pytest.mark.parametrize(("flags", "share"), [(("--epochs", "9"), 0.1), (("--epochs", "4", "--bf16"), 0.6)])
def test_llama_factorys_loop_learns_without_a_gradient(
    flags: tuple[str, ...], share: float, run: Callable[..., str]
) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("localized_like_llama_factory", *flags))]
    assert losses[-1] < share * losses[0]


def test_the_second_moment_of_a_hook_is_that_of_the_texts_without_padding(
    run: Callable[..., str], tmp_path: Path
) -> None:
    texts = World().prose(40)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    run("covariance_of_a_model", "--output", tmp_path / "moment.safetensors", "--text", tmp_path / "texts.txt")
    found = StreamingCovariance.load(tmp_path / "moment.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    keys: list[torch.Tensor] = []
    model.model.layers[5].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    rows = torch.cat(keys).double()
    assert found.count == len(rows)
    torch.testing.assert_close(found.finalize(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
