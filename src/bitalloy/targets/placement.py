"""Where a target rounds: the only place that knows it.

A site is one rounding that a plan may make. Which sites a tensor has between two units follows from the schemes of both
and from the target's `Placement`:

Case 1. `ENDS`: kernels read and write rounded numbers. A unit that rounds does so with its result, once for all
        readers; so does one that reads a tensor that nobody rounded for it, or that was rounded to another format. A
        Concat rounds again what was rounded before it.
Case 2. `ENTRY`: kernels read rounded numbers and write floats. Every unit that rounds does so with what it reads.
Case 3. `NONE`: nothing is rounded, because the tensor is made inside the kernel that reads it.
Case 4. A scheme that is `dynamic` rounds inside the kernel what that reads, whatever it was rounded to before, and
        writes floats: a site where the tensor enters, and no conversion.
Case 5. A unit that computes in another format is one site with all its roundings, wherever its tensors come from.

Conversions are what such borders cost: from floats to rounded numbers and back (`ENDS`), to rounded numbers alone
(`ENTRY`), and Casts between formats that units compute in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitalloy.core.schemes import Plan, Scheme
from bitalloy.core.units import Placement, Unit, UnitEdge, UnitGraph, WeightSite

WEIGHTS, ACTIVATIONS, WHOLE = "weights", "activations", "all"
"""Parts of a unit that sites belong to."""


@dataclass(frozen=True, slots=True)
class Site:
    """One rounding that a plan may make."""

    place: str
    """Id of a `UnitEdge`, an `Edge` inside a unit, a `WeightSite`, or of a unit that computes in another format."""
    scheme: str
    part: str
    """What of a unit is rounded: WEIGHTS, ACTIVATIONS or WHOLE."""
    end: bool = False
    """Whether a tensor is rounded where it is made, for all its readers."""
    again: bool = False
    """Whether what is rounded has been rounded already."""
    after: str = ""
    """Scheme of another format to which the tensor was rounded where it is made; empty where that did not round it."""

    @property
    def label(self) -> str:
        """What is rounded, as a report says it."""
        return f"{self.place}{f' after {self.after}' if self.after else ''}{' again' if self.again else ''}"

    @property
    def id(self) -> str:
        """A name that is unique on a target; columns of the probe matrix have it."""
        return f"{self.label} in {self.scheme}"


@dataclass(frozen=True, slots=True, order=True)
class Conversion:
    """What a tensor is turned into on its way from one unit to another; an end that does not matter is empty."""

    source: str
    sink: str

    @property
    def rounding(self) -> bool:
        """Whether floats become rounded numbers or the reverse; otherwise it is a Cast."""
        return not self.source or not self.sink


def roundings(edge: UnitEdge, source: Scheme, sink: Scheme) -> tuple[Site, ...]:
    """List the sites of a tensor between two units.

    Args:
        edge: the tensor.
        source: scheme of the unit that makes it; the baseline for an input of the graph.
        sink: scheme of the unit that reads it; the baseline for an output of the graph.
    """
    own = edge.producer is not None and edge.producer == edge.consumer
    if edge.placement is Placement.NONE or (own and sink.dynamic):  # such a kernel rounds what it reads and no more
        return ()
    if edge.placement is Placement.ENTRY:
        return (Site(edge.id, sink.name, ACTIVATIONS),) if sink.rounds else ()
    found, made = [], source.hands_on and edge.rooted
    if made:
        found.append(Site(edge.id, source.name, ACTIVATIONS, end=True, again=edge.passed_on))
    if sink.rounds and not _alike(source, sink):
        found.append(Site(edge.id, sink.name, ACTIVATIONS, after=source.name if made else ""))
    return tuple(found)


def conversions(edge: UnitEdge, source: Scheme, sink: Scheme) -> tuple[Conversion, ...]:
    """List the conversions of a tensor between two units that take time. Arguments as for `roundings`."""
    if not source.hands_on and not sink.hands_on:
        return (Conversion(source.name, sink.name),) if _computes(source) != _computes(sink) else ()
    if _alike(source, sink):
        return ()
    found = []
    if source.hands_on and edge.placement is Placement.ENDS:
        found.append(Conversion(source.name, ""))
    if sink.hands_on and edge.placement is not Placement.NONE:
        found.append(Conversion("", sink.name))
    return tuple(found)


def own_sites(unit: Unit, scheme: Scheme) -> tuple[Site, ...]:
    """List the sites inside a unit: inner tensors and weights, or one for all where it computes in the format."""
    if scheme.cast:
        return (Site(unit.id, scheme.name, WHOLE),)
    found = [Site(e.id, scheme.name, ACTIVATIONS) for e in unit.inner if scheme.rounds]
    found += [weight_site(w, scheme.name) for w in unit.weights if scheme.weight is not None]
    return tuple(found)


def weight_site(weight: WeightSite, scheme: str) -> Site:
    """Return the site of a weight in a scheme that rounds it."""
    return Site(weight.id, scheme, WEIGHTS)


def possible_sites(units: UnitGraph, edge: UnitEdge) -> tuple[Site, ...]:
    """List all sites that some plan has on a tensor, those that round it first before those that do so again."""
    found = dict.fromkeys(site for source, sink in scheme_pairs(units, edge) for site in roundings(edge, source, sink))
    first = {site.id: site for site in sorted(found, key=lambda s: s.again)}
    return tuple(first.values())


def all_sites(units: UnitGraph) -> Iterator[Site]:
    """List every site that some plan has, inside units and between them."""
    for unit in units.units:
        for name in unit.choices:
            yield from own_sites(unit, units.scheme(name))
    for edge in units.edges:
        yield from possible_sites(units, edge)


def site_owners(units: UnitGraph) -> dict[str, str]:
    """Map each site to the unit that rounds it first: the one whose weight, inner tensor, result or input it is."""
    found = {s.id: u.id for u in units.units for name in u.choices for s in own_sites(u, units.scheme(name))}
    for edge in units.edges:
        for site in possible_sites(units, edge):
            unit = edge.producer if site.end else edge.consumer
            if unit is not None:
                found.setdefault(site.id, unit)
    return found


def scheme_pairs(units: UnitGraph, edge: UnitEdge) -> Iterator[tuple[Scheme, Scheme]]:
    """List the schemes that the units at both ends of a tensor may have; a unit has the same one at both ends."""
    allowed, baseline = units.allowed, units.schemes[0].name
    sources, sinks = (allowed.get(end or "", (baseline,)) for end in (edge.producer, edge.consumer))
    for source in sources:
        for sink in sinks:
            if edge.producer != edge.consumer or source == sink:
                yield units.scheme(source), units.scheme(sink)


def rounded(units: UnitGraph, plan: Plan) -> frozenset[str]:
    """Return the ids of all sites that a plan rounds."""
    known = {scheme.name: scheme for scheme in units.schemes}
    sites = {s.id for u in units.units if u.id in plan for s in own_sites(u, known[plan[u.id]])}
    for edge, source, sink in touched(units, plan):
        sites.update(site.id for site in roundings(edge, source, sink))
    return frozenset(sites)


def borders(units: UnitGraph, plan: Plan) -> dict[Conversion, tuple[float, int]]:
    """Map each conversion to the elements and the number of the tensors that a plan converts so, each tensor once."""
    crossing: dict[tuple[str, Conversion], int] = {}
    for edge, source, sink in touched(units, plan):
        crossing.update({(edge.tensor, c): edge.elements for c in conversions(edge, source, sink)})
    found: dict[Conversion, tuple[float, int]] = {}
    for (_, conversion), elements in crossing.items():
        total, count = found.get(conversion, (0.0, 0))
        found[conversion] = total + elements, count + 1
    return found


def touched(units: UnitGraph, plan: Plan) -> Iterator[tuple[UnitEdge, Scheme, Scheme]]:
    """List the edges with a unit of a plan at an end, and the schemes of both; others have no sites or conversions."""
    known = {scheme.name: scheme for scheme in units.schemes}
    for edge in units.edges:
        if edge.producer in plan or edge.consumer in plan:
            yield edge, known[plan.scheme_of(edge.producer)], known[plan.scheme_of(edge.consumer)]


def all_conversions(schemes: tuple[Scheme, ...]) -> tuple[Conversion, ...]:
    """List every conversion that a plan on these schemes may need."""
    rounding = [c for s in schemes if s.hands_on for c in (Conversion(s.name, ""), Conversion("", s.name))]
    others = [s for s in schemes if not s.hands_on]
    casts = [Conversion(a.name, b.name) for a in others for b in others if _computes(a) != _computes(b)]
    return (*rounding, *casts)


def _alike(source: Scheme, sink: Scheme) -> bool:
    """Tell whether one scheme hands on what the other reads."""
    return source.hands_on and sink.hands_on and source.activation == sink.activation


def _computes(scheme: Scheme) -> str | None:
    """Return the format that units of a scheme compute in; None for float32."""
    return scheme.activation if scheme.cast else None
