"""Conversations: what a template writes, what is learned of it, and what is refused."""

import datetime
import json
import pickle
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from scaletrain import data
from scaletrain.config import rules
from scaletrain.config.schema import DataConfig, ModelConfig, RunConfig
from scaletrain.data import cache, sources, tokenizers
from scaletrain.data.blocks import Stream
from scaletrain.data.chats import ChatTemplate, messages_of, tools_of
from scaletrain.data.sequences import blank
from scaletrain.data.tokenise import split_of
from scaletrain.data.tokenizers import JsonTokenizer
from scaletrain.errors import DataError

CHATML = """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\n' }}\
{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}\
{% endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls | tojson }}
    {%- endif %}
    {{- message.content | trim + '<|eot_id|>' }}
    {%- if loop.index == 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama": ["<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TURNS = [
    {"role": "system", "content": "Be short."},
    user(" 1 + 1? <|im_end|>\n"),
    assistant("  zwei für ü  "),
    user("<b> & 'c'"),
    assistant("\n\nno", tool_calls=[{"f": "<ü>"}]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folder of each model, written as one downloads it."""
    found = {}
    for name, template in (("chatml", CHATML), ("llama", LLAMA)):
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL[name],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator([CHATML, "zwei für ü"] * 9, trainer)
        library.post_processor = processors.ByteLevel(trim_offsets=True)
        config: dict[str, Any] = {"eos_token": SPECIAL[name][-1]}
        folder = found[name] = tmp_path_factory.mktemp(name)
        library.save(str(folder / "tokenizer.json"))
        if name == "llama":
            config |= {"bos_token": {"content": "<|bos|>"}, "chat_template": "old"}
            (folder / "chat_template.jinja").write_text(template)
        else:
            named = [("tool_use", "no"), ("default", template)]
            listed = [{"name": n, "template": t} for n, t in named]
            config["chat_template"] = listed
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture
def given(folders) -> Any:
    def make(name):
        return tokenizers.read_tokenizer(
            DataConfig(tokenizer=str(folders[name] / "tokenizer.json"))
        )

    return make


def test_chatml_is_written_and_its_answers_are_marked(given):
    tokenizer = given("chatml")
    ids, answers = tokenizer.chat(TURNS)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n 1 + 1? <|im_end|>\n<|im_end|>\n"
        "<|im_start|>assistant\n  zwei für ü  <|im_end|>\n"
        "<|im_start|>user\n<b> & 'c'<|im_end|>\n"
        "<|im_start|>assistant\n\n\nno<|im_end|>\n"
    )
    learned = tokenizer.decode(ids[answers])
    assert learned == "  zwei für ü  <|im_end|>\n\n\nno<|im_end|>\n"
    assert (ids.dtype, answers.dtype) == (np.int32, bool)
    # A special token is one wherever it is spelled, as transformers has it.
    assert np.count_nonzero(ids == 0) == 5
    assert np.count_nonzero(ids == 1) == 6
    assert tokenizer.end_id == 1


def test_llama_is_written_and_its_answers_are_marked(given):
    tokenizer = given("llama")
    ids, answers = tokenizer.chat(TURNS[1:])
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert tokenizer.decode(ids) == (
        f"<|bos|>{head('user')}1 + 1? <|im_end|><|eot_id|>"
        f"{head('assistant')}zwei für ü<|eot_id|>"
        f"{head('user')}<b> & 'c'<|eot_id|>"
        f'{head("assistant")}[{{"f": "<ü>"}}]no<|eot_id|>'
    )
    learned = tokenizer.decode(ids[answers])
    assert learned == 'zwei für ü<|eot_id|>[{"f": "<ü>"}]no<|eot_id|>'


def test_a_token_answers_if_its_first_character_does(given):
    tokenizer = given("chatml")
    text, spans = tokenizer._chat_template.answers([user("x"), assistant(" fürfür ü")])
    ids, answers = tokenizer.chat([user("x"), assistant(" fürfür ü")])
    place, start = 0, spans[0][0]
    for token, answered in zip(ids.tolist(), answers, strict=True):
        spelled = len(tokenizer.decode([token]).encode())
        if "\ufffd" not in tokenizer.decode([token]):
            assert answered == (len(text.encode()[:place].decode()) >= start)
        else:
            spelled = 1
        place += spelled
    assert place == len(text.encode())


