"""Tables of token sequences as the library `datasets` keeps them: Parquet, or the Arrow files of `save_to_disk`.

A row is a sequence: `input_ids` a list of ids, other columns with a number for every token (a list as long) or one for
the row. Needs PyArrow only.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from safelm.formats.token_files import BLOCK_TOKENS, Block

IDS = "input_ids"


def find(folder: str) -> list[str]:
    """The data files of a folder in order: those that `state.json` lists, else Parquet files, in `data/` or here.

    Raises ValueError for a folder with several splits.
    """
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        raise ValueError(f"{folder}: several splits: give the folder of one of them")
    state = os.path.join(folder, "state.json")
    if os.path.exists(state):
        with open(state, encoding="utf-8") as file:
            listed = json.load(file)
        try:
            return [os.path.join(folder, os.path.basename(entry["filename"])) for entry in listed["_data_files"]]
        except (KeyError, TypeError):
            raise ValueError(f"{state}: not that of a saved dataset: it has no _data_files") from None
    for place in (os.path.join(folder, "data"), folder):
        names = sorted(os.listdir(place)) if os.path.isdir(place) else []
        if found := [name for name in names if name.endswith(".parquet")]:
            splits = {re.split(r"[-_.]\d", name)[0].removesuffix(".parquet") for name in found}
            if len(splits) > 1:
                raise ValueError(f"{place}: several splits ({', '.join(sorted(splits))}): give one's files a folder")
            return [os.path.join(place, name) for name in found]
    return []


class TableFile:
    """The sequences of a Parquet or Arrow file."""

    def __init__(self, path: str, columns: Sequence[str], ids: str = IDS):
        """`columns`: further ones that are wanted where they are there; `ids`: the name of the ids' column.

        Raises ValueError for a file that can't be read or lacks the ids' column.
        """
        self.path, self._ids = path, ids
        try:
            if path.endswith(".parquet"):
                self._parquet = pa.parquet.ParquetFile(path, memory_map=True)
                schema, self.num_sequences = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            else:
                self._parquet = None
                with pa.memory_map(path) as source, pa.ipc.open_stream(source) as reader:
                    schema, self.num_sequences = reader.schema, sum(batch.num_rows for batch in reader)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path}: damaged, or no table: {str(error).splitlines()[0]}") from None
        if ids not in schema.names:
            raise ValueError(f"{path}: no column {ids!r}: it has {', '.join(schema.names)}; name it by --ids_column")
        self._columns = [name for name in columns if name in schema.names]
        self.other_columns = [name for name in schema.names if name not in (ids, *self._columns)]

    def parts(self, max_tokens: int) -> list[tuple[int, int]]:
        """Ranges of a Parquet file's row groups; an Arrow file is one part."""
        if self._parquet is None:
            return [(0, 1)]
        found, begin, taken = [], 0, 0
        for group in range(self._parquet.metadata.num_row_groups):
            tokens = self._tokens_of(group)
            if taken and taken + tokens > max_tokens:
                found.append((begin, group))
                begin, taken = group, 0
            taken += tokens
        return [*found, (begin, self._parquet.metadata.num_row_groups)]

    def blocks(self, part: tuple[int, int]) -> Iterator[Block]:
        """The rows of a part."""
        row = 0
        for batch in self._batches(part):
            columns = {name: self._column(batch, name, row)[0] for name in self._columns}
            tokens, lengths_n = self._column(batch, self._ids, row)
            if lengths_n is None or tokens.dtype.kind not in "iu":
                raise ValueError(f"{self.path}: column {self._ids!r} is {batch.schema.field(self._ids).type}, no ids")
            yield Block(lengths_n, tokens, columns)
            row += batch.num_rows

    def _batches(self, part: tuple[int, int]) -> Iterator[pa.RecordBatch]:
        if self._parquet is None:
            with pa.memory_map(self.path) as source, pa.ipc.open_stream(source) as reader:
                yield from reader
            return
        wanted = [self._ids, *self._columns]
        for group in range(*part):
            rows = self._parquet.metadata.row_group(group).num_rows
            at_once = max(1, rows * BLOCK_TOKENS // max(self._tokens_of(group), 1))
            yield from self._parquet.iter_batches(at_once, row_groups=[group], columns=wanted)

    def _tokens_of(self, group: int) -> int:
        """Values of the ids' column in a row group."""
        facts = self._parquet.metadata.row_group(group)
        columns = (facts.column(index) for index in range(facts.num_columns))
        return next(each.num_values for each in columns if each.path_in_schema.split(".")[0] == self._ids)

    def _column(self, batch: pa.RecordBatch, name: str, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A column's numbers end to end, and how many each row has (None: one number a row)."""
        column = batch.column(name)
        if isinstance(column, pa.FixedSizeListArray):
            column = column.cast(pa.large_list(column.type.value_type))
        is_list = isinstance(column, pa.ListArray | pa.LargeListArray)
        values = column.flatten() if is_list else column
        if column.null_count or values.null_count:
            nulls = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
            where = f", row {row + int(nulls[0])} of its part" if len(nulls) else ""
            raise ValueError(f"{self.path}: column {name!r} has nulls{where}")
        numbers = values.to_numpy(zero_copy_only=False)
        return numbers, np.diff(column.offsets.to_numpy().astype(np.int64)) if is_list else None


class TableWriter:
    """Writes a Parquet file of sequences, a row group for each block."""

    def __init__(self, path: str, dtype: np.dtype, columns: Mapping[str, tuple[np.dtype, bool]]):
        """`columns`: dtype of each further one, and whether it has a number for every token."""
        self._types = {name: (pa.from_numpy_dtype(kind), is_list) for name, (kind, is_list) in columns.items()}
        fields = [(name, pa.list_(kind) if is_list else kind) for name, (kind, is_list) in self._types.items()]
        self._schema = pa.schema([(IDS, pa.list_(pa.from_numpy_dtype(dtype))), *fields])
        self._writer = pa.parquet.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)

    def add(self, block: Block) -> None:
        """Appends rows."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths_n)]).astype(np.int32))
        arrays = [pa.ListArray.from_arrays(offsets, pa.array(np.asarray(block.tokens)))]
        for name, (kind, is_list) in self._types.items():
            values = pa.array(block.columns[name], kind)
            arrays.append(pa.ListArray.from_arrays(offsets, values) if is_list else values)
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Writes the footer."""
        self._writer.close()
