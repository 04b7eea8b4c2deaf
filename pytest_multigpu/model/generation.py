"""Greedy generation through ``model.generate``, timed token by token and held against itself.

May import records and siblings; torch and transformers in functions.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..records.generation import Agreement, GenerationReading, Timing
from .loaded import LoadedModel

NEW_TOKENS = 4
LAUNCHES = 200
"""Below the thousand or so that a GPU queues before Python has to wait."""
FEW = 4
"""Tokens, where only their time is of interest."""
"""First pass over repeat: above this, attention is measured again without cuDNN."""
CHAT = [{"role": "user", "content": "Say in one sentence why the sky is blue."}]


@dataclass(frozen=True)
class Generated:
    """One greedy generation."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """The new ones."""
    logits: Any
    """``(new_tokens, vocab)``, raw, on the device where generation keeps them."""
    timing: Timing

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and new tokens."""
        return (*self.prompt, *self.tokens)


def first_generation(
    loaded: LoadedModel, prompt: Sequence[int] | None = None, *, new_tokens: int = NEW_TOKENS
) -> Generated:
    """The first of the generations that :func:`read_generation` compares.

    :param prompt: token ids; by default :func:`chat_tokens`.
    """
    ids = tuple(prompt if prompt is not None else chat_tokens(loaded))
    return Generated(ids, *generate(loaded, ids, new_tokens))


def chat_tokens(loaded: LoadedModel) -> tuple[int, ...]:
    """A short conversation through the tokenizer's own chat template, if it has one."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        found = tokenizer(CHAT[0]["content"])["input_ids"]
    return tuple(int(token) for token in found)


def read_generation(
    loaded: LoadedModel, first: Generated, *, tolerance: float = 0.1
) -> GenerationReading:
    """Generate again, then once more without a cache, and compare with the first time.

    :param tolerance: largest relative error of logits that counts as equal, for telling which
        tokens are clear; see ``judging.generation.tolerance_for``.
    """
    import torch

    ids, new_tokens = first.prompt, len(first.tokens)
    second_tokens, second_logits, repeat = generate(loaded, ids, new_tokens)
    uncached = full_logits(loaded, first.text[:-1])
    nonfinite = sorted(set(_nonfinite(uncached, 0)) | set(_nonfinite(first.logits, len(ids) - 1)))
    agreement = compare(first.logits, uncached[len(ids) - 1 :], tolerance)
    cudnn, again, without, launch = None, None, None, None
    if loaded.cuda_devices:
        launch = launch_seconds(loaded.cuda_devices[0])
        backends: Any = torch.backends.cuda  # partly untyped
        cudnn = bool(backends.cudnn_sdp_enabled())
        if first.timing.is_slow_beside(repeat):
            again = _at_new_lengths(loaded, ids, beyond=new_tokens)
            if cudnn and again.is_slow_beside(repeat):
                with without_cudnn_attention():
                    without = _at_new_lengths(loaded, ids, beyond=new_tokens + FEW)
    return GenerationReading(
        prompt_tokens=len(ids),
        first_tokens=first.tokens,
        second_tokens=second_tokens,
        nonfinite_positions=tuple(nonfinite),
        positions=len(uncached),
        agreement=agreement,
        first=first.timing,
        repeat=repeat,
        repeat_errors=compare(second_logits, first.logits, tolerance).relative_errors,
        cudnn_attention=cudnn,
        launch_seconds=launch,
        new_lengths=again,
        without_cudnn=without,
    )


def _at_new_lengths(loaded: LoadedModel, prompt: Sequence[int], *, beyond: int) -> Timing:
    """``FEW`` tokens after a prompt that many tokens longer: its own again, which is plausible."""
    longer = (*prompt, *itertools.islice(itertools.cycle(prompt), beyond))
    return generate(loaded, longer, FEW)[2]


def generate(
    loaded: LoadedModel, prompt: Sequence[int], new_tokens: int, *, batch: int = 1
) -> tuple[tuple[int, ...], Any, Timing]:
    """Greedy ``model.generate`` of exactly ``new_tokens``, end-of-text tokens or not.

    :return: the new tokens and raw logits ``(new_tokens, vocab)`` of sequence 0, on the device
        where generation keeps them, and the times.
    """
    import torch

    clock = _Clock(loaded)
    ids = torch.tensor([list(prompt)] * batch, device=loaded.input_device)
    clock.start()
    with torch.no_grad():
        out = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[clock],
        )
    tokens = tuple(int(token) for token in out.sequences[0, len(prompt) :])
    return tokens, torch.stack([logits[0] for logits in out.logits]), clock.timing()


def launch_seconds(gpu: int) -> float:
    """Seconds that Python takes to launch one elementwise kernel: the least of five runs.

    :param gpu: CUDA index.
    """
    import torch

    tensor = torch.zeros(1, device=f"cuda:{gpu}")
    times = []
    for _ in range(5):
        torch.cuda.synchronize(gpu)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            tensor.add_(1)
        times.append((time.perf_counter() - began) / LAUNCHES)
    return min(times)


def full_logits(loaded: LoadedModel, text: Sequence[int]) -> Any:
    """Logits ``(len(text), vocab)`` of one forward without a cache."""
    import torch

    ids = torch.tensor([list(text)], device=loaded.input_device)
    with torch.no_grad():
        return loaded.model(input_ids=ids, use_cache=False).logits[0]


def compare(cached: Any, uncached: Any, tolerance: float) -> Agreement:
    """Both ``(n_tokens, vocab)``. A one-token product and a many-token product round differently,
    so equality is not expected; a token counts only where its lead exceeds that rounding."""
    import torch

    ours, theirs = cached.float(), uncached.float().to(cached.device)
    spread = theirs.std(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    errors = (ours - theirs).square().mean(dim=-1).sqrt() / spread
    best = ours.topk(2, dim=-1).values
    # A single logit can be off by several times the RMS: five is rarer than one in a million.
    clear = best[:, 0] - best[:, 1] > 2 * 5 * tolerance * spread
    differing = clear & (ours.argmax(dim=-1) != theirs.argmax(dim=-1))
    return Agreement(
        relative_errors=tuple(float(error) for error in errors),
        clear_tokens=int(clear.sum()),
        differing_tokens=int(differing.sum()),
    )


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Switch cuDNN attention off, and back to what it was."""
    import torch

    backends: Any = torch.backends.cuda  # partly untyped
    before = backends.cudnn_sdp_enabled()
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(before)


class _Clock:
    """A logits processor that changes nothing: it is called once each step, after the forward has
    been queued, which is where Python stops working and starts to wait."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._devices = loaded.cuda_devices
        self._marks: list[float] = []
        self._waits: list[float] = []

    def start(self) -> None:
        self._synchronize()
        self._marks.append(time.perf_counter())

    def __call__(self, _input_ids: Any, scores: Any) -> Any:
        queued = time.perf_counter()
        self._synchronize()
        done = time.perf_counter()
        self._waits.append(done - queued)
        self._marks.append(done)
        return scores

    def _synchronize(self) -> None:
        import torch

        for index in self._devices:
            torch.cuda.synchronize(index)

    def timing(self) -> Timing:
        steps = [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]
        return Timing(
            prefill_seconds=steps[0],
            decode_seconds=tuple(steps[1:]),
            waiting_seconds=tuple(self._waits[1:]),
        )


def _nonfinite(logits: Any, offset: int) -> list[int]:
    rows = (~logits.isfinite()).any(dim=-1).nonzero().flatten()
    return [offset + int(row) for row in rows]
