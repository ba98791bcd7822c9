"""Ways to spoil a valid file: what it means, so that it still parses, or its bytes."""

import copy
import io
import json
import re
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LEAVES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    100,
    2**31,
    2**53,
    2**63,
    2**64,
    10**30,
    -(2**63),
    -(10**30),
    0.5,
    -0.5,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "\n",
    "x",
    "0",
    "-1",
    "1e3",
    "1e999",
    "NaN",
    "null",
    "\u0661",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\U0001f600",
    "\u2028",
    "e\u0301",
    "\ufeff",
    "*",
    "[",
    "?",
    "!x",
    "{}",
    "%s",
    "{0}",
    "a/b",
    "a/b@c",
    "a/b:c",
    "../x",
    "/",
    "~",
    ".",
    "..",
    "a" * 300,
    "a" * 100_000,
    "all",
    "first",
    "last",
    "middle",
    "subject",
    "text:",
    "text:The",
    "each",
    "together",
    "window",
    "float32",
    "bfloat16",
    "auto",
    "full",
    "sae",
    "knockout",
    "llama",
    "gpt2",
    [],
    {},
    [[]],
    [None],
    [0, 0],
    [1, "x"],
    ["x", ["y"]],
    {"": 1},
    {"x": None},
    {"1": 1},
    {"each": "all"},
    {"together": [0, 1]},
    {"each": [0]},
    {"window": 2},
    {"text": "The"},
    {"first": 1},
    list(range(50)),
]
"""Values that programs did not expect in the place of another."""
CLAIMS = [b"2024-13-45", b"!!int x", b"!!timestamp x", b"!!float x", b"9" * 5_000, b"!!binary x", b"!!set [a]"]
HALVES = ["\ud800", "x\udfff"]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b"\t",
    b'"',
    b"'",
    b"`",
    b",",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b"#",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"? ",
    b"- ",
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"1e999",
    b"9" * 5_000,
    b"[" * 3_000,
    b"{" * 3_000,
    b'{"a":' * 3_000,
    b"\x1b[2J",
    "\u2028".encode(),
    "\u202e".encode(),
    b"0x" + b"f" * 4_000,
    b"PAR1",
    b"PK\x03\x04",
    b"\xff" * 8,
    b"\x00" * 8,
]
"""Bytes that mean something to one parser or another."""


