"""EvoPress: evolutionary search for the sparsity of every linear (Sieberling et al., arXiv 2410.14649)."""

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from barber.errors import UserError, require_counts
from barber.methods import masks
from barber.model.decoder import Decoder, LayerInputs
from barber.model.driver import Turn, outside_of_layers
from barber.runtime.activations import Activations
from barber.runtime.tensors import Tensor, batches, moved
from barber.walk.allocation.base import Allocation, Setting, Watch, rounded
from barber.walk.allocation.survey import Surveyed, survey

# Levels are counted from the uniform one; what an int8 can hold beside "at none of them".
_LOWEST_LEVEL, _HIGHEST_LEVEL = -127, 126
_NEVER = 127

# At most so many pairs of moves make an offspring; fewer are likelier.
_MOST_MOVES = 3

Levels = tuple[int, ...]


@dataclass(frozen=True)
class EvoPress(Allocation):
    """Mutate the sparsities of the linears, and keep what is nearest to the dense model.

    An offspring has a few linears a level sparser and as many a level denser than its parent. A level is the same
    number of weights in every linear, so the total stays. Selection is by the KL divergence of the next-token
    distributions from the dense model's, in rounds of ever fewer candidates on ever more tokens; in the last one the
    parent takes part, so what is kept never gets worse there. Masks are Wanda's, on dense inputs.

    Time: forward passes over `offspring` times the first number of tokens, and so on, a generation. Layers are run one
    at a time for all candidates, so the model need not fit on the device. Memory: a byte a prunable weight.

    Args:
        generations: how often offspring are made.
        offspring: how many.
        survivors: how many of them a round leaves; the last one leaves 1.
        tokens: on how many tokens, from the first sample on, a round compares; as many as there are at most.
        step: weights of a level, as a share of those of an average linear.
        seed: of the mutations.
    """

    generations: int = 100
    offspring: int = 32
    survivors: Sequence[int] = (8, 2, 1)
    tokens: Sequence[int] = (2048, 16384, 65536)
    step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self, "generations", "offspring", most=10_000)
        if not self.survivors or self.survivors[-1] != 1 or min(self.survivors) < 1:
            raise UserError(f"must be whole numbers that end with 1, not {list(self.survivors)}", field="survivors")
        if len(self.tokens) != len(self.survivors) or min(self.tokens) < 1:
            raise UserError(
                f"must be as many numbers above 0 as survivors has ({len(self.survivors)}), not {list(self.tokens)}",
                field="tokens",
            )
        if not 0 < self.step < 1:
            raise UserError(f"must be above 0 and below 1, not {self.step}", field="step")

    def allocate(self, setting: Setting, watch: Watch | None = None) -> dict[str, int]:
        """The number of weights that each linear loses."""
        ladder = Ladder.uniform(setting, self.step)
        index_OI: dict[str, Tensor] = {}
        to_do = len(Decoder(setting.model).layers) + self.generations

        def look(surveyed: Surveyed) -> None:
            for name in surveyed.dense_OI.keys() & ladder.start.keys():
                index_OI[name] = ladder.index(name, surveyed.score_OI(name))
            if watch is not None:
                watch(surveyed.index + 1, to_do)

        survey(setting, look)
        with torch.inference_mode(False), torch.no_grad(), setting.weights.showing("dense"):
            rounds = [Round(setting, tokens, ladder, index_OI) for tokens in self.tokens]
            parent: Levels = (0,) * len(ladder.start)
            (divergence,) = rounds[-1].divergences([parent])
            chance = random.Random(self.seed)
            for generation in range(self.generations):
                candidates = [ladder.mutated(parent, chance) for _ in range(self.offspring)]
                for compare, survivors in zip(rounds[:-1], self.survivors[:-1], strict=True):
                    ranking = sorted(zip(compare.divergences(candidates), candidates, strict=True))
                    candidates = [candidate for _, candidate in ranking[:survivors]]
                found = min(zip(rounds[-1].divergences(candidates), candidates, strict=True))
                # the parent where they are equal
                divergence, parent = min((divergence, parent), found, key=lambda pair: pair[0])
                if watch is not None:
                    watch(to_do - self.generations + generation + 1, to_do)
        return ladder.counts(parent)


@dataclass(frozen=True)
class Ladder:
    """The levels of every linear: numbers of weights to prune, `step` apart.

    Args:
        start: level 0, by linear and in the order of the walk.
        sizes: the weights of each linear.
        step: weights of a level, the same in all linears.
    """

    start: Mapping[str, int]
    sizes: Mapping[str, int]
    step: int

    @classmethod
    def uniform(cls, setting: Setting, step: float) -> "Ladder":
        """Level 0 is the uniform sparsity; a level is a share of an average linear, at least one weight."""
        sizes = setting.sizes
        start = rounded({name: size * setting.sparsity for name, size in sizes.items()}, sizes, setting.total)
        return cls(start, sizes, max(1, int(sum(sizes.values()) / len(sizes) * step)))

    def counts(self, levels: Sequence[int]) -> dict[str, int]:
        """The number of pruned weights of each linear."""
        return {name: self.start[name] + level * self.step for name, level in zip(self.start, levels, strict=True)}

    def index(self, name: str, score_OI: Tensor) -> Tensor:
        """From which level on every weight of a linear is pruned: (O, I), int8, on the CPU."""
        order_OI = masks.order_evenly(score_OI)
        level_OI = (order_OI - self.start[name]).div_(self.step, rounding_mode="floor").add_(1)
        return level_OI.clamp_(_LOWEST_LEVEL, _NEVER).to(torch.int8).cpu()

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """A few times, one linear a level up and another one down; as it was where there is no room for that."""
        found = list(levels)
        for _ in range(min(chance.randint(1, _MOST_MOVES), chance.randint(1, _MOST_MOVES))):
            up, down = self._with_room(found, 1), self._with_room(found, -1)
            if not up or not down:
                break
            found[chance.choice(up)] += 1
            found[chance.choice(down)] -= 1
        return tuple(found)

    def _with_room(self, levels: Sequence[int], move: int) -> list[int]:
        """The linears, by number, that have a level so far from the present one."""
        counts = self.counts(levels)
        return [
            number
            for number, (name, level) in enumerate(zip(self.start, levels, strict=True))
            if 0 <= counts[name] + move * self.step <= self.sizes[name]
            and _LOWEST_LEVEL <= level + move <= _HIGHEST_LEVEL
        ]


