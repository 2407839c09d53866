#!/usr/bin/env bash
# lm-eval 0.4.13: a model whose logits are all NaN gets an accuracy. The log-likelihoods of all choices are NaN, the
# largest of them is by numpy's argmax the first, and what comes out is the share of documents whose first choice is
# right: a plausible figure, with a standard error, and no warning. A model that overflows in half precision after
# pruning looks like one that guesses.
#
# Seen, for eight questions of which two have their first choice right: "acc 0.25".
# What to do: look at the logits (a forward hook), or measure perplexity beside the tasks, which is NaN then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 "transformers==5.23.0" "lm-eval[hf]==0.4.13"
mkdir "$folder/task"
python3 - "$folder/task" <<'PYTHON'
import json, sys
rows = [{"query": "w2 w3", "choices": [" w4", " w5"], "gold": int(number % 4 != 0)} for number in range(8)]
with open(f"{sys.argv[1]}/rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
with open(f"{sys.argv[1]}/task.yaml", "w") as file:
    file.write(f"""task: eight_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {sys.argv[1]}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
""")
PYTHON
HF_HOME="$folder/home" "$folder/venv/bin/python" - "$folder/task" <<'PYTHON' 2>"$folder/err" | tee "$folder/out"
import sys
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config).eval()
model.model.norm.weight.data[0] = torch.nan
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=["eight_questions"],
                        task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False), bootstrap_iters=0)
print("acc", found["results"]["eight_questions"]["acc,none"])
PYTHON
grep -qx "acc 0.25" "$folder/out" || { tail -5 "$folder/err"; exit 1; }
