"""Image prompts: references that a UNet attends to beside the text (IP-Adapter, arXiv 2308.06721), row by row.

diffusers gives the scale of an adapter to the whole UNet, and wants images for every forward from then on. Here the
loader of diffusers reads the files, and the UNet gets its own attention back; `attending` says for one forward which
rows attend to which images, and how much. The rest is the plain UNet, bit for bit, and a forward of one request has the
bits of the stock pipeline with its adapters and scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from models.guiding.guides import IpAdapter
from models.guiding.reference import ReferenceKind

_Part = tuple[int, int, ReferenceKind, float, Any]  # first row, row after the last one, adapter, scale, tokens

_switches: WeakKeyDictionary[Any, _Switch] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """What the rows of one request attend to: tokens (rows, images, tokens, channels), the negative half first where
    the request is guided, and the scale of the adapter."""

    kind: ReferenceKind
    scale: float
    tokens: Any

    def of_rows(self, rows: int) -> ImagePrompt:
        """The same for a forward of that many rows; without guidance there is the positive half only."""
        if rows == len(self.tokens):
            return self
        if 2 * rows != len(self.tokens):
            raise RuntimeError(f"a forward of {rows} rows, and image tokens for {len(self.tokens)}")
        return ImagePrompt(self.kind, self.scale, self.tokens[rows:])


class ImagePrompts:
    """The adapters of one pipeline, which shares them with its siblings. All methods but the first from any thread."""

    def __init__(self, pipeline: Any, adapter: IpAdapter, source: str, *, compiled: bool = False) -> None:
        """Loads them into the pipeline, whose UNet will be `compiled` or not. Raises what the loader raises."""
        plain = dict(pipeline.unet.attn_processors)
        pipeline.load_ip_adapter(
            source,
            subfolder=adapter.subfolder,
            weight_name=list(adapter.files.values()),
            image_encoder_folder=adapter.image_encoder,
            revision=adapter.revision,
        )
        self._pipeline = pipeline
        self._projections = dict(
            zip(adapter.files, pipeline.unet.encoder_hid_proj.image_projection_layers, strict=True)
        )
        _take_over(pipeline.unet, plain, list(adapter.files))
        _switches[pipeline.unet].compiled = compiled

    @property
    def kinds(self) -> frozenset[ReferenceKind]:
        return frozenset(self._projections)

    def place(self, device: str) -> None:
        """Move what is no part of the pipeline's modules."""
        for projection in self._projections.values():
            projection.to(device).eval()

    def encode(self, kind: ReferenceKind, image: Any) -> Any:
        """What the image encoder makes of a picture: negative and positive, (2, 1, ...)."""
        import torch
        from diffusers.models.embeddings import ImageProjection

        hidden = not isinstance(self._projections[kind], ImageProjection)
        positive, negative = self._pipeline.encode_image(image, self._pipeline._execution_device, 1, hidden)
        return torch.stack([negative, positive])

    def prompt(self, kind: ReferenceKind, scale: float, encoded: Any, images: int, *, guided: bool) -> ImagePrompt:
        """The prompt of a request, or of a batch of it, that makes so many images."""
        device = self._pipeline._execution_device
        halves = encoded if guided else encoded[1:]
        [embeds] = self._pipeline.prepare_ip_adapter_image_embeds(None, [halves], device, images, guided)
        tokens = self._projections[kind](embeds.flatten(0, 1))
        return ImagePrompt(kind, scale, tokens.reshape(*embeds.shape[:2], *tokens.shape[1:]))


@contextlib.contextmanager
def attending(module: Any, prompts: Sequence[tuple[int, Sequence[ImagePrompt]]]) -> Iterator[None]:
    """Around one forward of a UNet: so many rows, one request after another, with the image prompts of each."""
    switch = _switches.get(module)
    if switch is None or not any(own for _, own in prompts):
        yield
        return
    parts: list[_Part] = []
    start = 0
    for rows, own in prompts:
        parts += [(start, start + rows, prompt.kind, prompt.scale, prompt.tokens) for prompt in own]
        start += rows
    switch.parts = parts
    try:
        with switch.eager():
            yield
    finally:
        switch.parts = ()


class _Switch:
    """What the layers of one UNet add to the forward that is running."""

    parts: Sequence[_Part] = ()
    compiled = False

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """Compiled code would be compiled anew for each mixture of rows and scales."""
        if not self.compiled:
            return contextlib.nullcontext()
        import torch

        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance


class _Attention:
    """The processor of one layer: the plain one, and in between, before its output is projected, the image prompts."""

    def __init__(self, plain: Any, switch: _Switch, keys: dict[str, Any], values: dict[str, Any]) -> None:
        self._plain, self._switch, self._keys, self._values = plain, switch, keys, values

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        **kwargs: Any,
    ) -> Any:
        layer = _Between(attn, self._add) if self._switch.parts else attn
        return self._plain(layer, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)

    def _add(self, heads: int, query: Any, hidden: Any) -> Any:
        for start, end, kind, scale, tokens in self._switch.parts:
            key, value = self._keys[kind](tokens), self._values[kind](tokens)
            if end - start == len(hidden):
                hidden = hidden + scale * _attention(heads, query, key, value)
            else:
                hidden[start:end] = hidden[start:end] + scale * _attention(heads, query[start:end], key, value)
        return hidden


class _Between:
    """An attention layer as its processor sees it: keeps the query, and adds to what is projected at the end."""

    def __init__(self, attn: Any, add: Any) -> None:
        self._attn, self._add = attn, add
        self._query: Any = None
        self.to_out = (self._project, *attn.to_out[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden: Any) -> Any:
        self._query = self._attn.to_q(hidden)
        return self._query

    def _project(self, hidden: Any) -> Any:
        return self._attn.to_out[0](self._add(self._attn.heads, self._query, hidden))


def _attention(heads: int, query: Any, key: Any, value: Any) -> Any:
    """Attention of (rows, positions, channels) to (rows, ..., channels), in the query's shape."""
    from torch.nn.functional import scaled_dot_product_attention

    rows, width = len(query), key.shape[-1] // heads
    query, key, value = (each.view(rows, -1, heads, width).transpose(1, 2) for each in (query, key, value))
    output = scaled_dot_product_attention(query, key, value)
    return output.transpose(1, 2).reshape(rows, -1, heads * width).to(query.dtype)


def _take_over(unet: Any, plain: dict[str, Any], kinds: list[ReferenceKind]) -> None:
    """Give the UNet its own attention back, beside the layers that the loader has put in."""
    import torch

    switch = _switches.setdefault(unet, _Switch())
    unet.encoder_hid_proj = None  # first, since it may have attention of its own
    unet.config.encoder_hid_dim_type = None
    loaded = unet.attn_processors
    layers = {name: part for name, part in loaded.items() if hasattr(part, "to_k_ip")}
    processors = dict(plain)
    for name, layer in layers.items():
        keys = dict(zip(kinds, layer.to_k_ip, strict=True))
        processors[name] = _Attention(plain[name], switch, keys, dict(zip(kinds, layer.to_v_ip, strict=True)))
    unet.set_attn_processor(processors)
    unet.image_prompts = torch.nn.ModuleList(layers.values())  # so that they move with the UNet
