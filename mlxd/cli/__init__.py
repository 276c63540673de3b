"""The command line: words in, calls, words out, exit status. The only part that prints or exits (beside the processes' own doors).

Data goes to stdout, talk to stderr. A command's file is imported when the command is used, and heavy imports wait until a command needs
them: `mlxd status` takes less than 150 ms.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from mlxd import __version__
from mlxd.errors import MlxdError

#: Every command, in the order of `mlxd --help`, and the file of this package that has it.
GROUPS = {
    "Run it": {"start": "daemon", "stop": "daemon", "restart": "daemon", "reload": "daemon", "run": "daemon"},
    "Keep it running": {
        "autostart": "autostart",
        "check": "services",
        "recover": "services",
        "monitor": "services",
        "uninstall": "uninstall",
    },
    "Look at it": {"status": "look", "top": "top", "logs": "look", "events": "look", "config": "config", "doctor": "doctor"},
    "Models": {
        "pull": "pull",
        "list": "models",
        "show": "models",
        "ps": "models",
        "load": "models",
        "unload": "models",
        "cp": "models",
        "alias": "models",
        "rm": "models",
    },
    "Use it": {"chat": "chat", "env": "services", "completion": "completion"},
}
#: What a full or broken disk says, where the output goes there.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
FILES = {name: file for group in GROUPS.values() for name, file in group.items()}


class Commands(click.Group):
    """Lists the commands in groups, and turns an MlxdError into one line and its exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(FILES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        name = "run" if name == "serve" else name
        if name not in FILES:
            return None
        module = importlib.import_module(f"{__name__}.{FILES[name]}")
        command: click.Command = getattr(module, {"list": "list_"}.get(name, name))  # `list` is Python's own
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in GROUPS.items():
            commands = [(name, command) for name in group if (command := self.get_command(ctx, name))]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(60)) for name, command in commands])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MlxdError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_status)
        except BrokenPipeError:  # `mlxd logs | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 so that the interpreter's last flush has somewhere to go
            ctx.exit(0)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="mlxd %(version)s")
def main() -> None:
    """The always-on local LLM server for MLX models, for Ollama, OpenAI and Anthropic clients on port 11435."""
