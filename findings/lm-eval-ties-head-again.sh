#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.23.0: HFLM(pretrained=model) calls model.tie_weights() on a model in
# memory. A causal model whose config says tie_word_embeddings, but whose head has been given weights of its own (a
# pruned, trained or rescaled head), comes back with the head replaced by the embedding, without a word. Every later use
# of the same object, perplexity or save_pretrained, is of another model than the one that was handed over.
#
# Seen: "head before 0.5000, after 0.0000" (mean distance of head and embedding), "tied True".
# What to do: give lm-eval a copy, or set tie_word_embeddings to false in the config before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 "transformers==5.23.0" "lm-eval[hf]==0.4.13"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/err" | tee "$folder/out"
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     tie_word_embeddings=True)
model = LlamaForCausalLM(config).eval()
embedding = model.get_input_embeddings().weight
model.lm_head.weight = torch.nn.Parameter(embedding.detach() + 0.5)

def distance():
    return (model.lm_head.weight - embedding).abs().mean().item()

before = distance()
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
HFLM(pretrained=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1"))
print(f"head before {before:.4f}, after {distance():.4f}")
print("tied", model.lm_head.weight is model.get_input_embeddings().weight)
PYTHON
diff <(printf 'head before 0.5000, after 0.0000\ntied True\n') "$folder/out" || { cat "$folder/err"; exit 1; }
