"""Walks in a directed graph given as a list of edges, modeled on OpenAI's GraphWalks (openai/graphwalks).

| family    | answer                                                              |
|-----------|---------------------------------------------------------------------|
| `parents` | the nodes with an edge to the queried node                          |
| `depth_1` | breadth-first search: the nodes at distance 1 of the queried node   |
| `depth_2` | the nodes at distance 2                                             |
| `depth_3` | the nodes at distance 3                                             |

The score is the F1 of the expected and the generated set of nodes; the generated text is read up to the end of the line
or list. The task is sized for base models: nodes have four letters, answers have two to five nodes, and a solved
example precedes the graph. The other edges of the context form separate components of the same kind. The prompts are
worded differently from OpenAI's, so scores are comparable between models evaluated here but not with published ones.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Iterator

from ropepp_lit.eval.tasks import stock
from ropepp_lit.eval.tasks.base import Draft, Family

LETTERS = 4
"""Letters of a node's name."""

COMPONENT = 12
"""Nodes of each component that is not queried."""

Edge = tuple[str, str]


class GraphWalk(Family):
    """Nodes at a distance from a given node.

    Args:
        depth: Distance in edges; -1 selects the parents.
    """

    task = "graphwalks"

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self.part = "parents" if depth < 0 else f"depth_{depth}"

    @property
    def about(self) -> str:
        """See :attr:`Task.about`."""
        return "nodes with an edge to a node" if self._depth < 0 else f"nodes {self._depth} edges away from a node"

    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """See :meth:`Family.draft`."""
        nodes = stock.letters(rng, LETTERS, string.ascii_lowercase)
        start, edges, example = self._walk(rng, nodes)
        edges = rng.sample(edges, len(edges))
        head = f"{_listed(edges)}\n{self._question(start)} [{', '.join(example)}]\n\nThe graph has the edges:\n"
        start, edges, answers = self._walk(rng, nodes)
        return Draft(
            (_edge(edge) for edge in _others(rng, nodes)),
            [(rng.random(), _edge(edge)) for edge in edges],
            self._question(start),
            answers,
            head=f"The graph has the edges:\n{head}",
            ideal=f" [{', '.join(answers)}]",
            separator="\n",
        )

    def score(self, answers: list[str], written: str) -> float:
        """Return the F1 of the expected and the generated nodes."""
        generated = set(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", re.split(r"[\]\n]", written.lstrip())[0]))
        correct = len(generated & set(answers))
        return 2 * correct / (len(generated) + len(set(answers)))

    def _question(self, start: str) -> str:
        if self._depth < 0:
            return f"The parents of {start}, which have an edge to it:"
        return f"The nodes at depth {self._depth} of a breadth-first search from {start}:"

    def _walk(self, rng: random.Random, nodes: Iterator[str]) -> tuple[str, list[Edge], list[str]]:
        """Return the queried node, the edges of its component, and the answers."""
        start = next(nodes)
        edges = [(next(nodes), start) for _ in range(rng.randint(2, 4) if self._depth < 0 else 1)]
        levels = [[start]]
        for _ in range(max(1, self._depth + 1)):  # one level more than queried
            # Only the last node of a level has multiple children, so levels grow by one or two nodes.
            parents = levels[-1] + [levels[-1][-1]] * rng.randint(1, 2 if len(levels) == 1 else 1)
            levels.append([next(nodes) for _ in parents])
            edges += zip(parents, levels[-1], strict=True)
        answers = [parent for parent, child in edges if child == start] if self._depth < 0 else levels[self._depth]
        return start, edges, rng.sample(answers, len(answers))


def _others(rng: random.Random, nodes: Iterator[str]) -> Iterator[Edge]:
    """Yield edges of other components without end, shuffled with those of the previous component."""
    pending: list[Edge] = []
    while True:
        component = list(itertools.islice(nodes, COMPONENT))
        pending += [edge for edge in itertools.permutations(component, 2) if rng.random() < 1.4 / COMPONENT]
        rng.shuffle(pending)
        while len(pending) > COMPONENT:
            yield pending.pop()


def _edge(edge: Edge) -> str:
    return " -> ".join(edge)


def _listed(edges: list[Edge]) -> str:
    return "\n".join(map(_edge, edges))


FAMILIES = {family.part: family for family in map(GraphWalk, (-1, 1, 2, 3))}