def of_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes turned, taken out, put in, doubled, cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice((1, 1, 2, 4, 8, 64)))
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:to]
            case 2:
                out[at:at] = rng.choice(BYTES)
            case 3:
                out[at:to] = rng.choice(BYTES)
            case 4:
                out[at:at] = out[at:to] * rng.choice((1, 2, 50))
            case 5:
                out = out[:at] if rng.random() < 0.5 else out[at:]
            case _:
                out[at:to] = rng.randbytes(to - at)
    return bytes(out)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(Container, key) of everything in a tree."""
    queue = [tree]
    while queue:
        node = queue.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        for key, value in items:
            yield node, key
            queue.append(value)


def of_tree(rng: Random, tree: Any, others: list[Any], *, halves: bool = False) -> Any:
    """A tree of JSON values with some of it replaced, renamed, gone, doubled, wrapped, or from elsewhere."""
    root = {"": copy.deepcopy(tree)}
    leaves = LEAVES + HALVES if halves else LEAVES
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = list(places(root))
        if not every:
            break
        node, key = rng.choice(every)
        other, there = rng.choice(list(places({"": rng.choice([*others, tree])})))
        match rng.randrange(10):
            case 3 if type(value := node[key]) in (int, float):
                node[key] = rng.choice((-value, value + 1, value - 1, value * 1_000_000, 2**31, 2**63, 0, value / 3))
            case 0 | 1 | 2 | 3:
                node[key] = copy.deepcopy(rng.choice(leaves))
            case 4 if node is not root:
                del node[key]
            case 5:
                node[key] = copy.deepcopy(other[there])
            case 6 if isinstance(node, dict) and node is not root:
                node[_name(rng, there, leaves)] = node.pop(key)
            case 7 if isinstance(node, dict):
                node[_name(rng, there, leaves)] = copy.deepcopy(rng.choice([other[there], rng.choice(leaves)]))
            case 8 if isinstance(node, list) and len(node) < 1_000:
                node.extend(copy.deepcopy([node[key]] * rng.choice((1, 2, 20))))
            case 9:
                for _ in range(rng.choice((1, 1, 3, 60))):
                    node[key] = [node[key]] if rng.random() < 0.5 else {_name(rng, there, leaves): node[key]}
            case _:
                node[key] = rng.choice((str(node[key]), f"{node[key]}x", [node[key]]))
    return root.get("", {})


def _name(rng: Random, there: Any, leaves: list[Any]) -> str:
    words = [leaf for leaf in leaves if isinstance(leaf, str) and len(leaf) < 1_000]
    return rng.choice([str(there), str(there), f"{there}s", rng.choice(words)])


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=rng_free_indent(tree)).encode("utf-8", "surrogatepass")


def rng_free_indent(tree: Any) -> int | None:
    """Indented where it is small, as people write it."""
    return 1 if len(str(tree)[:5_000]) < 5_000 else None


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None).encode()


def _parsed(read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def of_json(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    return as_json(of_tree(rng, json.loads(data), [json.loads(other) for other in others], halves=True))


def of_yaml(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    text = as_yaml(of_tree(rng, yaml.safe_load(data), [yaml.safe_load(other) for other in others]))
    if rng.random() < 0.95:
        return text
    # What only YAML can write: scalars that claim to be what they are not.
    fields = list(re.finditer(rb"(?<=: )\S.*$", text, re.MULTILINE))
    if not fields:
        return text
    field = rng.choice(fields)
    return text[: field.start()] + rng.choice(CLAIMS) + text[field.end() :]


def of_jsonl(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    rows = [json.loads(line) for line in data.splitlines()]
    tree = of_tree(rng, rows, [[json.loads(line) for line in other.splitlines()] for other in others], halves=True)
    return b"\n".join(json.dumps(row).encode() for row in (tree if isinstance(tree, list) else [tree]))


def of_csv(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Rows with fields more, fewer, quoted, empty, doubled; a header spoilt."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice((1, 2, 3))):
        row = rng.choice(rows)
        at = rng.randrange(len(row)) if row else 0
        match rng.randrange(8):
            case 0 if row:
                leaf = rng.choice(LEAVES)
                row[at] = '"' + str(leaf)[:200_000].replace('"', '""') + '"'
            case 1 if row:
                del row[at]
            case 2:
                row.insert(at, rng.choice(["x", "", '""', '"a\nb"', '"', "id", "text"]))
            case 3:
                rows.insert(rng.randrange(len(rows) + 1), list(row))
            case 4 if len(rows) > 1:
                rows.remove(row)
            case 5:
                row[:] = [rng.choice(["", " ", "\ufeff"])]
            case 6 if row:
                row[at] = rng.choice(rng.choice(rows) or [""])
            case _ if row:
                row[at] += rng.choice(["s", " ", "\x1b[31m", "\u2028", "\x0b", "'"])
    return rng.choice(["\n", "\r\n", "\r"]).join(",".join(row) for row in rows).encode()


def of_text(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    text = data.decode()
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(text) + 1)
        text = rng.choice([text[:at], text[at:], text[:at] + str(rng.choice(LEAVES)) + text[at:], text * 2])
    return text.encode("utf-8", "surrogatepass")


# -- tensors ---------------------------------------------------------------------------------------------------------

DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", ""]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}


def of_safetensors(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """A header that says something else, with numbers enough for it; or other numbers."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name = rng.choice(list(header))
    tensor = header[name]
    whole = True
    match rng.randrange(10):
        case 0:
            header[rng.choice([f"{name}x", "k", "threshold", "W_skip", "scaling_factor", "__metadata__"])] = header.pop(
                name
            )
        case 1:
            del header[name]
        case 2:
            tensor["dtype"] = rng.choice(DTYPES)
        case 3:
            tensor["shape"] = rng.choice(
                [
                    tensor["shape"][::-1],
                    [*tensor["shape"], 1],
                    [],
                    [0],
                    [0, 4],
                    [3],
                    [2**40, 2**40],
                    [-1, 4],
                    ["x"],
                    None,
                    [1.5],
                    [2**62, 0],
                ]
            )
        case 4:
            header[f"{name}2"] = copy.deepcopy(tensor)
        case 5 if len(numbers) >= 4:
            at = rng.randrange(len(numbers) // 4) * 4
            numbers[at : at + 4] = struct.pack(
                "<f", rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0, -1.0])
            )
        case 6:
            header["__metadata__"] = rng.choice([{}, {"a": "b"}, {"a": 1}, [], None, "x"])
        case 7:
            header, whole = of_tree(rng, header, [], halves=True), False
        case 8:
            tensor["data_offsets"] = rng.choice([[0, 0], [4, 0], [-4, 4], [0, 2**62], [0], None, ["x", 4], [0.5, 4]])
            whole = False
        case _:
            numbers = bytearray(of_bytes(rng, bytes(numbers)))
            whole = False
    if whole and isinstance(header, dict):
        numbers = _laid_out(header, numbers)
    text = as_json(header)
    if rng.random() < 0.2:
        text += b" " * rng.randrange(1, 9)
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


