"""What the commands share: flags, one-line errors and exit codes. No torch."""
from __future__ import annotations

import argparse
import codecs
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Sequence

from pruning import UserError, offline_by
from pruning.data import DATASETS
from pruning.methods import BASELINES, METHODS, PRUNING, default_options
from pruning.methods.calibration import GIB, MEMORY
from pruning.methods.options import at_least, one_of
from pruning.metrics import BACKBONES, DEFAULT, METRICS
from pruning.models.pipelines import OFFLOADS
from pruning.models.saving import LARGEST_GUIDANCE, LARGEST_IMAGE
from pruning.records.answers import brief, failed, next_step
from pruning.records.findings import QUALITY, TOLERANCE
from pruning.records.record import Record

ROOT = Path(__file__).resolve().parents[1]
# Where results go: in a clone of the repository there, else, as an installed package, in the folder of the shell.
RESULTS = ROOT / "results" if (ROOT / "run_pruning_analysis.sh").is_file() else Path("results")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        if isinstance(action.default, Path) and ROOT in action.default.parents:
            return f"{action.help} (default: {action.default.relative_to(ROOT)} in the repository)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        """Print one line without the usage, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


# ---- argument types: text -> value; a wrong text raises ArgumentTypeError

def rate(text: str) -> float:
    """Return a pruning rate: a number in [0, 1)."""
    return _number(text, lambda value: 0 <= value < 1, "a rate is a number in [0, 1)")


def tolerance(text: str) -> float:
    """Return the share of the dense model's quality that may be lost: a number in (0, 1)."""
    return _number(text, lambda value: 0 < value < 1, "a tolerance is a share between 0 and 1")


def gibibytes(text: str) -> float:
    """Return an amount of memory in GiB: a number above 0."""
    return _number(text, lambda value: 0 < value < 1e9, "memory is a number of GiB above 0")


