"""The object classes of the embedded data set: thirty drawings with random proportions.

A shape is a function of a `Sketch` to draw on and `Draws` to take its proportions from. It works
in its own coordinates, x to the right and y down, within about [-1, 1]; size, place, rotation,
colours and texture are chosen afterwards (`fastcil.data.scenes`), so that nothing but the form
tells the class.
"""

from __future__ import annotations

from collections.abc import Callable
from math import atan2, cos, pi, sin, sqrt

import numpy as np

from fastcil.data.scenes_sketch import BODY, DARK, HOLE, LIGHT, TRIM, Draws, Sketch, arc, polar


def wheel(s: Sketch, d: Draws) -> None:
    """A rim, spokes and a hub."""
    spokes, turn = d.integer(3, 5), d.uniform(0, pi)
    for i in range(spokes):
        angle = turn + pi * i / spokes
        end = (0.9 * cos(angle), 0.9 * sin(angle))
        s.line([end, (-end[0], -end[1])], d.uniform(0.09, 0.13), TRIM)
    s.line(arc(0, 0, 0.88, 0.88), d.uniform(0.18, 0.28), BODY, closed=True)
    s.disc(0, 0, d.uniform(0.16, 0.28), tone=DARK)


def star(s: Sketch, d: Draws) -> None:
    """Four to seven points around a full body."""
    n, inner = d.integer(4, 7), d.uniform(0.36, 0.5)
    s.fill(polar([1.0, inner] * n))
    if d.chance(0.5):
        s.fill(polar([0.5, 0.5 * inner] * n), TRIM)


def house(s: Sketch, d: Draws) -> None:
    """Walls under a pitched roof, a door, windows."""
    eaves, wide = d.uniform(-0.2, 0.1), d.uniform(0.7, 0.9)
    s.box(-wide, eaves, wide, 1.0)
    if d.chance(0.6):
        s.box(0.35, -0.9, 0.6, eaves, DARK)
    s.fill([(-wide - 0.15, eaves), (0, -1.0), (wide + 0.15, eaves)], TRIM)
    door = d.uniform(-0.5, 0.1)
    s.box(door, 0.45, door + 0.35, 1.0, DARK)
    s.box(0.3, eaves + 0.25, 0.62, eaves + 0.55, LIGHT)
    if d.chance(0.5):
        s.box(-0.62, eaves + 0.25, -0.3, eaves + 0.55, LIGHT)


def tree(s: Sketch, d: Draws) -> None:
    """A conifer: stacked triangles on a trunk."""
    s.box(-0.13, 0.5, 0.13, 1.0, DARK)
    layers = d.integer(3, 4)
    for i in range(layers):
        top = -1.0 + i * 1.1 / layers
        half = 0.35 + 0.45 * i / (layers - 1) * d.uniform(0.85, 1.1)
        tone = BODY if i % 2 == 0 else TRIM
        s.fill([(-half, top + 2.0 / layers), (0, top), (half, top + 2.0 / layers)], tone)


def fish(s: Sketch, d: Draws) -> None:
    """An oval body with a forked tail, a fin and an eye."""
    high = d.uniform(0.38, 0.52)
    s.fill([(0.35, 0), (1.0, -0.5), (0.85, 0), (1.0, 0.5)], TRIM)
    s.fill([(-0.4, -0.8 * high), (0.2, -high - 0.3), (0.3, -0.5 * high)], TRIM)
    s.disc(-0.25, 0, 0.75, high)
    for x in np.linspace(-0.25, 0.2, d.integer(0, 3)):
        s.line([(x, -0.75 * high), (x + 0.08, 0), (x, 0.75 * high)], 0.07, TRIM)
    s.disc(-0.68, -0.12, 0.1, tone=LIGHT)
    s.disc(-0.7, -0.12, 0.05, tone=DARK)


