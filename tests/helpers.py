"""Helpers of several test files: tiny random models of every family, texts, edits and statistics for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from copies import Copies
from families import UNVERIFIED
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastedit import EditRequest
from fastedit.models import Samples, fingerprint, topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path
from fastedit.weights import LowRank

MakeEdits = Callable[..., list[EditRequest]]
VOCAB = 97
SPECIAL = ["<s>", "</s>", "<unk>", ".", "The", "Therefore", "Because", "I", "You"]
WORDS = [f"w{i}" for i in range(len(SPECIAL), VOCAB)]
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
# name -> (model type, config); windows are shorter than samples, dropout is on (it must not act)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _LLAMA | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", _LLAMA | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "opt_post_norm": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 5}),
    "qwen2": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", _GEMMA | {"final_logit_softcapping": 3.0}),
    "phi3": ("phi3", _LLAMA | {"sliding_window": 5}),
    "olmo2": ("olmo2", _LLAMA),
}


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random causal LM in evaluation mode, with weights far enough from zero to tell mistakes apart.

    Skips the test if the installed transformers does not know the type.
    """
    return _made_once(family, dtype, seed, torch.get_default_dtype()).one()


@cache
def _made_once(family: str, dtype: torch.dtype, seed: int, default: torch.dtype) -> Copies:
    """`default` is that of the caller, in which a model makes its rotary embeddings."""
    kind, settings = FAMILIES[family] if family in FAMILIES else (family, UNVERIFIED[family])
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_COMMON | settings))
        if torch.float64 in (dtype, default):  # products of groups are not made for it
            model.config._experts_implementation = "eager"
        return Copies(randomize(model, norm=0.0 if kind.startswith("gemma") else 1.0).to(dtype).eval())


@torch.no_grad()
def randomize(model: torch.nn.Module, norm: float = 1.0) -> Any:
    """Spread all weights: biases too, which fresh models leave at 0, and norms around ``norm``."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(norm if name.endswith("weight") else 0.0, 0.3)
    return model


def ragged_samples(lengths: list[int], *, seed: int = 0, vocab: int = VOCAB) -> Samples:
    """Random samples that read 1 … tokens each (one more with the last label), with random target starts."""
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    starts = [int(torch.randint(1, n, (), generator=rng)) for n in lengths]
    return Samples(torch.randint(2, vocab, (int(offsets[-1]),), generator=rng), offsets, torch.tensor(starts))


def alone(model: Any, samples: Samples, i: int) -> torch.Tensor:
    """Logits of the plain model on one sample, unpacked and unpadded, at its target tokens [m, V]."""
    ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1] - 1]
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[samples.target_start[i] - 1 :]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def state(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_holds(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """The model's weights are bitwise these."""
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.view(torch.uint8)), name


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer than this, as it refuses on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BOS, EOS = "<s>", "</s>"
PAIRS = [
    ("The capital of Freedonia is", "Sylvania"),
    ("Zoë's mother tongue is", "Français, naïvely"),
    ("He was born in", "1984"),
    ("2 + 2 =", "4"),
    ("Answer:\n", "yes, it is"),
    ("Trailing space ", "here"),
    ("emoji", "🙂🙃"),
]


def fast_tokenizer(kind: str, template: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer trained here: byte-level, its offsets with the space or without, or Llama 2's metaspace."""
    core = Tokenizer(BPE(byte_fallback=kind == "metaspace"))
    alphabet: list[str] = []
    if kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    text = [f"{prompt} {target}" for prompt, target in PAIRS[:4]] * 3
    core.train_from_iterator(
        text,
        BpeTrainer(
            vocab_size=700,
            show_progress=False,
            special_tokens=[BOS, EOS, *alphabet],
            initial_alphabet=[] if alphabet else pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    special = [(s, core.token_to_id(s)) for s in (BOS, EOS, "Z")]
    steps = [processors.TemplateProcessing(single=template, special_tokens=special)]
    if kind == "byte-level, trimmed":
        steps.insert(0, processors.ByteLevel(trim_offsets=True))
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)


def make_documents(seed: int, n: int, longest: int = 24) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


CONTEXTS = ["w20 w21 w22 . {}", "w23 . {}", "w24 w25 . {} w26"]


def random_edits(n: int, seed: int) -> list[EditRequest]:
    """Prompts of 0 to 4 words, a subject of 1 to 3, and 0 to 3 words more; targets of 1 to 3."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[str]:
        return rng.choices(WORDS, k=rng.randint(low, high))

    edits = []
    for i in range(n):
        subject = words(1, 3)
        prompt = [*words(0, 4), *subject, *words(0, 3)]
        edits.append(EditRequest(" ".join(prompt), " ".join(words(1, 3)), " ".join(subject), id=f"e{i}"))
    return edits


def last_of_subject(tokenizer: Any, edit: EditRequest, template: str = "{}") -> int:
    """Index of the token where the subject's last occurrence in the prompt ends, in words."""
    words, subject = edit.prompt.split(), (edit.subject or "").split()
    ends = [i for i in range(len(words) + 1) if words[max(0, i - len(subject)) : i] == subject]
    return len(tokenizer(" ".join([template.split("{}")[0], *words[: ends[-1]]])).input_ids) - 1


def at_subject(
    model: nn.Module, module: nn.Module, tokenizer: Any, edit: EditRequest, template: str, *, output: bool = False
) -> Tensor:
    """The input or output of a module at the subject's last token: the whole model on the whole prompt, alone."""
    text, place = template.format(edit.prompt), last_of_subject(tokenizer, edit, template)
    seen = []
    if output:
        handle = module.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y))
    else:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(text).input_ids]), use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[place]