def on_or_off(text: str) -> bool:
    """Return whether an option is on: "on" or "off"."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off; got {text!r}")
    return text == "on"


def _number(text: str, fits, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{expected}; got {text!r}")
    return value


def guidance(text: str) -> float:
    """Return a guidance scale: a finite number."""
    return _number(text, lambda value: abs(value) < LARGEST_GUIDANCE, "a guidance scale is a finite number")


positive = at_least(1)
not_negative = at_least(0)
noise_seeds = at_least(1, 1000)
pixels = at_least(1, LARGEST_IMAGE)


def shard(text: str) -> tuple:
    """Return (i, n) of 'i/n': the i-th of n parts, i from 1 to n."""
    part, slash, count = text.partition("/")
    if not (slash and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is i/n with i from 1 to n, such as 2/4; got {text!r}")
    return int(part), int(count)


# ---- flags; each means the same in every command

def add_tolerance(parser: Parser) -> None:
    """Add --tolerance, which every command takes that says how far a model can be pruned."""
    parser.add_argument("--tolerance", type=tolerance, default=TOLERANCE,
                        help=f"share of the dense model's {QUALITY} that pruning may cost")


def add_sampling_flags(parser: Parser) -> None:
    """Add the flags that say how and where images are drawn."""
    parser.add_argument("--steps", type=positive, help="denoising steps (default: the model's own)")
    parser.add_argument("--guidance_scale", type=guidance, help="guidance scale (default: the model's own)")
    parser.add_argument("--image_size", type=pixels, help="pixels a side (default: the model's own)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", type=one_of("dtype", ("float32", "float16", "bfloat16")),
                        help="dtype of the model (default: float32 on the CPU, else bfloat16; see docs/long-runs.md)")


def add_measuring_flags(parser: Parser) -> None:
    """Add the flags that measuring one rate and a sweep share."""
    defaults = ", ".join(f"{dataset.default_model} for {name}" for name, dataset in DATASETS.items())
    parser.add_argument("--method", type=one_of("method", METHODS), default="magnitude",
                        help="how to prune: " + "; ".join(f"{name}: {METHODS[name].help}" for name in PRUNING)
                             + "; or what to compare with: " + "; ".join(
                                 f"{name}: {METHODS[name].help}" for name in BASELINES))
    parser.add_argument("--dataset", type=one_of("dataset", DATASETS), default="shapes",
                        help="captions and originals: " + "; ".join(f"{n}: {d.help}" for n, d in DATASETS.items()))
    parser.add_argument("--data_dir", type=Path,
                        help="folder of the data set, or file of prompts (default: fetched if possible)")
    parser.add_argument("--model", help=f"a bundled model, a pipeline folder or a hub id (default: {defaults})")
    parser.add_argument("--seed", type=not_negative, default=0, help="chooses samples and noise")
    parser.add_argument("--seeds", type=noise_seeds, default=1,
                        help="noise seeds: each sample is drawn once for each, and dense is compared with itself")
    add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=positive,
                        help="images made together (default: as many as fit in GPU memory; on a CPU what a short trial "
                             "finds fastest)")
    parser.add_argument("--offload", type=one_of("offload", OFFLOADS),
                        help="keep waiting parts of the model on the CPU: model (whole modules) or sequential (layers)")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser with torch.compile before timing")
    parser.add_argument("--metrics", nargs="+", type=one_of("metric", METRICS),
                        help=f"what to measure (default: all that the data set allows, of {' '.join(DEFAULT)}); only "
                             f"if named here: {' '.join(name for name in METRICS if name not in DEFAULT)}")
    parser.add_argument("--metric_backbones", type=one_of("metric backbones", BACKBONES),
                        help="networks behind the metrics: bundled (for shapes) or standard (default: by dataset)")
    add_method_flags(parser)
    parser.add_argument("--calibration_memory", type=gibibytes, default=MEMORY / GIB, metavar="GIB",
                        help="GiB for what is gathered of layer inputs in one pass over the calibration calls; less "
                             "memory means more passes and the same result")
    parser.add_argument("--gradient_checkpointing", action="store_true",
                        help="in recovery, compute activations twice instead of keeping them: less memory, more time, "
                             "the same result (default: only if memory is short)")
    add_tolerance(parser)
    parser.add_argument("--save_pruned", type=Path, metavar="DIR",
                        help="save the pruned pipeline as a folder that --model takes; several rates: in DIR/RATE")
    parser.add_argument("--discard_images", action="store_true",
                        help="keep only the images that the figure shows; metrics added later make the others again")
    parser.add_argument("--overwrite", action="store_true",
                        help="measure again what an earlier run has measured; with --shard, its own rates only")
    parser.set_defaults(shard=None, sensitivity=False, rates_by_default=False, all_rates=None, dense_from=None)


def add_method_flags(parser: Parser) -> None:
    """Add a flag for every option of METHODS. The help names the methods that have the option, and its default."""
    users: Dict[str, Dict[str, Any]] = {}
    for method, entry in METHODS.items():
        for name, option in entry.options.items():
            users.setdefault(name, {})[method] = option
    for name, methods in users.items():
        option = next(iter(methods.values()))
        defaults = list(dict.fromkeys(("on" if each.default else "off") if each.type is bool else str(each.default)
                                      for each in methods.values()))
        shown = f" (default: {' or '.join(defaults)})" if defaults else ""
        kind = {"nargs": "?", "const": True, "type": on_or_off, "metavar": "on|off"} if option.type is bool \
            else {"type": option.type}
        parser.add_argument(f"--{name}", default=None, help=f"{', '.join(methods)}: {option.help}{shown}", **kind)


def method_options(args) -> Dict[str, Any]:
    """Return the options of args.method, given or by default.

    Raises UserError if an option is given that the method does not have.
    """
    options = default_options(args.method)
    for name in sorted({name for entry in METHODS.values() for name in entry.options}):
        given = getattr(args, name)
        if given is not None and name not in options:
            users = ", ".join(method for method, entry in METHODS.items() if name in entry.options)
            raise UserError(f"--{name} does nothing for the method {args.method}; it belongs to {users}")
        if given is not None:
            options[name] = given
    return options


def check_flags(args) -> None:
    """Raise UserError if a flag is given that args.method refuses."""
    for flag, why in METHODS[args.method].refuses.items():
        if getattr(args, flag):
            raise UserError(f"{args.method} takes no --{flag}: {why}; leave out --{flag}")


# ---- what a command says when it has finished

def closing(args, record: Record, path: Path, command: Sequence[str], drop: Sequence[str] = ()) -> str:
    """Return the answer in at most four lines of the terminal's width, the failures, the paths, the next thing to try.

    path: of the record. command: the script and its arguments, which the next command repeats but for the flags in
    `drop` and those that it changes.
    """
    answer = textwrap.wrap(brief(record, args.tolerance), max(40, shutil.get_terminal_size().columns), max_lines=4,
                           break_on_hyphens=False, placeholder=" …")
    files = {"Report": path.with_name("report.html"), "Figure": path.with_name(f"{record.variant}.png"),
             "Tables": path.with_name(f"{record.variant}.txt"), "Record": path}
    if args.shard:
        files = {"Record": path}
        merging = [Path(command[0]).with_name("merge_results.py"), "--results_dir", str(args.results_dir)]
        following = f"Next, when all shards are measured: {changed_command(merging, {})}"
    else:
        why, changes = next_step(record, args.tolerance, saved=args.save_pruned is not None)
        following = why and f"Next, {why}: {changed_command(command, changes, drop)}"
    return "\n".join(filter(None, [*answer, failed(record, args.tolerance), *(
        f"{name}: {near(file)}" for name, file in files.items() if file.exists()), following]))


def changed_command(command: Sequence[str], changes: Dict[str, Sequence[str]], drop: Sequence[str] = ()) -> str:
    """Return a command line to copy: this Python, a script and its arguments, with some flags changed or dropped.

    A command of another method loses the options of this one, and its folder of a pruned model.
    """
    script, *arguments = command
    options = {"--save_pruned", *(f"--{name}" for entry in METHODS.values() for name in entry.options)} \
        if "--method" in changes else set()
    python = "python" if shutil.which("python") == sys.executable else near(sys.executable)
    groups = []
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(argument)
    kept = [group for group in groups if group[0].split("=")[0] not in {*changes, *drop, *options}]
    return shlex.join([python, near(script), *(word for group in kept for word in group),
                       *(word for flag, values in changes.items() for word in (flag, *values))])


def near(path) -> str:
    """Return a path as seen from the current folder if it lies below it."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path)