def key(s: Sketch, d: Draws) -> None:
    """A ring bow, a shank and a bit with teeth."""
    bow, hole = d.uniform(0.36, 0.46), d.uniform(0.18, 0.24)
    s.line([(-0.4, 0), (1.0, 0)], 0.17)
    for i in range(d.integer(2, 3)):
        s.line([(0.92 - 0.26 * i, 0), (0.92 - 0.26 * i, d.uniform(0.3, 0.5))], 0.15)
    s.disc(-0.6, 0, bow)
    s.disc(-0.6, 0, hole, tone=HOLE)


def arrow(s: Sketch, d: Draws) -> None:
    """A shaft with a head, sometimes with a notched tail."""
    half, neck, shaft = d.uniform(0.45, 0.65), d.uniform(0.0, 0.3), d.uniform(0.15, 0.24)
    s.fill([(-0.95, -shaft), (neck, -shaft), (neck, shaft), (-0.95, shaft), (-0.75, 0)])
    s.fill([(neck - 0.05, -half), (1.0, 0), (neck - 0.05, half)], d.integer(BODY, TRIM))


def spiral(s: Sketch, d: Draws) -> None:
    """A line that winds outwards."""
    turns = d.uniform(2.2, 3.0)
    t = np.linspace(0.08, 1.0, 70)
    s.line(np.stack([t * np.cos(2 * pi * turns * t), t * np.sin(2 * pi * turns * t)], 1), 0.17)


def ladder(s: Sketch, d: Draws) -> None:
    """Two rails and their rungs."""
    half, narrow = d.uniform(0.32, 0.45), d.uniform(0.75, 1.0)
    rungs = d.integer(4, 6)
    for y in np.linspace(-0.75, 0.75, rungs):
        s.line([(-half, y), (half, y)], 0.1, TRIM)
    s.line([(-half * narrow, -1.0), (-half, 1.0)], 0.13)
    s.line([(half * narrow, -1.0), (half, 1.0)], 0.13)


def mug(s: Sketch, d: Draws) -> None:
    """A cylinder with a handle at its side."""
    top, wide = d.uniform(-0.85, -0.6), d.uniform(0.5, 0.62)
    s.line(arc(wide - 0.2, 0.05, 0.5, 0.42, -1.4, 1.4), 0.17)
    s.fill([(-wide - 0.2, top), (wide - 0.2, top), (wide - 0.28, 0.8), (-wide - 0.12, 0.8)])
    s.disc(-0.2, top, wide, 0.17, DARK)
    if d.chance(0.6):
        low = d.uniform(-0.2, 0.2)
        s.box(-wide - 0.16, low, wide - 0.24, low + d.uniform(0.15, 0.35), TRIM)


def flower(s: Sketch, d: Draws) -> None:
    """Petals round a centre, on a stem with leaves."""
    petals, turn = d.integer(5, 8), d.uniform(0, pi)
    s.line([(0, -0.3), (d.uniform(-0.15, 0.15), 1.0)], 0.11, DARK)
    s.fill([(0, 0.75), (0.45, 0.35), (0.3, 0.7)], DARK)
    if d.chance(0.6):
        s.fill([(0, 0.9), (-0.45, 0.5), (-0.3, 0.85)], DARK)
    for i in range(petals):
        angle = turn + 2 * pi * i / petals
        s.disc(0.38 * cos(angle), -0.4 + 0.38 * sin(angle), 0.7 / petals + 0.11)
    s.disc(0, -0.4, d.uniform(0.17, 0.24), tone=LIGHT)


def butterfly(s: Sketch, d: Draws) -> None:
    """Two pairs of wings, a thin body, feelers."""
    upper, lower = d.uniform(0.6, 0.9), d.uniform(0.45, 0.7)
    for side in (-1, 1):
        x = np.array([0, 0.45, 1.0, 0.95, 0.5, 0]) * side
        s.fill(np.stack([x, [-0.1, -upper, -upper, -0.25, 0.08, 0.08]], 1))
        x = np.array([0, 0.6, 0.75, 0.5, 0.2]) * side
        s.fill(np.stack([x, [0.0, 0.1, lower, lower + 0.2, lower]], 1), TRIM)
        s.disc(0.68 * side, -0.5 * upper, 0.14, tone=LIGHT)
        s.line([(0, -0.4), (0.25 * side, -0.85)], 0.05, DARK)
    s.disc(0, 0.05, 0.1, 0.55, DARK)