def _laid_out(header: dict[str, Any], numbers: bytearray) -> bytearray:
    """Offsets that fit dtypes and shapes, where these make sense."""
    out = bytearray()
    for name, tensor in header.items():
        if name == "__metadata__" or not isinstance(tensor, dict):
            continue
        try:
            size = SIZES.get(tensor["dtype"], 1)
            for side in tensor["shape"]:
                size *= side
            if not 0 <= size < 100_000:
                continue
        except TypeError:
            continue
        begin = tensor["data_offsets"][0] if isinstance(tensor.get("data_offsets"), list) else 0
        taken = bytes(numbers[begin : begin + size]).ljust(size, b"\0")
        tensor["data_offsets"] = [len(out), len(out) + size]
        out += taken
    return out


def of_npz(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Arrays of other shapes, kinds and orders, more and fewer of them, packed or not."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    array = arrays[name]
    match rng.randrange(7):
        case 0:
            arrays[f"{name}x"] = arrays.pop(name)
        case 1:
            del arrays[name]
        case 2:
            arrays[name] = array.astype(rng.choice(["f2", "f8", ">f4", "i4", "?", "U3", "c8", "S2", "M8[s]"]))
        case 3:
            shapes = [array.T, array[None], array[:0], array.ravel(), np.float32(1.0), np.asfortranarray(array)]
            arrays[name] = rng.choice(shapes)
        case 4:
            arrays[name] = np.where(rng.random() < 0.5, np.float32("nan"), array).astype(np.float32)
        case 5:
            arrays[name] = np.array([{}, None], object)
        case _:
            arrays[name] = np.zeros(3, [("a", "f4"), ("b", "i4")])
    out = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(out, **arrays)
    return out.getvalue()


def of_parquet(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Columns of other kinds, with other values, more, fewer, doubled; rows doubled, gone or out of order."""
    table = pq.read_table(io.BytesIO(data))
    for _ in range(rng.choice((1, 1, 2))):
        if not table.num_columns:
            break
        at = rng.randrange(table.num_columns)
        name, column = table.schema.names[at], table.column(at)
        match rng.randrange(9):
            case 0:
                table = table.remove_column(at)
            case 1:
                table = table.rename_columns([*table.schema.names[:at], f"{name}s", *table.schema.names[at + 1 :]])
            case 2:
                table = table.append_column(rng.choice([name, "x", ""]), column)
            case 3:
                table = table.set_column(at, name, _other_kind(rng, column))
            case 4 if table.num_rows and not pa.types.is_temporal(column.type):
                values = column.to_pylist()
                values[rng.randrange(len(values))] = rng.choice(LEAVES)
                table = table.set_column(at, name, _array(values, column.type))
            case 5 if table.num_rows:
                table = table.set_column(at, name, pa.nulls(table.num_rows, column.type))
            case 6:
                table = pa.concat_tables([table, table])
            case 7:
                table = table.slice(rng.randrange(table.num_rows + 1), rng.choice([0, 1, 100]))
            case _:
                table = table.take(pa.array(rng.sample(range(table.num_rows), table.num_rows), pa.int64()))
    out = io.BytesIO()
    try:
        pq.write_table(table, out, compression=rng.choice(["zstd", "snappy", "none"]))
    except (pa.ArrowException, ValueError):
        return data
    return out.getvalue()


def _other_kind(rng: Random, column: pa.ChunkedArray) -> pa.Array:
    n = len(column)
    kinds: list[tuple[Any, pa.DataType]] = [
        ("x", pa.string()),
        (b"\xff", pa.binary()),
        (1, pa.int8()),
        (2**63, pa.uint64()),
        (1.5, pa.float32()),
        (float("nan"), pa.float64()),
        (True, pa.bool_()),
        ([1], pa.list_(pa.int64())),
        (["x", None], pa.list_(pa.string())),
        ({"a": 1}, pa.struct([("a", pa.int64())])),
        (0, pa.timestamp("ns")),
        (-(2**62), pa.timestamp("s", "UTC")),
        (None, pa.null()),
        ([("k", 1)], pa.map_(pa.string(), pa.int64())),
        (1, pa.date32()),
        ("x", pa.large_string()),
        (0, pa.duration("s")),
        ({}, pa.struct([])),
    ]
    value, kind = rng.choice(kinds)
    array = pa.array([value] * n, kind)
    return array.dictionary_encode() if rng.random() < 0.1 and kind == pa.string() else array


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    for wanted in (kind, None, pa.string()):
        try:
            return pa.array([str(v) for v in values] if wanted == pa.string() and kind != wanted else values, wanted)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return pa.nulls(len(values), kind)
