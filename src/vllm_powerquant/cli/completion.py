"""The verb completion: scripts for bash, zsh and fish, generated from the parsers of all verbs.

Each script holds tables by path of verbs ("" for powerquant itself, then "codebook", "codebook show", ...): the words and
flags that may follow, and the values that flags take: words, or file names for any text, or nothing for a number.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")
# in place of a flag's words
_FILES, _NOTHING = "FILES", "NOTHING"
EPILOG = """\
bash:  echo 'eval "$(powerquant completion bash)"' >> ~/.bashrc
zsh:   echo 'eval "$(powerquant completion zsh)"' >> ~/.zshrc   (after compinit)
fish:  powerquant completion fish > ~/.config/fish/completions/powerquant.fish
"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "completion",
        help="print a script that completes verbs and flags in a shell",
        description="To be read by the shell as it starts:",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("shell", choices=SHELLS)
    verb.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    from . import build_parser

    print(script(args.shell, build_parser()))
    return 0


@dataclass
class Flag:
    """An option of a verb, all its spellings."""

    names: list[str]
    help: str
    takes_value: bool
    choices: list[str]
    takes_files: bool  # or any other text

    @property
    def values(self) -> str:
        """What is offered, for the scripts of bash and zsh."""
        return " ".join(self.choices) or (_FILES if self.takes_files else _NOTHING)


@dataclass
class Command:
    """powerquant itself or a verb: what may follow it."""

    path: str  # "codebook show"
    help: str
    verbs: list[Command] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # that its positions take

    def walk(self) -> Iterator[Command]:
        yield self
        for verb in self.verbs:
            yield from verb.walk()

    @property
    def name(self) -> str:
        return self.path.rpartition(" ")[2]


def read_command(parser: argparse.ArgumentParser, path: str = "", help: str = "") -> Command:
    """What a parser takes, its verbs' parsers included."""
    command = Command(path, help)
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or ()]
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, verb in action.choices.items():
                command.verbs.append(read_command(verb, f"{path} {name}".strip(), helps.get(name, "")))
        elif action.option_strings:
            takes_value, takes_files = action.nargs != 0, action.type not in (int, float)
            text = "" if action.help in (None, argparse.SUPPRESS) else action.help
            command.flags.append(Flag(list(action.option_strings), text, takes_value, choices, takes_files))
        else:
            command.words += choices
    return command


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script for one of SHELLS."""
    root = read_command(parser)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser.prog, root)


def _bash(prog: str, root: Command) -> str:
    verbs, flags, values = _cases(root)
    return f"""\
# completes {prog} in bash: eval "$({prog} completion bash)"
_{prog}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} path= verbs= flags= values= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path/${{COMP_WORDS[i]}}" in
{_indent(_path_cases(root), 12)}
        esac
    done
    case "$path" in
{_indent(verbs, 8)}
    esac
    case "$path" in
{_indent(flags, 8)}
    esac
    case "$path/$before" in
{_indent(values, 8)}
    esac
    if [[ $values == {_FILES} ]]; then
        compopt -o default 2>/dev/null
    elif [[ $values == {_NOTHING} ]]; then
        COMPREPLY=()
    elif [[ -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    else
        COMPREPLY=($(compgen -W "$verbs" -- "$word"))
        [[ -n $verbs ]] || compopt -o default 2>/dev/null
    fi
}}
complete -F _{prog} {prog}"""


def _zsh(prog: str, root: Command) -> str:
    paths, described = _indent(_path_cases(root), 12), []
    for command in root.walk():
        words = [f"{verb.name}:{_first_line(verb.help)}" for verb in command.verbs] + command.words
        flags = [f"{name}:{_first_line(flag.help)}" for flag in command.flags for name in flag.names]
        described.append(
            f"{_quoted_path(command)}) verbs=({' '.join(map(shlex.quote, words))}); "
            f"flags=({' '.join(map(shlex.quote, flags))});;"
        )
    return f"""\
