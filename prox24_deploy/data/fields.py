"""Which columns of records hold the text and its target, and what a chat becomes as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.foreign import blamed
from prox24_deploy.data.text_files import Record

_KINDS = {list: "list", dict: "object"}
_TEXT, _CHAT, _TARGET = "text", "messages", "target"

Chat = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Where texts stand in the records of a file.

    Attributes:
        text: the column of texts or of chats; None takes "text", then "messages", then the only
            one that there is.
        target: the column of what a decoder should write; None takes "target" where it is there.
        chat: from the messages of a chat to a text; None where the model has no such form.
    """

    text: str | None = None
    target: str | None = None
    chat: Callable[[Chat], str] | None = None

    def columns(self, where: str, names: Sequence[str]) -> tuple[str, str | None]:
        """The columns of text and target among all names, without a target None.

        Raises:
            CalibrationError: one that was asked for is not there, or nothing tells which to take.
        """
        listed = ", ".join(repr(str(name)) for name in names) or "none at all"
        for option, name in (("--column", self.text), ("--target-column", self.target)):
            if name is not None and name not in names:
                raise CalibrationError(
                    f"{where} has no column {name!r} but {listed}; pass one of them as {option}."
                )
        known = [name for name in (self.text, _TEXT, _CHAT) if name is not None and name in names]
        if not known and len(names) != 1:
            raise CalibrationError(
                f"{where} has the columns {listed}; say which holds the text with --column NAME."
            )
        text = [*known, *names][0]
        return text, self.target or (_TARGET if _TARGET in names and text != _TARGET else None)

    def wanted(self, where: str, names: Sequence[str]) -> list[str]:
        """The same as a list of the columns to be read."""
        return [name for name in self.columns(where, names) if name is not None]

    def read(self, path: Path, record: Record) -> tuple[str, object]:
        """Text and target of a record, None without a target.

        Raises:
            CalibrationError: the record has no text there, or a chat that cannot become one.
        """
        where = f"{path} {record.where}"
        if record.unit == "paragraph" or isinstance(record.value, str):
            return record.value, None
        fields = record.value if isinstance(record.value, dict) else {_TEXT: record.value}
        column, target = self.columns(where, list(fields))
        value = fields[column]
        if isinstance(value, list) and value and all(map(_is_message, value)):
            value = self._as_text(value, where)
        if isinstance(value, list | dict) and column not in {self.text, _TEXT, _CHAT}:
            raise CalibrationError(
                f'{where} has no text under "{column}" but a {_KINDS[type(value)]}; expected '
                f'records such as {{"text": "..."}}, one on each line or in one list that nothing '
                "is around; write them so."
            )
        if not isinstance(value, str):
            raise CalibrationError(
                f'{where} has no string "{column}"; expected {{"{column}": "..."}} per '
                f'{record.unit}, or a chat of messages with "role" and "content".'
            )
        return value, fields[target] if target else None

    def _as_text(self, messages: Chat, where: str) -> str:
        if self.chat is None:
            raise CalibrationError(
                f"{where} is a chat, and the tokenizer of the model has no chat template; pass "
                "texts, or the model whose tokenizer has one."
            )
        for number, message in enumerate(messages, start=1):
            # A call of a tool may stand in its place.
            if message["content"] is None and not message.get("tool_calls"):
                raise CalibrationError(
                    f'{where} has no "content" in message {number} of its chat; write what is '
                    "said, or leave the message out."
                )
        with blamed(
            lambda reason: CalibrationError(
                f"{where} does not fit the chat template of the model ({reason}); mend it."
            )
        ):
            return self.chat(messages)


def chat_of(tokenizer: Any) -> Callable[[Chat], str] | None:
    """How a tokenizer writes a chat as text, without the start token that it adds to any text."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def written(messages: Chat) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        return text.removeprefix(tokenizer.bos_token or "")

    return written


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()
