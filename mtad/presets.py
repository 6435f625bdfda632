"""The pairs that can be chosen by name. A table: imports no torch and loads nothing.

Names lead to these repositories and to no others, so nothing that a visitor sends can choose a
repository or a path.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mtad.errors import PairError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Beside the weights: the two caches, the activations, what the allocator keeps.
_OVERHEAD = 1.1


@dataclass(frozen=True)
class Preset:
    """A target and a draft of one vocabulary.

    Attributes:
        id: the name that `mtad.load_pair` takes.
        title: the name that people read.
        target: repository of the target.
        draft: repository of the draft; "" where the draft is made from the target.
        target_parameters: approximate number of the target's parameters.
        draft_parameters: approximate number of the draft's own parameters.
        license: of the weights, target first where the two differ.
        gated: True if a licence must be accepted on the Hugging Face Hub before the download.
        chat: True if the target follows a chat template.
        embedded: True for weights that come through the package index, without a model hub.
        note: what a user should know before choosing it.
    """

    id: str
    title: str
    target: str
    draft: str
    target_parameters: int
    draft_parameters: int
    license: str
    gated: bool = False
    chat: bool = False
    embedded: bool = False
    note: str = ""

    def memory_bytes(self, dtype: str = "bfloat16") -> int:
        """Approximate memory that both models need in a dtype, with a margin for caches.

        Args:
            dtype: "float32", "bfloat16" or "float16".
        """
        weights = (self.target_parameters + self.draft_parameters) * DTYPE_BYTES[dtype]
        return int(weights * _OVERHEAD)


_LLAMA_2 = "Llama 2 Community License"
_LLAMA_3 = "Llama 3.1 and Llama 3.2 Community Licenses"
_OPT = "OPT license (non-commercial research)"
_APACHE = "Apache-2.0"

_PRESETS = (
    Preset(
        "smollm2",
        "SmolLM2 135M Instruct (embedded)",
        "SmolLM2-135M-Instruct",
        "",
        134_515_008,
        0,
        _APACHE,
        chat=True,
        embedded=True,
        note="Runs on a laptop CPU; 93 MB are downloaded once.",
    ),
    Preset(
        "smollm2-1.7b",
        "SmolLM2 1.7B with SmolLM2 135M",
        "HuggingFaceTB/SmolLM2-1.7B",
        "HuggingFaceTB/SmolLM2-135M",
        1_711_376_384,
        134_515_008,
        _APACHE,
    ),
    Preset(
        "smollm2-1.7b-instruct",
        "SmolLM2 1.7B Instruct with SmolLM2 135M Instruct",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        1_711_376_384,
        134_515_008,
        _APACHE,
        chat=True,
    ),
    Preset(
        "qwen2.5-7b",
        "Qwen2.5 7B with Qwen2.5 0.5B",
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-0.5B",
        7_615_616_512,
        494_032_768,
        _APACHE,
    ),
    Preset(
        "qwen2.5-7b-instruct",
        "Qwen2.5 7B Instruct with Qwen2.5 0.5B Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen2.5-0.5B-Instruct",
        7_615_616_512,
        494_032_768,
        _APACHE,
        chat=True,
    ),
    Preset(
        "llama-3.1-8b",
        "Llama 3.1 8B with Llama 3.2 1B",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.2-1B",
        8_030_261_248,
        1_235_814_400,
        _LLAMA_3,
        gated=True,
        note="A pair of the paper.",
    ),
    Preset(
        "llama-3.1-8b-instruct",
        "Llama 3.1 8B Instruct with Llama 3.2 1B Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        8_030_261_248,
        1_235_814_400,
        _LLAMA_3,
        gated=True,
        chat=True,
        note="A pair of the paper.",
    ),
    Preset(
        "llama-2-13b",
        "Llama 2 13B with Llama 68M",
        "meta-llama/Llama-2-13b-hf",
        "JackFram/llama-68m",
        13_015_864_320,
        68_030_208,
        f"{_LLAMA_2}; draft {_APACHE}",
        gated=True,
        note="A pair of the paper. The draft's context is 2,048 tokens.",
    ),
    Preset(
        "llama-2-13b-chat",
        "Llama 2 13B Chat with Llama 68M",
        "meta-llama/Llama-2-13b-chat-hf",
        "JackFram/llama-68m",
        13_015_864_320,
        68_030_208,
        f"{_LLAMA_2}; draft {_APACHE}",
        gated=True,
        chat=True,
        note="A pair of the paper. The draft's context is 2,048 tokens.",
    ),
    Preset(
        "llama-2-70b",
        "Llama 2 70B with Llama 2 7B",
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Llama-2-7b-hf",
        68_976_648_192,
        6_738_415_616,
        _LLAMA_2,
        gated=True,
    ),
    Preset(
        "llama-2-70b-chat",
        "Llama 2 70B Chat with Llama 2 7B Chat",
        "meta-llama/Llama-2-70b-chat-hf",
        "meta-llama/Llama-2-7b-chat-hf",
        68_976_648_192,
        6_738_415_616,
        _LLAMA_2,
        gated=True,
        chat=True,
    ),
    Preset(
        "opt-13b",
        "OPT 13B with OPT 125M",
        "facebook/opt-13b",
        "facebook/opt-125m",
        12_853_473_280,
        125_239_296,
        _OPT,
        note="A pair of the paper.",
    ),
    Preset(
        "opt-66b",
        "OPT 66B with OPT 1.3B",
        "facebook/opt-66b",
        "facebook/opt-1.3b",
        65_719_701_504,
        1_315_758_080,
        _OPT,
    ),
)


def presets() -> tuple[Preset, ...]:
    """All pairs that `mtad.load_pair` knows, the embedded one first."""
    return _PRESETS


def find_preset(name: str) -> Preset:
    """The preset of that id.

    Raises:
        PairError: there is none; the message lists those that there are.
    """
    known = {preset.id: preset for preset in _PRESETS}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    shown = repr(name)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    raise PairError(
        f"There is no pair {shown}. {hint}Choose one of: {', '.join(known)}. For other models"
        " build mtad.ModelPair(target=..., draft=..., tokenizer=...) yourself."
    )