class Round:
    """Some of the samples, on which candidates are compared with the dense model.

    Args:
        setting: the dense model.
        tokens: how many, rounded up to whole samples.
        ladder, index_OI: the masks of all levels.
    """

    def __init__(self, setting: Setting, tokens: int, ladder: Ladder, index_OI: Mapping[str, Tensor]) -> None:
        self._setting, self._index_OI = setting, index_OI
        self._names = list(ladder.start)
        self._decoder = Decoder(setting.model)
        samples_NL = setting.tokens_NL[: math.ceil(tokens / setting.tokens_NL.shape[1])]
        self._num_tokens = samples_NL.numel()
        # Every so many-th sample: each process has some of the first ones, which all rounds begin with.
        self._tokens_NL = samples_NL[setting.ranks.rank :: setting.ranks.size]
        self._inputs: LayerInputs | None = None
        if len(self._tokens_NL):
            self._inputs = self._decoder.inputs(self._tokens_NL, setting.batch_size, setting.store)
            self._dense = self._run(self._inputs, [None])

    def divergences(self, candidates: Sequence[Levels]) -> list[float]:
        """KL(dense || candidate) of the next-token distributions, the mean over tokens; infinite where it is NaN."""
        setting = self._setting
        total_K = torch.zeros(len(candidates), dtype=torch.float64, device=setting.device)
        if self._inputs is not None:
            hidden = self._run(self._inputs, candidates)
            with self._head_onloaded():
                for number in range(len(self._tokens_NL)):  # one by one: logits are by far the largest that there is
                    dense_LV = self._log_probabilities(self._dense, number, number)
                    for k in range(len(candidates)):
                        sparse_LV = self._log_probabilities(hidden, k * len(self._tokens_NL) + number, number)
                        total_K[k] += (dense_LV.exp() * (dense_LV - sparse_LV)).sum(dtype=torch.float64)
        mean_K = setting.ranks.all_reduce_sum(total_K) / self._num_tokens
        return mean_K.nan_to_num(nan=math.inf, posinf=math.inf).tolist()

    def _run(self, inputs: LayerInputs, candidates: Sequence[Levels | None]) -> Activations:
        """What the last layer gives for the samples with the masks of each candidate, one after the other."""
        setting, num_samples = self._setting, len(self._tokens_NL)
        hidden = setting.store.empty(len(candidates) * num_samples, *inputs.hidden.shape[1:])

        def run(turn: Turn) -> None:
            names = turn.dense_OI.keys() & self._index_OI.keys()
            index_OI = {name: self._index_OI[name].to(setting.device) for name in names}
            for k, levels in enumerate(candidates):
                with turn.layer.using(self._masked(turn.dense_OI, levels, index_OI), setting.arithmetic):
                    for batch in batches(num_samples, setting.batch_size):
                        place = slice(k * num_samples + batch.start, k * num_samples + batch.stop)
                        x_BLD = hidden[place] if turn.index else inputs.hidden[batch]
                        hidden[place] = turn.layer.run(inputs.call(turn.index, x_BLD))

        deque(setting.driver.each(run), maxlen=0)
        return hidden

    def _masked(
        self, dense_OI: Mapping[str, Tensor], levels: Levels | None, index_OI: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The weights of a layer with the masks of a candidate; dense without one."""
        if levels is None:
            return dense_OI
        level = dict(zip(self._names, levels, strict=True))
        masked_OI = {name: dense_OI[name].masked_fill(one_OI <= level[name], 0) for name, one_OI in index_OI.items()}
        return {**dense_OI, **masked_OI}

    @contextmanager
    def _head_onloaded(self) -> Iterator[None]:
        """What lies around the layers on the device, as it is stored."""
        with moved(outside_of_layers(self._setting.model), self._setting.device):
            yield

    def _log_probabilities(self, hidden: Activations, place: int, number: int) -> Tensor:
        """Of a sample's next tokens, given what the last layer gave: (L, V), float32."""
        hidden_1LD = hidden[place : place + 1].to(self._setting.model.get_input_embeddings().weight.dtype)
        tokens_1L = self._tokens_NL[number : number + 1].to(self._setting.device)
        return self._decoder.logits(tokens_1L, hidden_1LD)[0].float().log_softmax(dim=-1)
