"""The tables of a store, typed. A column may be added in place; anything else raises `SCHEMA_VERSION`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from raymi.experiments import kinds

SCHEMA_VERSION = 1
"""Of the layout, the manifest and every table together; in each manifest and in each file's metadata."""

_TIME = pa.timestamp("us", tz="UTC")

MODELS = pa.schema(
    [
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("model_type", pa.string()),
        ("architecture", pa.string()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("attention", pa.string()),
        ("n_layers", pa.int32()),
        ("n_heads", pa.int32()),
        ("n_kv_heads", pa.int32()),
        ("hidden_size", pa.int32()),
        ("vocab_size", pa.int32()),
        ("parameters", pa.int64()),
        ("weight_bytes", pa.int64()),
        ("load_seconds", pa.float64()),
        # Bytes in use around the load; VRAM is null where there is none.
        ("ram_before", pa.int64()),
        ("ram_after", pa.int64()),
        ("vram_before", pa.int64()),
        ("vram_after", pa.int64()),
        ("host", pa.string()),
        ("replica", pa.string()),
        ("loaded_at", _TIME),
        ("capability", pa.string()),
        ("status", pa.string()),
        # Tensors that its config has no place for, and that were left out because the user allowed it.
        ("unused", pa.list_(pa.string())),
    ]
)
"""One row a load of a model. `capability` is JSON: what was measured at load."""

PROMPTS = pa.schema(
    [
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("wrong", pa.string()),
        ("subject", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("bos", pa.bool_()),
        ("answer_id", pa.int32()),
        ("answer_token", pa.string()),
        ("wrong_id", pa.int32()),
        ("wrong_token", pa.string()),
        ("pieces", pa.list_(pa.struct([("piece", pa.string()), ("positions", pa.list_(pa.int32()))]))),
    ]
)
"""One row a prompt as one model reads it."""

SAES = pa.schema(
    [
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("experiment", pa.string()),
        # What rows call it; where it is opened, with the commit; the commit, or the sha256 of local files.
        ("sae", pa.string()),
        ("where", pa.string()),
        ("version", pa.string()),
        # What it reads; what a transcoder predicts.
        ("site", pa.string()),
        ("site_out", pa.string()),
        ("d_in", pa.int64()),
        ("d_sae", pa.int64()),
        ("architecture", pa.string()),
        ("k", pa.int64()),
        ("format", pa.string()),
        ("dtype", pa.string()),
        # As the job says it; null where the files say it, or there is none.
        ("input_scale", pa.float64()),
        # Whether it takes activations without their mean over the width. Null in rows of before this was read, which is
        # looked up again: so is what follows.
        ("centred", pa.bool_()),
        # Whether its files say that its texts began with BOS; how the experiment's texts begin because of that, where
        # it is not as the tokenizer has it: always, never.
        ("prepend_bos", pa.bool_()),
        ("bos", pa.string()),
        # The module's own output that its files mean, where `site` or `site_out` is taken for the same place.
        ("plain", pa.string()),
        # Whether its site is an `attn.hook_z` that an older raymi took to be something else.
        ("z_moved", pa.bool_()),
        # Whether it reads what a norm gives before its weights. Null in rows of before that was told apart, when what
        # an MLP is fed was called `ln2.hook_normalized`.
        ("before_weights", pa.bool_()),
        # Why there is none: in the one row, without `sae`, of an experiment that found none for the model.
        ("note", pa.string()),
    ]
)
"""One row an autoencoder that an experiment found for one model: what the run measures from then on."""

VOCABULARY = pa.schema(
    [("model_id", pa.string()), ("revision", pa.string()), ("token_id", pa.int32()), ("token", pa.string())]
)
"""The text of token ids, so that rows need only carry ids."""

VERIFICATIONS = pa.schema(
    [
        ("ablation_id", pa.string()),
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("prompt_id", pa.string()),
        ("engine", pa.string()),
        ("max_logit_diff", pa.float64()),
        ("effect", pa.float64()),
        ("tolerance", pa.float64()),
        ("passed", pa.bool_()),
        ("measured_at", _TIME),
        ("spread", pa.float64()),
        ("spread_tolerance", pa.float64()),
        ("flips", pa.int32()),
        ("jumped", pa.bool_()),
    ]
)
"""One row an ablation that a replica measured a second time, by a full forward of the family's own attention.

`max_logit_diff` is between the two, `effect` between clean and ablated, both the largest over the vocabulary.

In half precision the second forward is in float32, and what is compared are effects (ablated - clean), a shift of all
logits aside: `spread` is the root of the difference's mean square. `flips` counts the choices of experts, a token and
layer, that the family's own forward makes otherwise in half precision; `jumped` says that the measured one was right
only when it made them as in float32. All four are null in float32."""

FAILURES = pa.schema(
    [
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("unit_id", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
        ("attempt", pa.int32()),
        ("failed_at", _TIME),
        ("prompt_id", pa.string()),
    ]
)
"""One row a failure. `stage` is select, plan, prompt, load, unit or replica; `unit_id` is null unless one unit failed,
`prompt_id` unless a model can never measure just this prompt. A row without a `kind` takes back what stands before it:
the prompt can be measured after all, or the job has no prompt of the unit any more."""

EVENTS = pa.schema(
    [
        ("model_id", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("happened_at", _TIME),
        # Null in what an older raymi has written.
        ("revision", pa.string()),
    ]
)
"""What else happened and is worth knowing afterwards: lost replicas, halved batches, resumed runs."""

TESTBEDS = pa.schema(
    [
        # A hash of the rest; rows name it.
        ("testbed", pa.string()),
        ("device", pa.string()),
        ("device_name", pa.string()),
        ("dtype", pa.string()),
        # Versions; `code` is the hash of raymi's source.
        ("raymi", pa.string()),
        ("code", pa.string()),
        ("torch", pa.string()),
        ("transformers", pa.string()),
        # What metrics of autoencoders mean.
        ("definitions", pa.string()),
    ]
)
"""One row a testbed: what rows were measured on and by, which may be another when a run is gone on with."""

SUPERSEDED = pa.schema(
    [
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("experiment", pa.string()),
        ("unit_id", pa.string()),
        # Null: the unit is planned again, and counts again.
        ("why", pa.string()),
        ("noticed_at", _TIME),
    ]
)
"""One row a unit that is stored and that the plan does not name any more: its rows stay, and leave every mean. Of
several rows the last holds."""

TESTBED = pa.field("testbed", pa.string())
"""The last column of every table of units, a key into `testbeds`; null where an older raymi did not say."""

SCHEMAS: Mapping[str, pa.Schema] = {
    "models": MODELS,
    "prompts": PROMPTS,
    "saes": SAES,
    "vocabulary": VOCABULARY,
    **{name: table.schema.append(TESTBED) for name, table in kinds.tables().items()},
    "testbeds": TESTBEDS,
    "superseded": SUPERSEDED,
    "verifications": VERIFICATIONS,
    "failures": FAILURES,
    "events": EVENTS,
}

UNIT_TABLES = tuple(kinds.tables())
"""Where units' rows go: all rows of a unit into one of them, at least one and all at once."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "prompts": ("model_id", "revision", "prompt_id"),
    "saes": ("model_id", "revision", "experiment", "sae", "site", "centred", "before_weights"),
    "vocabulary": ("model_id", "revision", "token_id"),
    "testbeds": ("testbed",),
}
"""What may stand in a table once only; the first row of a key wins. (`UNIT_TABLES` go by whole units.)"""


def rows(table: str, records: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Records as an Arrow table of the pinned schema; what a record leaves out is null.

    Raises:
        ValueError: a record has a field that the table has not.
    """
    listed = [dict(record) for record in records]
    schema = SCHEMAS[table]
    if unknown := {field for record in listed for field in record} - set(schema.names):
        raise ValueError(f"table {table} has no column {', '.join(sorted(unknown))}")
    return pa.Table.from_pylist(listed, schema=schema)


def check(table: str, data: pa.Table) -> None:
    """That `data` is exactly of the pinned schema of `table`, metadata apart.

    Raises:
        ValueError: it is not; says the first column that differs.
    """
    want = SCHEMAS[table]
    if data.schema.equals(want, check_metadata=False):
        return
    for name, kind in zip(want.names, want.types, strict=True):
        if name not in data.schema.names:
            raise ValueError(f"rows for table {table} lack the column {name} ({kind})")
        if (found := data.schema.field(name).type) != kind:
            raise ValueError(f"rows for table {table}: column {name} is {found}, not {kind}")
    raise ValueError(f"rows for table {table}: columns {data.schema.names}, not {want.names}")


def conform(table: str, data: pa.Table) -> pa.Table:
    """`data`, perhaps written before a column was added, as the pinned schema has it: columns it lacks are null."""
    want = SCHEMAS[table]
    have = set(data.schema.names)
    columns = [
        data.column(name).cast(kind) if name in have else pa.nulls(data.num_rows, kind)
        for name, kind in zip(want.names, want.types, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=want)
