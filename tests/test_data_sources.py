"""Documents: where they come from, in which order, and what is refused."""

import gzip
import io
import json
import lzma
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from scaletrain.config.schema import DataConfig
from scaletrain.data.sources import Document, documents, identity
from scaletrain.data.tokenise import split_of
from scaletrain.data.tokenizers import read_tokenizer
from scaletrain.errors import DataError


def read(path, **settings):
    return list(documents(DataConfig(source="files", path=str(path), **settings)))


def read_all(data):
    return list(documents(data))


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


def test_links_to_files_are_read_as_the_files_are(tmp_path):
    blob = lines(tmp_path / "blob", {"text": "linked"})
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines(corpus / "a.jsonl", {"text": "real"})
    (corpus / "b.jsonl").symlink_to("../blob")
    assert read(corpus / "*.jsonl") == [("a.jsonl:1", "real"), ("b.jsonl:1", "linked")]
    data = DataConfig(source="files", path=f"{corpus}/*.jsonl")
    before = identity(data)
    os.utime(blob, (0, 0))
    assert identity(data) != before
    blob.unlink()
    with pytest.raises(
        DataError, match=r"b.jsonl cannot be read: .*; make it readable"
    ):
        read(corpus / "*.jsonl")


@pytest.mark.parametrize("kind", ["folder", "link", "socket"])
def test_a_match_that_is_not_read_is_refused_by_name(tmp_path, kind):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("b")
    match = tmp_path / "corpus" / "more"
    if kind == "folder":
        (tmp_path / "more").rename(match)
        assert [d.name for d in read(tmp_path / "corpus/**")] == ["a.txt", "more/b.txt"]
    elif kind == "link":
        match.symlink_to(tmp_path / "more")
        with pytest.raises(
            DataError, match=r"corpus/more is a folder.*; name its files"
        ):
            read(tmp_path / "corpus/**")
    else:
        with socket.socket(socket.AF_UNIX) as place:
            place.bind(str(match))
    with pytest.raises(DataError, match=r"corpus/more is (a folder|neither).*; "):
        read(tmp_path / "corpus/*")
    assert [document.text for document in read(tmp_path / "corpus/*.txt")] == ["a"]


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "[y-z]/*"])
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch, pattern):
    for name in ("x", "y", "z/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    local = fsspec.filesystem("file")
    ls = type(local).ls

    def guarded(self, path, *args, **kwargs):
        if str(path).rstrip("/").endswith("/y"):
            raise PermissionError(13, "Permission denied", str(path))
        return ls(self, path, *args, **kwargs)

    monkeypatch.setattr(type(local), "ls", guarded)
    with pytest.raises(DataError, match=r"cannot be listed: .*denied: '.*/y/?'"):
        read(tmp_path / pattern)
    assert [document.text for document in read(tmp_path / "x/*.txt")] == ["x"]


def test_a_json_file_is_an_array_or_lines(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    expected = [("a.json:1", "one"), ("a.json:2", "two")]
    path = tmp_path / "a.json"
    for content in (json.dumps(rows), "\ufeff\n " + json.dumps(rows, indent=2)):
        path.write_text(content)
        assert read(path) == expected
    assert read(lines(path, *rows)) == expected
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert [d.text for d in read(tmp_path / "a.json.gz")] == ["one", "two"]
    path.rename(tmp_path / "a.ndjson")
    assert [d.text for d in read(tmp_path / "a.ndjson")] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "text": "x"\n}', r"a.json:1 is not JSON.*, or one array of objects"),
        ('[{"text": "x"}', r"a.json is not JSON.*; write one array of objects"),
        ('["x"]', r"a.json:1 has no field data.text_field='text', only str"),
        ('{"data": [{"text": "x"}]}', r"a.json:1 has no field .* only \['data'\]"),
    ],
)
def test_a_json_file_of_anything_else_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


def test_tables_in_csv_are_documents(tmp_path):
    text = 'one, "quoted"\r\ntwo é' + "x" * 200_000
    quoted = text.replace('"', '""')
    path = tmp_path / "a.csv"
    path.write_bytes(f'\ufeffn,body\r\n1,"{quoted}"\r\n\r\n2,three\r\n'.encode())
    expected = [("a.csv:1", text), ("a.csv:2", "three")]
    assert read(path, text_field="body") == expected
    (tmp_path / "a.tsv").write_text("n\tbody\n1\ta, b\n")
    assert read(tmp_path / "a.tsv", text_field="body") == [("a.tsv:1", "a, b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n,body\n1,x\n", r"has no field data.text_field='text', only \['n', 'body'"),
        (b"n,text\n1\n", r"is not sound CSV: row 1 has 1 values for 2 columns"),
        (b"text,text\n1,2\n", r"is not sound CSV: two columns have one name"),
        (b'text\n"x', r"is not sound CSV: unexpected end of data"),
        (b"text\n\xe9\n", r"is not sound CSV: 'utf-8' codec"),
    ],
)
def test_csv_that_is_not_understood_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"a.csv {message}"):
        read(tmp_path / "a.csv")


