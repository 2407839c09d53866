"""What people give to the calls of the library: short forms made long, and anything else refused in one sentence."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.resources import files
from math import ceil
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import UserError, did_you_mean
from barber.methods.patterns import NM, Exactly, Pattern, Unstructured
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.families import family_of
from barber.runtime.tensors import Tensor
from barber.walk.allocation import Allocation
from barber.walk.checks import check_weights, made_by

T = TypeVar("T")

_PATTERN = "0.5, '2:4', Unstructured(0.5) or NM(2, 4)"
# Of texts: samples as the pruning papers have them.
_SAMPLES, _SEQLEN = 128, 2048


def require_model(given: object) -> None:
    """Refuse what is no causal language model, and one that cannot be taken as it is.

    Raises:
        UserError: saying what to give instead.
    """
    if isinstance(given, str | PathLike):
        load = f"AutoModelForCausalLM.from_pretrained({str(given)!r})"
        raise UserError(f"model must be a model, not the name of one; load it first: {load}")
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"model must be the model itself, not {described(given)}; give its .module")
    if isinstance(inner := getattr(given, "_orig_mod", None), nn.Module):
        raise UserError(f"model must be as it was before torch.compile, a {type(inner).__name__}; give its ._orig_mod")
    if isinstance(given, nn.Module) and made_by(given, "peft"):
        check_weights(given)  # whose sentence it is
    if not isinstance(given, PreTrainedModel):
        raise UserError(f"model must be a causal language model of transformers, loaded, not {described(given)}")
    family_of(given.config)
    if given.get_output_embeddings() is None:
        raise UserError(
            f"model must have a language-model head, which {described(given)} has not; load it with "
            "AutoModelForCausalLM"
        )


def tokens_from(given: object, tokenizer: object, model: PreTrainedModel) -> Tensor:
    """The calibration samples: as they are, or texts made into samples.

    Raises:
        UserError: neither token ids in a tensor, nor texts with a tokenizer.
    """
    if isinstance(given, list | tuple) and given and all(isinstance(one, str) for one in given):
        if tokenizer is None:
            raise UserError("tokens_NL must be token ids; for texts give tokenizer= as well, or use barber.calibrate")
        return _cut(given, require_tokenizer(tokenizer), model)
    return require_tokens(given, "tokens_NL")


def require_tokens(given: object, key: str) -> Tensor:
    """Refuse what is no tensor: its shape and its ids are looked at by `checks.check_tokens`."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        advice = "give its input_ids, as a tensor"
    elif isinstance(given, PreTrainedTokenizerBase | str | PathLike):
        advice = "barber.calibrate(tokenizer, texts) makes some"
    elif isinstance(given, torch.utils.data.DataLoader):
        advice = "put its batches together: torch.cat([batch['input_ids'] for batch in loader])"
    else:
        advice = "torch.tensor(...) makes it of lists of equal length or of an array"
    raise UserError(f"{key} must be token ids in one tensor, [samples, tokens], not {described(given)}; {advice}")


def require_tokenizer(given: object) -> PreTrainedTokenizerBase:
    """Refuse what is no tokenizer of transformers."""
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    raise UserError(f"tokenizer must be one of transformers (AutoTokenizer.from_pretrained), not {described(given)}")


def pattern_from(given: object, key: str = "pattern") -> Pattern:
    """A pattern, or 0.5 or '2:4' for one."""
    if isinstance(given, Unstructured | NM | Exactly):
        return given
    if isinstance(given, str) and (cell := re.fullmatch(r"\s*(\d+)\s*(?::|of)\s*(\d+)\s*", given)):
        return _ranged(partial(NM, int(cell[1]), int(cell[2])), key)
    if isinstance(given, Real) and not isinstance(given, bool):
        return _ranged(partial(Unstructured, float(given)), key)
    raise UserError(f"{key} must be {_PATTERN}, not {described(given)}")


def patterns_from(given: object) -> Pattern | dict[str, Pattern]:
    """One pattern for all linears, or one for each by its name."""
    if isinstance(given, Mapping):
        return {name: pattern_from(one, f"pattern[{name!r}]") for name, one in given.items()}
    return pattern_from(given)