# completes {prog} in zsh: eval "$({prog} completion zsh)"
_{prog}() {{
    local word=$words[CURRENT] before=$words[CURRENT-1] path_= values= i
    local -a verbs flags
    for ((i = 2; i < CURRENT; i++)); do
        case "$path_/$words[i]" in
{paths.replace("path=", "path_=")}
        esac
    done
    case "$path_" in
{_indent(described, 8)}
    esac
    case "$path_/$before" in
{_indent(_cases(root)[2], 8)}
    esac
    if [[ $values == {_FILES} ]]; then
        _files
    elif [[ $values == {_NOTHING} ]]; then
        _message value
    elif [[ -n $values ]]; then
        compadd -- ${{=values}}
    elif [[ $word == -* ]]; then
        _describe -o flag flags
    elif (( $#verbs )); then
        _describe verb verbs
    else
        _files
    fi
}}
compdef _{prog} {prog}"""


def _fish(prog: str, root: Command) -> str:
    lines = [
        f"# completes {prog} in fish: {prog} completion fish > ~/.config/fish/completions/{prog}.fish",
        f"function __{prog}_path",
        "    set -l path ''",
        "    for word in (commandline -opc)[2..]",
        '        switch "$path/$word"',
    ]
    for command in root.walk():
        for verb in command.verbs:
            lines.append(f"            case {_fish_quote(f'{command.path}/{verb.name}')}")
            lines.append(f"                set path {_fish_quote(verb.path)}")
    lines += ["        end", "    end", "    echo $path", "end", f"complete -c {prog} -f"]
    for command in root.walk():
        at = f"complete -c {prog} -n {_fish_quote(f'test (__{prog}_path) = {_fish_quote(command.path)}')}"
        for verb in command.verbs:
            lines.append(f"{at} -a {verb.name} -d {_fish_quote(_first_line(verb.help))}")
        if command.words:
            lines.append(f"{at} -a {_fish_quote(' '.join(command.words))}")
        elif not command.verbs:
            lines.append(f"{at} -F")
        for flag in command.flags:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in flag.names)
            takes = ""
            if flag.takes_value:
                takes = (
                    f" -x -a {_fish_quote(' '.join(flag.choices))}"
                    if flag.choices
                    else " -r -F"
                    if flag.takes_files
                    else " -x"
                )
            lines.append(f"{at} {names}{takes} -d {_fish_quote(_first_line(flag.help))}")
    return "\n".join(lines)


def _path_cases(root: Command) -> list[str]:
    """Shell cases on "path/word" that set the path of the verb that the word is."""
    return [
        f"{shlex.quote(f'{command.path}/{verb.name}')}) path={shlex.quote(verb.path)};;"
        for command in root.walk()
        for verb in command.verbs
    ]


def _cases(root: Command) -> tuple[list[str], list[str], list[str]]:
    """Shell cases: on a path, its verbs and its flags; on "path/flag", what the flag takes."""
    verbs, flags, values = [], [], []
    for command in root.walk():
        words = [verb.name for verb in command.verbs] + command.words
        verbs.append(f"{_quoted_path(command)}) verbs={shlex.quote(' '.join(words))};;")
        names = [name for flag in command.flags for name in flag.names]
        flags.append(f"{_quoted_path(command)}) flags={shlex.quote(' '.join(names))};;")
        for flag in command.flags:
            if flag.takes_value:
                pattern = "|".join(shlex.quote(f"{command.path}/{name}") for name in flag.names)
                values.append(f"{pattern}) values={shlex.quote(flag.values)};;")
    return verbs, flags, values


def _quoted_path(command: Command) -> str:
    return shlex.quote(command.path)


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _first_line(text: str) -> str:
    """A help text on one line, its %-signs as printed; without colons, which part name from text in zsh."""
    return " ".join(text.replace("%%", "%").split()).replace(":", " -")


def _indent(lines: list[str], columns: int) -> str:
    return "\n".join(" " * columns + line for line in lines)
