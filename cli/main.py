"""The command `kfe-fx`: finds the sub-command, and turns every outcome into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click

from kfe_fx import __version__
from kfe_fx.errors import KfeError

COMMANDS = {
    "prune": "make a trained network smaller until it meets a budget",
    "sparsify": "set single weights to zero (saves no time by itself)",
    "pareto": "show what a network becomes at several budgets",
    "inspect": "show layers, units, what is frozen and why",
    "export": "write a network as ONNX and prove it equal",
    "verify": "check what prune wrote, files and function",
    "bench": "measure ONNX files against each other",
    "calibrate": "measure this machine, for predictions of latency",
    "capture": "turn a module into a program file",
    "train": "train a network, with curvature or without",
    "curvature": "show and measure second moments of its gradients",
    "rewrite": "run passes on a network, such as batchnorm-recurrent",
    "demo": "prune a small trained network that comes along",
}

EXIT_CODES = """\b
Exit codes:
  0  done                     4  the budget cannot be met
  1  a bug in kfe-fx          5  an output failed its verification
  2  usage or a bad file      6  bad data
  3  unsupported model        7  a missing dependency
"""

USAGE_EXIT = 2
INTERRUPTED_EXIT = 128 + signal.SIGINT
PIPE_EXIT = 128 + 13  # as a shell reports a command that died of SIGPIPE


@dataclass
class State:
    """What the options of the group leave for the end of the command."""

    traceback: bool = False


def want_traceback(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Remember that errors are to be shown with their traceback."""
    if value and isinstance(ctx.obj, State):
        ctx.obj.traceback = True


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for: `cli/NAME.py` defines `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of the work, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kfe_fx.cli.{cmd_name}").command
        if not any(param.name == "traceback" for param in command.params):
            # `kfe-fx prune ... --traceback` is where one types it after an error
            command.params.append(
                click.Option(
                    ["--traceback"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    hidden=True,
                    callback=want_traceback,
                )
            )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or name the one that was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that closed the pipe has seen enough."""
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # what is still buffered would raise once more at exit
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return PIPE_EXIT
        return value


@click.group(
    cls=LazyGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="kfe-fx %(version)s")
@click.option(
    "--traceback",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    envvar="KFE_FX_TRACEBACK",
    callback=want_traceback,
    help="Show the traceback of an error. Also: KFE_FX_TRACEBACK=1.",
)
def cli() -> None:
    """Make a trained PyTorch network smaller, and prove what came out.

    \b
    Example:
      kfe-fx prune model.pt --budget 0.5 --data train.npz

    halves the measured ONNX Runtime latency of model.pt and writes model.pruned.onnx, model.pruned.pt and
    model.pruned.json, the last with the plan and the proof.
    """


def one_line(text: str) -> str:
    """Fold a message into one printable line, whatever a file name or a library put into it."""
    folded = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in folded)


def report(text: str, exit_code: int) -> int:
    """Write one line to stderr."""
    click.echo(f"kfe-fx: error: {one_line(text)}", err=True)
    return exit_code


def report_usage(error: click.ClickException) -> int:
    """Say what is wrong with the command line and where its help is."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    where = f" (see '{ctx.command_path} --help')" if ctx else ""
    return report(error.format_message().rstrip(".") + where, USAGE_EXIT)


def run(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code; every error is one line on stderr."""
    state = State()
    try:
        value = cli.main(args=args, prog_name="kfe-fx", standalone_mode=False, obj=state)
        return value if isinstance(value, int) else 0
    except click.Abort:
        click.echo("kfe-fx: interrupted", err=True)
        return INTERRUPTED_EXIT
    except click.ClickException as error:
        return report_usage(error)
    except KfeError as error:
        if state.traceback:
            traceback.print_exc()
        return report(str(error) or type(error).__name__, error.exit_code)
    except OSError as error:
        # a full disk, a file that went away: the machine's fault and the user's to mend, not a bug
        if state.traceback:
            traceback.print_exc()
        reason = os.strerror(error.errno) if error.errno else str(error)
        return report(f"{error.filename}: {reason}" if error.filename else reason, USAGE_EXIT)
    except MemoryError as error:
        if state.traceback:
            traceback.print_exc()
        return report(f"out of memory ({error or 'no more told'}); give fewer examples or a smaller batch", USAGE_EXIT)
    except Exception as error:  # noqa: BLE001  the one place where a bug becomes a line instead of a traceback
        if state.traceback:
            traceback.print_exc()
        hint = "" if state.traceback else "; run it again with --traceback to see where"
        return report(f"this is a bug in kfe-fx: {type(error).__name__}: {error}{hint}", 1)


def terminated(signum: int, _frame: FrameType | None) -> NoReturn:
    """Leave by way of every `finally`, so that no temporary file stays behind."""
    raise SystemExit(128 + signum)


def main() -> None:
    """Run `kfe-fx` with the arguments of the process."""
    signal.signal(signal.SIGTERM, terminated)
    sys.exit(run())


if __name__ == "__main__":
    main()
