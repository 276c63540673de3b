"""The prompt of chat: a conversation, and what was typed before."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlxd import paths
from mlxd.cli import store
from mlxd.cli.chat import Answer, Terminal, dimmed, fill, seen, shortened, spoken
from mlxd.cli.stream import Broken
from mlxd.cli.words import bytes_of, table
from mlxd.errors import MlxdError

#: Of the history file.
MOST_LINES, MOST_HISTORY_BYTES = 1000, 1024 * 1024


class Conversation:
    """Talk at a prompt, until /bye or the end of input. `messages`: what has been said, all of which a model is told each time."""

    def __init__(self, where: paths.Paths, model: str):
        self.where = where
        self.model = model
        self.system = ""
        self.messages: list[dict[str, str]] = []
        self.history = History(where.chat_history)
        self.interrupted = False
        self.ended = False
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/model": ("[NAME]", "ask another model from now on; without a name, list them", self.change_model),
            "/system": (
                "[TEXT]",
                'say first what it is to be told; without a text, show it; "/system -" takes it away',
                self.change_system,
            ),
            "/clear": ("", "forget what was said; the system text stays", self.clear),
            "/help": ("", "show this", self.help),
            "/bye": ("", "end, as Ctrl-D does", self.bye),
        }

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo(f"{shortened(self.model)}  (/help shows the commands, Ctrl-D ends)")
        while not self.ended:
            try:
                self.turn()
            except KeyboardInterrupt:
                self.interrupt()
            except EOFError:
                click.echo()
                return

    def turn(self) -> None:
        """What is typed, and what becomes of it. Raises EOFError, and KeyboardInterrupt, once: in here alone Ctrl-C is heard."""
        try:
            signal.signal(signal.SIGINT, on_ctrl_c)
            line = self.read()
            self.interrupted = False
            self.take(line)
        except MlxdError as error:
            click.echo(f"Error: {error}", err=True)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def interrupt(self) -> None:
        """Ctrl-C at the prompt: what stands there is gone. Who has nothing there, or does it again, wants to leave."""
        typed = self.history.typed()
        click.echo()
        if self.interrupted or not typed:
            click.echo("Ctrl-D or /bye ends", err=True)
        self.interrupted = True

    def read(self) -> str:
        '''A line, or several between """, as a message or the text of /system. Raises EOFError, KeyboardInterrupt.'''
        line = self.history.ask(">>> ")
        before, quotes, rest = line.partition('"""')
        if not quotes or before.strip() not in ("", "/system"):
            return line
        lines = [rest]
        while '"""' not in lines[-1]:
            lines.append(self.history.ask("... "))
        text = "\n".join([*lines[:-1], lines[-1].partition('"""')[0]]).strip("\n")
        return f"{before.strip()} {text}"

    def take(self, line: str) -> None:
        """A command or a message. Raises MlxdError."""
        word, _, rest = line.partition(" ")
        if word in self.commands:
            self.commands[word][2](rest.strip())
        elif re.fullmatch(r"/\w*\??", word):
            raise MlxdError(f"there is no {word}: /help shows what there is; for a message that begins so put a blank before it")
        elif line.strip():
            self.say(line.strip())

    def say(self, text: str) -> None:
        """Raises MlxdError, and then this was not said."""
        said = [*self.messages, spoken("user", text)]
        first = [spoken("system", self.system)] if self.system else []
        answer, shown = Answer(self.model), Terminal()
        try:
            try:
                fill(answer, self.where, [*first, *said], shown)
            finally:
                shown.end()
        except KeyboardInterrupt:
            click.echo(dimmed("(stopped)"), err=True)
        except Broken as error:
            raise Broken(f"{error}; the conversation before your message is kept: send it again (arrow up)") from error
        if answer.text:
            self.messages = [*said, spoken("assistant", answer.text)]

    def change_model(self, name: str) -> None:
        server = store.running(self.where)
        if name:
            server.shown(name)
            self.model = name
            click.echo(f"{shortened(name)} answers from now on")
            return
        click.echo(f"{shortened(self.model)} answers")
        rows = [(" ", "name", "size")]
        for model in server.models():
            mark = "*" if shortened(model["name"]).lower() == shortened(self.model).lower() else " "
            rows.append((mark, seen(shortened(model["name"])), bytes_of(model["size"])))
        for line in table(rows):
            click.echo(line)

    def change_system(self, text: str) -> None:
        if text:
            self.system = "" if text == "-" else spoken("system", text)["content"]
        click.echo(f"system  {seen(self.system)}" if self.system else "there is no system text")

    def clear(self, _: str) -> None:
        self.messages = []
        click.echo("forgotten")

    def help(self, _: str) -> None:
        for name, (arguments, what, _call) in self.commands.items():
            click.echo(f"{name + ' ' + arguments:<16}  {what}")
        click.echo('"""               begins and ends a message of several lines')
        click.echo("Ctrl-C            stops an answer; what has come of it is kept")

    def bye(self, _: str) -> None:
        self.ended = True


class History:
    """What was typed at the prompt, in this run and in earlier ones: arrows bring it back, where Python has a line editor."""

    def __init__(self, file: Path):
        self.file = file
        self.trouble = ""
        try:
            import readline
        except ImportError:
            self.editor: Any = None
            return
        self.editor = readline
        readline.set_auto_history(False)
        for line in self.kept():
            readline.add_history(line)

    def kept(self) -> list[str]:
        text = paths.read_end(self.file, MOST_HISTORY_BYTES).decode(errors="replace").replace("\0", "")
        return text.split("\n")[:-1][-MOST_LINES:]

    def ask(self, prompt: str) -> str:
        """Raises EOFError, KeyboardInterrupt."""
        line = input(prompt)
        if line.strip():
            self.keep(line)
        return line

    def keep(self, line: str) -> None:
        """Also for the next run, and at once: this one may be killed. Another one may have written meanwhile."""
        if self.editor is not None:
            self.editor.add_history(line)
        lines = [*self.kept(), *line.split("\n")][-MOST_LINES:]
        try:
            paths.write_atomically(self.file, "".join(f"{one}\n" for one in lines).encode(errors="replace"))
        except OSError as error:
            if not self.trouble:
                self.trouble = f"the history is not kept: {self.file}: {error.strerror}"
                click.echo(self.trouble, err=True)

    def typed(self) -> str:
        """What stands at the prompt; "" where nobody knows."""
        return self.editor.get_line_buffer() if self.editor is not None else ""


def on_ctrl_c(number: int, frame: object) -> None:
    """Somebody may lean on the key, and Python's `input` does not bear a second one before it has told of the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
