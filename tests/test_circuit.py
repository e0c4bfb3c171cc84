"""Circuits against the sum over all windows and all latents, on cases small enough to write down."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from mtpd.heads.circuit.circuit import Circuit, HiddenMarkov, Mixture, new_circuit

CASES = [
    (structure, places, components)
    for structure, places, components in itertools.product(("ff", "cp", "hmm", "btree"), (1, 2, 3, 4), (1, 2, 3))
    if structure != "ff" or components == 1
]
TOKENS = 3


class Case:
    """A random circuit in float64 with its leaves [1, n, r, V]."""

    def __init__(self, structure: str, places: int, components: int, *, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.structure, self.places, self.components = structure, places, components
        self.circuit: Circuit = new_circuit(structure, places, components)
        self.weights = 2 * torch.randn(1, self.circuit.sums, generator=random, dtype=torch.float64)
        leaves = 2 * torch.randn(1, places, components, TOKENS, generator=random, dtype=torch.float64)
        self.leaves = leaves.log_softmax(-1)

    def evidence(self, known: dict[int, int]) -> Tensor:
        found = torch.zeros(1, self.places, self.components, dtype=torch.float64)
        for place, token in known.items():
            found[:, place] = self.leaves[:, place, :, token]
        return found

    def windows(self) -> list[tuple[int, ...]]:
        return list(itertools.product(range(TOKENS), repeat=self.places))

    def terms(self) -> dict[tuple[int, ...], Tensor]:
        """By latents, their probability, written as the definitions have it: one factor at a time."""
        r, n = self.components, self.places
        w = self.weights[0]
        found = {}
        if self.structure in ("ff", "cp"):
            first = w.softmax(0) if r > 1 else torch.ones(1, dtype=torch.float64)
            for j in range(r):
                found[(j,) * n] = first[j]
        elif self.structure == "hmm":
            steps = w[r:].view(n - 1, r, r).softmax(-1)
            for z in itertools.product(range(r), repeat=n):
                chance = w[:r].softmax(0)[z[0]]
                for i in range(1, n):
                    chance = chance * steps[i - 1, z[i - 1], z[i]]
                found[z] = chance
        else:
            found = self._tree(w)
        return found

    def _tree(self, w: Tensor) -> dict[tuple[int, ...], Tensor]:
        """Of at most four places: the root, and a region of two (or, of three places, one) on each side."""
        r, n = self.components, self.places
        found: dict[tuple[int, ...], Tensor] = {}
        root = w[:r].softmax(0)
        if n <= 2:
            return {(j,) * n: root[j] for j in range(r)}
        tied = w[r:].view(2, r, r).softmax(-1)
        for top, left, right in itertools.product(range(r), repeat=3):
            z = (left, left, right, right)[:n]
            found[z] = found.get(z, 0) + root[top] * tied[0, top, left] * tied[1, top, right]
        return found

    @functools.cached_property
    def table(self) -> Tensor:
        """p of every window, [V, ..., V]: a sum over latents of a product over places."""
        names = "abcd"[: self.places]
        product = f"{','.join(names)}->{names}"
        return sum(
            (
                chance * torch.einsum(product, *(self.leaves[0, i, z[i]].exp() for i in range(self.places)))
                for z, chance in self.terms().items()
            ),
            torch.zeros((), dtype=torch.float64),
        )

    def joint(self, window: tuple[int, ...]) -> Tensor:
        return self.table[window]

    def marginal(self, known: dict[int, int]) -> Tensor:
        return self.table[tuple(known.get(place, slice(None)) for place in range(self.places))].sum()


def log_marginal(circuit: Circuit, evidence: Tensor, weights: Tensor) -> Tensor:
    """log p of the known tokens [N], from the places up to the root; a place that is not known adds log 1."""
    r = circuit.components
    first = weights[:, :r].log_softmax(-1) if circuit.sums else weights.new_zeros(len(weights), 1)
    if isinstance(circuit, Mixture):
        return (first + evidence.sum(1)).logsumexp(-1)
    tied = weights[:, r:].unflatten(1, (-1, r, r)).log_softmax(-1).unbind(1) if weights.shape[1] > r else ()
    units = list(evidence.unbind(1))
    if isinstance(circuit, HiddenMarkov):
        state = first + units[0]
        for transition, unit in zip(tied, units[1:], strict=True):
            state = (state[:, :, None] + transition).logsumexp(1) + unit
        return state.logsumexp(-1)
    regions = iter(tied)
    while True:
        products = [sum(units[index + 1 : index + 2], units[index]) for index in range(0, len(units), 2)]
        if len(products) == 1:
            return (first + products[0]).logsumexp(-1)
        units = [(next(regions) + product[:, None]).logsumexp(-1) for product in products]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_joint_and_marginals(case: Case) -> None:
    """Fault: a region halved elsewhere, a transition read the wrong way round, a place that is not summed out."""
    windows = case.windows()
    evidence = torch.cat([case.evidence(dict(enumerate(window))) for window in windows])
    values = log_marginal(case.circuit, evidence, case.weights.expand(len(windows), -1)).exp()
    torch.testing.assert_close(values, torch.stack([case.joint(window) for window in windows]))
    assert values.sum().item() == pytest.approx(1.0)
    for size in range(case.places):
        for places in itertools.combinations(range(case.places), size):
            known = {place: (place + size) % TOKENS for place in places}
            value = log_marginal(case.circuit, case.evidence(known), case.weights).exp()
            torch.testing.assert_close(value[0], case.marginal(known).double())


def test_prefix_conditionals(case: Case) -> None:
    """Fault: a place that sees its own token or later ones, or that misses one before it."""
    windows = case.windows()
    evidence = torch.cat([case.evidence(dict(enumerate(window))) for window in windows])
    for window, mixed in zip(
        windows, case.circuit.prefix(evidence, case.weights.expand(len(windows), -1)), strict=True
    ):
        for place in range(case.places):
            before = dict(enumerate(window[:place]))
            found = (mixed[place][:, None] + case.leaves[0, place]).logsumexp(0).exp()
            expected = [case.marginal({**before, place: token}) for token in range(TOKENS)]
            torch.testing.assert_close(found, torch.stack(expected) / case.marginal(before))


def test_relations_between_circuits() -> None:
    """Fault: an hmm or a tree that does not start as a mixture; a mixture of one that is not the product."""
    mixture = Case("cp", 4, 3)
    window = mixture.evidence(dict(enumerate((0, 1, 2, 0))))
    expected = log_marginal(mixture.circuit, window, mixture.weights)
    for structure in ("hmm", "btree"):
        circuit = new_circuit(structure, 4, 3)
        near = circuit.start().double()[None]
        near[:, :3] = mixture.weights
        exact = near.clone()
        exact[:, 3:] *= 1e3
        torch.testing.assert_close(log_marginal(circuit, window, exact), expected)
        assert abs(log_marginal(circuit, window, near) - expected).item() < 0.5
    one = Case("cp", 4, 1)
    known = one.evidence(dict(enumerate((0, 1, 2, 0))))
    torch.testing.assert_close(log_marginal(one.circuit, known, one.weights), known.sum((1, 2)))


@pytest.mark.parametrize("structure", ["cp", "hmm", "btree"])
def test_far_apart_components(structure: str) -> None:
    """Fault: probabilities instead of their logarithms, which are 0 for unlikely windows, and NaN in the gradient."""
    circuit = new_circuit(structure, 8, 4)
    random = torch.Generator().manual_seed(0)
    weights = (60 * torch.randn(2, circuit.sums, generator=random)).requires_grad_()
    evidence = (-80 * torch.rand(2, 8, 4, generator=random)).requires_grad_()
    mixed = circuit.prefix(evidence, weights)
    conditional = (mixed + evidence).logsumexp(-1)
    assert conditional.isfinite().all()
    conditional.sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    assert evidence.grad is not None
    assert evidence.grad.isfinite().all()


@pytest.mark.parametrize("structure", ["cp", "hmm", "btree"])
@pytest.mark.parametrize("places", [2, 3, 5, 8, 9])
def test_wide_windows(structure: str, places: int) -> None:
    """Fault: regions of a tree that are put together wrongly where there are more than two sizes of them."""
    circuit = new_circuit(structure, places, 3)
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(2, circuit.sums, generator=random, dtype=torch.float64)
    evidence = -torch.rand(2, places, 3, generator=random, dtype=torch.float64)
    mixed = circuit.prefix(evidence, weights)
    # The chain rule: what is known up to a place, from masked passes.
    marginals = [torch.zeros(2, dtype=torch.float64)]
    for place in range(places):
        masked = evidence.clone()
        masked[:, place + 1 :] = 0.0
        marginals.append(log_marginal(circuit, masked, weights))
    expected = torch.stack(marginals, dim=1).diff(dim=1)
    torch.testing.assert_close((mixed + evidence).logsumexp(-1), expected)
    torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(2, places, dtype=torch.float64))
    # Drafts are chosen place by place.
    steps = circuit.follow(weights)
    followed = [next(steps), *(steps.send(evidence[:, place]) for place in range(places - 1))]
    torch.testing.assert_close(torch.stack(followed, dim=1), mixed)
