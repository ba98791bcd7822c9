"""Whether a loaded model's norms see the mean of the stream: of weights that can be centred and of others."""

import pytest
import torch

from raymi.errors import UserError
from raymi.experiments.autoencoders.places import confirm_places, sees_mean
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.model.hooked import HookedModel
from tests.families import build

LAYER_NORMS = ("gpt2", "gpt_neox", "gptj", "bloom", "falcon", "phi", "stablelm", "cohere", "starcoder2", "mpt")
RMS_NORMS = ("llama", "gemma2", "gemma3_text", "qwen3", "granite", "phi3", "mixtral", "lfm2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*LAYER_NORMS, *RMS_NORMS])
def test_layer_norms_do_not_see_the_mean_and_rms_norms_do(family: str, dtype: torch.dtype) -> None:
    tiny = build(family)
    for weight in tiny.parameters():
        weight.data = weight.data.to(dtype)
    model = HookedModel(tiny, "org/tiny")
    assert sees_mean(model) == (family in RMS_NORMS)


def test_an_autoencoder_of_centred_weights_is_refused_where_there_can_be_none() -> None:
    ref = SaeRef("org/sae:x", "org/sae@1:x", "1" * 40, "blocks.1.hook_resid_pre", None, 8, centred=True)
    confirm_places(HookedModel(build("gpt2"), "org/tiny"), [ref])
    with pytest.raises(UserError, match=r"org/sae:x: .*org/tiny with centred weights.*see the mean"):
        confirm_places(HookedModel(build("llama"), "org/tiny"), [ref])
