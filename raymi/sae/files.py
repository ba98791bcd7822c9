"""Tensors in files: what is in them without torch, and the tensors themselves, mapped into memory where they can be."""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from raymi import snapshot
from raymi.errors import UserError, quoted
from raymi.snapshot import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNSOUND = (zipfile.BadZipFile, zlib.error, ValueError, LookupError, EOFError, OSError, RuntimeError)
"""What zips raise that are spoilt, or of a kind that Python does not read (NotImplementedError is a RuntimeError)."""
_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member: after it come its name and an extra field of these lengths


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a file, as the file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None = None
    """In an .npz file, the byte at which its numbers begin; None where they are compressed."""


def members(file: Path) -> dict[str, Member]:
    """The tensors in a .safetensors or .npz file; only headers are read.

    Raises:
        UserError: when the file is missing, cut short or not what its name says.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == ".npz":
        return _npz_members(file)
    try:
        header = snapshot.safetensors_header(file)
    except DamagedError as error:
        raise UserError(f"{file}: {error}") from None
    return {
        name: Member(_DTYPES.get(str(t["dtype"]), str(t["dtype"])), tuple(t["shape"])) for name, t in header.items()
    }


def tensors(file: Path) -> Mapping[str, "Tensor"]:
    """The tensors in a file, on the CPU, in the order of the file.

    Safetensors, uncompressed npz members and zipped pickles are mapped: what is not touched is not read.

    Raises:
        UserError: when the file is damaged, or a pickle that holds anything but tensors, which is never run.
    """
    if file.suffix == ".npz":
        return _npz_tensors(file)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    return _pickle(file)


def _safetensors(file: Path) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a sound safetensors file ({error})") from None


def _pickle(file: Path) -> dict[str, "Tensor"]:
    import pickle

    import torch

    try:
        # weights_only makes tensors and plain containers and nothing else; there is no way to ask for more.
        loaded: object = torch.load(  # noqa: TID251
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: this pickle holds more than tensors and is refused: loading it could run any code",
            hint="Save its state_dict() again, or convert it to safetensors.",
        ) from None
    except Exception as error:  # what is no pickle fails in any way
        raise UserError(f"{file}: cannot be read as a pickle ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}")
    for name, tensor in cast(dict[Any, Any], loaded).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file}: expected tensors by name, found {quoted(name)}: {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{file}: tensor {name!r} is no plain array of numbers")
    return cast("dict[str, Tensor]", loaded)


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    try:
        yield
    except _UNSOUND as error:
        raise UserError(f"{file}: not a sound npz file ({error})") from None


def _npz_members(file: Path) -> dict[str, Member]:
    from numpy.lib import format as npy

    found: dict[str, Member] = {}
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
            for info in archive.infolist():
                with archive.open(info) as stream:
                    version = npy.read_magic(stream)
                    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, fortran, dtype = read(stream)
                    header = stream.tell()
                stored = info.compress_type == zipfile.ZIP_STORED and not fortran and dtype.isnative
                offset = _data_offset(raw, info) + header if stored else None
                found[info.filename.removesuffix(".npy")] = Member(dtype.name, shape, offset)
    except _UNSOUND as error:
        raise UserError(f"{file}: not a sound npz file ({error})") from None
    return found


def _data_offset(raw: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin; the local header's extra field may differ from that of the directory."""
    raw.seek(info.header_offset)
    name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + name + extra


def _npz_tensors(file: Path) -> dict[str, "Tensor"]:
    """Maps what np.savez wrote, which np.load would read whole.

    The members begin at any byte. Processors that torch runs on load unaligned numbers all the same.
    """
    import warnings

    import numpy as np
    import torch

    described = _npz_members(file)
    arrays: dict[str, Any] = {}
    with _sound(file), np.load(file, allow_pickle=False) as archive:
        for name, member in described.items():
            if not re.fullmatch("u?int[0-9]+|float(16|32|64)", member.dtype):  # Python objects would be a pickle
                raise UserError(f"{file}: tensor {name!r} is {member.dtype}; raymi reads float32 and float16")
            if member.offset is None or not all(member.shape):
                arrays[name] = archive[name].astype(member.dtype, copy=False)  # in this machine's order of bytes
            else:
                arrays[name] = np.memmap(file, member.dtype, "r", member.offset, member.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)  # nothing writes to it
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
