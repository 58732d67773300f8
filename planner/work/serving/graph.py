"""The greatest flow through a graph with capacities on its edges (Dinic 1970), for graphs of a few hundred edges."""

from __future__ import annotations

from typing import Final

NEGLIGIBLE: Final = 1e-9
"""Flow below which an edge counts as full; it keeps rounding from opening ways again."""


class Graph:
    """Edges with capacities, each followed by its reverse."""

    __slots__ = ("capacity", "edges", "target")

    def __init__(self) -> None:
        self.target: list[int] = []
        self.capacity: list[float] = []
        self.edges: list[list[int]] = []

    def vertex(self) -> int:
        """Add a vertex and return its number."""
        self.edges.append([])
        return len(self.edges) - 1

    def edge(self, origin: int, target: int, capacity: float) -> int:
        """Add an edge and return its number."""
        number = len(self.target)
        self.edges[origin].append(number)
        self.edges[target].append(number + 1)
        self.target += (target, origin)
        self.capacity += (capacity, 0.0)
        return number

    def flow(self, number: int) -> float:
        """Flow over an edge, after `maximum`."""
        return self.capacity[number ^ 1]

    def maximum(self, source: int, sink: int) -> float:
        """Push the greatest flow, by blocking flows over shortest ways (Dinic 1970)."""
        target, capacity, edges = self.target, self.capacity, self.edges
        total = 0.0
        while True:
            level = [-1] * len(edges)
            level[source] = 0
            reached = [source]
            for vertex in reached:
                below = level[vertex] + 1
                for number in edges[vertex]:
                    if capacity[number] > NEGLIGIBLE and level[target[number]] < 0:
                        level[target[number]] = below
                        reached.append(target[number])
                if level[sink] >= 0:
                    break
            if level[sink] < 0:
                return total
            left = [iter(numbers) for numbers in edges]
            way: list[int] = []
            vertex = source
            while True:
                if vertex == sink:
                    pushed = min(capacity[number] for number in way)
                    total += pushed
                    back = len(way)
                    for at, number in enumerate(way):
                        capacity[number] -= pushed
                        capacity[number ^ 1] += pushed
                        if capacity[number] <= NEGLIGIBLE and at < back:
                            back = at
                    vertex = target[way[back] ^ 1]
                    del way[back:]
                    continue
                below = level[vertex] + 1
                for number in left[vertex]:
                    if capacity[number] > NEGLIGIBLE and level[target[number]] == below:
                        way.append(number)
                        vertex = target[number]
                        break
                else:
                    if not way:
                        break
                    level[vertex] = -1
                    vertex = target[way.pop() ^ 1]