def test_texts_and_programs_are_read_and_other_suffixes_refused(tmp_path):
    known = ["a.txt", "b.md", "c.py", "d.rst", "e.html", "f.CC", "wiki_00", "g.rs.gz"]
    for name in known:
        content = name.encode()
        (tmp_path / name).write_bytes(
            gzip.compress(content) if name.endswith(".gz") else content
        )
    assert sorted(d.text for d in read(tmp_path / "*")) == sorted(known)
    for name in ("h.docx", "i.arrow", "j.jsonl.sz"):
        (tmp_path / name).write_text("text?")
    with pytest.raises(
        DataError, match=r"the suffix of h.docx, i.arrow, j.jsonl.sz is not.*\.txt"
    ):
        identity(DataConfig(source="files", path=f"{tmp_path}/*"))
    (tmp_path / "core").write_bytes(b"ELF\0\1")
    with pytest.raises(DataError, match="core has no suffix and no text in it"):
        read(tmp_path / "core")


def test_archives_of_several_files_are_refused_with_a_path_that_reads_them(tmp_path):
    names = ["0.jsonl", "1.jsonl"]
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        for name in names:
            archive.writestr(name, json.dumps({"text": name}))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        for name in names:
            content = json.dumps({"text": name}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "c.tgz").write_bytes((tmp_path / "b.tar.gz").read_bytes())
    with pytest.raises(DataError, match="c.tgz is an archive of .* files; unpack it"):
        read(tmp_path / "c.tgz")
    for name in ("a.jsonl.zip", "b.tar.gz"):
        with pytest.raises(DataError, match="is an archive of several files") as err:
            read(tmp_path / name)
        path = str(err.value).split("set data.path='")[1].removesuffix("'.")
        assert [document.text for document in read(path)] == names


def test_an_archive_of_one_file_is_read_as_that_file(tmp_path):
    path = tmp_path / "a.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/x", '{"text": "one"}')
    assert read(path) == [("a.jsonl.zip:1", "one")]
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(DataError, match="a.jsonl.zip is an empty archive; leave it"):
        read(path)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "lzma", "zip"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_a_file_that_is_not_compressed_as_it_says_is_named(tmp_path, kind, suffix):
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(b'{"text": "not compressed at all"}\n')
    with pytest.raises(DataError, match=rf"{path.name} .*; [^\n]*leave it out\.$"):
        read(path)


def test_what_is_cut_short_is_named(tmp_path):
    content = lzma.compress(b'{"text": "one"}\n' * 99)
    (tmp_path / "a.jsonl.xz").write_bytes(content[:-20])
    table = pyarrow.table({"text": ["one"] * 99})
    parquet.write_table(table, tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(b"\0" * 40 + whole[40:])
    for name in ("a.jsonl.xz", "b.parquet"):
        with pytest.raises(DataError, match=f"{name} [^\n]*; .*leave it out"):
            read(tmp_path / name)


def test_a_compression_without_its_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    for suffix in ("zst", "lz4"):
        path = tmp_path / f"a.txt.{suffix}"
        path.write_bytes(b"all text, as it happens")
        with pytest.raises(DataError, match=r"nothing here unpacks .*; pip install"):
            read(path)


@pytest.mark.parametrize("method", ["info", "glob", "open"])
def test_errors_of_any_file_system_are_one_line(tmp_path, monkeypatch, method):
    """Those of clouds and hubs derive from no class that is known here."""

    class Unreachable(Exception):
        pass

    def unreachable(self, *args, **kwargs):
        raise Unreachable("no route\n  to host")

    (tmp_path / "a.txt").write_text("x")
    local = type(fsspec.filesystem("file"))
    monkeypatch.setattr(local, method, unreachable)
    data = DataConfig(source="files", path=f"{tmp_path}/*.txt")
    with pytest.raises(DataError, match=r"; .*cannot be .*: no route to host; "):
        (identity if method == "info" else read_all)(data)


def test_a_tokenizer_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise Exception("no route to host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", unreachable)
    data = DataConfig(tokenizer="memory://tokenizer.json")
    with pytest.raises(DataError, match="it cannot be read: no route to host; give"):
        read_tokenizer(data)


def test_a_file_name_may_be_any_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("two")
    (document,) = read(tmp_path / "*")
    assert document == (name, "two")
    assert {split_of(name, fraction) for fraction in (0.0, 1.0)} == {
        "train",
        "validation",
    }


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