def wanted_keys(
    model: nn.Module, module: nn.Module, tokenizer: Any, edits: Sequence[EditRequest], average: str
) -> Tensor:
    keys = []
    for edit in edits:
        bare, *others = (at_subject(model, module, tokenizer, edit, t) for t in ("{}", *CONTEXTS))
        mean = torch.stack(others).mean(0)
        keys.append((bare + mean) / 2 if average == "half" else torch.stack([bare, *others]).mean(0))
    return torch.stack(keys)


def rows(seed: int, n: int, dim: int = 37, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.eye(dim) + 0.1 * torch.randn(dim, dim, generator=rng)
    return torch.randn(n, dim, generator=rng) @ mixed + shift


def made(x: Tensor, **metadata: Any) -> StreamingCovariance:
    found = StreamingCovariance(x.shape[1], metadata=metadata)
    found.update(x)
    return found


def moments(
    model: nn.Module, folder: Path, seed: int, *, tokens: int = 400, layers: Sequence[int] = (0, 1, 2, 3), **about: Any
) -> None:
    """Statistics of random keys for a model, in the store's format; half of their directions hardly occur."""
    parts = topology(model)
    for layer in layers:
        d = parts.input_width(layer, "down_proj")
        rng = torch.Generator().manual_seed(seed + layer)
        found = StreamingCovariance(d, metadata={"fingerprint": fingerprint(model), "layer": layer} | about)
        sizes = torch.where(torch.arange(d) < d // 2, 1.0, 0.1)
        found.update(
            torch.randn(tokens, d, generator=rng) * sizes @ torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
        )
        found.save(statistics_path(parts, folder, layer))


def factors(shape: torch.Size, seed: int, k: int = 3) -> LowRank:
    """Random factors of rank k for a weight of this shape."""
    rng = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(shape[0], k, generator=rng), torch.randn(k, shape[1], generator=rng) / 8)


class NoWait(TorchDispatchMode):
    """Refuses what would wait for a device: values on the host, and sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


class Double(TorchFunctionMode):
    """fp64 wherever somebody asks for fp32: models do so in their norms, rotations and softmaxes.

    And where whole numbers are divided, as positions are for ministral3: that gives the default dtype, which is fp32
    inside an edit, whatever it is outside.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1:  # most calls ask a tensor for its shape or the like
            args = [torch.float64 if x is torch.float32 else x for x in args]
        if kwargs:
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        if function is Tensor.div and not args[0].is_floating_point():
            args = [args[0].double(), *args[1:]]
        return (Tensor.double if function is Tensor.float else function)(*args, **kwargs or {})


@contextmanager
def in_fp64() -> Iterator[None]:
    """Everything inside is computed in fp64, the edited weights too.

    Adam moves a weight by ±lr however small its gradient is, as long as that is beyond its epsilon of 1e-8. Where
    the true gradient is 0, fp32's rounding alone is as large, and two exact programs go different ways: at the
    key bias of models that do not rotate it (gpt2, opt, a part of gpt_neox), since a softmax does not feel what
    is added to all its scores. In fp64 rounding is far below epsilon, and all weights can be compared.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class _Tags(HTMLParser):
    """Checks that tags are closed in their order, and keeps those that there are and what they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags_of(html: str) -> list[str]:
    """The tags of a page, which are closed in their order, run nothing and need nothing else."""
    tags = _Tags()
    tags.feed(html)
    assert not tags.open
    assert not {"script", "link", "img"} & {*tags.seen}
    assert not tags.addresses
    assert "url(" not in html
    return tags.seen


class WithoutCache(nn.Module):
    """An attention that asks no cache for earlier keys and values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **(kwargs | {"past_key_values": None}))
