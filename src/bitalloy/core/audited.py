"""Records of what a runtime ran for a plan: what `audit.json` is made of."""

from __future__ import annotations

from collections import Counter

from bitalloy.core.records import Record


class AuditedUnit(Record, frozen=True, kw_only=True):
    """A planned unit beside what the runtime ran for it."""

    unit: str
    kind: str
    planned: str
    """The scheme that the plan gives it."""
    executed: str
    """Precision in which its work was done; another type in the runtime's words, or empty where no kernel is known."""
    kernels: tuple[str, ...]
    us: float
    cause: str
    """Likely cause of a difference, or where its work went where it has no kernel of its own; empty without either."""
    rounded: bool = False
    """Whether the runtime rounded weights that the plan keeps in float; its kernel may work on floats all the same."""


class AuditedKernel(Record, frozen=True, kw_only=True):
    """One executed kernel."""

    op: str
    precision: str
    unit: str | None
    """The unit that it ran for; None for rounding, layout changes and the like between units."""
    us: float
    graph: str = "model"
    """The graph of a program that it belongs to."""


class AuditedNode(Record, frozen=True, kw_only=True):
    """A node of a graph as the runtime rewrote it."""

    op: str
    units: tuple[str, ...]
    """Planned units whose work it does; none for rounding, layout changes and the like between units."""
    nodes: tuple[str, ...]
    """Nodes of the mixed model that it stands for; none for what the runtime added."""
    ran: bool
    """Whether the profile has it."""


class AuditedGraph(Record, frozen=True, kw_only=True):
    """A graph of the mixed model as the runtime rewrote it before its first run."""

    graph: str
    nodes: tuple[AuditedNode, ...] = ()
    unfused: tuple[str, ...] = ()
    """Nodes QuantizeLinear whose readers are DequantizeLinear alone: pairs that round, and that no kernel took in."""
    folded: tuple[str, ...] = ()
    """Nodes that became constants."""
    removed: tuple[str, ...] = ()
    """Nodes that nothing stands for."""
    rounded: tuple[str, ...] = ()
    """Nodes whose float weights the runtime rounded to integers."""
    unknown: str = ""
    """Why none of this is known."""

    def fused(self) -> dict[str, int]:
        """Count by operator the nodes that do the work of several nodes of the model, rounding included."""
        return dict(Counter(n.op for n in self.nodes if len(n.nodes) > 1).most_common())

    def sentence(self) -> str:
        """Say in one sentence what became of the graph."""
        if self.unknown:
            return f"The graph that ran for '{self.graph}' is not known, only its profile: {self.unknown}"
        before = len({n for node in self.nodes for n in node.nodes} | {*self.folded, *self.removed})
        fused = ", ".join(f"{count} {op}" for op, count in self.fused().items())
        more = [
            f"{len(names)} {what}"
            for names, what in (
                (self.unfused, "pairs of QuantizeLinear and DequantizeLinear left unfused"),
                (self.folded, "nodes folded into constants"),
                (self.removed, "nodes removed"),
                ([n for n in self.nodes if not n.ran], "nodes that did not run"),
                (self.rounded, "nodes whose float weights were rounded"),
            )
            if names
        ]
        text = f"{before} nodes of '{self.graph}' became {len(self.nodes)}, of which several each in {fused or 'none'}"
        return "; ".join([text, *more]) + "."


class Audit(Record, frozen=True, kw_only=True):
    """`audit.json`: what the runtime ran."""

    runtime: str
    version: str
    units: tuple[AuditedUnit, ...]
    share_of_time: dict[str, float]
    """Precision that kernels read -> share of the time of all kernels."""
    kernels: tuple[AuditedKernel, ...]
    """All executed kernels, in order."""
    graphs: tuple[AuditedGraph, ...] = ()
    """Second evidence: what the runtime made of each graph. None where its kernels tell what they were made from."""
    note: str = ""
    """What a reader must know, such as that the target's own device was not there; empty without."""

    def differences(self) -> tuple[AuditedUnit, ...]:
        """Return the units whose work was done in another precision than planned, or on weights that were rounded."""
        return tuple(u for u in self.units if u.rounded or u.executed not in ("", u.planned))
