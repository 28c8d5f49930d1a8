import pytest

pytest.importorskip("transformers")

from hf.tiny_models import ARCHITECTURES, tiny_model  # noqa: E402


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    """A tiny model, with the attention it came with when the test is over."""
    model = tiny_model(request.param)
    yield model
    model.set_attn_implementation("sdpa")


@pytest.fixture(params=["fused", "dequantized"])
def path(request, model) -> str:
    """Which of its two ways the cache is read."""
    import vllm_powerquant.hf  # noqa: F401  registers the attention

    model.set_attn_implementation("powerquant" if request.param == "fused" else "sdpa")
    return request.param
