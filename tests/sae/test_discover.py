import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import save

from raymi.cli.sae import command
from raymi.errors import UserError
from raymi.sae import describe, scan
from tests.fakes import add_model
from tests.hub import REVISION, serve
from tests.sae.making import saelens, weights

NEWER, OLDER = "b" * 40, "a" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two repositories of autoencoders, one with several and one that nobody can use, beside a model."""
    add_model(tmp_path, "org/model")
    many = repository(tmp_path, "org/many")
    for layer in (0, 1):
        site = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        saelens(many / f"layer_{layer}" / "wide", "topk" if layer else "jumprelu", metadata=site)
    saelens(many / "odd", architecture="temporal")
    saelens(repository(tmp_path, "org/one"), "gated")
    (tmp_path / "models--org--empty" / "snapshots").mkdir(parents=True)
    return tmp_path


def repository(cache: Path, id: str, revision: str = NEWER) -> Path:
    """The folder of a new snapshot, to which refs/main points."""
    folder = cache / f"models--{id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    return folder / "snapshots" / revision


def test_every_autoencoder_in_the_cache_is_found(cache: Path) -> None:
    found = {sae.source: sae for sae in scan(cache_dir=cache)}
    assert list(found) == ["org/many:layer_0/wide", "org/many:layer_1/wide", "org/many:odd", "org/one"]
    about = found["org/many:layer_1/wide"].description
    assert about is not None
    assert (about.site, about.k, about.revision) == ("blocks.1.hook_resid_post", 5, NEWER)
    assert found["org/many:odd"].description is None
    assert "'temporal'" in (found["org/many:odd"].reason or "")
    assert [sae.source for sae in scan("org/many:layer_0", cache_dir=cache)] == ["org/many:layer_0/wide"]


def test_one_that_cannot_be_read_hides_no_other(cache: Path) -> None:
    folder = repository(cache, "org/versions")
    saelens(folder / "checkout", "relu", metadata={"sae_lens_version": "dev"})
    saelens(folder / "good", "relu")
    saelens(folder / "odd", "relu", metadata="x")
    found = {sae.source: sae for sae in scan("org/versions", cache_dir=cache)}
    good, checkout = (found[f"org/versions:{name}"].description for name in ("good", "checkout"))
    assert good is not None
    assert checkout is not None
    assert (checkout.format, checkout.site) == ("saelens", good.site)
    assert "metadata: expected an object" in (found["org/versions:odd"].reason or "")


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("org/one", "org/one"),
        ("org/many:layer_0/wide", "org/many:layer_0/wide"),
        ("org/many:layer_0/wide/", "org/many:layer_0/wide"),
        ("org/many:layer_0", "org/many:layer_0/wide"),
        ("org/many:layer_0/wide/sae_weights.safetensors", "org/many:layer_0/wide"),
        ("org/many@bbbb:layer_1/wide", "org/many:layer_1/wide"),
        ("org/many@main:layer_1/wide", "org/many:layer_1/wide"),
    ],
)
def test_ways_to_point_at_one(where: str, source: str, cache: Path) -> None:
    assert describe(where, cache_dir=cache).source == source


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("org/many", ["there are 3 SAEs", "org/many:layer_0/wide"]),
        ("org/many:layer_7", ["org/many has no 'layer_7'", "raymi sae fetch org/many:layer_7"]),
        ("org/mani", ["no repository 'org/mani'", "Did you mean org/many?"]),
        ("org/many@cccc", ["no revision 'cccc'"]),
        ("org/model", ["no SAE in a format that raymi knows"]),
        ("org/empty", ["no revision 'main'"]),
        ("nowhere", ["no folder or file 'nowhere'"]),
    ],
)
def test_what_is_not_there_is_named(where: str, words: list[str], cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        describe(where, cache_dir=cache)
    for word in words:
        assert word in str(caught.value)


def test_main_is_where_the_ref_points_and_not_the_newest(cache: Path) -> None:
    saelens(repository(cache, "org/one", OLDER), "relu")
    (cache / "models--org--one" / "refs" / "main").write_text(NEWER)
    assert describe("org/one", cache_dir=cache).architecture == "gated"
    assert describe(f"org/one@{OLDER}", cache_dir=cache).architecture == "standard"


def sae(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, env={"COLUMNS": "100"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list(cache: Path) -> None:
    lines = sae("list", "--cache-dir", str(cache)).splitlines()
    assert lines[0].split() == ["SAE", "model", "site", "width", "architecture", "dtype", "format"]
    assert lines[1].split() == ["org/many:layer_0/wide", "tiny", "blocks.0.hook_resid_post", "40", "jumprelu",
                                "float32", "saelens"]  # fmt: skip
    refused = lines.index("Cannot be used:")
    assert refused == 5
    assert lines[refused + 1].startswith("  org/many:odd: ")
    records = json.loads(sae("list", "--cache-dir", str(cache), "--json"))
    assert [(r["source"], r.get("d_sae"), bool(r["reason"])) for r in records] == [
        ("org/many:layer_0/wide", 40, False),
        ("org/many:layer_1/wide", 40, False),
        ("org/many:odd", None, True),
        ("org/one", 40, False),
    ]


def test_inspect(cache: Path) -> None:
    shown = sae("inspect", "org/many:layer_1/wide", "--cache-dir", str(cache))
    for line in ("architecture  topk, k = 5", "site          blocks.1.hook_resid_post", "width         6 -> 40",
                 "input         decoder bias subtracted", "W_enc   W_enc      6 x 40  float32"):  # fmt: skip
        assert line in shown.splitlines()
    record = json.loads(sae("inspect", "org/one", "--cache-dir", str(cache), "--json"))
    assert (record["architecture"], record["tensors"]["r_mag"], record["k"]) == ("gated", "r_mag", None)


def test_listing_imports_no_torch(cache: Path) -> None:
    code = (
        "import sys; from raymi.cli.main import raymi\n"
        f"raymi(['sae', 'list', '--cache-dir', {str(cache)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'ray', 'polars', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_fetch_downloads_one_autoencoder_and_nothing_else(tmp_path: Path) -> None:
    cfg = json.dumps({"architecture": "standard", "hook_name": "blocks.3.hook_mlp_out"}).encode()
    files = {f"{name}/{file}": data for name in ("a", "b")
             for file, data in {"cfg.json": cfg, "sae_weights.safetensors": save(weights("relu"))}.items()}  # fmt: skip
    with serve({"org/saes": files | {"README.md": b"#"}}) as hub:

        def fetch(where: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "raymi", "sae", "fetch", where, "--cache-dir", str(tmp_path)],
                env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"},
                capture_output=True,
                text=True,
                timeout=60,
            )

        got, missing = fetch("org/saes:b"), fetch("org/none:b")
        downloads = sorted(hub.downloads)
    assert got.stdout == "org/saes:b: standard, 6 -> 40, at blocks.3.hook_mlp_out\n", got.stderr
    assert downloads == ["b/cfg.json", "b/sae_weights.safetensors"]
    assert describe("org/saes:b", cache_dir=tmp_path).revision == REVISION
    assert missing.returncode == 2
    assert "org/none:b cannot be fetched" in missing.stderr
    assert "Traceback" not in missing.stderr
