"""What can be checked before any weight is read: do model, calibration set, pattern and methods fit together?"""

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel

from barber.errors import UserError, within
from barber.methods.patterns import NM, Pattern, by_linear
from barber.methods.pruners import RIA, Pruner, SparseGPT
from barber.methods.rebuild import Rebuild
from barber.model.decoder import Decoder
from barber.model.driver import outside_of_layers
from barber.runtime.numerics import FiniteChecks
from barber.runtime.tensors import Tensor


def check_methods(
    pattern: Pattern | Mapping[str, Pattern],
    pruner: Pruner | None,
    steps: Mapping[str, Rebuild],
    schedule: str = "paper",
) -> None:
    """Refuse combinations of methods that mean nothing.

    Args:
        steps: of the rebuilding, by the config key.

    Raises:
        UserError: rebuilding without an initial mask, or methods that the pattern does not allow.
    """
    if steps and pruner is None:
        key = next(iter(steps)).partition(".")[0]
        raise UserError(f"{key}: there is no mask to {key} without a pruner; choose one, or {key}=none")
    if steps and pruner is not None and pruner.gradient == "layer" and schedule == "interleaved":
        raise UserError(
            f"schedule must be paper with the pruner {type(pruner).__name__}, which looks at whole layers, "
            "not interleaved"
        )
    for one in set(pattern.values()) if isinstance(pattern, Mapping) else (pattern,):
        _check_pattern(one, pruner, steps)


def _check_pattern(pattern: Pattern, pruner: Pruner | None, steps: Mapping[str, Rebuild]) -> None:
    for key, step in steps.items():
        with within(key):
            step.check(pattern)
    if isinstance(pruner, RIA) and pruner.permute:
        if not isinstance(pattern, NM):
            raise UserError(
                f"pruner.permute must be false but with an N:M pattern (here {pattern}, which has no cells)"
            )
        if steps:
            raise UserError(f"pruner.permute must be false with {next(iter(steps))}, whose cells are of neighbours")
    if isinstance(pruner, SparseGPT) and isinstance(pattern, NM) and pruner.block_size % pattern.m:
        raise UserError(f"pruner.block_size must be a multiple of pattern.m ({pattern.m}), not {pruner.block_size}")


def check_architecture(
    model: PreTrainedModel, pattern: Pattern | Mapping[str, Pattern], left_out: Collection[str] = ()
) -> None:
    """Refuse a model that the pattern does not fit; a model on the meta device will do.

    Args:
        left_out: linears that stay dense, by name.

    Raises:
        UserError: an unsupported model type, a block without a prunable linear, or a linear whose inputs m does not
            divide, or that has no pattern.
    """
    decoder = Decoder(model)
    for layer in decoder.layers:
        for block in layer.blocks:
            if not block.linears:
                raise UserError(f"model: {layer.name} of {type(model).__name__} has no prunable linear in {block.name}")
    patterns = by_linear(pattern, [linear.name for linear in decoder.linears], left_out)
    for linear in decoder.linears:
        if linear.weight_OI.dtype == torch.float64:
            raise UserError(
                "model.dtype must be float32, bfloat16 or float16, not float64: the walk computes in float32"
            )
        inputs, one = linear.weight_OI.shape[1], patterns.get(linear.name)
        if isinstance(one, NM) and inputs % one.m:
            raise UserError(
                f"pattern.m must divide the inputs of every linear; {linear.name} has {inputs}, "
                f"which {one.m} does not divide"
            )


def check_weights(model: nn.Module) -> None:
    """Refuse a model in memory whose weights are not its modules' own plain parameters: to set them would not stay, or
    not be what the model computes with.

    Raises:
        UserError: an adapter inside, a weight made of others at every forward, quantised or offloaded weights.
    """
    for name, module in model.named_modules():
        if made_by(module, "peft"):
            raise UserError(
                f"model must have no adapter inside, but {name or 'it'} is {type(module).__name__} of peft; merge the "
                "adapter first (merge_and_unload of peft), or remove it"
            )
        hooks = module._forward_pre_hooks.values()
        if is_parametrized(module) or any(made_by(hook, "torch.nn.utils") for hook in hooks):
            raise UserError(
                f"model must have its weights as they are, but {name} makes one of others at every forward; first call "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not offloaded and all(parameter.is_meta for parameter in model.parameters()):
        raise UserError("model must have weights, but all of it is on the meta device; load it with from_pretrained")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or len(places) > 1:
            raise UserError(
                f"model must be in memory and on one device, but {name if parameter.is_meta else 'it'} is offloaded or "
                "elsewhere; load it without device_map, and let device= say where to compute"
            )
        kind = type(parameter.data).__name__
        if kind != "Tensor" or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise UserError(
                f"model must have plain weights, but {name} is a {kind} of {parameter.dtype}; dequantise it first"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("model must have plain weights, but it is quantised; dequantise it first (model.dequantize())")


def made_by(thing: object, package: str) -> bool:
    """Whether a class, or one that it is derived from, comes from a package or from a module in it."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(thing).__mro__)


def check_numbers(model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinity before or behind its layers, where the walk does not come.

    Raises:
        NumericsError: naming the tensor.
    """
    outside = set(map(id, outside_of_layers(model)))
    checks = FiniteChecks()
    checks.order({f"{name}: the weight": one.detach() for name, one in model.named_parameters() if id(one) in outside})
    checks.require()


def check_tokens(tokens_NL: Tensor, config: PreTrainedConfig, key: str, length_key: str | None = None) -> None:
    """Refuse token ids that the model has no embedding for, and samples longer than its positions.

    Args:
        key: the config key of the tokens, for the message.
        length_key: that of the length of a sample, where it has one of its own.

    Raises:
        UserError: no integers [samples, tokens], an id outside the vocabulary, or too many tokens in a sample.
    """
    is_integer = not (tokens_NL.is_floating_point() or tokens_NL.is_complex() or tokens_NL.dtype == torch.bool)
    if tokens_NL.ndim != 2 or tokens_NL.numel() == 0 or not is_integer:
        raise UserError(
            f"{key} must be integers of shape [samples, tokens], not {tokens_NL.dtype} {list(tokens_NL.shape)}"
        )
    vocabulary = config.get_text_config().vocab_size
    low, high = int(tokens_NL.min()), int(tokens_NL.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise UserError(f"{key} holds token id {wrong}, but the model's vocabulary has the ids 0 to {vocabulary - 1}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens_NL.shape[1] > positions:
        raise UserError(
            f"{length_key or key} gives samples of {tokens_NL.shape[1]} tokens, but the model has positions for "
            f"{positions} at most"
        )


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one; anything else is taken at its word.

    Raises:
        UserError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):  # torch knows more, such as meta
        raise UserError(f"must be auto, cpu, cuda or cuda:INDEX, not {device!r}", field="device")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"is {device}, but there is no CUDA device here; use device=auto or device=cpu", field="device")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"is {device}, but there are {torch.cuda.device_count()} CUDA devices here", field="device")
    return resolved
