"""What is measured of a model. One file a kind; `evaluation` puts them together."""

from barber.evals.agreement import Agreement
from barber.evals.evaluation import Evaluation, Prepared, evaluation
from barber.evals.sample import Sample
from barber.evals.windows import WindowProtocol, Windows
from barber.evals.zero_shot import ZeroShot

__all__ = [
    "Agreement",
    "Evaluation",
    "Prepared",
    "Sample",
    "WindowProtocol",
    "Windows",
    "ZeroShot",
    "evaluation",
]
