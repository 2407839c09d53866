"""How far the engine is from what the machine can do: time, flops and bytes of every phase of one walk.

    python experiments/benchmarks/engine.py --shape smollm2-135m --samples 16 --seqlen 512 --plain
    python experiments/benchmarks/engine.py --model FOLDER --tokens FILE.safetensors --json result.json

Wanda and Barber, 50 % unstructured, by default the paper's schedule. Needs torch and transformers only. The rate that a
phase is compared with is that of a large matrix product, measured in the same run; flops are those that the method
needs (a causal attention counts half), whatever is computed beyond them counts as time lost. `--plain` runs the plain
implementation of plain.py in the same process, alternating with the engine.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))  # a checkout that is not installed will do

from barber import Barber, Unstructured, Wanda
from barber.model.blocks import Layer
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.sources import hollow
from barber.model.stream import Streamed
from barber.model.weights import InMemory, Weights
from barber.runtime.memory import keep_freed_memory
from barber.runtime.precision import Precision
from barber.runtime.products import fast_linears
from barber.walk.pruning import Pruning
from experiments.benchmarks.plain import plain_wanda_barber


class Shape(NamedTuple):
    """Of a LLaMA-like model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "tiny": Shape(64, 160, 4, 4, 2, 256, tied=True),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8, 32000),
}


@dataclass
class Phase:
    """What a phase took, and what the method needs there."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    share: float | None = None


@dataclass
class Result:
    """One configuration, measured."""

    arguments: dict[str, Any]
    machine: dict[str, Any]
    rates: dict[str, float]
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    phases: dict[str, Phase] = field(default_factory=dict)
    needed_flops: float = 0.0
    share: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int | None = None
    exchanges: int = 0
    differing_bits: int | None = None


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="barber-benchmark-") as scratch:
        result = _measure(arguments, device, Path(scratch))
    print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def _measure(arguments: argparse.Namespace, device: torch.device, scratch: Path) -> Result:
    config = _config(arguments)
    tokens_NL = _tokens(arguments, config)
    machine = {"device": _name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = Result({key: value for key, value in vars(arguments).items() if value is not None}, machine, {})
    precision = Precision(arguments.forward, arguments.gradient)
    masks: dict[str, torch.Tensor] = {}
    for repetition in range(arguments.repeat):
        model, weights, checkpoint = _open(arguments, config, scratch / str(repetition), device)
        _forget_peak(device)
        masks.clear()

        def note(_: Any, block: Any, keep: bool = arguments.plain) -> None:
            if keep:
                masks.update({linear.name: linear.final.mask_OI.cpu() for linear in block.linears})

        started = time.perf_counter()
        pruning = Pruning(
            Unstructured(0.5),
            Wanda(),
            [Barber(alpha=arguments.alpha)],
            device,
            arguments.batch_size,
            precision,
            arguments.schedule,
            arguments.activations,
            scratch,
        )
        report = pruning.carry_out(model, tokens_NL, weights, checkpoint, on_block=note)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.seconds.append(time.perf_counter() - started)
        if repetition == 0:
            result.peak_host_bytes = _peak()
            if device.type == "cuda":
                result.peak_device_bytes = torch.cuda.max_memory_allocated(device)
        result.exchanges = report.exchanges
        for name, seconds in report.seconds.items():
            result.phases.setdefault(name, Phase()).seconds += seconds / arguments.repeat
        named = sum(report.seconds.values())
        rest = result.phases.setdefault("load, store, rest", Phase())
        rest.seconds += (result.seconds[-1] - named) / arguments.repeat
        layers = Decoder(model).layers
        del model, weights
        if arguments.plain:
            plain_model = _in_memory(arguments, config, torch.float32).to(device)
            outcome = plain_wanda_barber(plain_model, tokens_NL.to(device), 0.5, arguments.alpha)
            result.plain_seconds.append(sum(outcome.seconds.values()))
            result.differing_bits = sum(int((masks[name] != bits.cpu()).sum()) for name, bits in outcome.pruned.items())
            del plain_model, outcome
    _account(result, layers, config, tokens_NL, arguments, precision, device)
    return result


def _account(
    result: Result,
    layers: list[Layer],
    config: PreTrainedConfig,
    tokens_NL: torch.Tensor,
    arguments: argparse.Namespace,
    precision: Precision,
    device: torch.device,
) -> None:
    """Fill in what every phase needs, and how near the machine's rate it came."""
    forward, gradient = precision.on(device)
    result.rates = {kind: rate(kind, device) for kind in {forward.kind, gradient.kind}}
    needs = needed(layers, config, tokens_NL, forward.dtype.itemsize, gradient.dtype.itemsize, arguments.schedule)
    least = 0.0
    for name, phase in result.phases.items():
        parts = needs.get(name, {})
        phase.flops = sum(flops for flops, _ in parts.values())
        phase.bytes = sum(num_bytes for _, num_bytes in parts.values())
        kinds = {"forward": forward.kind, "gradient": gradient.kind}
        seconds = sum(flops / result.rates[kinds[part]] for part, (flops, _) in parts.items())
        phase.share = seconds / phase.seconds if phase.seconds and phase.flops else None
        least += seconds
    result.needed_flops = sum(phase.flops for phase in result.phases.values())
    result.share = least / median(result.seconds)


