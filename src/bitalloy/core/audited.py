"""Records of what a runtime ran for a plan, and of what a compiler made of it: `audit.json` and `compiled.json`."""

from __future__ import annotations

from collections import Counter

from bitalloy.core.outcome import CompiledCounts
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


class CompiledUnit(Record, frozen=True, kw_only=True):
    """A planned unit beside the types that its kernel reads, by the text of the engine."""

    unit: str
    kind: str
    planned: str
    """The scheme that the plan gives it."""
    compiled: str
    """Scheme whose types its kernel reads, several as `int8/fp16`; empty where the text does not name the unit."""
    kernel: str = ""
    """Kind of the kernel in the compiler's words."""
    reads: tuple[str, ...] = ()
    """Types that the kernel reads, in the compiler's words, scales left out."""
    weighted: bool
    """Whether it is a convolution or a product of matrices. Only of these the types say in which scheme they run."""
    cause: str = ""
    """Likely cause of a difference, or why the text does not name it; empty without either."""

    @property
    def differs(self) -> bool:
        """Whether it is weighted, known, and reads other types than planned."""
        return self.weighted and self.compiled not in ("", self.planned)


class CompiledGraph(Record, frozen=True, kw_only=True):
    """The engine of one graph."""

    graph: str
    kernels: int = 0
    requantizing: int = 0
    """Kernels of their own that read floats and write rounded numbers."""
    casting: int = 0
    """Kernels of their own that only change the type of floats."""
    reformatting: int = 0
    """Kernels that work for no node of the model: they change a layout, or move data."""
    widening: int = 0
    """Convolutions and products that read rounded numbers and write float32."""
    size_bytes: int = 0
    seconds: float = 0.0
    """Time that the compiler took."""
    messages: tuple[str, ...] = ()
    """Warnings of the compiler, equal ones once with their number."""
    failed: str = ""
    """Why there is no engine; empty where there is one."""

    def sentence(self) -> str:
        """Say in one sentence what became of the graph."""
        if self.failed:
            return f"'{self.graph}' has no engine: {self.failed}"
        return (
            f"'{self.graph}' became {self.kernels} kernels, {self.size_bytes / 1e6:.1f} MB in {self.seconds:.1f} s: "
            f"{self.requantizing} that only round, {self.casting} that only cast, {self.reformatting} that only move "
            f"data; {self.widening} convolutions and products read rounded numbers and write float32."
        )


class Compilation(Record, frozen=True, kw_only=True):
    """`compiled.json`: what NVIDIA's compiler made of a plan, on a machine without the device."""

    compiler: str
    version: str
    capability: int
    """Compute capability that it was compiled for."""
    units: tuple[CompiledUnit, ...]
    graphs: tuple[CompiledGraph, ...]
    note: str = ""
    """What a reader must know, such as that the device itself is not one that the compiler knows; empty without."""

    @property
    def counts(self) -> CompiledCounts:
        """Count the weighted units."""
        weighted = [u for u in self.units if u.weighted]
        return CompiledCounts(
            planned=len(weighted),
            found=sum(u.compiled != "" for u in weighted),
            agree=sum(u.compiled == u.planned for u in weighted),
            differ=sum(u.differs for u in weighted),
            seconds=round(sum(g.seconds for g in self.graphs), 2),
            capability=self.capability,
            built=not any(g.failed for g in self.graphs),
        )

    def differences(self) -> tuple[CompiledUnit, ...]:
        """Return the units whose kernels read other types than planned, then the weighted ones that are not named."""
        unknown = (u for u in self.units if u.weighted and not u.compiled)
        return (*(u for u in self.units if u.differs), *unknown)

    def sentence(self) -> str:
        """Say in one sentence how far engine and plan agree."""
        told = self.counts
        return (
            f"{self.compiler} {self.version} for SM{self.capability}: of {told.planned} convolutions and products "
            f"{told.found} were found in the engine's text, {told.agree} read the planned types, {told.differ} others."
        )