def test_a_token_that_begins_before_the_answer_is_none(folders):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    content = (folders["chatml"] / "tokenizer.json").read_text()
    files = {"chat_template.jinja": template.encode()}
    tokenizer = JsonTokenizer(content, "<|im_end|>", files)
    assert len(tokenizer.encode_batch([" message"])[0]) == 1
    ids, answers = tokenizer.chat([user("x"), assistant("message zwei"), user("x")])
    assert tokenizer.decode(ids) == "user: x assistant: message zwei user: x "
    learned = tokenizer.decode(ids[answers])
    assert learned.rstrip() == " zwei"  # its last space may begin " user"


def test_the_template_sees_what_transformers_gives_it():
    template = ChatTemplate(
        "{{ eos_token }}|{{ tools is none }}|{{ documents is none }}|{{ bos_token }}|"
        "{{ strftime_now('%Y') }}|{{ {'b': 'ä<', 'a': 1} | tojson(indent=1) }}|"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
        {"eos_token": "</s>"},
    )
    year = str(datetime.datetime.now().year)
    assert template.render([]) == (
        f'</s>|True|True||{year}|{{\n "b": "ä<",\n "a": 1\n}}|{{"a": 2, "b": 1}}'
    )


MALICIOUS = [
    '{{ "".__class__.__mro__ }}',
    '{{ "".__class__.__base__.__subclasses__() }}',
    '{{ ""|attr("__class__")|attr("__mro__") }}x{{ (""|attr("__class__")).mro() }}',
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__.__globals__ }}",
    '{{ "{0.__class__.__mro__}".format(1) }}',
    '{{ "{m.__class__.__mro__}".format_map({"m": 1}) }}',
    "{{ (messages|map(attribute='__class__')|first).__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ {} | tojson(cls=joiner) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10**9) %}{% endfor %}",
]


@pytest.mark.parametrize("source", MALICIOUS)
def test_a_template_reaches_nothing_outside(source):
    messages = [user("x")]
    with pytest.raises(DataError, match="the chat template fails: .*; repair"):
        ChatTemplate(source, {}).render(messages)
    assert messages == [user("x")]


def test_a_class_a_template_names_is_spelled_as_nothing():
    assert ChatTemplate('[{{ "".__class__ }}]', {}).render([]) == "[]"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    source = (
        "{% for m in messages %}{{ m.role[0] + ':' }}"
        "{{ m.content if loop.last or m.role == 'user' else '...' }};{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    template = ChatTemplate(source, {})
    one = [user("1"), assistant("2")]
    assert template.answers(one) == ("u:1;a:2;", [(6, 8)])
    with pytest.raises(DataError, match=r"rewrites earlier.*message 2.*single turn"):
        template.answers([*one, user("3"), assistant("4")])
    with pytest.raises(DataError, match=r"message 2 has no place"):
        ChatTemplate(source.replace("'a:'", "'b:'"), {}).answers(one)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path, folders):
    def make(path, name="chatml", seq_len=64, **settings):
        defaults = {
            "source": "files",
            "path": str(path),
            "format": "chat",
            "tokenizer": str(folders[name] / "tokenizer.json"),
            "validation_fraction": 0.0,
            "cache_dir": str(tmp_path / "cache"),
        }
        config = DataConfig(**(defaults | settings))
        model = ModelConfig(vocab_size=400)
        return RunConfig(model=model, seq_len=seq_len, data=config)

    return make


def prepared(run) -> Any:
    return data.prepare(run, lambda line: None)


