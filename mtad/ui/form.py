"""The form of the Compare tab: its fields, what they hold, and the link that carries them.

Pure: knows no gradio. A link is a query string in which every part is text: `prompt`, `methods`
with commas between, and fields of `DecodeConfig` by their names. It may come from anyone, so it is
checked like a request; parts of other names are ignored, since hosts and messengers add their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs, urlencode

from mtad.catalogue import methods
from mtad.config import DecodeConfig
from mtad.errors import ConfigError, MtadError
from mtad.ui.comparison import Request, check_request
from mtad.ui.names import short_name

Kind = Literal["whole", "number", "slider", "choice", "text", "tick"]
OWN_LENGTH = "each method's own"
# Servers and messengers cut longer ones.
MAX_LINK = 8_000
# Of a query string that is read at all.
MAX_QUERY = 200_000


@dataclass(frozen=True)
class Field:
    """A field of `DecodeConfig` as the form shows it.

    Attributes:
        name: in `DecodeConfig`.
        label: what stands above it.
        meaning: one line.
        kind: of what it holds: a whole number, a number, one on a slider, one of `choices`, a
            text, or a tick.
        default: what the form opens with.
        low, high, step: of a slider; the library's range may be wider.
        choices: of a choice.
    """

    name: str
    label: str
    meaning: str
    kind: Kind
    default: Any
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()


FIELDS = (
    Field("max_new_tokens", "max_new_tokens", "Most tokens of an answer.", "whole", 96),
    Field("seed", "seed", "The same seed gives the same answer.", "whole", 0),
    Field(
        "num_draft_tokens",
        "num_draft_tokens (γ)",
        "Tokens drafted for one target pass; auto: as many as should pay.",
        "choice",
        "auto",
        choices=("auto", OWN_LENGTH, *(str(k) for k in (*range(1, 17), 24, 32, 48, 64))),
    ),
    Field(
        "beam_width",
        "beam_width (W)",
        "Beams of the search; auto takes what costs no speed.",
        "choice",
        "4",
        choices=("auto", *(str(k) for k in range(1, 65))),
    ),
    Field(
        "accept_threshold",
        "accept_threshold (τ)",
        "MTAD accepts a prefix while joint p/q is above τ.",
        "slider",
        DecodeConfig.accept_threshold,
        0.01,
        1,
        0.01,
    ),
    Field(
        "temperature",
        "temperature",
        "Below 1 sharpens both models; 0 takes the most probable.",
        "slider",
        1.0,
        0,
        2,
        0.05,
    ),
    Field("top_k", "top_k", "Keeps the k most probable tokens; 0 keeps all.", "whole", 10),
    Field(
        "top_p",
        "top_p",
        "Keeps the smallest set of this probability; 1 keeps all.",
        "slider",
        0.9,
        0.05,
        1,
        0.05,
    ),
    Field(
        "k_config",
        "k_config",
        'Children of a node, by depth of the tree, such as 4, 2, 2; or "auto".',
        "text",
        "auto",
    ),
    Field("replacement", "replacement", "Draws children with replacement.", "tick", True),
    Field(
        "fallback_threshold",
        "fallback_threshold",
        "The draft stops where its largest probability is under this.",
        "number",
        0.6,
    ),
    Field(
        "rollback_threshold",
        "rollback_threshold",
        "A draft token is replaced where −log p exceeds this.",
        "number",
        5.0,
    ),
    Field("typical_epsilon", "typical_epsilon (ε)", "Ceiling of the threshold.", "number", 0.09),
    Field("typical_delta", "typical_delta (δ)", "Factor of exp(−entropy).", "number", 0.3),
    Field(
        "search",
        "search",
        "Beam sampling on the target, or the exact tree.",
        "choice",
        "beam",
        choices=("beam", "exact"),
    ),
    Field(
        "joint_temperature",
        "joint_temperature",
        "Exact search draws blocks by p^(1/T); 0 takes the best.",
        "number",
        1.0,
    ),
    Field("node_budget", "node_budget", "Most tree nodes of one exact search.", "whole", 4096),
    Field("ignore_eos", "ignore_eos", "Goes on after the answer has ended.", "tick", False),
    Field("stop", "stop", "Ends the text before one of these, one a line.", "text", ""),
)
BY_NAME = {field.name: field for field in FIELDS}


def fields_read(method_ids: Sequence[str]) -> set[str]:
    """Names of the fields that at least one of the methods reads."""
    return {name for info in methods() if info.id in method_ids for name in info.parameters}


def unread_line(method_ids: Sequence[str]) -> str:
    """Which fields are hidden, and which methods would read them; "" if none is."""
    read = fields_read(method_ids)
    readers: dict[str, list[str]] = {}
    for field in FIELDS:
        if field.name not in read:
            names = [short_name(info.id) for info in methods() if field.name in info.parameters]
            readers.setdefault(", ".join(names), []).append(field.name)
    parts = [f"{', '.join(fields)} ({names})" for names, fields in readers.items()]
    return f"Hidden, since no chosen method reads them: {'; '.join(parts)}." if parts else ""


def request_of(prompt: Any, method_ids: Any, values: Mapping[str, Any]) -> Request:
    """A checked request from what the form holds. Fields that no chosen method reads are left out.

    Raises:
        ConfigError, PromptError: with the message of the library.
    """
    chosen = method_ids if isinstance(method_ids, (list, tuple)) else ()
    read = fields_read(chosen)
    parameters = {
        name: parameter(BY_NAME[name], value) for name, value in values.items() if name in read
    }
    if "num_draft_tokens" not in read and parameters.get("beam_width") == "auto":
        del parameters["beam_width"]  # W is chosen together with γ
    return check_request(prompt, method_ids, **parameters)


def parameter(field: Field, value: Any) -> Any:
    """The value for `DecodeConfig`; what makes no sense is left for it to refuse by name."""
    if field.name in ("num_draft_tokens", "beam_width"):
        text = str(value).strip() if value is not None else ""
        if text in ("", OWN_LENGTH):
            return None
        return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else value
    if field.name == "k_config":
        if str(value).strip() == "auto":
            return "auto"
        parts = str(value).split(",") if value is not None else []
        return tuple(
            int(part) if part.strip().isascii() and part.strip().isdigit() else part.strip()
            for part in parts[:99]
        )
    if field.name == "stop":
        return tuple(line for line in str(value or "").split("\n") if line)
    return value


# ------------------------------------------------------------------ links


def link_of(prompt: Any, method_ids: Any, values: Mapping[str, Any]) -> str:
    """The query string that carries a request: only what its methods read.

    Raises:
        ConfigError, PromptError: it is no valid request, or too long for a link.
    """
    request = request_of(prompt, method_ids, values)
    chosen = [info.id for info in request.methods]
    read = fields_read(chosen)
    parts = {"prompt": request.prompt, "methods": ",".join(chosen)}
    parts |= {name: _text(value) for name, value in values.items() if name in read}
    query = urlencode({name: text for name, text in parts.items() if text != ""})
    if len(query) > MAX_LINK:
        raise ConfigError(
            f"The link would have {len(query):,} characters, but at most {MAX_LINK:,} survive being"
            " sent. Shorten the prompt."
        )
    return query


def read_link(query: str) -> dict[str, Any] | None:
    """What a link fills in: `prompt`, `methods` and fields; what it does not name is left out.

    Returns:
        None if no part of it is meant for this form.

    Raises:
        ConfigError, PromptError: something in it cannot be used; then nothing of it is.
    """
    parts = _parts(query)
    if not parts:
        return None
    found: dict[str, Any] = {}
    for name, text in parts.items():
        if name == "prompt":
            found[name] = text
        elif name == "methods":
            found[name] = [part.strip() for part in text.split(",")]
        else:
            found[name] = _value(BY_NAME[name], text)
    # Whatever the link leaves to the form is valid: the rest decides.
    defaults = {field.name: field.default for field in FIELDS}
    given = {name: value for name, value in found.items() if name in BY_NAME}
    chosen = found.get("methods", [methods()[0].id, methods()[1].id])
    request = check_request(found.get("prompt", "any"), chosen)
    # All fields at once, also those that the chosen methods do not read.
    parameters = {n: parameter(BY_NAME[n], v) for n, v in (defaults | given).items()}
    check_request(request.prompt, chosen, **parameters)
    if "methods" in found:
        found["methods"] = [info.id for info in request.methods]
    return found


def read_draft(query: str) -> dict[str, Any] | None:
    """What a visitor had typed before the page was loaded again.

    As `read_link`, but it is the visitor's own unfinished work: what can be filled in is.
    """
    found: dict[str, Any] = {}
    try:
        parts = _parts(query)
    except MtadError:
        return None
    for name, text in parts.items():
        if name == "prompt":
            found[name] = text
        elif name == "methods":
            known = {info.id for info in methods()}
            found[name] = [part for part in text.split(",") if part in known]
        else:
            try:
                found[name] = _value(BY_NAME[name], text)
            except MtadError:
                continue
    return found or None


def _parts(query: str) -> dict[str, str]:
    if not isinstance(query, str) or len(query) > MAX_QUERY:
        raise ConfigError(f"it has more than {MAX_QUERY:,} characters")
    try:
        parsed = parse_qs(
            query.removeprefix("?"), keep_blank_values=True, max_num_fields=100, errors="strict"
        )
    except ValueError:
        raise ConfigError("it is no well-formed query of a link") from None
    ours = {"prompt", "methods", *BY_NAME}
    for name, texts in parsed.items():
        if name in ours and len(texts) > 1:
            raise ConfigError(f"it names {name} {len(texts)} times")
    return {name: texts[0] for name, texts in parsed.items() if name in ours}


def _value(field: Field, text: str) -> Any:
    """What the form's component holds.

    Raises:
        ConfigError: the text is none that this field can hold.
    """
    if field.kind == "tick":
        if text not in ("true", "false"):
            raise ConfigError(f"{field.name} is {text[:40]!r}, but must be true or false.")
        return text == "true"
    if field.kind in ("whole", "number", "slider"):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not abs(number) < 1e15:
            raise ConfigError(f"{field.name} is {text[:40]!r}, but must be a number.")
        if field.kind == "slider" and not field.low <= number <= field.high:
            raise ConfigError(
                f"{field.name} is {number:g}, but this page offers {field.low:g} to {field.high:g}."
            )
        return int(number) if number.is_integer() and field.kind != "number" else number
    if field.kind == "choice" and text not in field.choices:
        # The form's list is a part of what the library takes: let the library say what is wrong.
        DecodeConfig(**{field.name: parameter(field, text)})
        raise ConfigError(
            f"{field.name} is {text[:40]!r}, but this page offers {', '.join(field.choices)}."
        )
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
