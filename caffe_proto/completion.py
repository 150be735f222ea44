"""Completion in a shell: of commands, options, choices and file names."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")


class FileName(click.types.StringParamType):
    """Text that names a file, a folder, or the PREFIX of some: a shell completes it as such."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type="file")]


def complete_files(group: click.Group) -> None:
    """Let a shell complete file names wherever the commands of a group take free text.

    Layer names, numbers and the like are free text too: a shell then offers files, which is no harm.
    """
    for command in group.commands.values():
        if isinstance(command, click.Group):
            complete_files(command)
        for param in command.params:
            if type(param.type) is click.types.StringParamType:
                param.type = FileName()


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that lets SHELL (bash, zsh or fish) complete commands, options and file names.

    \b
    bash: eval "$(caffe-lra completion bash)"            in ~/.bashrc
    zsh:  eval "$(caffe-lra completion zsh)"             in ~/.zshrc, behind compinit
    fish: caffe-lra completion fish > ~/.config/fish/completions/caffe-lra.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    root = click.get_current_context().find_root()
    name = root.command_path
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    click.echo(found(root.command, {}, name, variable).source())
