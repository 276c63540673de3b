"""What a shell completes: the script for it, and the names of models."""

from __future__ import annotations

import click

from mlxd.errors import MlxdError

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and models.

    In bash: eval "$(mlxd completion bash)". In zsh, after compinit: eval "$(mlxd completion zsh)". In fish: mlxd completion fish | source
    """
    from click.shell_completion import get_completion_class

    from mlxd.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "mlxd", "_MLXD_COMPLETE").source())


def model_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Those that begin so; none, and not a word, when they cannot be had at once: somebody is typing."""
    from mlxd import paths
    from mlxd.cli import store

    try:
        return [name for name in store.names(paths.locate()) if name.lower().startswith(incomplete.lower())]
    except (MlxdError, OSError, LookupError, TypeError):
        return []
