"""More devices: one compiled step's times carried over to other numbers of them, and what stops the scaling.

What changes with the number of devices is arithmetic, so nothing is compiled again. TPUs:

    matrix products, kernels, other operations    in proportion to the sequences on a device
    the optimizer's update                        its parameters shrink with `fsdp`
    collectives over `fsdp`                       a device receives (n - 1) / n of the same arrays, over the links that the
                                                  larger torus has, once for each pass
    their latency                                 a microsecond a hop, half-way round each ring of the torus
    gradients over `replica`                      an all-reduce of this device's share in each pass, between slices over the
                                                  network and never hidden

The estimate hides the same share of the other communication as the compiled schedule did. GPUs are worked out anew by the
roofline for each number of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.config import Config
from neo.errors import InputError
from neo.plan.compile import phase_of
from neo.plan.plan import Collective, Cost, Plan
from neo.plan.report import GIB, aligned, mesh_text
from neo.plan.roofline import UPDATE_BYTES
from neo.plan.rough import WIDTH, link_bandwidth

if TYPE_CHECKING:
    from neo.plan.planner import Engine, Setting
    from neo.plan.topology import Topology

HOP_SECONDS = 1e-6      # inferred: about a microsecond a hop of ICI
WORTH = 0.9             # of the best MFU of the table (ours): below it a config has stopped scaling
HIDDEN = 0.02           # of a step (ours): communication that is shorter limits nothing
SLICE = 64              # chips (ours): runs of several slices are not made of smaller ones
# Cores that a product's number counts for one chip (neo.plan.topology): to name a slice of so many chips.
_PRODUCTS = {"v4": ("v4", 2), "v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2), "v5e": ("v5litepod", 1), "v6e": ("v6e", 1)}


@dataclasses.dataclass(frozen=True)
class Times:
    """A step on one number of devices, in seconds."""

    compute: float
    links: float       # bytes over ICI, or NVLink
    latency: float
    network: float     # between slices or nodes
    exposed: float     # share of links and latency that is not hidden
    network_exposed: float = 1.0

    @property
    def no_overlap(self) -> float:
        return self.compute + self.links + self.latency + self.network

    @property
    def lost(self) -> float:
        """What is not hidden."""
        return self.exposed * (self.links + self.latency) + self.network_exposed * self.network

    @property
    def estimate(self) -> float:
        return max(self.full_overlap, self.compute + self.lost)

    @property
    def full_overlap(self) -> float:
        return max(self.compute, self.links + self.latency + self.network)


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of devices. `weak`: as many sequences on each device as planned; `own`: the config's own global batch.

    None where that is impossible; `why` then says so, else what limits it.
    """

    devices: int
    topology: str
    mesh: dict[str, int]
    global_batch: int
    weak: Times | None
    own: Times | None
    weak_mfu: float
    own_mfu: float
    why: str


def rows(config: Config, base: Topology, plan: Plan, counts: Sequence[int], engine: Engine) -> list[Row]:
    """One for each number of devices, from a plan that was priced on `base`."""
    assert plan.cost is not None
    return [_row(config, base, plan, count, engine) for count in counts]


def table(config: Config, base: Topology, plan: Plan, counts: Sequence[int], engine: Engine) -> str:
    """Rows as text, with the sentences that say where the config stops scaling, and why."""
    found = rows(config, base, plan, counts, engine)
    local = plan.micro_batch * plan.accumulation
    lines = [("devices", "topology", "mesh", "batch", "step ms", "MFU %", "no .. full overlap",
              f"MFU % at {plan.global_batch:,}", "limited by")]
    for row in found:
        if row.weak is None:
            lines.append((f"{row.devices:,}", row.topology, mesh_text(row.mesh) if row.mesh else "", *("-",) * 5, row.why))
            continue
        top = plan.flops_causal / plan.peak_flops
        lines.append((f"{row.devices:,}", row.topology, mesh_text(row.mesh), f"{row.global_batch:,}",
                      f"{1e3 * row.weak.estimate:.0f}", f"{100 * row.weak_mfu:.1f}",
                      f"{100 * top / row.weak.no_overlap:.1f} .. {100 * top / row.weak.full_overlap:.1f}",
                      f"{100 * row.own_mfu:.1f}" if row.own else "-", row.why))
    source = f"from the step compiled for {plan.topology}" if engine.compile else "by the roofline"
    return "\n".join([f"weak scaling, {local} sequences of {plan.seq_len:,} tokens on each device, {source}",
                      aligned(lines, left=(1, 2, 8)), *(textwrap.fill(text, 128) for text in _verdicts(plan, found))])


