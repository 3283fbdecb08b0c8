"""Conversations: rows of messages, written out by a tokenizer's own chat template.

A template comes with somebody else's model and is run as what it is, a stranger's
program: sandboxed, with nothing in reach but the messages and a few functions.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scaletrain.errors import DataError

Message = Mapping[str, Any]  # "role", "content" and whatever the template knows


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Returns the conversation in `row`: its messages, or a prompt and its completion.

    Raises:
      DataError: there is none, nobody answers in it, or a message says nothing.
    """
    if row.get("messages") is not None:
        found = row["messages"]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        found = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        raise DataError(
            f"neither messages nor a prompt and a completion that are texts, only "
            f"{sorted(row)}; write messages=[{{role, content}}, ...], or set "
            "data.format=text."
        )
    if not isinstance(found, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in found
    ):
        raise DataError(
            "messages is not a list of objects with a role each; "
            "write messages=[{role, content}, ...]."
        )
    if not any(_answers(message) for message in found):
        roles = ", ".join(m["role"] for m in found) or "none"
        raise DataError(
            f"no message of role assistant (there are: {roles}), so nothing to learn; "
            "leave the row out."
        )
    for place, message in enumerate(found, start=1):
        _check_content(place, message)
    # Parquet fills in what one message has and another lacks; templates ask whether
    # a key is there.
    return [{k: v for k, v in m.items() if v is not None} for m in found]


def _check_content(place: int, message: Message) -> None:
    """Refuses what a template would write as Python spells it, or as nothing."""
    content, named = message.get("content"), f"message {place} ({message['role']})"
    if not isinstance(content, (str, list, type(None))):
        raise DataError(
            f"{named} has content of type {type(content).__name__}; write it as a text."
        )
    says = any(value for key, value in message.items() if key != "role")
    if not says and (_answers(message) or content is None):
        raise DataError(f"{named} says nothing; give it content, or leave the row out.")


class ChatTemplate:
    """A Jinja template that writes conversations, run as `transformers` runs it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compiles `source`.

        Args:
          source: the template.
          special_tokens: what it may call by name, such as bos_token.

        Raises:
          DataError: not a template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        # One moment, so that midnight does not part a conversation from its prefix.
        now = datetime.datetime.now()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now.strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as err:
            raise _failed(err) from err
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Returns `messages` as text, ending where an answer begins if `prompt`.

        Raises:
          DataError: the template refuses, or reaches for what it may not.
        """
        try:
            text = self._template.render(
                self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
            text.encode("utf-8")  # JSON can spell half a surrogate pair
        except Exception as err:  # a stranger's program can fail in any way
            raise _failed(err) from err
        return text

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the whole text, and from where to where the assistant wrote it.

        Raises:
          DataError: the template fails, or an answer has no place of its own because
            earlier turns are written differently once there are later ones.
        """
        whole, spans = self.render(messages), []
        for place, message in enumerate(messages):
            if not _answers(message):
                continue
            before = self.render(messages[:place], prompt=True)
            after = self.render(messages[: place + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the chat template rewrites earlier turns, so message {place + 1} "
                    "has no place of its own; cut the conversation so that it ends "
                    "with its answer (single turn)."
                )
            spans.append((len(before), len(after)))
        return whole, spans


class _Generation(Extension):
    """Marks of an answer, for which `transformers` has a use and nobody here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _answers(message: Message) -> bool:
    return message["role"] == "assistant"


def _failed(err: Exception) -> DataError:
    what = str(err) or type(err).__name__
    return DataError(
        f"the chat template fails: {what}; repair the row, or the tokenizer's template."
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
    """Returns JSON as it is; Jinja's own filter escapes it for HTML."""
    # No `cls` or `default`: json would call what the template hands it.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