GOOD = {"messages": TURNS}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"neither messages nor a prompt.*only \['text'\]; write mess"),
        ({"prompt": "x", "completion": 3}, r"neither messages nor a prompt"),
        ({"messages": "x"}, r"not a list of objects with a role each; write"),
        ({"messages": ["x"]}, r"not a list of objects with a role each; write"),
        ({"messages": [{"content": "x"}]}, r"not a list of objects with a role"),
        ({"messages": []}, r"no message of role assistant \(there are: none\)"),
        ({"messages": [user("x")]}, r"no message of role assistant \(there are: user"),
        ({"messages": [user("x"), assistant("")]}, r"message 2 \(assistant\) says no"),
        (
            {"messages": [user("x"), assistant(None)]},
            r"message 2 \(assistant\) says no",
        ),
        (
            {"messages": [{"role": "user"}, assistant("x")]},
            r"message 1 \(user\) says n",
        ),
        ({"messages": [user("x"), assistant(5)]}, r"message 2 .* content of type int"),
        (
            {"messages": [user({}), assistant("x")]},
            r"message 1 .* content of type dict",
        ),
        (
            {"messages": [{"role": "tool", "content": ""}, assistant("x")]},
            "the chat template fails: no role tool; repair the row",
        ),
        (
            {"prompt": "\ud800", "completion": "x"},
            r"surrogates not allowed; repair the row",
        ),
        (["x"], r"holds list, not an object; write one JSON"),
    ],
)
def test_bad_rows_are_refused_by_name(run, tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"a.jsonl:2.*{message}"):
        prepared(run(path, "llama"))


def test_a_tokenizer_without_a_template_is_refused(run, tmp_path, folders):
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((folders["chatml"] / "tokenizer.json").read_bytes())
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"a.jsonl:1; .* no chat template; put the"):
        prepared(run(path, tokenizer=str(bare), end_of_text="<|im_end|>"))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"a.jsonl:1; the chat template fails: "):
        prepared(run(path, tokenizer=str(bare), end_of_text="<|im_end|>"))


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


TRIMMED = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }};{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
BY_PART = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (TRIMMED, "u:How far?;a:Two miles.;"),
        (
            TRIMMED.replace("m.content | trim", "m.content + ''"),
            "u:How far?;a:Two miles.;",
        ),
        (BY_PART, "u:<How ><far?>;a:<Two miles.>;"),
        # Content that is no text is nothing to this one.
        (BY_PART.replace("<{{ p.text }}>", ""), "u:How far?;a:Two miles.;"),
    ],
)
def test_content_in_parts_is_written_as_the_template_knows_it(source, text):
    row = {"messages": [user(parts("How ", "far?")), assistant(parts("Two miles."))]}
    written, spans = ChatTemplate(source, {}).answers(messages_of(row))
    assert written == text
    (answer,) = [written[start:stop] for start, stop in spans]
    assert answer == text.split("a:")[1]


@pytest.mark.parametrize("given", [{"content": None}, {}])
def test_a_message_without_content_is_none_to_its_template(given):
    call = {"role": "assistant", **given, "tool_calls": [{"name": "f"}]}
    (message,) = messages_of({"messages": [call]})
    source = (
        "{{ messages[0].content is none }}{{ messages[0].content is not none }}"
        "{{ messages[0].content == none }}{{ messages[0].content is string }}"
        "{{ 'content' in messages[0] }}|{{ messages[0].content }}"
        "{{ messages[0].content | trim }}{{ messages[0].content ~ '' }}"
        "{% if messages[0].content %}no{% endif %}|{{ messages[0].content | tojson }}"
    )
    assert ChatTemplate(source, {}).render([message]) == (
        "TrueFalseTrueFalseTrue||null"
    )


def test_tools_are_given_to_the_template_or_refused():
    row = GOOD | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    source = "{% if tools %}{{ tools | tojson }};{% endif %}" + TRIMMED
    text, spans = ChatTemplate(source, {}).answers(messages_of(row), tools_of(row))
    assert text.startswith(json.dumps(row["tools"]) + ";s:Be short.;")
    assert [text[a:b] for a, b in spans] == ["zwei für ü;", "no;"]
    for none in ({}, {"tools": None}, {"tools": []}):
        plain = ChatTemplate(source, {}).answers(messages_of(GOOD), tools_of(none))
        assert plain == ChatTemplate(TRIMMED, {}).answers(TURNS)
    with pytest.raises(DataError, match="template writes no tools; leave them out"):
        ChatTemplate(TRIMMED, {}).answers(messages_of(row), tools_of(row))


