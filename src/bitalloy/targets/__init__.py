"""What each device can do: units, allowed precisions, and where roundings happen."""

from collections.abc import Sequence
from dataclasses import replace

from bitalloy.core.errors import BitalloyError, did_you_mean
from bitalloy.targets.base import Target
from bitalloy.targets.devices import find_device
from bitalloy.targets.openvino_cpu import OPENVINO_CPU
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.ort_cuda import ORT_CUDA
from bitalloy.targets.tensorrt import TENSORRT
from bitalloy.targets.tensorrt_rtx import TENSORRT_RTX

TARGETS: dict[str, Target] = {t.name: t for t in (ORT_CPU, OPENVINO_CPU, ORT_CUDA, TENSORRT, TENSORRT_RTX)}


def target(name: str, device: str = "") -> Target:
    """Look a target up by name.

    Args:
        name: the name of a target.
        device: the device that its costs and schemes are of, or its compute capability; without it the one that it has.

    Raises:
        BitalloyError: no such target or device, a device for a target that is measured where it runs, or one that the
            target does not run on.
    """
    if name not in TARGETS:
        raise BitalloyError(f"Unknown target '{name}'. Available: {', '.join(TARGETS)}.{did_you_mean(name, TARGETS)}")
    found = TARGETS[name]
    if not device:
        return found
    if found.device is None:
        others = ", ".join(t.name for t in TARGETS.values() if t.device is not None)
        raise BitalloyError(
            f"--device {device} is given for the target '{name}', which is measured on the machine where it runs. "
            f"Leave it out, or choose a target that is estimated: {others}."
        )
    wanted = find_device(device)
    if wanted not in found.devices:
        raise BitalloyError(
            f"The target '{name}' does not run on {wanted.name} (SM{wanted.capability}). Choose --device "
            f"{' or '.join(d.id for d in found.devices)}, or --target {TENSORRT.name}."
        )
    return replace(found, device=wanted)


def chosen_targets(names: Sequence[str], device: str = "", schemes: Sequence[str] = ()) -> list[Target]:
    """Look several targets up; those of them that are estimated are so for the device.

    Args:
        names: names of targets.
        device: see `target`.
        schemes: names of schemes that plans may use, each of at least one of the targets.

    Raises:
        BitalloyError: none or one twice, no such target or device, a device for none of them, or a scheme that is one
            of none of them.
    """
    if len(set(names)) != len(names) or not names:
        raise BitalloyError(f"Targets are {', '.join(names) or 'none'}; expected one or more, each once.")
    found = [target(name) for name in names]
    if device and all(t.device is None for t in found):
        target(names[0], device)
    devices = [target(t.name, device) if t.device is not None else t for t in found]
    for name in schemes:
        _check_scheme(name, devices)
    return devices


def _check_scheme(name: str, devices: Sequence[Target]) -> None:
    """Refuse a name that is a scheme of none of the targets, and say which schemes there are."""
    known = list(dict.fromkeys(s.name for device in devices for s in device.schemes))
    if name in known:
        return
    why = "; ".join(f"{d.name}: {lacks[name]}" for d in devices if name in (lacks := d.lacking_schemes))
    others = [t.name for t in TARGETS.values() if any(o.scheme.name == name for o in t.offers)]
    elsewhere = f", or --target {' or '.join(others)} for {name}" if others and not why else ""
    raise BitalloyError(
        f"--schemes names '{name}', which is no scheme of {' or '.join(d.name for d in devices)}"
        f"{f' ({why})' if why else ''}. Choose among {', '.join(known)}{elsewhere}.{did_you_mean(name, known)}"
    )


def on_devices(found: Target) -> dict[str, Target]:
    """Map what `--device` takes to a target on that device; nothing for one that is measured where it runs."""
    return {device.id: replace(found, device=device) for device in found.devices}


__all__ = ["TARGETS", "Target", "chosen_targets", "on_devices", "target"]
