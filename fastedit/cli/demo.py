"""`fastedit demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.outcome import keeping
from fastedit.cli.output import show, summary
from fastedit.cli.phase import work_begins, wrote
from fastedit.errors import ConfigError, EditError, ModelError
from fastedit.files import check_directory


def demo(
    n: Annotated[int, typer.Option("--n", min=1, help="Counterfactual edits to make.")] = 500,
    output: Annotated[
        Path | None,
        typer.Option(help="Also write checkpoint, delta and report to this folder; replaces a checkpoint."),
    ] = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Edit the small trained model that ships with the package, measure it, and revert the edit.

    Example: fastedit demo --n 500
    """
    from fastedit.demo import World, checkpoint_path

    world, path = World(), checkpoint_path()
    if n > len(world.people):
        raise ConfigError(f"--n {n}: the fact world has {len(world.people)} people to make an edit about")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no model; train it: python -m fastedit.demo.train --output {path}")
    if output:
        check_directory(output, arguments.inputs_of(str(path)))
    import torch

    from fastedit.cli.bars import Bars
    from fastedit.demo.world import Draw
    from fastedit.evaluation.predict import predict
    from fastedit.evaluation.report import compare
    from fastedit.requests import EditRequest

    started = time.perf_counter()
    edits, prose = world.requests(n), world.prose(200)
    edited = {request.subject for request in edits}
    others = world.questions("trained", [fact for fact in world.facts if fact.subject not in edited])
    asked = [EditRequest(prompt, answer) for prompt, answer in Draw("demo").shuffled(others)[:500]]
    # the weights are stored in bf16, but CPUs are faster in fp32
    editor = arguments.load(str(path), arguments.Dtype.float32, None)

    def accuracy(bars: Bars, when: str) -> float:
        progress = bars.callback(f"facts not edited, {when}")
        predictions = predict(editor.parts, asked, kinds=("rewrite",), progress=progress)
        share: float = compare(asked, predictions).metrics["reliability"]["generated"]
        return share

    originals = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    work_begins()
    with Bars() as bars:
        before, known_before = arguments.measure(editor, edits, prose, bars, "before"), accuracy(bars, "before")
        editor.progress = bars.callback("", len(edits))
        result = editor.edit(edits)
        after, known_after = arguments.measure(editor, edits, prose, bars, "after"), accuracy(bars, "after")
    report = compare(edits, after, before)
    if output:
        with keeping(output, result) as outcome:
            outcome.finish(report, editor.parts)
            wrote(output)
    result.revert()
    now = editor.model.state_dict()
    restored = all(torch.equal(tensor, now[name]) for name, tensor in originals.items())
    show(report)
    typer.echo(f"facts not edited  {known_before:.1%} → {known_after:.1%} of {len(asked)} questions answered")
    typer.echo(f"time              {summary(result)}; {time.perf_counter() - started:.0f} s with measuring")
    if not restored:
        raise EditError("revert did not restore the weights bit for bit; this is a bug, please report it")
    typer.echo("revert            all weights restored, bit for bit")