def test_rows_are_the_same_whatever_file_they_come_from(run, tmp_path, folders):
    """Parquet gives all structs of a column all its keys."""
    (tmp_path / "chat_template.jinja").write_text(
        "{{ tools | tojson }}" + TRIMMED.replace("m.content | trim", "m | tojson")
    )
    content = (folders["chatml"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)

    def turns(name, **given):
        call = {"function": {"name": name, "arguments": given}}
        messages = [user(name), assistant(None, tool_calls=[call]), assistant("x")]
        tools = [{"name": name, "parameters": dict.fromkeys(given, "string")}]
        return {"messages": messages, "tools": tools}

    rows = [turns("weather", city="Ulm"), turns("clock", zone="CET")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tokenizer, kinds = str(tmp_path / "tokenizer.json"), ("jsonl", "parquet", "json")
    found = {
        prepared(
            run(tmp_path / f"a.{kind}", tokenizer=tokenizer, end_of_text="<|im_end|>")
        ).fingerprint
        for kind in kinds
    }
    assert len(found) == 1


def test_a_map_of_parquet_is_an_object(run, tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    fields = {"role": pyarrow.string(), "content": pyarrow.string(), "given": kind}
    messages = pyarrow.list_(pyarrow.struct(list(fields.items())))
    rows = [{"messages": [assistant("x", given={"city": "Ulm"})]}]
    schema = pyarrow.schema([("messages", messages)])
    table = pyarrow.Table.from_pylist(rows, schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    data_of = DataConfig(source="files", path=f"{tmp_path}/*.parquet", format="chat")
    assert [row.fields["messages"] for row in sources.rows(data_of)] == [
        rows[0]["messages"]
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user([{"type": "image", "url": "x"}]), assistant("y")]},
            r"message 1 \(user\) has a part of type image; only parts that are texts",
        ),
        ({"messages": [user(["x"]), assistant("y")]}, "has a part of type str"),
        ({"messages": [user("x"), assistant(parts(""))]}, r"message 2 .* says nothing"),
        (
            {"messages": [user("x"), assistant("y", weight=0), assistant("z")]},
            r"message 2 \(assistant\) has weight 0, and every answer is learned",
        ),
        (
            GOOD | {"system": "Be brief."},
            "system beside the messages would not be read",
        ),
        (GOOD | {"documents": [{"text": "x"}]}, "documents beside the messages would"),
        (GOOD | {"tools": "[]"}, "tools is not a list of objects; write tools="),
        (GOOD | {"tools": [{"name": "f"}]}, "the chat template writes no tools; leave"),
    ],
)
def test_what_would_not_reach_the_model_is_refused(run, tmp_path, row, message):
    with pytest.raises(DataError, match=rf"a.jsonl:2; .*{message}"):
        prepared(run(write(tmp_path / "a.jsonl", GOOD, row)))


