"""Engine: the same few methods over Transformers, vLLM and the sparse engine.

python examples/engine.py [CHECKPOINT or FILE.gguf]        the embedded SmolLM2 without one
"""

import sys

from vllm_powerquant import Engine

with Engine.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None) as engine:
    print(engine)
    print(engine.generate("The capital of France is", max_tokens=8, temperature=0))
    for piece in engine.chat_stream([{"role": "user", "content": "Name three colours."}], max_tokens=24, temperature=0):
        print(piece, end="", flush=True)
    print()
    engine.generate_with_metrics("Once upon a time", max_tokens=24, temperature=0).print_report()
