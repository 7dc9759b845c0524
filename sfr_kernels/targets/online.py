"""`OnlineTargets`, in place of a `TargetStore` for data that cannot be encoded ahead, as the model's own answers.

The collator, in any process, makes the texts; the attached model has them embedded on its own device (on a GPU by a
thread, on a second stream) and waits for them where the loss needs them.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SFRConfig
from .encoder import as_configured, check_encoder, target_size


@dataclass
class PendingTargets:
    """Targets (A, d) that are being computed."""

    future: "Future[tuple[Tensor, torch.cuda.Event | None]]"

    def wait(self) -> Tensor:
        """The targets. The CPU waits until their kernels are launched, the current stream until they are done."""
        value, ready = self.future.result()
        if ready is not None:
            stream = torch.cuda.current_stream(value.device)
            stream.wait_event(ready)
            value.record_stream(stream)
        return value


class OnlineTargets:
    """Embeds the segments of each batch; the last `capacity` distinct ones are cached on the device."""

    def __init__(
        self,
        encoder,  # SentenceTransformer, frozen
        tokenizer,  # of the language model
        *,
        capacity: int = 16384,  # segments in the cache, 2 d bytes each
        batch_size: int = 64,
    ):
        check_encoder(encoder)
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.capacity, self.batch_size = capacity, batch_size
        self.target_size = target_size(encoder)
        self.encoded = 0  # segments embedded so far, less those found in the cache
        self._slots: OrderedDict[str, int] = OrderedDict()  # rows of the cache, the least recently used first
        self._table: Tensor | None = None  # (capacity, d) float16
        self._stream = self._thread = None

    def __getstate__(self) -> dict:
        """A pickle holds the encoder, and an empty cache."""
        return self.__dict__ | {"_slots": OrderedDict(), "_table": None, "_stream": None, "_thread": None}

    def __deepcopy__(self, memo: dict) -> "OnlineTargets":
        """A copy that shares the encoder, which is frozen, and has a cache of its own."""
        memo[id(self)] = twin = copy.copy(self)
        return twin

    def check(self, config: SFRConfig) -> None:
        """Gives the encoder the pooling and the length of the config; the collator makes segments by its rules."""
        if self.encoder is not None:
            self.encoder = as_configured(self.encoder, config)

    def start(self, texts: Sequence[str | None], device: torch.device | str) -> PendingTargets:
        """Begins to embed the texts as (A, d) float16, unit norm, zero where the text is None."""
        if self.encoder is None:
            raise RuntimeError("the encoder stays in the process that made OnlineTargets: embed there")
        device = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
        if device.type == "cpu":  # the decoder needs the same cores: the OpenMP team of another thread slows every op
            done = Future()
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False):  # whatever modes the caller is in
                done.set_result(self._run(list(texts), device))
            return PendingTargets(done)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="targets")
        return PendingTargets(self._thread.submit(self._run, list(texts), device))

    @torch.no_grad()
    def _run(self, texts: list[str | None], device: torch.device) -> "tuple[Tensor, torch.cuda.Event | None]":
        if device.type != "cuda":
            return self._embed(texts, device), None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            return self._embed(texts, device), self._stream.record_event()

    def _embed(self, texts: list[str | None], device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device:
            self._slots.clear()
            self._table = torch.zeros(self.capacity, self.target_size, dtype=torch.float16, device=device)
            self.encoder.to(device)
        out = torch.zeros(len(texts), self.target_size, dtype=torch.float16, device=device)
        known = [(i, self._slots[text]) for i, text in enumerate(texts) if text in self._slots]
        if known:
            index = torch.tensor(known, dtype=torch.int64).T.to(device)
            out[index[0]] = self._table[index[1]]
            for i, _ in known:
                self._slots.move_to_end(texts[i])
        new = sorted({t for t in texts if t is not None and t not in self._slots}, key=lambda t: (-len(t), t))
        if new:
            values = self.encoder.encode_document(
                new, batch_size=self.batch_size, normalize_embeddings=True, convert_to_tensor=True,
                show_progress_bar=False,
            ).half()  # fmt: skip
            self.encoded += len(new)
            # on a GPU the check would be a device sync, and the loss is NaN
            if device.type == "cpu" and not (finite := values.isfinite().all(1)).all():
                text = new[int((~finite).nonzero()[0])]
                raise ValueError(f"the encoder returned NaN or infinite values for {text[:200]!r}")
            place = {text: i for i, text in enumerate(new)}
            index = [(i, place[t]) for i, t in enumerate(texts) if t in place]
            index = torch.tensor(index, dtype=torch.int64).T.to(device)
            out[index[0]] = values[index[1]]
            self._cache(new[: self.capacity], values)
        return out

    def _cache(self, texts: list[str], values: Tensor) -> None:
        slots = []
        for text in texts:
            slot = len(self._slots) if len(self._slots) < self.capacity else self._slots.popitem(last=False)[1]
            self._slots[text] = slot
            slots.append(slot)
        self._table[torch.tensor(slots, dtype=torch.int64).to(self._table.device)] = values[: len(texts)]
