"""From a SiLU model to a sparse one that the C++ engine serves: ReLU, predictors, a file, answers.

python examples/sparse_model.py [FOLDER]        keeps what it makes there; without one it is removed in the end

The predictors are trained on 4,096 tokens for three epochs, so that this takes half a minute on two cores, and the answer
shows it: docs/sparse.md says what a model worth using takes. (Needs the extras [sparse,hf,model] and, to compile the engine
the first time, what docs/sparse-engine.md names.)
"""

import sys
import tempfile
from pathlib import Path

from vllm_powerquant import SparseEngine
from vllm_powerquant.sparse.convert import convert
from vllm_powerquant.sparse.lowrank import Training
from vllm_powerquant.sparse.predictor import train_predictors
from vllm_powerquant.sparse.relufy import relufy

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
    # the embedded SmolLM2, with the changes that come with the package
    relufy(None, folder / "student", eval_windows=0, progress=False)
    trained = train_predictors(
        folder / "student",
        folder / "predictors",
        tokens=4096,
        window=256,
        rank=96,
        recall=0.995,
        training=Training(epochs=3),
        progress=False,
    )
    share = trained.total
    active, predicted = share["active_share"], share["predicted_share"]
    print(f"neurons: active {active:.0%}, predicted {predicted:.0%}, recall {share['recall']:.1%}")
    convert(folder / "student", folder / "model.gguf", predictor=folder / "predictors", progress=False)

    question = [{"role": "user", "content": "What is the capital of France?"}]
    with SparseEngine(folder / "model.gguf") as engine:
        (answer,) = engine.chat([question], {"max_tokens": 24, "temperature": 0})
        print(answer.outputs[0].text)
