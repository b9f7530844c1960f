"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), which is not a dependency and may be missing."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastedit.errors import ConfigError, EditError, listed, reason
from fastedit.models import Model

_MAIN = ("acc_norm", "acc", "exact_match", "f1", "mc2")  # the first of these that a task has is its main metric


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> None:
    """Raise ConfigError for tasks that lm-eval does not have, or if it is not installed.

    Args:
        include_path: folder of tasks of one's own, as for lm-eval's `--include_path`.

    Raises:
        ConfigError: also if there is such a folder and it cannot be read, or without tasks.
    """
    if not tasks:
        if include_path is not None:
            raise ConfigError(f"{include_path} has tasks of lm-eval, and none is named; name some, as in --tasks mine")
        return
    known = set(_manager(include_path).all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        more = f", {include_path} has none of that name" if include_path else ""
        raise ConfigError(f"lm-eval has no task {listed(unknown)}{more}; `lm-eval ls tasks` lists those that it has")


def run_tasks(model: Model, tasks: Sequence[str], include_path: Path | None = None) -> dict[str, float]:
    """Run tasks; returns the main metric of each: the first of acc_norm, acc, exact_match, f1 and mc2, else its first.

    Args:
        include_path: as for `check_tasks`.

    Raises:
        ConfigError: lm-eval is not installed. EditError: it gives no metric for a task.
    """
    if not tasks:
        return {}
    adapter = _lm_eval("lm_eval.models.huggingface").HFLM(pretrained=model.network, tokenizer=model.tokenizer)
    options = {} if include_path is None else {"task_manager": _manager(include_path)}
    output = _lm_eval("lm_eval").simple_evaluate(model=adapter, tasks=list(tasks), bootstrap_iters=0, **options)
    results: Mapping[str, Mapping[str, Any]] = output["results"]
    values = {task: _main(results.get(task, {})) for task in tasks}
    if lacking := [task for task, value in values.items() if value is None]:
        raise EditError(f"lm-eval gives no metric of {listed(lacking)}; take other tasks")
    return {task: value for task, value in values.items() if value is not None}


def _manager(include_path: Path | None) -> Any:
    manager = _lm_eval("lm_eval.tasks").TaskManager
    if include_path is None:
        return manager()
    if not include_path.is_dir():
        raise ConfigError(f"{include_path} is not a folder; give the one with your tasks of lm-eval (*.yaml)")
    try:
        return manager(include_path=str(include_path))
    except Exception as error:  # whatever its parser raises
        raise ConfigError(f"lm-eval cannot read the tasks in {include_path}: {reason(error)}") from error


def _main(result: Mapping[str, Any]) -> float | None:
    """The main metric of a task's results, whose names are such as "acc,none": metric, filter of the answers."""
    metrics = {
        name.partition(",")[0]: float(value)
        for name, value in result.items()
        if "," in name and "_stderr" not in name and isinstance(value, numbers.Real)
    }
    return next((metrics[name] for name in (*_MAIN, *metrics) if name in metrics), None)


def _lm_eval(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"tasks need lm-eval ({error.name} is not installed): pip install lm-eval") from None
