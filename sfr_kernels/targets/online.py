"""`OnlineTargets`: targets of data that cannot be encoded ahead, such as the model's own answers.

It stands where a `TargetStore` stands. The collator, in whatever process it runs, makes the texts; the attached model
has them embedded on its own device, on a stream beside the decoder's, and waits for them where the loss needs them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SFRConfig
from ..rows import SupervisedRows
from .encoder import target_size
from .segments import segment_texts


@dataclass
class PendingTargets:
    """Targets (A, d) on their way."""

    value: Tensor
    ready: "torch.cuda.Event | None"

    def wait(self) -> Tensor:
        """The targets, for the current stream, which waits for them; the CPU does not."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.value.device)
            stream.wait_event(self.ready)
            self.value.record_stream(stream)
        return self.value


class OnlineTargets:
    """Embeds segments when a batch has them; the last `capacity` distinct ones are remembered on the device."""

    def __init__(
        self,
        encoder,  # SentenceTransformer, frozen
        tokenizer,  # of the language model
        *,
        capacity: int = 16384,  # segments that are remembered, 2 d bytes each
        batch_size: int = 64,
    ):
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.capacity, self.batch_size = capacity, batch_size
        self.target_size = target_size(encoder)
        self.encoded = 0  # segments that were embedded so far
        self._slots: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._table: Tensor | None = None  # (capacity, d) float16
        self._stream = None

    def __getstate__(self):
        # A dataloader's worker makes texts; it has no use for the encoder and what that remembers.
        return self.__dict__ | {"encoder": None, "_slots": OrderedDict(), "_table": None, "_stream": None}

    def check(self, config: SFRConfig) -> None:
        """Whatever the config's segments are, they are made by it."""

    def texts(self, labels: Tensor, rows: SupervisedRows, config: SFRConfig) -> list[str | None]:
        """The text of every anchor, None for a zero target. On a GPU this waits for the labels."""
        return segment_texts(labels.cpu(), rows.to("cpu"), self.tokenizer, config)

    @torch.no_grad()
    def start(self, texts: Sequence[str | None], device: torch.device) -> PendingTargets:
        """Begins to embed the texts: (A, d) float16, unit norm, zero where the text is None."""
        if self.encoder is None:
            raise RuntimeError("the encoder stays in the process that made OnlineTargets: embed there")
        device = torch.device(device)
        if device.type != "cuda":
            return PendingTargets(self._embed(list(texts), device), None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            value = self._embed(list(texts), device)
            return PendingTargets(value, self._stream.record_event())

    def _embed(self, texts: list[str | None], device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device:
            self._slots.clear()
            self._table = torch.zeros(self.capacity, self.target_size, dtype=torch.float16, device=device)
            self.encoder.to(device)
        out = torch.zeros(len(texts), self.target_size, dtype=torch.float16, device=device)
        known = {i: self._slots[text] for i, text in enumerate(texts) if text in self._slots}
        if known:
            index = torch.tensor([list(known), list(known.values())]).to(device, non_blocking=True)
            out[index[0]] = self._table[index[1]]
            for i in known:
                self._slots.move_to_end(texts[i])
        fresh = sorted({t for t in texts if t is not None and t not in self._slots}, key=lambda t: (-len(t), t))
        if fresh:
            with torch.autocast(device.type, enabled=False):
                found = self.encoder.encode_document(
                    fresh, batch_size=self.batch_size, normalize_embeddings=True, convert_to_tensor=True,
                    show_progress_bar=False,
                ).half()  # fmt: skip
            self.encoded += len(fresh)
            place = {text: i for i, text in enumerate(fresh)}
            index = torch.tensor([(i, place[t]) for i, t in enumerate(texts) if t in place]).to(device).T
            out[index[0]] = found[index[1]]
            self._remember(fresh[: self.capacity], found, device)
        return out

    def _remember(self, texts: list[str], found: Tensor, device: torch.device) -> None:
        slots = []
        for text in texts:
            slot = len(self._slots) if len(self._slots) < self.capacity else self._slots.popitem(last=False)[1]
            self._slots[text] = slot
            slots.append(slot)
        self._table[torch.tensor(slots).to(device, non_blocking=True)] = found[: len(texts)]