def needed(
    layers: list[Layer],
    config: PreTrainedConfig,
    tokens_NL: torch.Tensor,
    forward_width: int,
    gradient_width: int,
    schedule: str,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Flops and bytes by phase, of passes in the precision of forward passes and of gradients, LLaMA-like blocks.

    Flops are two a weight and token, and those of causal attention; bytes are those of the linears' inputs, outputs and
    weights, once a pass, and of the scores and masks.
    """
    num_tokens, seqlen = tokens_NL.numel(), tokens_NL.shape[1]
    text = config.get_text_config()
    heads = text.num_attention_heads
    attention = 2 * num_tokens * seqlen * heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    phases: dict[str, dict[str, list[float]]] = {}

    def add(phase: str, kind: str, flops: float, num_bytes: float) -> None:
        entry = phases.setdefault(phase, {}).setdefault(kind, [0.0, 0.0])
        entry[0] += flops
        entry[1] += num_bytes

    for index, layer in enumerate(layers):
        shapes = [tuple(linear.weight_OI.shape) for linear in layer.linears]
        weights = sum(o * i for o, i in shapes)
        last = [block.linears[-1].weight_OI.numel() for block in layer.blocks]  # o and down: their inputs' gradients
        moved = sum(num_tokens * (o + i) + o * i for o, i in shapes)
        whole = 2 * num_tokens * weights + attention
        fewer = 2 * num_tokens * (weights - last[-1]) + attention  # statistics need no output of the last linear
        if schedule == "paper":
            add("statistics", "forward", fewer, moved * forward_width)
            if index + 1 < len(layers):
                add("propagate", "forward", whole, moved * forward_width)
        add("compare", "forward", whole, moved * forward_width)
        backward = 2 * num_tokens * sum(last) + 2.5 * attention
        add("compare", "gradient", whole + backward, 2 * moved * gradient_width)
        add("squared gradients", "gradient", 2 * num_tokens * weights, moved * gradient_width)
        add("propagate", "forward", whole, moved * forward_width)
        add("select", "forward", 0.0, weights * (4 + 1 + 4))
        add("exchange", "forward", 0.0, weights * (4 + 4 + 1 + 1 + 4))
    return {phase: {kind: (f, b) for kind, (f, b) in kinds.items()} for phase, kinds in phases.items()}


def rate(kind: str, device: torch.device) -> float:
    """Flops a second of a large matrix product, the best of what is there."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    linear = torch.nn.Linear(size, size, bias=False, dtype=dtype, device=device)
    x = torch.randn(size, size, device=device).to(dtype)
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    best = 0.0
    with torch.no_grad():
        best = max(best, 2 * size**3 / _seconds(lambda: linear(x), device))
        with fast_linears([linear], device):
            best = max(best, 2 * size**3 / _seconds(lambda: linear(x), device))
    torch.set_float32_matmul_precision(before)
    return best


def table(result: Result) -> str:
    """What was measured, for a terminal."""
    unit, scale = ("TF/s", 1e12) if max(result.rates.values()) > 5e12 else ("GF/s", 1e9)
    lines = [f"{'phase':<20}{'seconds':>10}{'Tflop':>10}{'GiB':>10}{unit:>10}{'of the rate':>13}"]
    for name, phase in sorted(result.phases.items(), key=lambda item: -item[1].seconds):
        speed = f"{phase.flops / phase.seconds / scale:.0f}" if phase.flops and phase.seconds else ""
        share = f"{phase.share:.0%}" if phase.share else ""
        work = f"{phase.flops / 1e12:>10.2f}{phase.bytes / 2**30:>10.2f}"
        lines.append(f"{name:<20}{phase.seconds:>10.2f}{work}{speed:>10}{share:>13}")
    seconds = median(result.seconds)
    lines.append(f"{'all':<20}{seconds:>10.2f}{result.needed_flops / 1e12:>10.2f}{'':>20}{result.share:>13.0%}")
    lines.append("")
    rates = ", ".join(f"{kind} {flops / scale:.0f} {unit}" for kind, flops in sorted(result.rates.items()))
    lines.append(f"matrix products on {result.machine['device']}: {rates}")
    lines.append(f"seconds of each run: {', '.join(f'{each:.1f}' for each in result.seconds)}")
    memory = f"peak memory of the process {result.peak_host_bytes / 2**30:.2f} GiB"
    if result.peak_device_bytes is not None:
        memory += f", of the device {result.peak_device_bytes / 2**30:.2f} GiB"
    lines.append(memory)
    if result.plain_seconds:
        plain = median(result.plain_seconds)
        lines.append(
            f"plain implementation {plain:.1f} s: {plain / seconds:.2f} times as long; "
            f"{result.differing_bits} of its mask bits differ ({result.exchanges} pairs exchanged)"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="a LLaMA shape with random weights")
    parser.add_argument("--model", help="a Hugging Face folder instead")
    parser.add_argument("--layers", type=int, help="that many decoder layers instead of all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", help="a .safetensors with `tokens` [samples, tokens] instead of random ids")
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--device", help="cpu, cuda; by default a GPU if there is one")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--forward", default="auto", choices=["auto", "float32", "tf32", "bfloat16"])
    parser.add_argument("--gradient", default="auto", choices=["auto", "float32", "tf32", "bfloat16"])
    parser.add_argument("--schedule", default="paper", choices=["paper", "interleaved"])
    parser.add_argument("--streaming", action="store_true", help="one layer in memory at a time")
    parser.add_argument("--activations", default="auto", choices=["auto", "device", "host", "disk"])
    parser.add_argument("--dtype", help="of the weights as stored; by default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--plain", action="store_true", help="run the plain implementation as well")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--scratch", help="a folder for temporary files")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> PreTrainedConfig:
    if arguments.model:
        config: PreTrainedConfig = AutoConfig.from_pretrained(arguments.model)
    else:
        shape = SHAPES[arguments.shape]
        config = AutoConfig.for_model(
            "llama",
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=max(4096, arguments.seqlen),
        )
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    return config


