"""A piece of text that the model goes on with: what people look at first."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import UserError, require_counts
from barber.evals.results import SampleResult


@dataclass(frozen=True)
class Sample:
    """The likeliest continuation of a prompt, token by token.

    Args:
        prompt: what the model is given.
        tokens: how many tokens it adds at most.
    """

    prompt: str
    tokens: int = 40

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("must be a text, not an empty one", field="prompt")
        require_counts(self, "tokens", most=10_000)

    def evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SampleResult:
        """Let a model that has been placed go on."""
        ids = tokenizer(self.prompt, return_tensors="pt")["input_ids"].to(model.device)
        end = model.generation_config.eos_token_id if model.generation_config else None
        how = GenerationConfig(
            max_new_tokens=self.tokens, do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id or 0
        )
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return SampleResult(self.prompt, text, out.shape[1] - ids.shape[1])
