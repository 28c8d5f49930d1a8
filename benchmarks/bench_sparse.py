"""The sparse engine's speed beside dense llama.cpp on random weights, in turns in one run, ratios pair by pair.

    python benchmarks/make_sparse_model.py --shape m1 --type f16 q4_0 -o FOLDER
    python benchmarks/bench_sparse.py --models FOLDER --shapes m1 --threads 1 2 [--llama PYTHON] [--out CSV]

Works: decode (one sequence), concurrent (8 sequences against one of the same engine), prompt (512 tokens), busy (decode with
one foreign process spinning on each core, against itself idle and against llama.cpp under the same load). One thread counts
CPU time, more threads count wall time. --llama names the Python that has llama-cpp-python; --llama-prompt another one for
prompts, where the first build cannot run them.

The bound of sparse decoding is the time to read every matrix once at the read bandwidth and the active neurons' bundles at
the bandwidth of gathering rows of their size, both measured in each round by powerinfer-bench. The models' gates read an
eighth of their input (that makes the predictor exact); the engine reads the zeros like any weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from csv_rows import append_rows, git_commit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WORKS = ("decode", "concurrent", "prompt", "busy")
CONCURRENT = 8
PROMPT = 512


@dataclass(frozen=True)
class Row:
    """Median, least and greatest of one rate or ratio over the rounds."""

    shape: str
    type: str
    work: str
    what: str  # a provider's tokens/s, or a ratio
    threads: int
    clock: str  # cpu: per CPU second; wall: per second
    median: float
    low: float
    high: float
    rounds: int
    load: float  # of the machine, running processes, when the round began; median
    cpu: str
    llama_cpp: str
    commit: str
    date: str


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.version = ""

    def ours(self, path: Path, threads: int, *options: str) -> dict:
        return run([str(self.args.engine), "--model", str(path), "--threads", str(threads), "--context", "1024", *options])

    def llama(self, python: str, path: Path, threads: int, *options: str) -> dict:
        script = str(ROOT / "benchmarks" / "llama_cpp_speed.py")
        report = run([python, script, "--model", str(path), "--threads", str(threads), *options])
        self.version = report["version"]
        return report

    def memory(self, threads: int, row_bytes: int) -> dict:
        return run([str(self.args.engine), "--threads", str(threads), "--row-bytes", str(row_bytes)])["memory"]

    def round(self, work: str, folder: Path, dtype: str, threads: int) -> dict[str, float]:
        """What one round measured: rates by provider, and the sparse decode's bound."""
        sparse, dense = folder / f"sparse-{dtype}.gguf", folder / f"dense-{dtype}.gguf"
        clock = clock_of(threads)
        decode = ("--decode", str(self.args.decode), "--repeat", "3")
        if work == "prompt":
            options = ("--decode", "0", "--prompt", str(PROMPT), "--repeat", "2")
            return {
                "llama.cpp": rate(
                    self.llama(self.args.llama_prompt or self.args.llama, dense, threads, *options), "prompt", clock
                ),
                "sparse": rate(self.ours(sparse, threads, *options), "prompt", clock),
                "dense": rate(self.ours(dense, threads, *options), "prompt", clock),
            }
        if work == "concurrent":
            return {
                "sparse, 1": rate(self.ours(sparse, threads, *decode), "decode", clock),
                f"sparse, {CONCURRENT}": rate(
                    self.ours(sparse, threads, *decode, "--concurrent", str(CONCURRENT)), "decode", clock
                ),
            }
        if work == "busy":
            # a foreign process takes CPU, so wall time is what counts
            idle = rate(self.ours(sparse, threads, *decode), "decode", "per_second")
            with busy_cores():
                llama = rate(self.llama(self.args.llama, dense, threads, *decode), "decode", "per_second")
                ours = rate(self.ours(sparse, threads, *decode), "decode", "per_second")
            return {"llama.cpp": llama, "sparse": ours, "sparse, idle": idle}
        llama = self.llama(self.args.llama, dense, threads, *decode)
        report = self.ours(sparse, threads, *decode)
        ours_dense = self.ours(dense, threads, *decode)
        model = report["model"]
        memory = self.memory(threads, model["neuron_bytes"])
        seconds = model["matrix_bytes"] / memory[f"read_{clock}"] + (
            report["active_share"] * model["ffn_bytes"] / memory[f"gather_{clock}"]
        )
        return {
            "llama.cpp": rate(llama, "decode", clock),
            "sparse": rate(report, "decode", clock),
            "dense": rate(ours_dense, "decode", clock),
            "bound": 1 / seconds,
            "active share": report["active_share"],
            "peak memory over file, MB": (report["peak_rss_bytes"] - sparse.stat().st_size) / 1e6,
        }


