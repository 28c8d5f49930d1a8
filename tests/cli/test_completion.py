"""Completion scripts, read and asked by the shells themselves."""

import shlex
import shutil
import subprocess

import pytest

from vllm_powerquant.cli import build_parser, main
from vllm_powerquant.cli.completion import SHELLS, read_command, script

# words typed so far, the last one being completed -> what is offered (a flag's value: the words alone)
VERBS = [verb.name for verb in read_command(build_parser()).verbs]
CASES = {
    "a verb": (["cod"], ["codebook"]),
    "all verbs": ([""], VERBS),
    "a verb of a verb": (["codebook", "co"], ["compare"]),
    "a flag": (["codebook", "show", "--ki"], ["--kind"]),
    "a flag after others": (["codebook", "show", "--bits", "2", "--json", "--he"], ["--head-size", "--help"]),
    "a flag's value": (["codebook", "show", "--kind", ""], ["lloyd_max", "trellis", "uniform"]),
    "a flag of another verb": (["info", "--ki"], []),
    "a flag with a verb's name as value": (["convert", "info", "--thr"], ["--threshold"]),
    "a number": (["codebook", "show", "--head-size", ""], []),
    "a word": (["completion", "f"], ["fish"]),
    "a file": (["convert", "here"], ["here.txt"]),
    "a flag's file": (["convert", "-o", "her"], ["here.txt"]),
}


@pytest.fixture
def folder(tmp_path, capsys):
    """A folder with here.txt and the three scripts, as the verb prints them."""
    (tmp_path / "here.txt").touch()
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        (tmp_path / f"powerquant.{shell}").write_text(capsys.readouterr().out)
    return tmp_path


def asked(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_bash(case, folder):
    typed, want = CASES[case]
    words = ["powerquant", *typed]
    code = (
        "source powerquant.bash; complete -p powerquant >/dev/null || exit 3; "
        # what `-o default` of compopt does can be asked of a completion in progress alone
        'compopt() { mapfile -t COMPREPLY < <(compgen -f -- "$word"); }; '
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(typed)}; _powerquant; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    assert sorted(asked(folder, "bash", "--norc", "-c", code).split()) == sorted(want)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("case", CASES)
def test_fish(case, folder):
    typed, want = CASES[case]
    code = f"source powerquant.fish; complete -C {shlex.quote('powerquant ' + ' '.join(typed))}"
    lines = asked(folder, "fish", "--no-config", "-c", code).splitlines()
    assert sorted(line.partition("\t")[0] for line in lines) == sorted(want)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("case", ["a verb", "a verb of a verb", "a flag", "a word", "a file", "a flag's file"])
def test_zsh(case, folder):
    # typed on a terminal of its own, as a user would; what is completed alone stands on the line afterwards
    typed, (want,) = CASES[case]
    line = "powerquant " + " ".join(typed)
    code = f"""
        zmodload zsh/zpty; zpty z zsh -f -i; out=
        expect() {{ while [[ $out != *$1* ]]; do zpty -r z part || exit 1; out+=$part; done }}
        zpty -w z 'PROMPT=; unsetopt zle; autoload -U compinit; compinit -u -d dump; source ./powerquant.zsh; setopt zle'
        zpty -w z 'echo read''y'; expect ready
        zpty -w -n z {shlex.quote(line)}$'\\t\\001: \\005\\n'; zpty -w z 'fc -ln -1 >line; echo do''ne'; expect done
        cat line
    """
    got = ""
    for _ in range(5):  # a shell that is slow to take its terminal over loses what was typed before
        got = got.strip() or asked(folder, "zsh", "-f", "-c", code)
    assert got.strip() == f": powerquant {' '.join([*typed[:-1], want])}"


def test_every_flag_of_every_verb_is_in_every_script():
    parser = build_parser()
    commands = list(read_command(parser).walk())
    assert len(commands) > 10 and any(command.path == "codebook show" for command in commands)
    for shell in SHELLS:
        text = script(shell, parser)
        for command in commands:
            for flag in command.flags:
                name = flag.names[-1]
                assert (f"-l {name[2:]}" if shell == "fish" else name) in text


def test_help_says_how_to_install(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert 'eval "$(powerquant completion bash)"' in text and "powerquant completion fish >" in text
