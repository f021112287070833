"""The command line: ``fastcil train | compare | pretrain | profile | evaluate | ...``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastcil.errors import FastcilError, RankLostError

if TYPE_CHECKING:
    from fastcil.engine.compare import Comparison

_USAGE = """usage: fastcil COMMAND [options]

  train      run one method:          fastcil train --method foster+cim --data scenes
  compare    several at equal memory: fastcil compare --methods foster,foster+cim --seeds 0,1,2
  pretrain   weights to start from:   fastcil pretrain --data cifar100:classes=0-49
  profile    where time goes:         fastcil profile foster --data cifar100 --steps 20
  evaluate   a saved Learner on data: fastcil evaluate LEARNER --data DATA
  report     write a run's report:    fastcil report RUN_DIR
  ingest     images, to be mapped:    fastcil ingest SOURCE OUT.store
  methods    what there is:           fastcil methods [NAME]
  presets    published runs:          fastcil presets [NAME]
  codec      a learned image codec:   fastcil codec COMMAND, such as train
  doctor     what this machine can do

  fastcil COMMAND --help lists a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; bad input prints one sentence and returns 2, an interruption 130.

    Where torchrun started several processes and another of them ended, it is 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from fastcil import __version__

        print(__version__)
        return 0
    command, *rest = arguments
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "compare": _compare,
        "pretrain": _pretrain,
        "profile": _profile,
        "evaluate": _evaluate,
        "report": _report,
        "ingest": _ingest,
        "methods": _methods,
        "presets": _presets,
        "codec": _codec,
        "doctor": _doctor,
    }
    shown = warnings.showwarning
    warnings.showwarning = _warn
    try:
        if command not in commands:
            from fastcil.contract import nearest

            raise FastcilError(f"command '{command}' is unknown; {nearest(command, commands)}")
        if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            from fastcil.engine.distributed import refuse_ranks

            refuse_ranks(command)
        return commands[command](rest)
    except RankLostError as error:
        _say(str(error))
        return 1
    except FastcilError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from the last checkpoint.")
        return 130
    finally:
        warnings.showwarning = shown


def _say(sentence: str) -> None:
    """Prints what went wrong, once where several processes say the same."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from fastcil.engine.peers import say_once

        if not say_once(sentence):
            return
    print(f"fastcil: {sentence}", file=sys.stderr, flush=True)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line of its own: where in the source it arose helps nobody here."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastcil: warning: {message}", file=sys.stderr)


def _train(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_run
    from fastcil.engine.distributed import speaks
    from fastcil.engine.run import train

    options = parse_run("train", arguments)
    options["run_dir"] = options["run_dir"] or _default_dir(
        options["method"], options["data"], options["scenario"]
    )
    result = train(**options)
    if not speaks():
        return 0
    print(result)
    return _write_report(options["run_dir"])


def _compare(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_run
    from fastcil.engine.compare import RunsFailedError, compare

    options = parse_run("compare", arguments)
    options["run_dir"] = options["run_dir"] or _default_dir(
        "compare", options["data"], options["scenario"]
    )
    try:
        comparison = compare(**options)
    except RunsFailedError as error:
        _show(error.comparison, options["run_dir"])
        raise
    return _show(comparison, options["run_dir"])


def _show(comparison: Comparison, run_dir: str) -> int:
    """Prints the tables of a comparison, and writes its report."""
    from rich.console import Console

    console = Console(width=200 if not sys.stdout.isatty() else None)
    for table in (comparison.table(), comparison.sessions_table()):
        if table is not None:
            console.print(table)
    return _write_report(run_dir)


def _pretrain(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_pretrain
    from fastcil.engine.pretrain import pretrain

    options = parse_pretrain(arguments)
    # A network made from another one's weights is not that one's run.
    options["run_dir"] = options["run_dir"] or _default_dir(
        "pretrain", options["data"], options["network"]["activation"]
    )
    made = pretrain(**options)
    print(f"weights: {made.weights}\ntest accuracy: {made.accuracy:.2f} %")
    return _write_report(options["run_dir"])


def _profile(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_run
    from fastcil.engine.profile import profile

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--method", *arguments]
    options = parse_run("profile", arguments)
    options["run_dir"] = options["run_dir"] or _default_dir(
        f"profile-{options['method']}", options["data"], options["scenario"]
    )
    print(profile(**options), end="")
    print(f"traces: {options['run_dir']}")
    return 0


def _default_dir(name: str, data: str, what: str) -> str:
    """``runs/NAME-DATA-SCENARIO``: the same command finds its run again."""
    shown = str(data).partition(":list=")[0].rstrip("/").rpartition("/")[2].partition(":")[0]
    # Of session lists the folder's name tells enough.
    stream = f"few-{what.rstrip('/').rpartition('/')[2]}" if what.startswith("few:") else what
    return f"runs/{name}-{shown}-{stream}"


def _evaluate(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_evaluate
    from fastcil.engine.assess import assess

    options = parse_evaluate(arguments)
    for name, figures in assess(**options).items():
        print(f"{name}: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %")
    return 0


def _report(arguments: list[str]) -> int:
    from fastcil.engine.arguments import parse_report

    return _write_report(parse_report(arguments))


def _ingest(arguments: list[str]) -> int:
    from fastcil.data.ingest import ingest
    from fastcil.data.mapped import check_pixels
    from fastcil.engine.arguments import parse_ingest

    options = parse_ingest(arguments)
    if "verify" in options:
        checked = check_pixels(options["verify"])
        print(f"{options['verify']}: {checked:,} bytes of pixels are as they were written")
    else:
        print(ingest(**options, tell=lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


def _write_report(run_dir: str) -> int:
    from fastcil.engine.report import write_report

    print(f"report: {write_report(run_dir)}")
    return 0


def _methods(arguments: list[str]) -> int:
    from fastcil.engine.catalogue import describe, list_all

    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: fastcil methods [NAME]\n\nlists what there is, or one's options")
        return 0
    if len(arguments) > 1:
        raise FastcilError(f"methods takes one name; it got {len(arguments)}.")
    print(describe(arguments[0]) if arguments else list_all())
    return 0


def _presets(arguments: list[str]) -> int:
    from fastcil.engine.catalogue import describe_preset, list_presets

    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: fastcil presets [NAME]\n\nlists published runs, or what one sets")
        return 0
    if len(arguments) > 1:
        raise FastcilError(f"presets takes one name; it got {len(arguments)}.")
    print(describe_preset(arguments[0]) if arguments else list_presets())
    return 0


def _codec(arguments: list[str]) -> int:
    from fastcil.codec_cli import run_codec

    return run_codec(arguments)


def _doctor(arguments: list[str]) -> int:
    from fastcil.engine.doctor import findings

    if arguments in (["-h"], ["--help"]):
        print("usage: fastcil doctor\n\nlists what this machine and installation can do")
        return 0
    if arguments:
        raise FastcilError(f"doctor takes no argument; it got '{arguments[0]}'.")
    for name, finding, good in findings():
        print(f"{'ok ' if good else '-- '} {name:14} {finding}")
    return 0