RATIOS = {
    "decode": (("sparse", "llama.cpp"), ("dense", "llama.cpp"), ("sparse", "bound"), ("sparse", "dense")),
    "prompt": (("sparse", "llama.cpp"), ("dense", "llama.cpp")),
    "concurrent": ((f"sparse, {CONCURRENT}", "sparse, 1"),),
    "busy": (("sparse", "llama.cpp"), ("sparse", "sparse, idle")),
}


def clock_of(threads: int) -> str:
    return "per_cpu_second" if threads == 1 else "per_second"


def run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def rate(report: dict, phase: str, clock: str) -> float:
    """The best repetition: what disturbs a run only slows it."""
    return max(entry[clock] for entry in report[phase])


@contextlib.contextmanager
def busy_cores():
    """One process that spins on each core this process may use."""
    spinners = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
            spinners.append(subprocess.Popen([sys.executable, "-c", code]))
        time.sleep(0.5)
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder that make_sparse_model.py wrote to")
    parser.add_argument("--engine", type=Path, default=ROOT / "build" / "powerinfer" / "powerinfer-bench")
    parser.add_argument("--llama", default=sys.executable, help="Python that has llama-cpp-python")
    parser.add_argument("--llama-prompt", help="the same for prompts (default: --llama)")
    parser.add_argument("--shapes", nargs="+", default=["m1", "m2"])
    parser.add_argument("--types", nargs="+", default=["f16", "q4_0"])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=32, help="tokens of one repetition")
    parser.add_argument("--out", type=Path, help="CSV that rows are appended to (default: none)")
    parser.add_argument("--commit", default=os.environ.get("BENCH_COMMIT"), help="for the rows (default: what git says)")
    args = parser.parse_args()
    bench = Bench(args)
    for shape in args.shapes:
        for dtype in args.types:
            for threads in args.threads:
                for work in args.works:
                    if work == "busy" and threads == 1:
                        continue
                    measure(bench, work, shape, dtype, threads)


def measure(bench: Bench, work: str, shape: str, dtype: str, threads: int) -> None:
    args = bench.args
    values: dict[str, list[float]] = {}
    loads = []
    for _ in range(args.rounds):
        loads.append(os.getloadavg()[0])
        result = bench.round(work, args.models / shape, dtype, threads)
        for name, value in result.items():
            values.setdefault(name, []).append(value)
        for above, below in RATIOS[work]:
            values.setdefault(f"{above} / {below}", []).append(result[above] / result[below])
    clock = "wall" if work == "busy" or threads > 1 else "cpu"
    rows = [
        Row(
            shape, dtype, work, what, threads, clock, statistics.median(v), min(v), max(v), args.rounds,
            statistics.median(loads), cpu_name(), bench.version, args.commit or git_commit(), time.strftime("%Y-%m-%d"),
        )
        for what, v in values.items()
    ]  # fmt: skip
    append_rows(args.out, rows)
    print(f"{shape} {dtype} {work}, {threads} threads, {clock} time, load {rows[0].load:.1f}")
    for row in rows:
        print(f"  {row.what:32} {row.median:9.3f} ({row.low:.3f} to {row.high:.3f})", flush=True)


if __name__ == "__main__":
    main()
