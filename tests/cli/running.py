"""`barber` inside the tests' own process, as a shell would run it: seconds less than a process each."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from barber import cli
from barber.run import notes, runner
from barber.run.experiment import Experiment
from barber.walk.report import BlockReport
from tests import tiny

TEXT = "It is a truth universally acknowledged, that a text of bytes is as good as any to try things out. " * 20


@dataclass(frozen=True)
class Result:
    """What a shell sees of a command."""

    code: int
    out: str
    err: str


def barber(*arguments: str) -> Result:
    """Run `barber ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        _own_logging(err),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["barber", *arguments]),
        mock.patch.object(Hydra, "get_mode", _mode),
        mock.patch.object(notes, "plot_losses", _plot_losses),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            GlobalHydra.instance().clear()
    return Result(code, out.getvalue(), err.getvalue())


def built(*overrides: str) -> Experiment:
    """The experiment that a command line stands for; nothing is carried out."""
    found: list[Experiment] = []

    def run(experiment: Experiment, *_: Any) -> None:
        found.append(experiment)
        raise SystemExit

    with mock.patch.object(runner, "run", run), tempfile.TemporaryDirectory() as folder:
        result = barber(*overrides, f"hydra.run.dir={folder}")
    assert found, result.err
    return found[0]


def complaint(result: Result) -> str:
    """The one sentence with which a command refused the user's input; nothing else may be on stderr."""
    assert result.code == 2, result
    assert re.fullmatch(r"barber: [^\n]+\n", result.err), result.err
    assert "Traceback" not in result.out
    return result.err.removeprefix("barber: ").removesuffix("\n")


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record


def done(*arguments: str) -> str:
    """Run a command that has to go well, without a word on stderr; what it says."""
    result = barber(*arguments)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def layers_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of layers.jsonl."""
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text(encoding="utf-8").splitlines()]


def blocks_of(folder: Path) -> list[dict[str, Any]]:
    """The same without the time that was needed."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in layers_of(folder)]


def files_of(folder: Path) -> set[str]:
    """All files, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """What the files of a folder hold and when they were written."""
    return {
        name: (hashlib.sha256((folder / name).read_bytes()).hexdigest(), (folder / name).stat().st_mtime_ns)
        for name in files_of(folder)
    }


def loaded(folder: Path) -> transformers.PreTrainedModel:
    """A model of which no tensor was missing and none left over."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the safetensors files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_inputs(folder: Path) -> None:
    """What a small run needs: `text.md`, `tokens.safetensors`, and `model`, a llama that was saved."""
    (folder / "text.md").write_text(TEXT, encoding="utf-8")
    save_file({"tokens": tiny.tokens(6, 32)}, folder / "tokens.safetensors")
    # as wide as it has to be for a tenth of a row's pairs to be one at least
    save_model(tiny.model("llama", hidden_size=128, intermediate_size=192), folder / "model")


def save_model(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Save a model, without the progress bar."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)


def linear_weights(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of all linears in the decoder layers of a llama, by the linears' names."""
    layers = {f"model.{name}": module for name, module in model.model.named_modules() if name.startswith("layers.")}
    return {name: module.weight.detach() for name, module in layers.items() if isinstance(module, torch.nn.Linear)}


_mode_of_hydra = Hydra.get_mode


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Whether the config asks for several runs; to see that Hydra composes all of it once more, and hides what fails.

    Half of the time of a command that is refused; only experiments ask for it.
    """
    asks = any(override.startswith(("experiment=", "hydra.mode=")) for override in overrides)
    return _mode_of_hydra(hydra, config_name, overrides) if asks else None


_plotted: dict[Any, bytes] = {}
_plot = notes.plot_losses


def _plot_losses(blocks: Sequence[BlockReport], title: str, path: Path) -> None:
    """Draw a picture once for all runs of the same layers: it takes as long as all the rest of a run."""
    kind = tuple((block.layer, block.block, block.loss_before is None) for block in blocks)
    if kind not in _plotted:
        _plot(blocks, title, path)
        _plotted[kind] = path.read_bytes()
    path.write_bytes(_plotted[kind])


@contextlib.contextmanager
def _own_logging(err: io.StringIO) -> Iterator[None]:
    """Put the handlers of the logs back afterwards; what transformers warns of goes to `err` meanwhile."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    warnings = [h for h in logging.getLogger("transformers").handlers if type(h) is logging.StreamHandler]
    streams = [handler.setStream(err) for handler in warnings]
    try:
        yield
    finally:
        for handler, stream in zip(warnings, streams, strict=True):
            handler.setStream(stream or sys.stderr)
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
