"""Engine on vLLM with the embedded model: one real engine, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import json
import os
import signal
from pathlib import Path
from vllm_powerquant import Engine
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantEngineError

def main():
    greedy = {"temperature": 0, "max_tokens": 12}
    found = {}
    with Engine.from_pretrained(
        backend="vllm", key_bits=4, kv_cache_memory_bytes=128 << 20, enforce_eager=True, max_model_len=512, max_num_seqs=8
    ) as engine:
        prompts = ["The capital of France is", "The sky is"]
        results = engine.generate_with_metrics(prompts, **greedy)
        found["batch"] = [result.to_dict() for result in results]
        found["alone"] = [engine.generate(prompt, **greedy) for prompt in prompts]
        left = engine.generate_stream("Hello", max_tokens=400, ignore_eos=True)
        next(left)
        stream = engine.generate_stream(prompts[0], **greedy)
        found["pieces"] = [next(stream)]
        # two answers under way at once, one of which is given up
        next(left)
        left.close()
        found["unfinished"] = engine._backend._engine.get_num_unfinished_requests()
        found["pieces"] += list(stream)
        found["streamed"] = stream.result.text
        found["chat"] = engine.chat([{"role": "user", "content": "What is the capital of France?"}], **greedy)
        found["seeds"] = [engine.generate("Hello", seed=seed, temperature=1.0, max_tokens=8) for seed in (1, 1, 2)]
        found["stop"] = engine.generate_with_metrics(prompts[0], stop=["ris"], **greedy).to_dict()
        found["refused"] = []
        for prompt in ("", [5] * 600):
            try:
                engine.generate(prompt, **greedy)
            except PowerQuantConfigError as error:
                found["refused"].append(str(error))
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        (core,) = [pid for pid, name in names.items() if "EngineCor" in name]
        stream = engine.generate_stream("Hello", max_tokens=400, ignore_eos=True)
        next(stream)
        os.kill(core, signal.SIGKILL)
        try:
            list(stream)
        except PowerQuantEngineError as error:
            found["died"] = str(error)
    print("FOUND " + json.dumps(found))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    program = tmp_path_factory.mktemp("engine") / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


def test_answers(found):
    texts = [result["text"] for result in found["batch"]]
    # two prompts computed together round otherwise than one alone, and the second answer has close ties in bf16
    assert texts[0] == found["alone"][0] and texts[0].startswith(" Paris")
    assert all(text.startswith(" a canvas of ") for text in (texts[1], found["alone"][1]))
    assert len(found["pieces"]) > 3 and "".join(found["pieces"]) == found["streamed"] == texts[0]
    assert "Paris" in found["chat"]
    assert found["seeds"][0] == found["seeds"][1] != found["seeds"][2]
    assert (found["stop"]["text"], found["stop"]["finish_reason"]) == (" Pa", "stop")


def test_figures_are_what_vllm_tells(found):
    first = found["batch"][0]
    assert (first["backend"], first["prompt_tokens"], first["completion_tokens"]) == ("vllm", 5, 12)
    assert (first["finish_reason"], first["attention"]) == ("length", "fused")
    assert 0 < first["seconds_to_first_token"] < first["seconds"]
    assert first["kv_bytes"] is first["compression_ratio"] is first["gpu_memory_peak"] is None


def test_an_answer_that_is_left_is_ended(found):
    assert found["unfinished"] == 1  # the other one


def test_refusals(found):
    empty, long = found["refused"]
    assert empty.startswith("the prompt is empty") and long.startswith("vLLM refuses the request:")


def test_an_engine_that_dies_is_one_clear_error(found):
    assert found["died"].startswith("vLLM's engine died, its log says why; make another Engine")


def test_bad_option_is_refused_before_vllm_starts():
    from vllm_powerquant import Engine
    from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

    with pytest.raises(PowerQuantConfigError, match=r"unknown option of backend vllm: max_model_length \(did you mean"):
        Engine.from_pretrained(backend="vllm", max_model_length=5)
    with pytest.raises(PowerQuantUnsupportedError, match="not to 8; use backend='transformers'"):
        Engine.from_pretrained(backend="vllm", load_in_8bit=True)
