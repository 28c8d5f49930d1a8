"""README.md and docs/: their code prints what stands there, their tables are those of the rows and of the code, the verbs,
flags and tests that they name exist."""

import csv
import os
import re
import subprocess
import sys

import pytest

from pages import ROOT, blocks, check_python
from vllm_powerquant.cli import EXIT_CODES, build_parser, main
from vllm_powerquant.cli.completion import read_command

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
# codec.md and transformers.md run in tests of their own; serving.md as a program, since vLLM's processes import it
RUN = {"README.md", "docs/codec.md", "docs/transformers.md", "docs/serving.md"}


def test_every_page_with_python_is_run():
    assert {page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))} == RUN


def test_readme_prints_what_it_says(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check_python("README.md") == 2


@pytest.mark.vllm
@pytest.mark.slow
def test_serving_prints_what_it_says(tmp_path):
    pytest.importorskip("vllm")
    ((_, program), (kind, want)) = [block for block in blocks("docs/serving.md") if block[0] in ("python", "text")]
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # vLLM's processes write on stdout as well
    assert kind == "text" and want in done.stdout, done.stdout[-2000:]


def test_files_are_there():
    for page, text in PAGES.items():
        for target in re.findall(r"(?:benchmarks|docs|examples|src|tests|third_party)/[\w/.-]+\.(?:csv|py|md|svg)", text):
            assert (ROOT / target).is_file(), f"{page}: {target}"


def test_readme_names_every_page():
    assert {page for page in PAGES if page.startswith("docs/")} <= set(re.findall(r"\]\((docs/[\w-]+\.md)", README))


def test_layout_is_that_of_the_sources():
    tree = re.search(r"^## Layout\n\n```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
    source = ROOT / "src" / "vllm_powerquant"
    named = set()
    for line in tree.splitlines():
        names = [name for name in line[:48].split() if re.fullmatch(r"[\w/]+(\.py|/)", name)]
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names:
            assert ([ROOT, source, source / "attention"][depth] / name).exists(), name
        if depth == 1:
            named |= {name.rstrip("/") for name in names}
    there = {path.name for path in source.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert there - {"__init__.py", "__pycache__"} == named


def test_ci_runs_the_readmes_test_command():
    assert "\npython quickstart.py --test" in README
    assert "quickstart.py --test\n" in (ROOT / ".ci" / "run").read_text()


def test_verbs_and_exit_codes_are_those_of_the_help(capsys):
    (verbs,) = [action for action in build_parser()._actions if action.dest == "verb"]
    rows = "\n".join(f"| `{verb.dest}` | {verb.help} |" for verb in verbs._choices_actions)
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    assert f"|---|---|\n{rows}\n\n" in README and f"|---|---|\n{codes}\n\n" in README
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{code} {meaning}" in told for code, meaning in EXIT_CODES.items())


def test_verbs_have_the_flags_that_pages_give():
    verbs = {verb.name: verb for verb in read_command(build_parser()).verbs}
    seen = 0
    for page, text in PAGES.items():
        text = text.replace("\\\n", " ")
        commands = re.findall(r"^(?:    |\$ )?(?:\w+=\S+ )*powerquant ([a-z-]+)(.*)$", text, re.MULTILINE)
        commands += re.findall(r"`powerquant ([a-z-]+)([^`]*)`", text)
        for verb, words in commands:
            assert verb in verbs, f"{page}: powerquant {verb}"
            known = {name for command in verbs[verb].walk() for flag in command.flags for name in flag.names}
            # serve passes flags on to the server
            for flag in re.findall(r"(?<=\s)-[-a-z][\w-]*", re.sub(r"\s# .*", "", words)) if verb != "serve" else ():
                assert flag in known, f"{page}: powerquant {verb} {flag}"
                seen += 1
    assert seen > 30


def test_benchmarks_have_the_flags_that_pages_give():
    # these two add flags to several scripts
    shared = "".join((ROOT / "benchmarks" / name).read_text() for name in ("harness.py", "engine.py"))
    seen = 0
    for page, text in PAGES.items():
        for script, words in re.findall(r"python benchmarks/(\w+\.py)([^`\n]*(?:\\\n[^`\n]*)*)", text):
            source = (ROOT / "benchmarks" / script).read_text() + shared
            for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", words):
                assert f'"{flag}"' in source, f"{page}: {script} {flag}"
                seen += 1
    assert seen > 30


def test_serving_names_tests_that_exist():
    """Each test of the table is a function of its file, and each id stands in that file."""
    table = PAGES["docs/serving.md"].split("## Supported and refused")[1].split("\n## ")[0]
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    seen = 0
    for row in [line for line in table.splitlines() if line.startswith("| ")]:
        file = function = None
        for name in re.findall(r"`([^`]*)`", row.split(" | ")[-1]):
            parts = re.fullmatch(r"(test_\w+\.py)?(?:::)?(test_\w+)?(?:\[([\w-]+)\])?", name)
            if parts is None or not any(parts.groups()):
                continue
            path, test, case = parts.groups()
            file, function = path or file, test or (None if path else function)
            assert file in sources, name
            assert function is None or f"def {function}(" in sources[file], name
            assert case is None or re.search(rf"""["']{case}["']""", sources[file]), name
            seen += 1
    assert seen > 60


def test_transformers_figures_are_those_of_the_rows():
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results" / "cache").glob("*.csv")):
        with open(path) as file:
            rows += csv.DictReader(file)
    page = PAGES["docs/transformers.md"].split("\n## Measured")[1]

    def row(bench: str, cache: str, tokens: int, model: str = "smollm2", batch: int = 1) -> dict[str, str]:
        (found,) = [
            row
            for row in rows
            if (row["bench"], row["cache"].removesuffix(", K4/V2"), int(row["tokens"]), row["model"], int(row["batch"]))
            == (bench, cache, tokens, model, batch)
        ]
        return found

    def ratio(row: dict[str, str], digits: int) -> str:
        middle, low, high = (f"{float(row[name]):.{digits}f}" for name in ("ratio", "ratio_low", "ratio_high"))
        return f"{middle} times ({low} to {high})"

    for tokens, model, digits in ((2048, "smollm2", 2), (1024, "qwen3-8b, 8 layers", 1), (32768, "qwen3-8b, 8 layers", 1)):
        exact, fused = (row("speed", cache, tokens, model) for cache in ("DynamicCache", "fused"))
        speeds = " | ".join(f"{float(found['value']):.1f} tokens/s" for found in (exact, fused))
        assert f"| {speeds} | {ratio(fused, digits)} |" in page
    for batch, unit, digits in ((1, "tokens/s", (0, 0)), (16, "steps/s", (0, 1))):
        pairs = [
            [row("speed, no cuDNN", cache, tokens, "qwen3-8b, 8 layers", batch) for tokens in (1024, 32768)]
            for cache in ("DynamicCache", "fused")
        ]
        speeds = [
            "; ".join(f"{float(found['value']):.{n}f}" for found, n in zip(pair, digits, strict=True)) for pair in pairs
        ]
        short, long = (ratio(found, 2) for found in pairs[1])
        assert f"| {speeds[0]} {unit} | {speeds[1]} {unit} | {short.replace(' times', '')}; {long} |" in page
    held = row("memory", "fused", 8192)
    assert f"| {int(float(held['value'])) / 2**20:.1f} MiB | {float(held['ratio']):.2f} times less |" in page
    assert f"gave {ratio(row('speed', 'dequantized', 2048), 2)}" in page
    fed = {"one token at a time": "one at a time", "in chunks of 16": "chunks of 16", "in chunks of 50": "chunks of 50",
           "one at a time, in a left-padded batch of six": "left-padded batch, one at a time"}  # fmt: skip
    for name, cell in fed.items():
        fused, dequantized = (float(row("KL", f"{path}, {cell}", 1024)["value"]) for path in ("fused", "dequantized"))
        assert f"| {name} | {fused:.4f} | {dequantized:.4f} |" in page
    seeds = sorted(float(row("KL", f"reference, rotation {seed}, chunks of 16", 1024)["value"]) for seed in range(4))
    assert f"| {', '.join(f'{kl:.4f}' for kl in seeds)} |" in page