def bolt(s: Sketch, d: Draws) -> None:
    """A jagged stroke of lightning."""
    lean = d.uniform(0.2, 0.45)
    s.fill(
        [
            (lean - 0.1, -1.0),
            (-0.55, 0.12),
            (-0.05, 0.12),
            (-lean - 0.05, 1.0),
            (0.6, -0.25),
            (0.1, -0.25),
            (lean + 0.35, -1.0),
        ]
    )


def anchor(s: Sketch, d: Draws) -> None:
    """A ring, a shank with a stock, and curved arms."""
    reach = d.uniform(0.6, 0.8)
    s.line(arc(0, -0.78, 0.17, 0.17), 0.11, TRIM, closed=True)
    s.line([(0, -0.6), (0, 0.9)], 0.16)
    s.line([(-0.42, -0.38), (0.42, -0.38)], 0.14, TRIM)
    s.line(arc(0, 0.2, reach, 0.7, 0.1, pi - 0.1), 0.16)
    for side in (-1, 1):
        x = np.array([-0.25, 0.05, 0.2]) * side + reach * side
        s.fill(np.stack([x, [0.25, -0.1, 0.4]], 1))


def hourglass(s: Sketch, d: Draws) -> None:
    """Two bulbs between two plates, sand in both."""
    half, level = d.uniform(0.5, 0.65), d.uniform(0.3, 0.6)
    for way in (-1, 1):
        s.fill([(-half, 0.85 * way), (half, 0.85 * way), (0.06, 0), (-0.06, 0)], LIGHT)
    s.fill([(-half * level, -0.85 * level), (half * level, -0.85 * level), (0, 0)], TRIM)
    s.fill([(-half, 0.85), (0, 0.85 - 0.8 * level), (half, 0.85)], TRIM)
    for y in (-0.9, 0.9):
        s.line([(-half - 0.15, y), (half + 0.15, y)], 0.2)


def kite(s: Sketch, d: Draws) -> None:
    """A quartered rhombus with a tail of bows."""
    half, cross = d.uniform(0.45, 0.6), d.uniform(-0.55, -0.4)
    top, low, left, right = (0, -1.0), (0, 0.35), (-half, cross), (half, cross)
    tail = [(0.2 * sin(4 * t), 0.35 + 0.65 * t) for t in np.linspace(0, 1, 12)]
    s.line(tail, 0.06, DARK)
    for i in (5, 10):
        x, y = tail[i]
        s.fill([(x - 0.18, y - 0.1), (x + 0.18, y + 0.1), (x + 0.18, y - 0.1), (x - 0.18, y + 0.1)])
    s.fill([top, right, low, left])
    s.fill([top, right, (0, cross)], TRIM)
    s.fill([(0, cross), low, left], TRIM)


def mushroom(s: Sketch, d: Draws) -> None:
    """A spotted half-round cap on a stalk."""
    stalk, rim = d.uniform(0.18, 0.3), d.uniform(-0.05, 0.15)
    foot = stalk + 0.1
    s.fill([(-stalk, rim - 0.1), (stalk, rim - 0.1), (foot, 1.0), (-foot, 1.0)], LIGHT)
    s.fill(arc(0, rim, 0.95, 0.85 + rim, pi, 2 * pi))
    for x, y in ((-0.5, 0.3), (0.05, 0.55), (0.5, 0.28)):
        s.disc(x + d.uniform(-0.06, 0.06), rim - y, d.uniform(0.09, 0.16), tone=LIGHT)


def sailboat(s: Sketch, d: Draws) -> None:
    """A hull, a mast and two unequal sails."""
    s.line([(0, -1.0), (0, 0.55)], 0.08, DARK)
    s.fill([(0.08, -0.95), (0.08, 0.4), (d.uniform(0.6, 0.8), 0.4)], LIGHT)
    s.fill([(-0.08, d.uniform(-0.75, -0.5)), (-0.08, 0.4), (-0.6, 0.4)], TRIM)
    s.fill([(-0.9, 0.52), (0.95, 0.52), (0.6, d.uniform(0.85, 1.0)), (-0.55, 0.9)])