def resized(topology: Topology, devices: int) -> Topology | None:
    """The same kind with another number of devices, in as few slices as that takes; None where there is no such shape."""
    from neo.plan.topology import parse
    chips = devices // topology.chip.devices
    if chips * topology.chip.devices != devices or devices < 1:
        return None
    if topology.platform == "gpu":
        inside = min(topology.shape[0], devices)
        if devices % inside:
            return None
        kind = topology.name.partition(":")[0]
        sold = kind != topology.kind   # machines of a provider, 8 GPUs each
        return None if sold and inside < 8 else parse(f"{kind}:{devices // inside}" if sold else
                                                      f"{kind}:{inside}x{devices // inside}")
    product, cores = _PRODUCTS[topology.kind]
    for slices in (2 ** n for n in range(8) if n == 0 or chips % 2 ** n == 0 and chips // 2 ** n >= SLICE):
        with contextlib.suppress(InputError):
            return parse(parse(f"{f'{slices}*' if slices > 1 else ''}{product}-{chips // slices * cores}").name)
    return None


def _row(config: Config, base: Topology, plan: Plan, devices: int, engine: Engine) -> Row:
    local = plan.micro_batch * plan.accumulation
    there = resized(base, devices)
    if there is None:
        return _impossible(devices, "", {}, f"{base.kind} has no slice of so many chips")
    try:
        sizes = _mesh(config, plan, base, there)
        weak = _on(config, plan, there, sizes, local)
    except InputError as error:
        return _impossible(devices, there.name, {}, str(error))
    batch = weak.phase.global_batch
    before = _on(config, plan, base, plan.mesh, local)
    need = plan.memory.peak + weak.estimate().peak - before.estimate().peak
    if need > weak.capacity:
        return _impossible(devices, there.name, sizes, f"needs {need / GIB:.1f} of {weak.capacity / GIB:.1f} GiB a device")
    times = _times(plan, before, weak, engine)
    own, own_mfu = None, 0.0
    ways = batch // local
    if plan.global_batch % ways == 0:
        one = _on(config, plan, there, sizes, plan.global_batch // ways)
        own = _times(plan, before, one, engine)
        own_mfu = one.flops[1] / plan.peak_flops / own.estimate
    return Row(devices, there.name, sizes, batch, times, own, weak.flops[1] / plan.peak_flops / times.estimate, own_mfu,
               _limit(times, there))


def _impossible(devices: int, topology: str, mesh: dict[str, int], why: str) -> Row:
    return Row(devices, topology, mesh, 0, None, None, 0.0, 0.0, why)


def _mesh(config: Config, plan: Plan, base: Topology, there: Topology) -> dict[str, int]:
    """The plan's mesh with more `fsdp`; where model or links do not allow it, with copies inside the slice."""
    from neo.plan.search import possible
    inner = plan.mesh["expert"] * plan.mesh["context"] * plan.mesh["tensor"]
    if there.devices % (there.slices * inner):
        raise InputError(f"{mesh_text({**plan.mesh, 'fsdp': 1})} does not divide {there.devices} devices")
    copies, room = max(1, plan.mesh["replica"] // base.slices), there.devices // there.slices // inner
    while copies <= room:
        sizes = {**plan.mesh, "replica": copies * there.slices, "fsdp": room // copies}
        if room % copies == 0 and config.model.d_model % sizes["fsdp"] == 0 and possible(sizes, there):
            return sizes
        copies *= 2
    raise InputError(f"no fsdp that divides model.d_model={config.model.d_model} follows the links")


def _on(config: Config, plan: Plan, topology: Topology, sizes: dict[str, int], local: int) -> Setting:
    """The planned phase alone, with `local` sequences on each device of this topology."""
    from neo.parallel.mesh import BATCH_AXES
    from neo.plan.planner import setting
    phase = dataclasses.replace(phase_of(config, plan.phase), batch_ramp=(), batch_ramp_tokens=0,
                                global_batch=local * math.prod(sizes[axis] for axis in BATCH_AXES))
    micro = math.gcd(local, plan.micro_batch)
    train = dataclasses.replace(config.train, micro_batch=micro, remat=plan.remat)
    mesh = dataclasses.replace(config.mesh, **sizes)
    return setting(dataclasses.replace(config, phases=(phase,), train=train, mesh=mesh), topology)


def _times(plan: Plan, before: Setting, there: Setting, engine: Engine) -> Times:
    cost = plan.cost
    assert cost is not None
    if engine.compile is None:
        return _of_cost(engine.rough(there))
    work = there.local_batch / before.local_batch
    update = _update_seconds(plan, before)
    compute = max(0.0, cost.compute - update) * work + _update_seconds(plan, there)
    passes = there.accumulation / before.accumulation
    links = latency = 0.0
    for one in cost.collectives:
        if _over_replicas(one, plan):
            continue
        n, n0 = (there.sizes["fsdp"], max(2, plan.mesh["fsdp"])) if _over_fsdp(one, plan) else (one.group, one.group)
        seconds = one.wire_bytes / link_bandwidth(there.topology, one.group * n // n0)
        if _over_fsdp(one, plan):
            seconds *= (n - 1) / n / ((n0 - 1) / n0)
            latency += one.times * (passes if one.loop != "entry" else 1) * _hops(there.topology) * HOP_SECONDS
        links += seconds * (passes if one.loop != "entry" else work)
    share = there.accumulation * WIDTH * plan.parameters / (there.sizes["fsdp"] * there.sizes["tensor"])
    slices, copies = there.topology.slices, there.sizes["replica"] // there.topology.slices
    links += 2 * (copies - 1) / copies * share / link_bandwidth(there.topology)
    network = 2 * (slices - 1) / slices * share / there.topology.dcn_bandwidth
    hidden = cost.communication - max(0.0, cost.best - cost.compute)
    exposed = 1 - hidden / cost.communication if cost.communication else 0.0
    return Times(compute, links, latency, network, min(1.0, max(0.0, exposed)))


def _of_cost(cost: Cost) -> Times:
    """Of the roofline: its estimate is full overlap too, but for what it says cannot be hidden."""
    bound = sum(one.seconds for one in cost.collectives if one.mode == "sync")
    network = sum(one.seconds for one in cost.collectives if one.network == "dcn" and one.mode != "sync")
    return Times(cost.compute + bound, max(0.0, cost.communication - bound - network), 0.0, network, 0.0, 0.0)


def _over_replicas(one: Collective, plan: Plan) -> bool:
    return one.network == "dcn" or (one.axes == ("replica",) and plan.mesh["replica"] > 1)


def _over_fsdp(one: Collective, plan: Plan) -> bool:
    return "fsdp" in one.axes or (not one.axes and one.group == plan.mesh["fsdp"])


def _update_seconds(plan: Plan, there: Setting) -> float:
    """The optimizer's pass over this device's parameters, bound by HBM."""
    mine = plan.parameters / (there.sizes["fsdp"] * there.sizes["tensor"])
    return UPDATE_BYTES * mine / there.topology.chip.hbm_bandwidth


def _hops(topology: Topology) -> float:
    """Of the longest way between two chips of a slice."""
    return sum(side / 2 if ring else side - 1 for side, ring in zip(topology.shape, topology.wrap, strict=False))


def _limit(times: Times, topology: Topology) -> str:
    """What stands between this step and its computation alone."""
    lost = times.estimate - times.compute
    if lost <= HIDDEN * times.compute:
        return "computation"
    between = "slices" if topology.platform == "tpu" else "nodes"
    parts = {"links": f"links: {1e3 * times.links:.0f} ms of weights and gradients",
             "latency": f"latency of the links: {1e3 * times.latency:.0f} ms",
             "network": f"network between {between}: {1e3 * times.network:.0f} ms"}
    seconds = {"links": times.links * times.exposed, "latency": times.latency * times.exposed,
               "network": times.network * times.network_exposed}
    if times.links + times.latency + times.network >= times.compute:
        seconds = {"links": times.links, "latency": times.latency, "network": times.network}
    return parts[max(seconds, key=lambda name: seconds[name])]


def _verdicts(plan: Plan, found: Sequence[Row]) -> list[str]:
    """Where it stops with its sequences per device, and where with its own global batch."""
    lines = []
    for what, shares in (("with so many sequences on each device", {row.devices: row.weak_mfu for row in found}),
                         (f"with its own global batch of {plan.global_batch:,}", {row.devices: row.own_mfu for row in found})):
        best = max(shares.values(), default=0.0)
        good = [devices for devices, share in shares.items() if share and share >= WORTH * best]
        if not good:
            continue
        text = f"{what}, {plan.config} keeps {100 * WORTH:.0f} % of its best MFU up to {max(good):,} devices"
        after = [row for row in found if row.devices > max(good) and row.topology]
        beyond = min(after, key=lambda row: row.devices, default=None)
        if beyond is None:
            text += ", the last that was asked for"
        elif not shares[beyond.devices] and beyond.weak is not None:
            text += f"; {beyond.devices:,} cannot share {plan.global_batch:,} sequences without mesh.context or mesh.tensor"
        else:
            text += f"; at {beyond.devices:,}: {100 * shares[beyond.devices]:.1f} %, {_reason(beyond, what)}"
        lines.append(text)
    return lines


def _reason(row: Row, what: str) -> str:
    if "own" in what and row.own is not None and row.own.links + row.own.latency > row.own.compute:
        return "weights and gradients take longer than the few sequences on a device"
    return row.why
