"""Conversations: rows of messages, written out by a tokenizer's own chat template.

A template comes with a published model and is untrusted code: it runs in a sandbox,
and reaches only the messages and a few functions.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scaletrain.errors import DataError

Message = Mapping[str, Any]  # "role", "content" and other keys that the template reads
Tool = Mapping[str, Any]  # a function that answers may call, in the template's form

# Fields that would change the text of a conversation, but are not given to templates.
_UNREAD = ("system", "functions", "documents", "chat_template_kwargs")
FIELDS = ("messages", "prompt", "completion", "tools", *_UNREAD)


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Returns the conversation in `row`: its messages, or a prompt and its completion.

    A message without content has `content` None.

    Raises:
      DataError: there is no conversation, it has no answer, a message is empty, or
        a part of it would not reach the model.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        raise DataError(
            f"neither messages nor a prompt and a completion that are texts, only "
            f"{sorted(row)}; write messages=[{{role, content}}, ...], or set "
            "data.format=text."
        )
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise DataError(
            "messages is not a list of objects with a role each; "
            "write messages=[{role, content}, ...]."
        )
    if not any(_answers(message) for message in messages):
        roles = ", ".join(m["role"] for m in messages) or "none"
        raise DataError(
            f"no message of role assistant (there are: {roles}), so nothing to learn; "
            "leave the row out."
        )
    if unread := [name for name in _UNREAD if row.get(name)]:
        raise DataError(
            f"{', '.join(unread)} beside the messages would not be read; write it as a "
            "message, or leave it out."
        )
    for place, message in enumerate(messages, start=1):
        _check(place, message)
    # Keys with null are removed, except content: templates ask whether a key exists,
    # and whether content is none.
    empty = {"content": None}
    return [empty | {k: v for k, v in m.items() if v is not None} for m in messages]


def tools_of(row: Mapping[str, Any]) -> list[Tool]:
    """Returns the tools that the conversation in `row` may use.

    Raises:
      DataError: the tools are not a list of objects.
    """
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise DataError(
            "tools is not a list of objects; write tools=[{type, function}, ...], or "
            "leave them out."
        )
    return tools


def _check(place: int, message: Message) -> None:
    """Refuses content that a template would write as a Python object, or not at all."""
    content, named = message.get("content"), f"message {place} ({message['role']})"
    if not isinstance(content, (str, list, type(None))):
        raise DataError(
            f"{named} has content of type {type(content).__name__}; write it as a text."
        )
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{named} has a part of type {kind}; only parts that are texts are "
                "read; write {type: text, text: ...}, or leave the row out."
            )
    if message.get("weight") not in (None, 1):
        raise DataError(
            f"{named} has weight {message['weight']}, and every answer is learned; "
            "leave the weight out, or cut the conversation so that it ends with the "
            "answer to learn."
        )
    more = (v for k, v in message.items() if k not in ("role", "content", "weight"))
    says = _text(message) or any(more)
    if not says and (_answers(message) or content is None):
        raise DataError(f"{named} says nothing; give it content, or leave the row out.")


def _text(message: Message) -> str:
    """Returns the content of a message as one text."""
    content: Any = message.get("content") or ""
    if _in_parts(message):
        return "".join(part["text"] for part in content)
    return content


def _in_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list)


class _NoContent:
    """The content of a message without any: `is none`, and written as nothing."""

    def __str__(self) -> str:
        return ""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _NoContent)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class ChatTemplate:
    """A Jinja template that writes conversations, run as `transformers` runs it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compiles `source`.

        Args:
          source: the template.
          special_tokens: spellings by the names in templates, such as bos_token.

        Raises:
          DataError: not a template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        # Read once, so that midnight gives no conversation two dates.
        now = datetime.datetime.now()
        environment.filters["tojson"] = _to_json
        environment.tests["none"] = _is_none
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now.strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as err:
            raise _failed(err) from err
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        prompt: bool = False,
    ) -> str:
        """Returns `messages` as text, ending where an answer begins if `prompt`.

        Args:
          messages: the conversation, from its first message.
          tools: functions that answers may call.
          prompt: whether the text ends with the header of an answer.

        Raises:
          DataError: the template refuses the messages, or breaks the sandbox's rules.
        """
        try:
            text = self._template.render(
                self._special_tokens,
                messages=[_given(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
            )
            text.encode("utf-8")  # JSON can spell half a surrogate pair
        except Exception as err:  # untrusted code can fail in any way
            raise _failed(err) from err
        return text

    def answers(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and the spans (start, stop) in it that the assistant wrote.

        Raises:
          DataError: the template fails, writes none of the tools, or an answer has no
            place of its own because earlier turns are written differently once there
            are later ones.
        """
        if not self._knows_parts(messages, tools):
            messages = [
                {**m, "content": _text(m)} if _in_parts(m) else m for m in messages
            ]
        text, spans = self.render(messages, tools), []
        if tools and text == self.render(messages):
            raise DataError(
                "the chat template writes no tools; leave them out, or take a "
                "tokenizer whose template does."
            )
        for place, message in enumerate(messages):
            if not _answers(message):
                continue
            before = self.render(messages[:place], tools, prompt=True)
            after = self.render(messages[: place + 1], tools)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"the chat template rewrites earlier turns, so message {place + 1} "
                    "has no place of its own; cut the conversation so that it ends "
                    "with its answer (single turn)."
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _knows_parts(self, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Returns whether the template writes content that is a list of parts."""
        in_parts = [message for message in messages if _in_parts(message)]
        try:
            text = self.render(messages, tools) if in_parts else ""
        except DataError:
            return False
        parts = [part for message in in_parts for part in message["content"]]
        return all(part["text"].strip() in text for part in parts)


class _Generation(Extension):
    """The tag `generation` around an answer, which `transformers` reads; ignored."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _answers(message: Message) -> bool:
    return message["role"] == "assistant"


class _Parts(list):
    """Content in parts, which a template has to read one by one."""

    def __str__(self) -> str:
        raise ValueError("the template writes a list of parts as if it were a text")


def _given(message: Message) -> dict[str, Any]:
    """Returns the form of `message` that templates get."""
    if message.get("content") is None:
        return {**message, "content": _NoContent()}
    if _in_parts(message):
        return {**message, "content": _Parts(message["content"])}
    return dict(message)


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, _NoContent)


def _failed(err: Exception) -> DataError:
    reason = str(err) or type(err).__name__
    return DataError(
        f"the chat template fails: {reason}; "
        "repair the row, or the tokenizer's template."
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns plain JSON; Jinja's own filter escapes it for HTML."""
    # No `cls` and no `default`: json would call an object that the template passes.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_null,
    )


def _null(value: Any) -> None:
    """Returns None, the JSON null, for a message without content."""
    if not isinstance(value, _NoContent):
        raise TypeError(f"{type(value).__name__} is not JSON")
