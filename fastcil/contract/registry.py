"""Names of methods, addons and codecs, and where they live."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable

from fastcil.errors import CompositionError, FastcilError

METHODS: dict[str, str | type] = {
    "finetune": "fastcil.methods.finetune:Finetune",
    "joint": "fastcil.methods.joint:Joint",
    "er": "fastcil.methods.er:ExperienceReplay",
    "mer": "fastcil.methods.mer:MER",
    "gem": "fastcil.methods.gem:GEM",
    "a-gem": "fastcil.methods.a_gem:AGEM",
    "lwf": "fastcil.methods.lwf:LwF",
    "ebm": "fastcil.methods.ebm:EBM",
    "eec": "fastcil.methods.eec:EEC",
    "dark": "fastcil.methods.dark:Dark",
    "darkpp": "fastcil.methods.dark:DarkPP",
    "ewc": "fastcil.methods.ewc:EWC",
    "online-ewc": "fastcil.methods.ewc:OnlineEWC",
    "mas": "fastcil.methods.mas:MAS",
    "osla": "fastcil.methods.osla:OSLA",
    "si": "fastcil.methods.si:SI",
    "dlcft": "fastcil.methods.dlcft:DLCFT",
    "icarl": "fastcil.methods.icarl:ICaRL",
    "eeil": "fastcil.methods.eeil:EEIL",
    "lecnet": "fastcil.methods.lecnet:LECNet",
    "wa": "fastcil.methods.wa:WA",
    "lucir": "fastcil.methods.lucir:LUCIR",
    "podnet": "fastcil.methods.podnet:PODNet",
    "ncm": "fastcil.methods.ncm:NCM",
    "topic": "fastcil.methods.topic:TOPIC",
    "der": "fastcil.methods.der:DER",
    "foster": "fastcil.methods.foster:Foster",
}
ADDONS: dict[str, str | type] = {
    "cam": "fastcil.addons.cam:CAM",
    "cim": "fastcil.addons.cim:CIM",
    "fisher": "fastcil.addons.fisher:Fisher",
    "mrdc": "fastcil.addons.mrdc:MRDC",
    "mnemonics": "fastcil.addons.mnemonics:Mnemonics",
    "samc": "fastcil.addons.samc:SAMC",
    "aanets": "fastcil.addons.aanets:AANets",
    "lec": "fastcil.addons.lec:LEC",
}
CODECS: dict[str, str | type] = {
    "raw": "fastcil.memory.codecs.raw:RawCodec",
    "bbox": "fastcil.memory.codecs.bbox:BBoxCodec",
    "jpeg": "fastcil.memory.codecs.jpeg:JpegCodec",
    "sparse": "fastcil.memory.codecs.sparse:SparseCodec",
    "learned": "fastcil.memory.codecs.learned:LearnedCodec",
}
ALIASES = {"ft-cnn": "finetune", "joint-cnn": "joint"}

_KINDS: dict[str, dict[str, str | type]] = {"method": METHODS, "addon": ADDONS, "codec": CODECS}


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that suggests the nearest known name, and lists all.

    Example:
        >>> nearest("fosterr", ["foster", "der"])
        "did you mean 'foster'? Known: der, foster."
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def lookup(kind: str, name: str) -> type:
    """The class registered under a name.

    Args:
        kind: ``method``, ``addon`` or ``codec``.
        name: Its registered name or an alias.

    Raises:
        FastcilError: The name is unknown; the nearest known one is suggested.
    """
    table = _KINDS[kind]
    entry = table.get(ALIASES.get(name, name))
    if entry is None:
        raise FastcilError(f"{kind} '{name}' is unknown; {nearest(name, table)}")
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(importlib.import_module(module), attribute)
    assert isinstance(entry, type)
    return entry


def register(kind: str, name: str, cls: type) -> None:
    """Makes a class of the user's own known by a name, for this process.

    Args:
        kind: ``method``, ``addon`` or ``codec``.
        name: Letters, digits, ``_`` and ``-``; may not hide a name of fastcil's own. A name of
            the user's own may be given again, as a notebook does.
        cls: A subclass of `Method`, `Addon` or `fastcil.memory.Codec`.

    Raises:
        FastcilError: The name is fastcil's own, or that of a method where an addon is registered
            or the other way round, or has other characters; an unknown kind; no class.
    """
    if kind not in _KINDS:
        raise FastcilError(f"kind is '{kind}', which is unknown; {nearest(kind, _KINDS)}")
    table = _KINDS[kind]
    if not re.fullmatch(r"[\w-]+", name):
        raise FastcilError(
            f"{kind} name is '{name}'; it must be made of letters, digits, '_' and '-'."
        )
    if not isinstance(cls, type):
        raise FastcilError(f"cls is {cls!r}; pass a class, not what it makes.")
    other = {"method": ADDONS, "addon": METHODS}.get(kind, {})
    if name in other:
        raise FastcilError(
            f"{kind} name '{name}' is that of {'an addon' if kind == 'method' else 'a method'}; "
            f"choose another."
        )
    taken = table.get(ALIASES.get(name, name))
    if taken is not None and taken is not cls and isinstance(taken, str):
        raise FastcilError(f"{kind} name '{name}' is fastcil's own; choose another.")
    table[name] = cls


def parse_composition(text: str) -> tuple[str, tuple[str, ...]]:
    """Splits ``foster+cim`` into its method and its addons, and checks the names.

    Raises:
        FastcilError: An unknown name.
        CompositionError: An addon stands first, a method stands behind ``+``, or one occurs twice.

    Example:
        >>> parse_composition("foster+cim")
        ('foster', ('cim',))
    """
    method, *addons = (part.strip() for part in text.split("+"))
    method = ALIASES.get(method, method)
    if method in ADDONS:
        raise CompositionError(
            f"method '{text}' starts with the addon '{method}'; put a method before it, as in "
            f"'foster+{method}'."
        )
    lookup("method", method)
    for addon in addons:
        if ALIASES.get(addon, addon) in METHODS:
            raise CompositionError(
                f"method '{text}' adds the method '{addon}' to another; only addons compose: "
                f"{', '.join(sorted(ADDONS))}."
            )
        lookup("addon", addon)
        if addons.count(addon) > 1:
            raise CompositionError(f"method '{text}' names the addon '{addon}' twice; once is all.")
    return method, tuple(addons)
