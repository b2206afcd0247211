"""diffratio completion bash|zsh|fish: print a completion script for the console script ``diffratio``.

The script is made of the parsers and holds all words itself: completing a word starts no Python.
"""

from __future__ import annotations

import argparse
import importlib
import shlex

from diffratio_fast import command
from diffratio_fast.config.presets import DESCRIPTIONS

SHELLS = ("bash", "zsh", "fish")
EPILOG = """  bash   echo 'source <(diffratio completion bash)' >> ~/.bashrc
  zsh    echo 'source <(diffratio completion zsh)' >> ~/.zshrc
  fish   diffratio completion fish > ~/.config/fish/completions/diffratio.fish"""


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.completion",
        description="Print a completion script for the command diffratio.",
        epilog=f"to install it:\n{EPILOG}",
    )
    result.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return result


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    modules = {
        name: importlib.import_module(f"diffratio_fast.{name}{'.__main__' if name == 'report' else ''}")
        for name in command.COMMANDS
    }
    return {name: module.parser() for name, module in modules.items()}


def first_words(name: str, options: argparse.ArgumentParser) -> list[str]:
    """What the first argument of a command can be, beside files: presets, or choices."""
    if name in ("train", "pretrain"):
        return list(DESCRIPTIONS)
    return [
        str(choice) for a in options._actions if not a.option_strings and a.choices for choice in a.choices
    ]


def long_options(options: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in options._actions if any(s.startswith("--") for s in action.option_strings)]


def bash() -> str:
    """A completion function of bash, which zsh's bashcompinit runs too."""
    cases, values = [], []
    found = parsers()
    for name, options in found.items():
        flags = [s for a in long_options(options) for s in a.option_strings if s.startswith("--")]
        words = shlex.quote(" ".join([*first_words(name, options), *flags]))
        cases.append(f"        {name}) words={words} ;;")
        values += [
            f"        {name}:{flag}) words={shlex.quote(' '.join(map(str, action.choices)))} ;;"
            for action in long_options(options)
            if action.choices
            for flag in action.option_strings
        ]
    return "\n".join(
        [
            "_diffratio() {",
            '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
            '    local name="${COMP_WORDS[1]}"',
            "    COMPREPLY=()",
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f"        words={shlex.quote(' '.join(found))}",
            '    else case "$name" in',
            *cases,
            "    esac; fi",
            '    case "$name:$before" in',
            *values,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
            '    if [ "${#COMPREPLY[@]}" -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi',
            "}",
            "complete -o filenames -F _diffratio diffratio",
            "",
        ]
    )


def fish() -> str:
    """Completions of fish, with a line of help each."""
    lines = [
        f"complete -c diffratio -n __fish_use_subcommand -a {name} -d {shlex.quote(text)}"
        for name, text in command.COMMANDS.items()
    ]
    for name, options in parsers().items():
        on = f"complete -c diffratio -n '__fish_seen_subcommand_from {name}'"
        if words := first_words(name, options):
            lines.append(f"{on} -a {shlex.quote(' '.join(words))}")
        for action in long_options(options):
            text = (action.help or "").partition(" [")[0].replace("%%", "%")
            values = f" -xa {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            lines += [
                f"{on} -l {flag[2:]}{values} -d {shlex.quote(text)}"
                for flag in action.option_strings
                if flag.startswith("--")
            ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    shell = parser().parse_args(argv).shell
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(fish() if shell == "fish" else bash(), end="")
    return 0


if __name__ == "__main__":
    command.run(main)
