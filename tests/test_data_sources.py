"""Documents: where they come from, in which order, and what is refused."""

import gzip
import json
import pathlib
import subprocess
import sys
import sysconfig

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from scaletrain.config.schema import DataConfig
from scaletrain.data.sources import Document, documents, identity
from scaletrain.errors import DataError


def read(path, **settings):
    return list(documents(DataConfig(source="files", path=str(path), **settings)))


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stdlib_is_every_readable_module_in_order():
    found = list(documents(DataConfig()))
    names = [document.name for document in found]
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 500
    assert {"json/decoder.py", "os.py"} <= set(names)
    assert not any("-packages/" in n or "__pycache__" in n for n in names)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert dict(found)["os.py"].encode() == (root / "os.py").read_bytes()
    assert all(text for _, text in found)


def test_stdlib_leaves_out_foreign_undecodable_and_empty_files(tmp_path, monkeypatch):
    contents = {
        "b.py": b"b",
        "a/c.py": b"c",
        "a.py": b"a",
        "empty.py": b"",
        "latin.py": b"\xe9",
        "notes.txt": b"no",
        "site-packages/x.py": b"x",
        "a/dist-packages/y.py": b"y",
        "__pycache__/z.py": b"z",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    expected = [("a.py", "a"), ("a/c.py", "c"), ("b.py", "b")]
    assert list(documents(DataConfig())) == expected
    before = identity(DataConfig())
    (tmp_path / "b.py").write_bytes(b"longer")
    assert identity(DataConfig()) != before


def test_text_files_are_documents_named_below_the_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("zwei\r\né".encode())
    (tmp_path / "sub" / "a.md").write_text("eins")
    (tmp_path / "c.txt").write_text("")
    expected = [Document("b.txt", "zwei\r\né"), Document("sub/a.md", "eins")]
    assert read(tmp_path / "**") == expected
    assert read(tmp_path / "b.txt") == expected[:1]


def test_a_path_that_looks_like_a_glob_is_a_path_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert [document.text for document in read(tmp_path / "a[1].txt")] == ["x"]


def test_files_are_read_from_any_file_system():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/2.txt": b"two", "/corpus/1.txt": b"one"})
    data = DataConfig(source="files", path="memory://corpus/*.txt")
    assert list(documents(data)) == [("1.txt", "one"), ("2.txt", "two")]
    before = identity(data)
    memory.pipe("/corpus/1.txt", b"uno")
    assert identity(data) != before


def test_json_lines_are_documents(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"t": "one\u2028two"}, {"t": ""}, {"t": "three"})
    path.write_bytes(path.read_bytes() + b"\n")
    expected = [("a.jsonl:1", "one\u2028two"), ("a.jsonl:3", "three")]
    assert read(path, text_field="t") == expected


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, name):
    content = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / name).write_bytes(content)
    assert [d.text for d in read(tmp_path / name)] == ["one", "two"]
    (tmp_path / name).write_bytes(content[:-12])
    with pytest.raises(DataError, match=f"{name} cannot be read.*leave it out"):
        read(tmp_path / name)


def test_parquet_rows_are_documents_read_in_batches(tmp_path, monkeypatch):
    texts = [f"row {i} é" for i in range(2500)]
    table = pyarrow.table({"n": list(range(2500)), "t": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet.ParquetFile, "read", None)
    found = read(tmp_path / "*.parquet", text_field="t")
    assert [document.text for document in found] == texts
    assert found[-1].name == "a.parquet:2500"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a.jsonl:2 is not JSON.*one JSON object a line"),
        ("[" * 99_999, r"a.jsonl:2 is not JSON.*one JSON object a line"),
        ('["text"]', r"a.jsonl:2 has no field data.text_field='text', only list"),
        ('{"body": "x"}', r"a.jsonl:2 has no field .*only \['body'\]; set data.text_f"),
        ('{"text": 3}', r"a.jsonl:2 holds int in 'text', not a text"),
        ('{"text": null}', r"a.jsonl:2 holds NoneType in 'text', not a text"),
        ('{"text": "\\ud800"}', r"a.jsonl:2 is not Unicode"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"data.path='{path}'; {message}"):
        read(path)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 no")
    table = pyarrow.table({"t": ["a", None], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8.*convert it"):
        read(tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"junk.parquet is not sound Parquet"):
        read(tmp_path / "junk.parquet")
    with pytest.raises(DataError, match=r"only \['t', 'n'\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:2 holds NoneType"):
        read(tmp_path / "a.parquet", text_field="t")


@pytest.mark.parametrize("path", ["{}/none.txt", "{}/*.md", "{}", "nosuch://x/*"])
def test_a_path_without_files_is_refused(tmp_path, path):
    path = path.format(tmp_path)
    with pytest.raises(DataError, match=r"(no file matches|cannot be listed).*; give"):
        read(path)
    with pytest.raises(DataError):
        identity(DataConfig(source="files", path=path))


TFDS = """
import sys, numpy as np, tensorflow_datasets as tfds
class ScaletrainTiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    def _info(self):
        fields = {"body": tfds.features.Text(), "n": np.int64}
        features = tfds.features.FeaturesDict(fields)
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(7):
            yield i, {"body": f"document {i} é", "n": i}
ScaletrainTiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

READ = """
import sys
from scaletrain.config.schema import DataConfig
from scaletrain.data.sources import documents, identity
from scaletrain.errors import DataError
def attempt(path="scaletrain_tiny", **settings):
    data = DataConfig(source="tfds", path=path, **{"text_field": "body", **settings})
    try:
        return identity(data), list(documents(data))
    except DataError as err:
        return str(err)
print(repr([
    attempt(),
    attempt("scaletrain_tiny:1.2.0", split="train[:2]"),
    attempt(text_field="text"),
    attempt(text_field="n"),
    attempt(split="nosuch"),
    attempt("nosuch_data_set"),
    attempt("mnist"),
]))
assert "tensorflow" not in sys.modules
"""


def run_python(code, *arguments, data_dir):
    # Data sets register in a process for good, and TFDS reads its folder's name once.
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"TFDS_DATA_DIR": str(data_dir), "PATH": "", "HOME": str(data_dir)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tfds_is_read_without_tensorflow(tmp_path):
    run_python(TFDS, str(tmp_path), data_dir=tmp_path)
    whole, part, *refused = eval(run_python(READ, data_dir=tmp_path))
    told, found = whole
    assert told[:2] == ["scaletrain_tiny/1.2.0", 7]
    assert sorted(text for _, text in found) == [f"document {i} é" for i in range(7)]
    names = [name for name, _ in found]
    assert names == [f"scaletrain_tiny/1.2.0:{i}" for i in range(7)]
    assert part[1] == found[:2]
    assert part[0] != whole[0]
    field, number, split, name, unprepared = refused
    assert "only ['body', 'n']; set data.text_field" in field
    assert "holds int in 'n', not a text" in number
    assert "data.split='nosuch' cannot be read at random" in split
    assert name.startswith("data.path='nosuch_data_set'; TFDS has no data set")
    assert "it is not prepared; prepare it with" in unprepared
    assert "file_format='array_record'" in unprepared

    info = tmp_path / "scaletrain_tiny" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    other_format = eval(run_python(READ, data_dir=tmp_path))[0]
    assert "cannot be read at random" in other_format
    assert "file_format='array_record'" in other_format