def _tokens(arguments: argparse.Namespace, config: PreTrainedConfig) -> torch.Tensor:
    if arguments.tokens:
        return load_file(arguments.tokens)["tokens"][: arguments.samples, : arguments.seqlen].long()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (arguments.samples, arguments.seqlen), generator=generator)


def _open(
    arguments: argparse.Namespace, config: PreTrainedConfig, scratch: Path, device: torch.device
) -> tuple[PreTrainedModel, Weights, Checkpoint | None]:
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default
    if not arguments.streaming:
        model = _in_memory(arguments, config, dtype)
        return model, InMemory(model), None
    scratch.mkdir(parents=True)
    model = hollow(config, dtype)
    _fill({name: tensor for name, tensor in model.named_parameters() if "layers." not in name}, model, dtype)
    checkpoint = Discarding(scratch, config.num_hidden_layers)
    return model, Streamed(model, OneLayer(model, dtype), checkpoint), checkpoint  # type: ignore[arg-type]


class OneLayer:
    """A source of tensors that are random and the same in every layer: a disk need not hold a large model."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        layer = Decoder(model).layers[0]
        self._file = tempfile.NamedTemporaryFile(suffix=".safetensors")  # noqa: SIM115 (it lives as long as this)
        save_file(_random(layer.module.state_dict(), dtype), self._file.name)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """A layer's tensors, read from the disk."""
        return {f"{layer.name}.{name}": tensor.clone() for name, tensor in load_file(self._file.name).items()}


class Discarding(Checkpoint):
    """A checkpoint that forgets a layer when the next one is written."""

    def write_layer(self, index: int, tensors: Any, dense: str) -> None:
        super().write_layer(index, tensors, dense)
        self.wait()
        for kind in ("layer", "pruned"):
            (self.folder / f"{kind}-{index - 1:05d}.safetensors").unlink(missing_ok=True)


def _in_memory(arguments: argparse.Namespace, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if arguments.model:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(arguments.model, config=config, dtype=dtype)
        return model.eval()
    model = hollow(config, dtype)
    layers = Decoder(model).layers
    first = _random(layers[0].module.state_dict(), dtype)
    for layer in layers:  # the same numbers in all of them: drawing billions would take longer than the walk
        layer.module.load_state_dict({name: tensor.clone() for name, tensor in first.items()}, assign=True)
    _fill({name: tensor for name, tensor in model.named_parameters() if tensor.is_meta}, model, dtype)
    return model.eval()


def _fill(parameters: dict[str, torch.Tensor], model: PreTrainedModel, dtype: torch.dtype) -> None:
    for name, tensor in _random(parameters, dtype).items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).load_state_dict({leaf: tensor}, strict=False, assign=True)
    model.tie_weights()


def _random(like: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(tensor.shape, dtype=dtype)
        if tensor.ndim == 1
        else torch.empty(tensor.shape, dtype=dtype).normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        for name, tensor in like.items()
    }


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of some runs after two to warm up."""
    found = []
    for number in range(9):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            found.append(time.perf_counter() - started)
    return median(found)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak() -> int:
    """Of the process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
