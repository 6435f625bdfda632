"""DecodeConfig: every field, every way to get it wrong, and what the message must say."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest

from mtad.catalogue import method_info, methods
from mtad.config import MAX_NEW_TOKENS, MAX_SEED, MAX_STOP_STRINGS, DecodeConfig
from mtad.errors import ConfigError, MtadError

NOT_WHOLE = [1.0, 1.5, math.nan, math.inf, "4", b"4", True, False, [4], (4,), {}, 1j, object]
NOT_A_NUMBER = [math.nan, -math.nan, math.inf, -math.inf, "0.5", b"0.5", True, False, [0.5], {}, 1j]
NOT_BOOL = [0, 1, 1.0, "true", "", [], math.nan]
HUGE = [10**400, -(10**400)]
K_CONFIG = (
    '1 to 8 whole numbers from 1 to 16, such as (4, 2, 2), with at most 1024 nodes, or "auto"'
)

# field → (allowed range as the message gives it, values to refuse, values to accept)
TABLE: dict[str, tuple[str, list[Any], list[Any]]] = {
    "max_new_tokens": (
        f"a whole number from 1 to {MAX_NEW_TOKENS}",
        [*NOT_WHOLE, *HUGE, 0, -1, MAX_NEW_TOKENS + 1],
        [1, MAX_NEW_TOKENS],
    ),
    "num_draft_tokens": (
        'a whole number from 1 to 64 or "auto"',
        [*NOT_WHOLE, *HUGE, 0, -1, 65, "Auto", ""],
        [1, 64, "auto"],
    ),
    "beam_width": (
        'a whole number from 1 to 64 or "auto"',
        [*NOT_WHOLE, *HUGE, 0, -1, 65, "Auto"],
        [1, 64],
    ),
    "accept_threshold": (
        "a number greater than 0 and finite",
        [*NOT_A_NUMBER, *HUGE, 0, 0.0, -0.0, -0.1],
        [5e-324, 0.01, 1, 1.5, 1e300],
    ),
    "temperature": (
        "0, or a number at least 0.001 and at most 100",
        [*NOT_A_NUMBER, *HUGE, -0.1, 0.0009, 100.1],
        [0, 0.0, 0.001, 1, 100.0],
    ),
    "top_k": (
        "a whole number from 0 to 2147483647",
        [*NOT_WHOLE, *HUGE, -1, 2**31],
        [0, 1, 2**31 - 1],
    ),
    "top_p": (
        "a number greater than 0 and at most 1",
        [*NOT_A_NUMBER, *HUGE, 0, 0.0, -0.1, 1.0001],
        [1e-9, 1, 1.0],
    ),
    "seed": (
        f"a whole number from 0 to {MAX_SEED}",
        [*NOT_WHOLE, *HUGE, -1, MAX_SEED + 1],
        [0, MAX_SEED],
    ),
    "k_config": (
        K_CONFIG,
        [
            *[(), [], (0,), (17,), (1.0,), (True,), ("2",), (None,), (math.nan,), 4, "42", {4: 2}],
            *[(1,) * 9, (16, 16, 16), (10**400,), 1.5, math.nan],
        ],
        [(1,), (16,), (1,) * 8, (4, 4, 4, 4), (16, 16, 2)],
    ),
    "replacement": ("True or False", NOT_BOOL, [True, False]),
    "fallback_threshold": (
        "a number at least 0 and at most 1",
        [*NOT_A_NUMBER, *HUGE, -0.1, 1.1],
        [0, 0.6, 1],
    ),
    "rollback_threshold": (
        "a number at least 0 and finite",
        [*NOT_A_NUMBER, *HUGE, -0.1],
        [0, 5.0, 1e9],
    ),
    "typical_epsilon": (
        "a number greater than 0 and at most 1",
        [*NOT_A_NUMBER, *HUGE, 0, -0.1, 1.1],
        [1e-9, 1],
    ),
    "typical_delta": (
        "a number greater than 0 and at most 1",
        [*NOT_A_NUMBER, *HUGE, 0, -0.1, 1.1],
        [1e-9, 1],
    ),
    "search": ('"beam" or "exact"', ["Beam", "", "greedy", 0, True, math.nan, []], ["exact"]),
    "joint_temperature": (
        "0, or a number at least 0.001 and at most 100",
        [*NOT_A_NUMBER, *HUGE, -1, 0.0009, 101],
        [0, 0.001, 100],
    ),
    "node_budget": ("a whole number from 1 to 65536", [*NOT_WHOLE, *HUGE, 0, 65537], [1, 65536]),
    "iteration_costs": (
        "2 to 65 numbers greater than 0 and at most 1e6",
        [(), (1.0,), (1, 0.0), (1, -1), (1, math.nan), (1, 10**400), (1, "2"), "12", 5, (1,) * 66],
        [(1, 0.5), (1.0,) * 65],
    ),
    "tree_costs": (
        "2 to 65 numbers greater than 0 and at most 1e6",
        [(), (1.0,), (1, 0.0), ((1, 2), (1, 2)), "12", (1,) * 66],
        [(1, 0.5), (1.0,) * 65],
    ),
    "ignore_eos": ("True or False", NOT_BOOL, [True, False]),
    "stop": (
        f"at most {MAX_STOP_STRINGS} non-empty strings",
        [("",), ["a", ""], (1,), [None], 5, True, math.nan, {"a": 1}, ("a",) * 17, ("\ud800",)],
        [(), ("a",), ("a",) * MAX_STOP_STRINGS],
    ),
}


def test_the_table_covers_every_field() -> None:
    assert set(TABLE) == {field.name for field in dataclasses.fields(DecodeConfig)}


def refusals() -> list[Any]:
    return [
        pytest.param(name, value, allowed, id=f"{name}-{str(value)[:12]!a}-{index}")
        for name, (allowed, values, _) in TABLE.items()
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value", "allowed"), refusals())
def test_a_value_outside_the_range_is_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DecodeConfig(**{name: value})
    message = str(caught.value)
    shown = repr(value)
    assert message.startswith(f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}, ")
    assert f"but must be {allowed}" in message
    assert message.endswith(".") and len(message) < 250
    assert isinstance(caught.value, (MtadError, ValueError))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (_, _, values) in TABLE.items() for value in values],
)
def test_a_value_at_the_edge_is_taken(name: str, value: Any) -> None:
    assert getattr(DecodeConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", TABLE)
def test_none_stands_for_the_default(name: str) -> None:
    assert DecodeConfig(**{name: None}) == DecodeConfig()


def test_an_empty_stop_string_is_refused_without_its_tuple_too() -> None:
    with pytest.raises(ConfigError, match="stop is .*, but must be at most 16 non-empty strings"):
        DecodeConfig(stop="")  # type: ignore[arg-type]


def test_a_number_too_long_to_print_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="seed is a number of thousands of digits, but must be"):
        DecodeConfig(seed=10**5000)
    with pytest.raises(ConfigError, match="temperature is a number of thousands of digits"):
        DecodeConfig(temperature=10**5000)


def test_a_tensor_that_is_no_whole_number_is_not_rounded() -> None:
    torch = pytest.importorskip("torch")
    assert DecodeConfig(beam_width=torch.tensor(3)).beam_width == 3
    with pytest.raises(ConfigError, match="beam_width is tensor"):
        DecodeConfig(beam_width=torch.tensor(3.7))


def test_values_become_plain_python() -> None:
    """A trace is written from them, so that a NumPy number would be refused much later."""
    numpy = pytest.importorskip("numpy")
    config = DecodeConfig(
        max_new_tokens=numpy.int64(7),
        temperature=numpy.float32(0.5),
        top_p=1,
        k_config=[2, 1],  # type: ignore[arg-type]
        stop="END",  # type: ignore[arg-type]
    )
    assert type(config.max_new_tokens) is int and config.max_new_tokens == 7
    assert type(config.temperature) is float and config.temperature == 0.5
    assert type(config.top_p) is float
    assert config.k_config == (2, 1) and config.stop == ("END",)
    assert isinstance(hash(config), int)


def test_a_config_cannot_be_changed_and_an_unknown_field_is_an_error() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeConfig().seed = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="gamma"):
        DecodeConfig(gamma=3)  # type: ignore[call-arg]


def test_a_replaced_config_is_checked_again() -> None:
    with pytest.raises(ConfigError, match="top_p is 2"):
        dataclasses.replace(DecodeConfig(), top_p=2)


def test_a_config_survives_pickling() -> None:
    config = DecodeConfig(seed=5, stop=("a",))
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_draft_length_of_the_method_fills_the_gap_only() -> None:
    assert DecodeConfig().with_draft_length(10).num_draft_tokens == 10
    assert DecodeConfig(num_draft_tokens=3).with_draft_length(10).num_draft_tokens == 3
    assert DecodeConfig(num_draft_tokens="auto").with_draft_length(10).num_draft_tokens == "auto"
    lengths = {info.id: info.draft_length for info in methods()}
    assert lengths.pop("bild") == 10
    assert set(lengths.values()) == {4}


def test_methods_read_fields_that_exist_and_every_field_is_read() -> None:
    read = {name for info in methods() for name in info.parameters}
    assert read == set(TABLE)


@pytest.mark.parametrize("name", ["MTAD", "", "mtad ", "greedy", None, 3])
def test_an_unknown_method_is_refused_with_the_list_of_those_that_exist(name: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        method_info(name)
    message = str(caught.value)
    assert message.startswith(f"There is no method {name!r}. Choose one of: ")
    assert all(info.id in message for info in methods())


def test_a_width_is_chosen_together_with_a_length() -> None:
    adapting = DecodeConfig(num_draft_tokens="auto", beam_width="auto")
    assert (adapting.width, DecodeConfig(beam_width=7).width) == (4, 7)
    for length in (None, 5):
        with pytest.raises(ConfigError, match='beam_width is "auto".*num_draft_tokens="auto"'):
            DecodeConfig(num_draft_tokens=length, beam_width="auto")
    rows = dataclasses.replace(adapting, iteration_costs=[[1, 2], [1, 2.5]])  # type: ignore[list-item]
    assert rows.iteration_costs == ((1.0, 2.0), (1.0, 2.5))
    for wrong in ([[1, 2], 3], [[1, 2], [1, -2]], [[1]], [[1, 2]] * 17):
        with pytest.raises(ConfigError, match="or 1 to 16 rows of them"):
            dataclasses.replace(adapting, iteration_costs=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="iteration_costs"):
        DecodeConfig(iteration_costs=[[1, 2]])  # type: ignore[list-item]
