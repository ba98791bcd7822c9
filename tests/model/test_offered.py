import pytest

from raymi.model.hooked import HookedModel
from raymi.model.interventions import EDITABLE, Edit
from raymi.model.offered import offered
from raymi.model.sites import NAMES, NoSuchPlace
from tests.families import build, prompt


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "lfm2", "cohere", "granite", "jetmoe"])
def test_what_is_offered_is_what_can_be_captured_and_changed(family: str):
    model = HookedModel(build(family), family)
    found = {str(site): editable for site, editable in offered(model)}
    assert next(iter(found)) == "hook_embed"
    assert not model.tap.captures
    assert not model.tap.at_z
    ids = prompt(rows=2)
    assert set(model.forward(ids, capture=list(found)).cache) == set(found)
    for layer in range(model.n_layers):
        for name in NAMES:
            site = f"blocks.{layer}.{name}"
            if site not in found:
                with pytest.raises(NoSuchPlace):
                    model.forward(ids, capture=[site])
            if name not in EDITABLE:
                assert not found.get(site)
                continue
            edit = Edit(layer, name, (3,), None, 0.5, None)
            if found.get(site):
                assert bool(model.forward(ids, [(), (edit,)]).fired_B[1])
            else:
                with pytest.raises(NoSuchPlace):
                    model.forward(ids, [(), (edit,)])
    assert any(found.values())


def test_layers_without_attention_have_no_pattern():
    names = {str(site) for site, _ in offered(HookedModel(build("lfm2"), "lfm2"))}
    assert {name for name in names if name.endswith("hook_pattern")} == {
        "blocks.1.attn.hook_pattern",
        "blocks.4.attn.hook_pattern",
    }
