"""Where a run's images stay: on the device, in host memory, or in the file they are mapped from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.distributed import speaks
from fastcil.engine.free_memory import device_free, host_free, own_share
from fastcil.engine.groups import EngineOptions
from fastcil.engine.needs import format_size, say
from fastcil.engine.plan import Plan
from fastcil.engine.resolve import pick_device
from fastcil.errors import FastcilError
from fastcil.nn.ranks import current

Place = Literal["device", "host", "disk"]
_SHARE = 0.5  # of what is free; the rest is for networks, activations and decoded exemplars


@dataclass(frozen=True)
class Room:
    """What there is and what is to find a place in it.

    Args:
        nbytes: Of all images.
        mapped: Whether they are a memory-mapped file's, and not yet in memory.
        device_free: Bytes free on a CUDA device; None where the run is on another kind.
        host_free: Bytes of host memory that can be had without swapping, for this process.
    """

    nbytes: int
    mapped: bool
    device_free: int | None
    host_free: int


def choose(wanted: str, room: Room) -> Place:
    """Where images are to stay.

    ``auto`` is the device if they take no more than half of what is free there; else host memory if
    they take no more than half of what is free there, from which batches go to a CUDA device;
    else the file. Without CUDA they stay where they are: of a mapped file the system keeps in
    memory what is read again and again, as long as there is room, and a batch is read from there as
    fast as from a copy.

    Args:
        wanted: The option ``engine.data``.
        room: What there is.

    Raises:
        FastcilError: They don't fit where they are wanted, or are not to be had there.

    Example:
        >>> choose("auto", Room(10 << 30, True, 80 << 30, 64 << 30))
        'device'
        >>> choose("auto", Room(70 << 30, True, 80 << 30, 512 << 30))
        'host'
        >>> choose("auto", Room(70 << 30, True, 80 << 30, 64 << 30))
        'disk'
        >>> choose("auto", Room(70 << 30, True, None, 512 << 30))
        'disk'
    """
    if wanted != "auto":
        return _asked_for(wanted, room)
    if room.device_free is not None and room.nbytes <= _SHARE * room.device_free:
        return "device"
    if not room.mapped:
        return "host"
    fits = room.device_free is not None and room.nbytes <= _SHARE * room.host_free
    return "host" if fits else "disk"


def _asked_for(wanted: str, room: Room) -> Place:
    """The place that was asked for, if images can be there."""
    size = format_size(room.nbytes)
    if wanted == "device":
        if room.device_free is None:
            raise FastcilError("engine.data is 'device', and there is no CUDA device; use 'auto'.")
        if room.nbytes > room.device_free:
            raise FastcilError(
                f"engine.data is 'device', but the images take {size} and "
                f"{format_size(room.device_free)} are free there; use 'auto' or 'host'."
            )
        return "device"
    if wanted == "host":
        if room.mapped and room.nbytes > room.host_free:
            raise FastcilError(
                f"engine.data is 'host', but the images take {size} and "
                f"{format_size(room.host_free)} of memory are free; use 'auto' or 'disk'."
            )
        return "host"
    if not room.mapped:
        raise FastcilError(
            "engine.data is 'disk', but the images are in memory; write them with 'fastcil ingest' "
            "and pass the folder that it makes, or use 'auto'."
        )
    return "disk"


def place_images(plans: Sequence[Plan]) -> None:
    """Puts the images of plans where their options want them, once for all that share them.

    Args:
        plans: Whose ``dataset`` is replaced; the first one's options decide for those of the same
            data set.

    Raises:
        FastcilError: As `choose`.
    """
    placed: dict[int, Dataset] = {}
    for plan in plans:
        before, engine = plan.dataset, plan.settings.engine
        if id(before) not in placed:
            device = pick_device(plan.device)
            both = [before.train, before.test]
            train, test = place_parts(both, engine, device, before.name)
            placed[id(before)] = replace(before, train=train, test=test)
        plan.dataset = placed[id(before)]


def place_parts(
    parts: Sequence[Examples], engine: EngineOptions, device: torch.device, name: str
) -> list[Examples]:
    """Puts images where the options want them, all in one place.

    Args:
        parts: Examples; those that lie on a CUDA device stay there, unless asked for elsewhere.
        engine: Its ``data`` says where, its ``progress`` whether to tell.
        device: Where networks live.
        name: What the line that is told calls them.

    Raises:
        FastcilError: As `choose`.
    """
    there = all(part.images.device.type == "cuda" for part in parts)
    if there and engine.data in ("auto", "device"):
        return list(parts)
    room = on_all_ranks(look_around(parts, device))
    place = choose(engine.data, room)
    if engine.progress and speaks():
        say(f"{name}: {_line(place, room, device)}")
    return [move(part, place, device) for part in parts]


def look_around(parts: Sequence[Examples], device: torch.device) -> Room:
    """Measures what there is.

    Args:
        parts: The images.
        device: The run's.
    """
    mapped = any(part.images.mapped is not None for part in parts)
    nbytes = sum(part.images.nbytes for part in parts)
    return Room(nbytes, mapped, device_free(device), own_share(host_free()))


def on_all_ranks(room: Room) -> Room:
    """The least of what the ranks have, so that all choose alike.

    Example:
        >>> room = Room(1 << 20, True, None, 1 << 30)
        >>> on_all_ranks(room) == room
        True
    """
    mine = json.dumps([room.host_free, room.device_free])
    hosts, devices = zip(*map(json.loads, current().texts(mine)), strict=True)
    free = min((nbytes for nbytes in devices if nbytes is not None), default=None)
    return replace(room, host_free=min(hosts), device_free=free)


def move(examples: Examples, place: Place, device: torch.device) -> Examples:
    """The same examples with their images in a place.

    Args:
        examples: They.
        place: Where to; ``disk`` leaves them.
        device: The run's.
    """
    if place == "disk":
        return examples
    if place == "device":
        return examples.to(device)
    return Examples(_in_host_memory(examples.images), examples.labels)


def _in_host_memory(images: ImageStore) -> ImageStore:
    """Images in memory; batches of them, which the host reads, go to a device by `ops.send`."""
    if images.device.type == "cpu" and images.mapped is None:
        return images
    return images.compact(torch.device("cpu"))


def _line(place: Place, room: Room, device: torch.device) -> str:
    """What is said of a choice."""
    size = format_size(room.nbytes)
    if place == "device":
        assert room.device_free is not None
        return f"images on {device}: {size} of {format_size(room.device_free)} free"
    if place == "host":
        return f"images in host memory: {size}"
    return f"images memory-mapped: {size}, with {format_size(room.host_free)} of memory free"