# ---- running a command

# What texts hold beyond ASCII, for outputs whose encoding lacks it. Anything else is shown as an escape.
PLAIN = {"−": "-", "–": "-", "±": "+-", "·": "*", "²": "^2", "×": "x", "→": "->", "↑": "(up)", "↓": "(down)",
         "…": "...", "Δ": "delta ", "‖": "|", "é": "e"}


def plain(error: UnicodeError):
    """Write a character that an encoding lacks by the nearest that it has. An error handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    texts = [PLAIN.get(letter, letter.encode("ascii", "backslashreplace").decode())
             for letter in error.object[error.start:error.end]]
    return "".join(texts), error.end


def prepare_process() -> None:
    """Make output, network and home usable: an encoding may lack letters, an output be closed, a user have no home."""
    codecs.register_error("plain", plain)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process lives
        with suppress(AttributeError, ValueError):  # a test's own output
            getattr(sys, name).reconfigure(errors="plain")
    if offline_by():
        os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library reads it when it is imported
    if not Path(os.path.expanduser("~")).is_absolute():  # in containers: no HOME, and a user id without a name
        os.environ["HOME"] = tempfile.mkdtemp(prefix="pruning-home-")
        os.environ.setdefault("USER", "nobody")
        print(f"this user has no home folder: what is fetched goes to {os.environ['HOME']}; set HOME to keep it",
              file=sys.stderr)


def run(main) -> None:
    """Run a command. Exit with 2 and one line after a UserError or if the system refuses, with 130 after Ctrl-C."""
    prepare_process()
    try:
        try:
            main()
        finally:  # also of --help; later, Python would print a traceback if the output cannot take it
            sys.stdout.flush()
    except UserError as error:
        stop(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        stop(130, "\ninterrupted; finished points are kept, and the same command continues from them")
    except BrokenPipeError:
        stop(2, "error: nobody reads the output any more; what is finished is kept")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which commands import late
            raise
        stop(2, "error: the GPU ran out of memory; give a smaller --batch_size, --offload model or --dtype bfloat16 "
                f"({str(error).split('.')[0]})")
    except OSError as error:  # a full disk, no permission, a name that is too long
        place = error.filename if error.filename is not None else "the output"
        stop(2, f"error: cannot use {place}: {error.strerror or error}")


def stop(code: int, line: str) -> None:
    """Exit with a code and one line on stderr, also if an output takes nothing any more."""
    for output, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            output.write(text)
            output.flush()
        except (OSError, ValueError):  # what is left in the buffer would raise once more at the end
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    sys.exit(code)