def test_files_without_rows_are_refused(run, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a.txt has no rows; write conversations"):
        prepared(run(tmp_path / "a.txt"))
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has neither messages.*\['text'\]"):
        prepared(run(tmp_path / "a.parquet"))


def test_parquet_jsonl_and_instructions_are_the_same_conversations(run, tmp_path):
    rows = [
        {"messages": [user("x"), assistant("y", tool_calls=["f"])]},
        {"messages": [user("für"), assistant("zwei")]},
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    first = prepared(run(write(tmp_path / "a.jsonl", *rows), "llama"))
    other = prepared(run(tmp_path / "a.parquet", "llama"))
    assert first.fingerprint == other.fingerprint
    pair = {"prompt": "für", "completion": "zwei"}
    assert messages_of(pair) == rows[1]["messages"]
    plain = prepared(run(write(tmp_path / "b.jsonl", rows[0], pair), "llama"))
    assert plain.fingerprint == first.fingerprint
    table = pyarrow.Table.from_pylist([pair])
    parquet.write_table(table, tmp_path / "b.parquet")
    assert prepared(run(tmp_path / "b.parquet")).splits["train"].num_documents == 1


def conversations(number):
    rng = np.random.default_rng(0)
    found = []
    for size in rng.integers(1, 60, number):
        turns = [user("?" * int(rng.integers(1, 40))), assistant("für " * int(size))]
        found.append({"messages": turns * int(rng.integers(1, 3))})
    # One whose only answer is far away, between others.
    found.insert(3, {"messages": [user("1 2 " * 400), assistant("x")]})
    return found


def naive_windows(tokenizer, rows, seq_len):
    """Returns the windows, filled one conversation after another."""
    windows, left = [], 0
    for row in rows:
        ids, answers = (a.tolist() for a in tokenizer.chat(row["messages"]))
        ids, answers = ids[: seq_len + 1], answers[: seq_len + 1]
        if not any(answers[1:]):
            continue
        if len(ids) - 1 > left:
            windows.append([])
            left = seq_len
        windows[-1].append((ids, answers))
        left -= len(ids) - 1
    return windows


@pytest.mark.parametrize("seq_len", [20, 64, 500])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_are_whole_conversations(run, tmp_path, given, split, seq_len):
    rows = conversations(40)
    path = write(tmp_path / "a.jsonl", *rows)
    settings = run(path, seq_len=seq_len, validation_fraction=0.4)
    corpus = prepared(settings)
    found = data.sequences(corpus, split, settings)
    mine = [
        row
        for number, row in enumerate(rows, start=1)
        if split_of(f"a.jsonl:{number}", 0.4) == split
    ]
    windows = naive_windows(given("chatml"), mine, seq_len)
    assert len(found) == len(windows)
    assert found.split is None
    for index, window in enumerate(windows):
        expected = blank(seq_len)
        place = 0
        for segment, (ids, answers) in enumerate(window, start=1):
            for offset in range(len(ids) - 1):
                expected["tokens"][place] = ids[offset]
                expected["targets"][place] = ids[offset + 1]
                expected["segments"][place] = segment
                expected["positions"][place] = offset
                expected["weights"][place] = 1.0 if answers[offset + 1] else 0.0
                place += 1
        example = found[index]
        for name, values in expected.items():
            assert example[name].dtype == values.dtype
            assert example[name].tolist() == values.tolist()
        assert example["weights"].sum() > 0
        whole = corpus.splits[split]
        stream = Stream(whole.path, whole.num_tokens, whole.dtype)
        for (ids, _), begin in zip(window, found.documents(index), strict=True):
            tokens = stream.window(begin, begin + len(ids)) & (2**31 - 1)
            assert tokens.tolist() == ids
    for index in (-1, len(found)):
        with pytest.raises(IndexError):
            found[index]
    copy = pickle.loads(pickle.dumps(found))
    assert copy[0]["tokens"].tolist() == found[0]["tokens"].tolist()


def test_conversations_that_are_answered_too_late_are_refused(run, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "x" * 99, "completion": "y"})
    long, short = run(path, seq_len=200), run(path, seq_len=20)
    corpus = prepared(long)
    assert len(data.sequences(corpus, "train", long)) == 1
    assert len(data.sequences(corpus, "validation", long)) == 0
    with pytest.raises(DataError, match=r"seq_len=20; none of the 1 conv.*; raise seq"):
        data.sequences(corpus, "train", short)


def test_a_window_that_ends_with_the_first_answered_token_is_kept(run, tmp_path, given):
    row = {"prompt": "1 2 3", "completion": "zwei"}
    _, answers = given("chatml").chat(messages_of(row))
    first = int(np.argmax(answers))
    path = write(tmp_path / "a.jsonl", row)
    just, short = run(path, seq_len=first), run(path, seq_len=first - 1)
    found = data.sequences(prepared(just), "train", just)
    assert len(found) == 1
    assert found[0]["weights"].tolist() == [0.0] * (first - 1) + [1.0]
    with pytest.raises(DataError, match="is answered within it"):
        data.sequences(prepared(short), "train", short)


def test_conversations_are_kept_and_damage_is_seen(run, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", *conversations(12))
    settings = run(path, validation_fraction=0.3)
    lines = []
    corpus = data.prepare(settings, lines.append)
    assert "tokenised 13 conversations into 0.0" in lines[-1]
    assert data.baselines(corpus, corpus.splits["validation"]) == {}
    assert corpus.splits["validation"].num_documents > 0
    tokenise = cache.tokenise
    monkeypatch.setattr(cache, "tokenise", None)
    again = prepared(settings)
    assert (again.fingerprint, again.splits) == (corpus.fingerprint, corpus.splits)
    starts = corpus.splits["train"].path.with_suffix(".starts.npy")
    values = np.load(starts)
    assert values.dtype == np.int64
    assert values[0] == 0
    assert values[-1] == corpus.splits["train"].num_tokens
    np.save(starts, values * 2)
    with pytest.raises(DataError, match=r"damaged: its starts are.*; delete"):
        data.sequences(corpus, "train", settings)
    starts.write_bytes(b"x" * starts.stat().st_size)
    with pytest.raises(DataError, match=r"starts.npy; damaged: .*; delete"):
        data.sequences(corpus, "train", settings)
    starts.unlink()
    monkeypatch.setattr(cache, "tokenise", tokenise)
    assert prepared(settings).fingerprint == corpus.fingerprint
    assert starts.exists()


def test_where_conversations_end_is_part_of_the_fingerprint(run, tmp_path, folders):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    content = (folders["chatml"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    found = set()
    for name, cut in (("a", 1), ("b", 2)):
        parts = ["x", "y", "z"]
        rows = [
            {"messages": [assistant(part) for part in parts[:cut]]},
            {"messages": [assistant(part) for part in parts[cut:]]},
        ]
        settings = run(
            write(tmp_path / f"{name}.jsonl", *rows),
            tokenizer=str(tmp_path / "tokenizer.json"),
        )
        found.add(prepared(settings).fingerprint)
    assert len(found) == 2


def test_the_format_is_part_of_the_key(run, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD | {"text": "x" * 99})
    chat = prepared(run(path))
    text = prepared(run(path, format="text"))
    assert chat.splits["train"].path.parent != text.splits["train"].path.parent
    assert (chat.splits["train"].dtype, text.splits["train"].dtype) == (
        "uint32",
        "uint16",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "tfds"}, "data.source=tfds; data.format=chat reads rows of .jsonl"),
        ({"tokenizer": "bytes"}, "data.tokenizer=bytes; it has no chat template for"),
        ({"tokenizer": "a.model"}, "data.tokenizer=a.model; it has no chat template"),
        (
            {"text_field": "body"},
            "data.text_field='body'; no effect with data.format=chat; leave it at "
            "'text', or set data.format to text.",
        ),
        ({"format": "chats"}, "data.format='chats'; unknown; pick one of text, chat."),
    ],
)
def test_settings_that_conversations_cannot_honour(run, settings, message):
    assert rules.problems(run("a.jsonl")) == []
    (problem,) = rules.problems(run("a.jsonl", **settings))
    assert problem.startswith(message)


def test_the_template_is_part_of_the_fingerprint(folders):
    content = (folders["chatml"] / "tokenizer.json").read_text()
    config = json.loads((folders["chatml"] / "tokenizer_config.json").read_bytes())
    found = []
    for change in ({}, {"chat_template": "x"}, {"chat_template": None}, {"a": 1}):
        files = {"tokenizer_config.json": json.dumps(config | change).encode()}
        found.append(JsonTokenizer(content, "", files).fingerprint)
    assert len(set(found)) == 3
    assert found[0] == found[3]
    bare = JsonTokenizer(content, "<|im_end|>")
    assert bare.fingerprint == found[2]