def crescent(s: Sketch, d: Draws) -> None:
    """A moon: a disc without the disc beside it."""
    beside, radius = d.uniform(0.45, 0.75), 0.85
    x = (1 - radius**2 + beside**2) / (2 * beside)  # where the two circles cross
    y = sqrt(1 - x * x)
    outer, inner = atan2(y, x), atan2(y, x - beside)
    back = arc(beside, 0, radius, radius, 2 * pi - inner, inner)
    s.fill(np.concatenate([arc(0, 0, 1.0, 1.0, outer, 2 * pi - outer), back]))


def gear(s: Sketch, d: Draws) -> None:
    """A toothed disc with a round hole."""
    teeth, root = d.integer(7, 10), d.uniform(0.7, 0.78)
    s.fill(polar([1.0, 1.0, root, root] * teeth))
    s.disc(0, 0, d.uniform(0.28, 0.4), tone=HOLE)


def umbrella(s: Sketch, d: Draws) -> None:
    """A canopy of panels, a stick, a hooked grip."""
    deep = d.uniform(0.75, 0.95)
    s.line([(0, -0.9), (0, 0.75)], 0.09, DARK)
    s.line(arc(0.2, 0.75, 0.2, 0.22, pi, 0), 0.1, DARK)
    s.fill(arc(0, 0, 1.0, deep, pi, 2 * pi))
    s.fill(np.concatenate([arc(0, 0, 0.35, deep, pi, 2 * pi)]), TRIM)
    for x in (-0.67, 0.0, 0.67):
        s.disc(x, 0.04, 0.33, 0.16, HOLE)
    s.line([(0, -0.1), (0, 0.4)], 0.09, DARK)


def heart(s: Sketch, d: Draws) -> None:
    """Two lobes above a point."""
    t = np.linspace(0, 2 * pi, 40)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    outline = np.stack([np.sin(t) ** 3, -y / 16 - 0.1], 1)
    s.fill(outline)
    if d.chance(0.5):
        s.fill(outline * d.uniform(0.45, 0.65), TRIM)


def snowflake(s: Sketch, d: Draws) -> None:
    """Six arms with side branches."""
    where, length = d.uniform(0.45, 0.65), d.uniform(0.25, 0.38)
    for i in range(6):
        a = pi * i / 3
        s.line([(0, 0), (cos(a), sin(a))], 0.12)
        fork = (where * cos(a), where * sin(a))
        for turn in (-0.9, 0.9):
            tip = (fork[0] + length * cos(a + turn), fork[1] + length * sin(a + turn))
            s.line([fork, tip], 0.1)


def crown(s: Sketch, d: Draws) -> None:
    """A band under spikes with balls on them."""
    spikes, high = d.integer(3, 5), d.uniform(-0.6, -0.4)
    xs = np.linspace(-0.9, 0.9, 2 * spikes - 1)
    ys = [high if i % 2 == 0 else 0.15 for i in range(len(xs))]
    s.fill([*zip(xs, ys, strict=True), (0.75, 0.75), (-0.75, 0.75)])
    s.box(-0.77, 0.5, 0.77, 0.75, TRIM)
    for x in xs[::2]:
        s.disc(x, high - 0.05, 0.13, tone=LIGHT)


def glasses(s: Sketch, d: Draws) -> None:
    """Two lenses, a bridge and two arms."""
    r = d.uniform(0.34, 0.42)
    for x in (-0.52, 0.52):
        if d.chance(0.5):
            s.disc(x, 0.1, r, tone=DARK)
        s.line(arc(x, 0.1, r, r * d.uniform(0.85, 1.0)), 0.13, closed=True)
    s.line(arc(0, 0.05, 0.16, 0.15, pi, 2 * pi), 0.11)
    for side in (-1, 1):
        s.line([((0.52 + r) * side, 0.0), (1.0 * side, -0.45), (0.8 * side, -0.6)], 0.1)


