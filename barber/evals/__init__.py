"""Evaluations of a model. One file a kind."""

from barber.evals.perplexity import Perplexity

__all__ = ["Perplexity"]