@cache
def named(*groups: str) -> dict[str, str]:
    """The public classes that the command line's choices of groups are, by the names that these have there.

    Raises:
        UserError: these are not at hand, as in a checkout that is not installed.
    """
    try:
        conf = files("barber.conf")
    except ModuleNotFoundError as error:
        raise UserError("names stand for methods where Barber is installed; give the method itself, Wanda()") from error
    inside = [file for group in groups for file in conf.joinpath(group).iterdir()]
    choices = [file for file in inside if file.name.endswith(".yaml")]
    targets = {file.name: re.search(r"^_target_: barber\.(\w+)$", file.read_text(), re.MULTILINE) for file in choices}
    return {name.removesuffix(".yaml"): target[1] for name, target in sorted(targets.items()) if target}


def pruner_from(given: object) -> Pruner:
    """A pruner, or its name on the command line."""
    found: Pruner = _method(given, "pruner", ("pruner",), "prune", "Wanda() or 'wanda'")
    return found


def allocation_from(given: object) -> Allocation:
    """An allocation, or its name on the command line."""
    found: Allocation = _method(given, "allocation", ("allocation",), "allocate", "OWL() or 'owl'")
    return found


def steps_from(given: object) -> dict[str, Rebuild]:
    """The steps of a rebuilding, by the key that a sentence about them begins with."""
    if given is None:
        return {}
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    keys = ["rebuild"] if len(several) == 1 else [f"rebuild[{number}]" for number in range(len(several))]
    example = "Barber() or 'barber', a list of such steps, or None"
    return {
        key: _method(one, key, ("rebuild", "update"), "rebuild", example)
        for key, one in zip(keys, several, strict=True)
    }


def require_count(given: object, key: str, least: int = 1) -> None:
    """Refuse what is no whole number from `least` on."""
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise UserError(f"must be a whole number, not {described(given)}", field=key)
    if given < least:
        raise UserError(f"must be at least {least}, not {given}", field=key)


def require_flag(given: object, key: str) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(given, bool):
        raise UserError(f"must be True or False, not {described(given)}", field=key)


def require_one_of(choices: Sequence[str], given: object, key: str) -> None:
    """Refuse what is none of the choices."""
    if given not in choices:
        raise UserError(f"must be {' or '.join(choices)}, not {described(given)}", field=key)


def described(given: object) -> str:
    """What somebody gave, in a few words: a text or a number itself, of anything else its kind."""
    if given is None or isinstance(given, str | Real):
        return repr(given)
    if isinstance(given, type):
        return f"the class {given.__name__}"
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def _method(given: Any, key: str, groups: tuple[str, ...], does: str, example: str) -> Any:
    """A method: itself, as who has a function of that name is, or of its name on the command line with its defaults."""
    if isinstance(given, str):
        known = named(*groups)
        if (name := given.strip().lower()) in known:
            return getattr(import_module("barber"), known[name])()
        raise UserError(f"{key}={given!r}: no such name{did_you_mean(name, list(known))}")
    if isinstance(given, type):
        raise UserError(f"{key} must be a method that is set up, not {described(given)}; write {given.__name__}()")
    if not callable(getattr(given, does, None)) or isinstance(given, nn.Module | Tensor):
        raise UserError(f"{key} must be a method such as {example}, not {described(given)}")
    return given


def _ranged(make: Callable[[], T], key: str) -> T:
    """What is made, whose complaint begins with the key and not with a field that nobody has named."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _cut(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """Texts as samples, (N, L) int64: joined, cut without overlap, and of too many every so many-th."""
    tokens_T = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], dtype=torch.int64)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _SEQLEN
    length = min(_SEQLEN, positions, len(tokens_T))
    if length < 2:
        raise UserError(f"tokens_NL must be texts of two tokens at least, of which these have {length}")
    tokens_NL = tokens_T.unfold(0, length, length)
    return tokens_NL[:: ceil(len(tokens_NL) / _SAMPLES)].contiguous()
