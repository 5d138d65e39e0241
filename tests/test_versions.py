"""open_clip's next version, by a stand-in that has its attention's class and is called as its blocks call theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from standins import Attention4, as_version_4

from clipfit.model import loading


@pytest.mark.parametrize("name", ["vit", "eos", "bidirectional"])
def test_the_stand_in_computes_what_open_clip_does(models, name):
    clip = loading.load(models[name])
    images = torch.randn(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(["a photo of a cat", "a dog"])
    other = as_version_4(copy.deepcopy(clip.model))
    assert other.state_dict().keys() == clip.model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(other.encode_image(images), clip.model.encode_image(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.encode_text(tokens), clip.model.encode_text(tokens), atol=1e-5, rtol=1e-5)
    if any(isinstance(module, torch.nn.MultiheadAttention) for module in clip.model.modules()):
        assert any(isinstance(module, Attention4) for module in other.modules())
