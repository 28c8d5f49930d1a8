"""One long prompt, held packed once, and several questions about it: a copy of the cache for each.

python examples/one_prompt_several_answers.py
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_powerquant.hf import PowerQuantCache  # registers attn_implementation="powerquant"
from vllm_powerquant.model import prepare_model

checkpoint = prepare_model()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16", attn_implementation="powerquant").eval()

story = "Alice has a red ball, Bob has a blue ball and Carol owns a green bicycle. " * 30
prefix = tokenizer(story, return_tensors="pt").input_ids
cache = PowerQuantCache(model)
with torch.inference_mode():
    model(prefix, past_key_values=cache, use_cache=True)
print(cache.memory_report())

for name in ("Alice", "Bob", "Carol"):
    question = tokenizer(f"\nQuestion: what does {name} have? Answer: {name} has a", return_tensors="pt").input_ids
    ids = torch.cat((prefix, question), 1)
    output = model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)
    print(f"{name}: {tokenizer.decode(output[0, ids.shape[1] :])}")
