"""One command-line option for every field of `DecodeConfig`, added to a command by a decorator.

The names and defaults come from the dataclass, so that a new field cannot be forgotten: without
a line in `_HELP` the module does not import. Ranges are checked by `DecodeConfig` itself, whose
message is the same here, in the library and on the page.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mtad.cli_io import UsageError
from mtad.config import DecodeConfig
from mtad.errors import ConfigError

_HELP: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "Most tokens that are written. 1 to 131072."),
    "num_draft_tokens": (
        str,
        'Draft length γ. 1 to 64, or "auto". Default: 10 for bild, 4 elsewhere.',
    ),
    "beam_width": (
        str,
        "Beams W of the draft (mtad, mtad_tree) or target (beam, mtjd). 1 to 64, or with γ auto"
        ' "auto".',
    ),
    "accept_threshold": (float, "τ: a prefix passes while joint p / joint q > τ. Above 0."),
    "temperature": (float, "Divides the logits; 0 chooses by maximum. 0, or 0.001 to 100."),
    "top_k": (int, "Keep the k most probable tokens; 0 keeps all."),
    "top_p": (float, "Keep the smallest set with this mass; 1 keeps all. Above 0 to 1."),
    "seed": (int, "Of every random choice. 0 to 2^32 − 1."),
    "k_config": (
        str,
        'specinfer: children by depth, such as 4,2,2; 1 to 8 numbers from 1 to 16, or "auto".',
    ),
    "replacement": (bool, "specinfer: draw children with replacement."),
    "fallback_threshold": (float, "bild: the draft stops where it is less sure. 0 to 1."),
    "rollback_threshold": (float, "bild: replace a draft token where −log p exceeds this. 0 up."),
    "typical_epsilon": (float, "typical: ε, ceiling of the threshold. Above 0 to 1."),
    "typical_delta": (float, "typical: δ, factor of exp(−entropy). Above 0 to 1."),
    "search": (str, "mtjd: beam or exact."),
    "joint_temperature": (float, "mtjd exact: blocks are drawn with p^(1/T). 0, or 0.001 to 100."),
    "node_budget": (int, "mtjd exact: most tree nodes of one iteration. 1 to 65536."),
    "iteration_costs": (
        str,
        "With γ auto: cost of an iteration with 0, 1, 2, … draft tokens, such as 1,1.2,1.4; with W"
        " auto rows of them with ; between. Default: measured.",
    ),
    "tree_costs": (
        str,
        "With --k-config auto: cost of an iteration without a draft, then with each of its 8 trees."
        " Default: measured.",
    ),
    "ignore_eos": (bool, "Go on after an end-of-sequence token."),
    "stop": (list[str], "Cut the text before this string. May be given up to 16 times."),
}
_FIELDS = {field.name: field for field in dataclasses.fields(DecodeConfig)}
if _HELP.keys() != _FIELDS.keys():
    raise ImportError(f"options and fields differ: {sorted(_HELP.keys() ^ _FIELDS.keys())}")

_PANEL = "Decoding parameters"


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options to a command, which gets them as one `config: DecodeConfig`.

    Raises (when the command is called):
        UsageError: a value is outside its range; the message names the field and the range.
    """
    # eval_str and not get_type_hints, which on Python 3.10 wraps what defaults to None once more.
    signature = inspect.signature(command, eval_str=True)
    own = [item for name, item in signature.parameters.items() if name != "config"]
    options = [_option(name) for name in _FIELDS]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in _FIELDS}
        try:
            config = config_from(given)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        command(**values, config=config)

    parameters = own + options
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {item.name: item.annotation for item in parameters}
    return wrapped


def config_from(given: dict[str, Any]) -> DecodeConfig:
    """A config from option values; None, or no value of a repeatable option, is the default.

    Raises:
        ConfigError: a value is outside its range.
    """
    values = {name: value for name, value in given.items() if value not in (None, [])}
    for name in ("num_draft_tokens", "beam_width"):
        if values.get(name, "auto") != "auto":
            values[name] = _whole(values[name])
    if values.get("k_config", "auto") != "auto":
        values["k_config"] = tuple(_whole(part) for part in values["k_config"].split(","))
    if "iteration_costs" in values:
        rows = [tuple(map(_number, row.split(","))) for row in values["iteration_costs"].split(";")]
        values["iteration_costs"] = tuple(rows) if len(rows) > 1 else rows[0]
    if "tree_costs" in values:
        values["tree_costs"] = tuple(map(_number, values["tree_costs"].split(",")))
    if "stop" in values:
        values["stop"] = tuple(values["stop"])
    return DecodeConfig(**values)


def _whole(text: str) -> int | str:
    """The number, or the text itself for `DecodeConfig` to refuse by name."""
    try:
        return int(text)
    except ValueError:
        return text


def _number(text: str) -> float | str:
    """Likewise."""
    try:
        return float(text)
    except ValueError:
        return text


def _option(name: str) -> inspect.Parameter:
    kind, text = _HELP[name]
    flag = "--" + name.replace("_", "-")
    names = (f"{flag}/--no-{name.replace('_', '-')}",) if kind is bool else (flag,)
    default = _FIELDS[name].default
    if default is not None and name != "stop":
        text += f" Default: {shown(default)}."
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=_PANEL)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def shown(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