def envelope(s: Sketch, d: Draws) -> None:
    """A letter with its flap folded down."""
    high, tip = d.uniform(0.55, 0.7), d.uniform(0.0, 0.2)
    s.box(-1.0, -high, 1.0, high)
    s.line([(-1.0, high), (-0.1, tip - 0.1)], 0.08, DARK)
    s.line([(1.0, high), (0.1, tip - 0.1)], 0.08, DARK)
    s.fill([(-1.0, -high), (1.0, -high), (0, tip)], TRIM)
    s.line([(-1.0, -high), (0, tip), (1.0, -high)], 0.09, DARK)
    if d.chance(0.5):
        s.disc(0, tip, 0.16, tone=LIGHT)


def bell(s: Sketch, d: Draws) -> None:
    """A flared dome with a rim and a clapper."""
    waist = d.uniform(0.42, 0.52)
    s.disc(0, 0.78, 0.18, tone=DARK)
    s.line(arc(0, -0.85, 0.13, 0.13), 0.09, TRIM, closed=True)
    side = [(waist, -0.1), (waist + 0.1, 0.25), (0.85, 0.6)]
    s.fill([*arc(0, -0.1, waist, 0.65, pi, 2 * pi), *side, *((-x, y) for x, y in side[::-1])])
    s.line([(-0.85, 0.6), (0.85, 0.6)], 0.16, TRIM)


def rocket(s: Sketch, d: Draws) -> None:
    """A pointed hull with fins, a porthole and a flame."""
    wide = d.uniform(0.24, 0.32)
    s.fill([(-0.2, 0.6), (0, d.uniform(0.85, 1.1)), (0.2, 0.6)], LIGHT)
    for side in (-1, 1):
        s.fill([(wide * side, 0.05), (0.65 * side, 0.75), (wide * side, 0.6)], TRIM)
    s.fill([(-wide, 0.62), (-wide, -0.4), (0, -1.05), (wide, -0.4), (wide, 0.62)])
    s.fill([(-wide, -0.4), (0, -1.05), (wide, -0.4)], TRIM)
    s.disc(0, -0.1, 0.15, tone=LIGHT if d.chance(0.5) else DARK)


def car(s: Sketch, d: Draws) -> None:
    """A side view: cabin, body, two wheels."""
    cabin, roof = d.uniform(-0.55, -0.35), d.uniform(-0.6, -0.45)
    s.fill([(cabin - 0.2, -0.05), (cabin, roof), (0.3, roof), (0.6, -0.05)], TRIM)
    glass = roof + 0.12
    s.fill([(cabin - 0.02, -0.1), (cabin + 0.1, glass), (0.22, glass), (0.42, -0.1)], LIGHT)
    s.fill([(-1.0, -0.05), (0.75, -0.08), (1.0, 0.1), (1.0, 0.38), (-1.0, 0.38)])
    r = d.uniform(0.2, 0.26)
    for x in (-0.55, 0.55):
        s.disc(x, 0.38, r, tone=DARK)
        s.disc(x, 0.38, 0.45 * r, tone=LIGHT)


def cactus(s: Sketch, d: Draws) -> None:
    """A column with two arms, in a pot."""
    s.line([(0, -0.85), (0, 0.6)], 0.36)
    for side in (-1, 1):
        y = d.uniform(-0.2, 0.25)
        s.line([(0, y), (0.55 * side, y), (0.55 * side, y - d.uniform(0.3, 0.5))], 0.22)
    s.fill([(-0.45, 0.5), (0.45, 0.5), (0.32, 1.0), (-0.32, 1.0)], TRIM)


SHAPES: tuple[Callable[[Sketch, Draws], None], ...] = (
    *(wheel, star, house, tree, fish, key, arrow, spiral, ladder, mug),
    *(flower, butterfly, bolt, anchor, hourglass, kite, mushroom, sailboat, crescent, gear),
    *(umbrella, heart, snowflake, crown, glasses, envelope, bell, rocket, car, cactus),
)
"""All shapes in class order: a class keeps its number, and new ones are added at the end."""
