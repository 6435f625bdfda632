"""The kernels' C interface, as ctypes sees it: the structures of kernels.c, and the functions.

Fields stand in the order of the C source; a pointer is an address, and what it points to must live
as long as the call.
"""

from __future__ import annotations

import ctypes
import dataclasses

from mtad.histories import Histories

_Pointer = ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("streamed", ctypes.c_int32),
        ("data", _Pointer),
    )


class Layer(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = (
        ("attention_norm", _Pointer),
        ("mlp_norm", _Pointer),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    """`Model` of kernels.c."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("mlp", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("cosines", _Pointer),
        ("sines", _Pointer),
        ("embedding", _Pointer),
        ("vocabulary", ctypes.c_int32),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", _Pointer),
        ("head", Matrix),
    )


class Cache(ctypes.Structure):
    """`Cache` of kernels.c."""

    _fields_ = (
        ("keys", _Pointer),
        ("values", _Pointer),
        ("capacity", ctypes.c_int64),
        ("texts", ctypes.c_int32),
        ("halves", ctypes.c_int32),
    )


class Pass(ctypes.Structure):
    """`Pass` of kernels.c."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("prefix", ctypes.c_int32),
        ("nodes", ctypes.c_int32),
        ("tokens", _Pointer),
        ("positions", _Pointer),
        ("visible", _Pointer),
        ("logits", _Pointer),
        ("skipped", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("tap_layer", _Pointer),
        ("tapped", _Pointer),
        ("more", ctypes.POINTER(Matrix)),
        ("from_", ctypes.c_int32),
        ("states", _Pointer),
    )


class Draft(ctypes.Structure):
    """`Draft` of kernels.c."""

    _fields_ = (
        ("model", Model),
        ("read", Matrix),
        ("join", Matrix),
        ("read_norm", _Pointer),
        ("token_norm", _Pointer),
        ("state_norm", _Pointer),
        ("taps", ctypes.c_int32),
    )


class Books(ctypes.Structure):
    """`Books` of kernels.c."""

    _fields_ = (
        ("prefix", ctypes.c_int32),
        ("position", ctypes.c_int32),
        ("embedding", _Pointer),
        ("tokens", _Pointer),
        ("parents", _Pointer),
        ("given", _Pointer),
        ("tails", _Pointer),
        ("text", _Pointer),
        ("count", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("odds", _Pointer),
        ("more", ctypes.POINTER(Matrix)),
        ("from_", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("names", _Pointer),
        ("places", _Pointer),
    )


class Step(ctypes.Structure):
    """`Step` of kernels.c."""

    _fields_ = (
        ("old", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        ("tokens", _Pointer),
        ("parents", _Pointer),
        ("below", ctypes.c_int32),
        ("states", _Pointer),
        ("known", ctypes.c_int32),
        ("logits", _Pointer),
    )


class Keep(ctypes.Structure):
    """`Keep` of kernels.c."""

    _fields_ = (
        ("hidden", _Pointer),
        ("states", _Pointer),
        ("path", _Pointer),
        ("kept", _Pointer),
        ("rows", ctypes.c_int32),
        ("known", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("unread", ctypes.c_int32),
        ("entries", ctypes.c_int32),
        ("exact", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """`Block` of kernels.c."""

    _fields_ = (
        ("steps", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("floors", _Pointer),
        ("ends", _Pointer),
        ("num_ends", ctypes.c_int32),
        ("taken", _Pointer),
        ("choices", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("logits", _Pointer),
        ("scratch", _Pointer),
    )


class Line(ctypes.Structure):
    """`Line` of kernels.c."""

    _fields_ = (
        ("block", Block),
        ("uniform", _Pointer),
        ("drawn", _Pointer),
        ("picked", _Pointer),
        ("values", _Pointer),
        ("token_ids", _Pointer),
        ("logprobs", _Pointer),
    )


# In the order of `Growth` in kernels.c: first what it reads, last what it only writes.
HISTORIES = tuple(field.name for field in dataclasses.fields(Histories))


class Rows(ctypes.Structure):
    """`Rows` of kernels.c."""

    _fields_ = (
        ("values", _Pointer),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("best", _Pointer),
        ("at", _Pointer),
        ("sums", _Pointer),
    )


class Choices(ctypes.Structure):
    """`Choices` of kernels.c."""

    _fields_ = (
        ("logits", _Pointer),
        ("stride", ctypes.c_int64),
        ("names", _Pointer),
        ("rows", ctypes.c_int32),
        ("all", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("values", _Pointer),
        ("token_ids", _Pointer),
        ("logprobs", _Pointer),
        ("sums", _Pointer),
    )


class Growth(ctypes.Structure):
    """`Growth` of kernels.c."""

    _fields_ = (
        ("choices", Choices),
        ("chance", _Pointer),
        ("steps", ctypes.c_int32),
        ("width", ctypes.c_int32),
        *((f"old_{name}", _Pointer) for name in HISTORIES[:-1]),
        *((f"new_{name}", _Pointer) for name in HISTORIES),
        ("races", _Pointer),
    )


class Search(ctypes.Structure):
    """`Search` of kernels.c."""

    _fields_ = (
        ("block", Block),
        ("width", ctypes.c_int32),
        ("chance", _Pointer),
        ("values", _Pointer),
        ("best", _Pointer),
        ("warped", _Pointer),
        ("races", _Pointer),
        ("tokens", _Pointer),
        ("parents", _Pointer),
        *((name, _Pointer) for name in HISTORIES),
    )


class Sample(ctypes.Structure):
    """`Sample` of kernels.c."""

    _fields_ = (
        ("choices", Choices),
        ("uniform", _Pointer),
        ("drawn", _Pointer),
        ("picked", _Pointer),
    )


class Correction(ctypes.Structure):
    """`Correction` of kernels.c."""

    _fields_ = (
        ("target", _Pointer),
        ("target_ids", _Pointer),
        ("draft", _Pointer),
        ("draft_ids", _Pointer),
        ("columns", ctypes.c_int32),
        ("draft_columns", ctypes.c_int32),
        ("draft_rows", ctypes.c_int32),
        ("accepted", _Pointer),
        ("uniform", _Pointer),
    )


class Record(ctypes.Structure):
    """`Record` of kernels.c."""

    _fields_ = (
        ("logits", _Pointer),
        ("stride", ctypes.c_int64),
        ("vocabulary", ctypes.c_int32),
        ("values", _Pointer),
        ("token_ids", _Pointer),
        ("columns", ctypes.c_int32),
        ("sums", _Pointer),
        ("path", _Pointer),
        ("tokens", _Pointer),
        ("accepted", _Pointer),
        ("final", _Pointer),
        ("depth", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("emitted", _Pointer),
        ("ids", _Pointer),
        ("logprobs", _Pointer),
    )


class Offer(ctypes.Structure):
    """`Offer` of kernels.c."""

    _fields_ = (
        ("nodes", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("logprobs", _Pointer),
        ("token_ids", _Pointer),
        ("tokens", _Pointer),
        ("parents", _Pointer),
        ("drafted", _Pointer),
        ("real", _Pointer),
        ("target", _Pointer),
    )


class Walk(ctypes.Structure):
    """`Walk` of kernels.c."""

    _fields_ = (
        ("offer", Offer),
        ("draft", _Pointer),
        ("draft_ids", _Pointer),
        ("draft_columns", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("replacement", ctypes.c_int32),
        ("uniform", _Pointer),
        ("path", _Pointer),
        ("accepted", _Pointer),
        ("tests", _Pointer),
        ("scores", _Pointer),
        ("thresholds", _Pointer),
        ("final", _Pointer),
    )


class Beams(ctypes.Structure):
    """`Beams` of kernels.c."""

    _fields_ = (
        ("steps", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("token_ids", _Pointer),
        ("logprobs", _Pointer),
        ("nodes", _Pointer),
        ("real", _Pointer),
        ("joint", _Pointer),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of a loaded library their types."""
    integer = ctypes.c_int
    drafting = _Pointer, ctypes.POINTER(Draft), ctypes.POINTER(Cache), ctypes.POINTER(Books)
    for name, result, arguments in (
        ("mtad_open", _Pointer, (integer,)),
        ("mtad_close", None, (_Pointer,)),
        ("mtad_linear", integer, (_Pointer, ctypes.POINTER(Matrix), _Pointer, _Pointer, integer)),
        (
            "mtad_forward",
            integer,
            (
                _Pointer,
                ctypes.POINTER(Model),
                ctypes.POINTER(Cache),
                ctypes.POINTER(Pass),
            ),
        ),
        (
            "mtad_write_rows",
            None,
            (ctypes.POINTER(Matrix), integer, integer, _Pointer, _Pointer),
        ),
        (
            "mtad_move",
            None,
            (ctypes.POINTER(Model), ctypes.POINTER(Cache), _Pointer, integer, integer),
        ),
        ("mtad_draft", integer, (*drafting, ctypes.POINTER(Step))),
        ("mtad_line", integer, (*drafting, ctypes.POINTER(Line))),
        ("mtad_search", integer, (*drafting, ctypes.POINTER(Search))),
        ("mtad_read", integer, (_Pointer, ctypes.POINTER(Draft), _Pointer, _Pointer, integer)),
        (
            "mtad_keep",
            integer,
            (_Pointer, ctypes.POINTER(Draft), ctypes.POINTER(Books), ctypes.POINTER(Keep)),
        ),
        ("mtad_rows", None, (_Pointer, ctypes.POINTER(Rows))),
        (
            "mtad_warp",
            None,
            (_Pointer, integer, integer, ctypes.c_double, ctypes.c_double, _Pointer),
        ),
        ("mtad_choose", None, (_Pointer, ctypes.POINTER(Choices))),
        ("mtad_grow", None, (_Pointer, ctypes.POINTER(Growth))),
        ("mtad_sample", None, (_Pointer, ctypes.POINTER(Sample))),
        ("mtad_draw", None, (*[_Pointer] * 3, integer, integer, _Pointer)),
        ("mtad_draw_row", None, (*[_Pointer] * 4, integer, _Pointer)),
        ("mtad_draw_corrected", None, (ctypes.POINTER(Correction), _Pointer)),
        ("mtad_record", None, (ctypes.POINTER(Record),)),
        ("mtad_best_block", None, (ctypes.POINTER(Beams), integer, *[_Pointer] * 4)),
        ("mtad_beam_tree", None, (ctypes.POINTER(Beams), *[_Pointer] * 6)),
        (
            "mtad_grow_tree",
            integer,
            (_Pointer, integer, _Pointer, integer, ctypes.c_int64, _Pointer, _Pointer),
        ),
        ("mtad_joint_prefix", None, (ctypes.POINTER(Offer), ctypes.c_double, _Pointer)),
        ("mtad_kept_run", None, (ctypes.POINTER(Offer), *[_Pointer] * 3)),
        (
            "mtad_joint_path",
            None,
            (
                *(ctypes.POINTER(Offer), _Pointer, _Pointer, integer),
                *(ctypes.c_double, _Pointer, _Pointer),
            ),
        ),
        ("mtad_walk", None, (ctypes.POINTER(Walk),)),
        ("mtad_pick", None, (*[_Pointer] * 3, integer, integer, _Pointer)),
        ("mtad_kernels", ctypes.c_char_p, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
