"""The frozen text encoder: captions to token embeddings, without padding.

A caption becomes the last hidden states [n, d] of a pretrained encoder, one vector for each of its n tokens, special
tokens included, at most ``max_tokens`` of them. Equal captions are encoded once; batches are made of captions of like
length, so that little is spent on padding, and masked, so that an embedding does not depend on its neighbours.

T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683) is loaded without its decoder and CLIP without its image tower;
any other family as ``transformers.AutoModel`` has it. transformers is imported when an encoder is loaded, not before.

`pipelines.prepare` encodes datasets with it, `LayeredPipeline` prompts.
"""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
_CONTENT = ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderInfo:
    """Which text encoder; two with equal ``weights`` and ``max_tokens`` give equal embeddings."""

    name: str
    "Name on the model hub, directory, or ``package:name/path``, as it was given."
    weights: str
    "``sha256:...`` of a directory's weights and tokenizer, or ``name@commit`` on the hub."
    width: int
    "Length d of a token's embedding."
    max_tokens: int
    "Longer captions are cut."


@dataclass(frozen=True, slots=True)
class Encoded:
    """Captions as token embeddings."""

    tokens: list[Float[Tensor, "_n d"]]
    "Float16, on the CPU, one entry a caption; equal captions share one tensor."
    truncated: list[bool]
    "Whether the caption had more than ``max_tokens`` tokens."


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Args:
        model: a transformers encoder; put in evaluation mode here.
        tokenizer: the transformers tokenizer that belongs to it.
        info: what it is.
        device: where it computes.
    """

    def __init__(
        self, model: Any, tokenizer: Any, info: EncoderInfo, device: torch.device | str = "cpu"
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Loads an encoder.

        Args:
            name: name on the model hub, a directory, or ``package:name/path`` for a directory in an installed package.
            revision: commit or tag on the hub.
            max_tokens: captions are cut to this many tokens.
            device: where it computes.
            dtype: of its weights and arithmetic. Not float16, which T5 exceeds; bfloat16 halves memory and time on a GPU.

        Raises:
            ValueError: there is no such encoder, or it cannot read ``max_tokens`` tokens.
        """
        info = describe(name, revision=revision, max_tokens=max_tokens)
        import transformers

        source = _source(name)
        try:
            with quiet():
                found = {"revision": commit_of(info.weights)}  # a branch may have moved since
                family = transformers.AutoConfig.from_pretrained(source, **found).model_type
                loader: Any = getattr(transformers, _ENCODERS.get(family, "AutoModel"))
                model = loader.from_pretrained(source, **found, dtype=dtype)
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **found)
        except OSError as error:
            raise ValueError(_unavailable(name, error)) from error
        return cls(model, tokenizer, info, device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the encoder, without what was left out in loading, and its tokenizer."""
        with quiet():
            self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)

    @property
    def width(self) -> int:
        """Length d of a token's embedding."""
        return self.info.width

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """`info` as a dictionary for JSON."""
        return asdict(self.info)

    def encode(self, captions: Sequence[str], batch_size: int = 64) -> Encoded:
        """Encodes captions; the empty caption is the null prompt of guidance.

        Args:
            captions: any number of texts.
            batch_size: captions to run at once, of like length.

        Raises:
            ValueError: the captions are one text, or an embedding exceeds float16.
        """
        if isinstance(captions, str):
            raise ValueError(f"captions={captions!r} must be a list of texts")
        distinct = list(dict.fromkeys(captions))
        ids, truncated = self._tokenize(distinct)
        order = sorted(range(len(distinct)), key=lambda i: len(ids[i]))
        encoded: dict[str, Tensor] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, tokens in zip(batch, self._run([ids[i] for i in batch]), strict=True):
                encoded[distinct[i]] = tokens
        cut = dict(zip(distinct, truncated, strict=True))
        return Encoded([encoded[text] for text in captions], [cut[text] for text in captions])

    def count(self, caption: str) -> int:
        """Tokens of a caption, before anything is cut."""
        return len(self.tokenizer(caption, verbose=False)["input_ids"])

    def _tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each caption, and which captions were cut."""
        if not captions:
            return [], []
        limit = self.info.max_tokens
        ids: list[list[int]] = self.tokenizer(captions, verbose=False)["input_ids"]
        truncated = [len(tokens) > limit for tokens in ids]
        for i in (i for i, cut in enumerate(truncated) if cut):
            # Again, because special tokens at the end must stay.
            ids[i] = self.tokenizer(captions[i], truncation=True, max_length=limit)["input_ids"]
        return ids, truncated

    @torch.inference_mode()
    def _run(self, ids: list[list[int]]) -> list[Float[Tensor, "_n d"]]:
        lengths = [len(tokens) for tokens in ids]
        if not max(lengths):
            raise ValueError(
                f"text encoder {self.info.name!r}: its tokenizer gives the empty caption no token"
            )
        padded = torch.full((len(ids), max(lengths)), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        output = self.model(
            input_ids=padded.to(self.device), attention_mask=mask.to(self.device)
        ).last_hidden_state
        hidden = output.to("cpu", torch.float16)
        if not hidden[mask.bool()].isfinite().all():
            raise ValueError(
                f"text encoder {self.info.name!r}: an embedding exceeds float16's range"
            )
        return [hidden[row, :length].clone() for row, length in enumerate(lengths)]


def pad(
    tokens: Sequence[Float[Tensor, "_n d"]], max_tokens: int
) -> tuple[Float[Tensor, "b {max_tokens} d"], Bool[Tensor, "b {max_tokens}"]]:
    """Stacks token embeddings of different lengths.

    Args:
        tokens: at least one; each of at most ``max_tokens`` tokens.
        max_tokens: length to pad to.

    Returns:
        float32 embeddings, zero where padded, and the mask, true where a token is.
    """
    text = torch.zeros(len(tokens), max_tokens, tokens[0].shape[1])
    mask = torch.zeros(len(tokens), max_tokens, dtype=torch.bool)
    for row, embedding in enumerate(tokens):
        text[row, : len(embedding)] = embedding
        mask[row, : len(embedding)] = True
    return text, mask


def describe(name: str, *, revision: str | None = None, max_tokens: int) -> EncoderInfo:
    """Says which encoder a name means, without loading its weights.

    A directory is identified by its content, a name on the hub by its commit.

    Raises:
        ValueError: there is no such encoder, or it cannot read ``max_tokens`` tokens.
    """
    source = _source(name)
    directory = Path(source)
    if directory.is_dir():
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(_unavailable(name, error)) from error
        try:
            weights = f"sha256:{content_hash(directory)}"
        except ValueError as error:
            raise ValueError(_unavailable(name, error)) from error
    else:
        from transformers import AutoConfig

        try:
            commit = _commit(source, revision)
            config = AutoConfig.from_pretrained(source, revision=commit).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{_unavailable(name, error)} (neither a directory here, nor to be had from the model hub)"
            ) from error
        weights = f"{name}@{commit}"
    text = {**config, **(config.get("text_config") or {})}  # CLIP has one of each tower
    width = text.get("d_model") or text["hidden_size"]
    longest = None if "d_model" in text else text.get("max_position_embeddings")
    if longest is not None and max_tokens > longest:
        raise ValueError(
            f"text encoder {name!r}: reads at most {longest} tokens, not max_tokens={max_tokens}"
        )
    return EncoderInfo(name=name, weights=weights, width=width, max_tokens=max_tokens)


def commit_of(weights: str) -> str | None:
    """The commit on the hub that `EncoderInfo.weights` names; None for a directory's."""
    return None if weights.startswith("sha256:") else weights.rpartition("@")[2]


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch, a tag or nothing means on the hub, or in its cache where the hub cannot be asked."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    if commit is None:
        raise ValueError("the hub does not say which commit this is")
    return str(commit)


def content_hash(directory: Path) -> str:
    """SHA-256 over names and bytes of the files that decide an embedding: weights, configuration and tokenizer.

    Raises:
        ValueError: there are no weights.
    """
    weights = next((found for kind in _WEIGHTS if (found := sorted(directory.glob(kind)))), None)
    if not weights:
        raise ValueError(f"no *.safetensors in {directory}")
    digest = hashlib.sha256()
    for path in sorted({*weights, *(file for kind in _CONTENT for file in directory.glob(kind))}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _source(name: str) -> str:
    """What transformers calls it: a directory for ``package:name/path``, otherwise the name itself."""
    if not name.startswith("package:"):
        if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
            raise ValueError(f"text encoder {name!r}: there is no such directory")
        return name
    package, _, inside = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"text encoder {name!r}: package {package!r} is not installed")
    directory = Path(spec.submodule_search_locations[0]) / inside
    if not directory.is_dir():
        raise ValueError(f"text encoder {name!r}: there is no folder {inside!r} in the package")
    return str(directory)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers and its table of left-over weights; a context. Also called by `vision`."""
    from transformers.utils import logging

    switch: Any = logging
    shown, verbosity = switch.is_progress_bar_enabled(), switch.get_verbosity()
    switch.disable_progress_bar()
    switch.set_verbosity_error()
    try:
        yield
    finally:
        switch.set_verbosity(verbosity)
        if shown:
            switch.enable_progress_bar()


def _unavailable(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"text encoder {name!r}: {reason or type(error).__name__}"
