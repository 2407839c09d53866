"""How much a run is going to write, and whether its disk has room for it."""

import shutil
from pathlib import Path

import torch

from barber.errors import UserError
from barber.model.decoder import Decoder
from barber.model.sources import RandomModel
from barber.run.claim import FOLDER
from barber.run.experiment import Experiment
from barber.run.export import HuggingFaceFolder, MaskFile
from barber.run.prepare import Inputs
from barber.runtime.activations import DENSE_SETS, SETS, ActivationStore


def require_space(experiment: Experiment, inputs: Inputs, folder: Path, keeps_layers: bool) -> None:
    """Refuse a run for which there is not enough room on its disk.

    Args:
        folder: of the run; what an interrupted one has left there need not be written again.
        keeps_layers: whether finished layers are written.

    Raises:
        UserError: there is not, as far as it can be known beforehand.
    """
    if not experiment.engine.disk_check:
        return
    parts = _parts(experiment, inputs, keeps_layers)
    there = sum(file.stat().st_size for file in (folder / FOLDER).glob("*"))
    needed, free = sum(parts.values()) - there, shutil.disk_usage(folder).free
    if needed > free:
        listed = ", ".join(f"{_size(num_bytes)} {what}" for what, num_bytes in parts.items() if num_bytes)
        raise UserError(
            f"hydra.run.dir must have room for {_size(needed)} ({listed}), and {_size(free)} are free in {folder}; "
            "choose another disk, make room, or say engine.disk_check=false"
        )


def _parts(experiment: Experiment, inputs: Inputs, keeps_layers: bool) -> dict[str, int]:
    """Bytes, by what they are for; what cannot be known before the masks are is left out."""
    model = inputs.skeleton
    itemsize = (model.config.dtype or torch.float32).itemsize
    whole = itemsize * sum(parameter.numel() for parameter in model.parameters())
    layers = Decoder(model).layers
    in_layers = itemsize * sum(tensor.numel() for layer in layers for tensor in layer.module.state_dict().values())
    masks = sum(linear.weight_OI.numel() for layer in layers for linear in layer.linears) // 4
    parts = {
        "for the weights of the model": whole if inputs.streams and isinstance(experiment.model, RandomModel) else 0
    }
    if inputs.calibration is not None:
        parts |= _of_samples(experiment, inputs, keeps_layers)
        parts["for finished layers"] = in_layers + masks if keeps_layers else 0
    if isinstance(experiment.export, HuggingFaceFolder) and experiment.pruner is not None:
        # A streamed model's layers are files already.
        parts["for model/"] = whole - in_layers if inputs.streams else whole
    if isinstance(experiment.export, MaskFile) and experiment.pruner is not None:
        parts["for masks.safetensors"] = masks
    return parts


def _of_samples(experiment: Experiment, inputs: Inputs, keeps_layers: bool) -> dict[str, int]:
    assert inputs.calibration is not None
    dtype = experiment.precision.on(inputs.device)[0].dtype
    follows_dense = any(step.needs.dense for step in experiment.steps.values())
    sets = SETS + (DENSE_SETS if follows_dense else 0)
    store = ActivationStore(experiment.engine.activations, inputs.device, dtype, sets=sets)
    num_samples, seqlen = inputs.calibration.tokens_NL.shape
    width = int(inputs.skeleton.config.get_text_config().hidden_size)
    one = num_samples * seqlen * width * dtype.itemsize
    streams = (2 if experiment.steps else 1) + follows_dense
    return {
        "for activations": sets * one if store.place_of(num_samples, seqlen, width) == "disk" else 0,
        # Those of a layer stay until those of the next are there.
        "for streams": 2 * streams * one if keeps_layers else 0,
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{max(num_bytes, 0) / 2**20:,.1f} MiB"
