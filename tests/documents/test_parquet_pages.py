"""What a Parquet file's pages ask for is known before Arrow decodes them: one value of a gigabyte ends in a line."""

import pyarrow
import pyarrow.parquet
import pytest

from safelm import documents
from safelm.documents import parquet, parquet_pages

ROWS = 3_000
TABLE = pyarrow.table(
    {
        "id": [str(i) for i in range(ROWS)],
        "text": [f"page {i} " * (i % 50) for i in range(ROWS)],
        "kind": ["a", "b", None] * (ROWS // 3),
        "meta": [{"source": "x" * (i % 7), "tags": ["t"] * (i % 3)} for i in range(ROWS)],
    }
)


def write(path, table=TABLE, **options):
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_all_pages_of_every_chunk_are_found(tmp_path, version, codec, dictionary):
    path = write(
        tmp_path / "a.parquet",
        data_page_version=version,
        compression=codec,
        use_dictionary=dictionary,
        data_page_size=4_000,
        row_group_size=1_000,
        write_page_checksum=True,
        write_page_index=True,
    )
    facts = pyarrow.parquet.read_metadata(path)
    with open(path, "rb") as file:
        groups = parquet_pages.read_footer(path, file)
        assert len(groups) == facts.num_row_groups
        for group, chunks in enumerate(groups):
            for index, own in enumerate(chunks):
                chunk = facts.row_group(group).column(index)
                assert own.name == chunk.path_in_schema and own.stop - own.begin == chunk.total_compressed_size
                found = list(parquet_pages.pages(file, own))
                headers = chunk.total_uncompressed_size - sum(size for _, size in found)
                assert 0 < headers < 200 * len(found), chunk
                assert sum(kind == 2 for kind, _ in found) == dictionary
    assert len(list(documents.read_rows(path))) == ROWS


def test_a_column_of_flags_without_rows_has_no_pages(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string()), "flag": pyarrow.array([], pyarrow.bool_())})
    path = write(tmp_path / "none.parquet", table)
    with open(path, "rb") as file:
        ((_, flag),) = parquet_pages.read_footer(path, file)
        assert flag.name == "flag" and not list(parquet_pages.pages(file, flag))
    assert not list(documents.read_rows(path))


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"use_dictionary": False, "row_group_size": 1}])
def test_a_page_that_is_too_large_is_one_line(tmp_path, monkeypatch, options):
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 1 << 20)
    table = pyarrow.table({"id": ["a", "b"], "text": ["fine", "a" * (3 << 20)], "note": ["x", "y"]})
    path = write(tmp_path / "bomb.parquet", table, compression="zstd", **options)
    group = 1 if "row_group_size" in options else 0
    message = rf"bomb.parquet: row group {group}, column 'text': a page of 31457\d\d bytes, more than 1048576"
    for read in (documents.read_rows, lambda path: documents.read_rows(path, ["text", "id"])):
        with pytest.raises(ValueError, match=message) as error:
            list(read(path))
        assert "\n" not in str(error.value)
    assert [row["note"] for _, row in documents.read_rows(path, ["note"], text_column=None)] == ["x", "y"]


def test_a_dictionary_s_value_in_every_row_takes_no_more_than_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_MOST_BATCH_BYTES", 4 << 20)
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), ["a" * (1 << 20)])
    table = pyarrow.table({"text": values.cast(pyarrow.string())})
    path = write(tmp_path / "bomb.parquet", table, compression="zstd", dictionary_pagesize_limit=1 << 24)
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    batches = [batch for _, batch in documents.iter_parquet(path, ["text"], text_column="text")]
    assert sum(batch.num_rows for batch in batches) == 100
    assert max(batch.nbytes for batch in batches) < 5 << 20


def test_damaged_headers_are_one_line_or_read_as_before(tmp_path):
    path = write(tmp_path / "a.parquet", TABLE.slice(0, 50))
    good = (tmp_path / "a.parquet").read_bytes()
    begin = pyarrow.parquet.read_metadata(path).row_group(0).column(1).dictionary_page_offset
    lines = []
    for at in range(begin, begin + 12):
        for value in (0, 8, 0x1C, 0x19, 0x7F, 0xFF):
            (tmp_path / "a.parquet").write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                list(documents.read_rows(path))
            except (ValueError, OSError) as error:
                assert path in str(error)
                lines.append(str(error))
    assert len(lines) > 30 and any("row group 0, column 'text': damaged: no page at byte" in line for line in lines)
