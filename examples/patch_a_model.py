"""A Transformers model that holds its KV cache packed, in one line.

python examples/patch_a_model.py [CHECKPOINT]        the embedded SmolLM2 without one
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_powerquant import check_model, patch
from vllm_powerquant.model import prepare_model

checkpoint = sys.argv[1] if len(sys.argv) > 1 else prepare_model()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16").eval()
print(str(check_model(model)).splitlines()[0])

patch(model)
question = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(output.past_key_values.memory_report())
