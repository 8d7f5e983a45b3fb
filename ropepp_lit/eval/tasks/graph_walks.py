"""Walks in a directed graph that the context lists edge by edge, after OpenAI's GraphWalks (openai/graphwalks).

| family    | asked for                                    |
|-----------|----------------------------------------------|
| `parents` | the nodes that have an edge to a node        |
| `depth_1` | breadth-first search: the nodes one edge away |
| `depth_2` | those two edges away, and no fewer            |
| `depth_3` | those three edges away, and no fewer          |

The score is F1 of the two sets of nodes, the answer being what is written up to the end of the line or the list. Sized
for base models: nodes are four letters, an answer has two to five of them, and an example with its answer stands before
the graph. All other edges of the context make a graph of the same kind without an edge to or from the nodes that are
looked at, so any node may be asked for. The wording is our own, so scores compare models here and not with OpenAI's.
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
"""Of a node's name."""

COMPONENT = 12
"""Nodes of each part of the graph that nothing is asked about."""

Edge = tuple[str, str]


class GraphWalk(Family):
    """Nodes that lie at a distance of another.

    Args:
        depth: Edges from the node, in their direction; -1 is one against it.
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
        """F1 of the wanted and the written nodes."""
        found = set(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", re.split(r"[\]\n]", written.lstrip())[0]))
        right = len(found & set(answers))
        return 2 * right / (len(found) + len(set(answers)))

    def _question(self, start: str) -> str:
        if self._depth < 0:
            return f"The parents of {start}, which have an edge to it:"
        return f"The nodes at depth {self._depth} of a breadth-first search from {start}:"

    def _walk(self, rng: random.Random, nodes: Iterator[str]) -> tuple[str, list[Edge], list[str]]:
        """A node, the edges around it, and the nodes that are asked for."""
        start = next(nodes)
        edges = [(next(nodes), start) for _ in range(rng.randint(2, 4) if self._depth < 0 else 1)]
        levels = [[start]]
        for _ in range(max(1, self._depth + 1)):  # one level more than is asked for
            # The last of a level alone has several children, so levels grow by one or two.
            parents = levels[-1] + [levels[-1][-1]] * rng.randint(1, 2 if len(levels) == 1 else 1)
            levels.append([next(nodes) for _ in parents])
            edges += zip(parents, levels[-1], strict=True)
        wanted = [parent for parent, child in edges if child == start] if self._depth < 0 else levels[self._depth]
        return start, edges, rng.sample(wanted, len(wanted))


def _others(rng: random.Random, nodes: Iterator[str]) -> Iterator[Edge]:
    """Edges of parts of a graph, mixed with those of the part before, without end."""
    waiting: list[Edge] = []
    while True:
        part = list(itertools.islice(nodes, COMPONENT))
        waiting += [edge for edge in itertools.permutations(part, 2) if rng.random() < 1.4 / COMPONENT]
        rng.shuffle(waiting)
        while len(waiting) > COMPONENT:
            yield waiting.pop()


def _edge(edge: Edge) -> str:
    return " -> ".join(edge)


def _listed(edges: list[Edge]) -> str:
    return "\n".join(map(_edge, edges))


FAMILIES = {family.part: family for family in map(GraphWalk, (-1, 1, 2, 3))}
