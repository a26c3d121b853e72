"""The processes of a job, each a rank: they share the lanes of a run, and what one of them decides all follow.

Their talk goes through gloo on the CPU; a bank that is on a GPU goes through NCCL, where the job's group has it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 30.0  # after which a rank that gives none is gone
GRACE_SECONDS = 10.0  # in which a rank may end in order once another is gone
SOON_SECONDS = 3.0  # of silence, after a connection broke: who was it?
PATIENCE = timedelta(days=30)  # others may evaluate, or read data, for long; who is gone is seen by signs of life
GONE = 70  # the exit status of a process that ends because another is gone
ADVICE = "Start again with the same run_dir, with this or any other number of ranks, to go on from the last checkpoint."

Value = TypeVar("Value")
CALLS = itertools.count()


class Ranks:
    """One of `world` processes that do the same calls in the same order; alone, everything is its own.

    group  of gloo, for what ranks tell each other; None alone
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self.group = rank, world, group
        self.heart: Heartbeat | None = None

    @property
    def first(self) -> bool:
        """Whether this one decides, writes and prints."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of so many lanes are this rank's, or another's: as many as any other's, or one more or less, or none.

        The first rank has some if there are any.
        """
        rank = self.rank if rank is None else rank
        each, over = divmod(count, self.world)
        begin = rank * each + min(rank, over)
        return range(begin, begin + each + (rank < over))

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Of `own` [lanes of this rank, ...] all [count, ...] on every rank, in the order of the lanes."""
        if self.world == 1:
            return own
        shape = (len(self.share(count, 0)), *own.shape[1:])  # the first rank has the most
        padded = own.new_zeros(shape)
        padded[: len(own)] = own
        group = self.group
        if own.is_cuda and "cuda:nccl" in dist.get_backend_config():
            self.all_reduce_max([0])  # NCCL gives up on who is late
            group = None
        else:
            padded = padded.cpu()
        sent = padded.flatten().view(torch.uint8)
        each = [torch.empty_like(sent) for _ in range(self.world)]
        with self._telling():
            dist.all_gather(each, sent, group)
        rows = [part.view(own.dtype).view(shape)[: len(self.share(count, i))] for i, part in enumerate(each)]
        return torch.cat(rows).to(own.device)

    def broadcast_from_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, on every rank; an error of it is raised on every rank."""
        if self.world == 1:
            return make()
        error: Exception | None = None
        sent = b""
        if self.first:
            try:
                value = make()
            except Exception as raised:
                error = raised
            sent = _packed(None, error) if error is not None else _packed(value, None)
        sent = self._broadcast(sent)
        if not self.first:
            value, error = _unpacked(sent)
        if error is not None:
            raise error
        return value

    def gather_to_first(self, own: Value) -> list[Value]:
        """Each rank's value, on the first; nothing on the others. Tensors must be on the CPU."""
        if self.world == 1:
            return [own]
        found: list[Any] | None = [None] * self.world if self.first else None
        with self._telling():
            dist.gather_object(own, found, 0, self.group)
        return found or []

    def all_reduce_max(self, numbers: list[int]) -> list[int]:
        """The largest of each number over the ranks."""
        if self.world == 1:
            return numbers
        found = torch.tensor(numbers)
        with self._telling():
            dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found.tolist()

    def agree(self, what: str, own: Tensor) -> None:
        """Raise RuntimeError on every rank, naming who differs, unless all have the same bits."""
        if self.world == 1:
            return
        content = own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = bytearray(hashlib.blake2b(content.data, digest_size=16).digest())
        hashes = self.gather(torch.frombuffer(digest, dtype=torch.uint8)[None], self.world)
        others = [rank for rank in range(1, self.world) if not torch.equal(hashes[rank], hashes[0])]
        if others:
            raise RuntimeError(
                f"{what} must be the same on every rank, but differs from rank 0's on {_named(others)}. See that all "
                f"run the same program and that their memory is sound. {ADVICE}"
            )

    @contextmanager
    def watched(self) -> Iterator[Ranks]:
        """Meanwhile each rank gives signs of life; where one is gone, the others end with a message. Gives itself."""
        if self.world == 1:
            yield self
            return
        store = PrefixStore(f"swamp_fast/{next(CALLS)}", _get_default_store().clone())
        self.heart = Heartbeat(self.rank, self.world, store)
        self.heart.start()
        try:
            yield self
        except BaseException as error:
            self.heart.stop(f"failed: {type(error).__name__}: {error}")
            raise
        else:
            self.heart.stop("left")
        finally:
            self.heart = None

    def _broadcast(self, sent: bytes) -> bytes:
        """The first rank's bytes."""
        with self._telling():
            length = torch.tensor([len(sent)])
            dist.broadcast(length, 0, self.group)
            held = bytearray(sent) if self.first else bytearray(int(length))
            dist.broadcast(torch.frombuffer(held, dtype=torch.uint8), 0, self.group)
        return bytes(held)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Around talk: an error of it says who is gone."""
        try:
            yield
        except RuntimeError as error:
            gone = None if self.heart is None else self.heart.soon_gone()
            raise RuntimeError(f"{gone or 'another rank is gone'}. {ADVICE}") from error


class Heartbeat(threading.Thread):
    """Gives signs of life in the job's store, and looks for those of the others.

    Each counts, and none tells its clock: those of two machines differ.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        super().__init__(name="swamp_fast heart", daemon=True)
        store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        self.rank, self.store = rank, store
        self.signs: dict[int, tuple[str, float]] = {}  # of the others that have begun, each with when it was new
        self.others = [other for other in range(world) if other != rank]
        self.store_is_gone = False
        self.over = threading.Event()

    def run(self) -> None:
        """Beat until it is over, or until another is gone: then end the process, if it doesn't by itself."""
        for beat in itertools.count():
            try:
                self.store.set(str(self.rank), str(beat))
                self._look()
            except RuntimeError:
                self.store_is_gone = True
            gone = self.gone(SILENT_SECONDS)
            if gone is not None and not self.over.wait(GRACE_SECONDS):
                sys.stderr.write(f"swamp_fast, rank {self.rank}: {gone}. {ADVICE}\n")
                sys.stderr.flush()
                os._exit(GONE)  # the main thread may wait for what never comes
            if self.over.wait(BEAT_SECONDS):
                return

    def stop(self, sign: str) -> None:
        """Leave, with a last sign."""
        self.over.set()
        self.join(2 * BEAT_SECONDS)
        with suppress(RuntimeError):
            self.store.set(str(self.rank), sign)

    def gone(self, seconds: float) -> str | None:
        """Who is, by so many seconds of silence, or by its own word."""
        now = time.monotonic()
        signs = list(self.signs.items())
        silent = [rank for rank, (sign, new) in signs if now - new > seconds and sign.isdecimal()]
        if silent:
            return f"{_named(silent)} {'are' if len(silent) > 1 else 'is'} gone, and gave no sign of life"
        if self.store_is_gone:
            return "rank 0 is gone, or what started the ranks"
        for rank, (sign, _) in signs:
            if sign.startswith("failed: "):
                return f"rank {rank} {sign}"
        return None

    def soon_gone(self) -> str | None:
        """Who is gone, after a connection broke."""
        until = time.monotonic() + 2 * SOON_SECONDS
        while time.monotonic() < until:
            gone = self.gone(SOON_SECONDS)
            if gone is not None:
                return gone
            time.sleep(BEAT_SECONDS / 4)
        return None

    def _look(self) -> None:
        for other in self.others:
            if self.store.check([str(other)]):
                sign = self.store.get(str(other)).decode()
                if other not in self.signs or self.signs[other][0] != sign:
                    self.signs[other] = sign, time.monotonic()


ALONE = Ranks()


def current() -> Ranks:
    """The ranks of the job's process group; without one, one. All of a job call it together."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), _gloo())


@contextmanager
def start(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of a process that torchrun started, which make their group; of any other, one.

    device  as in SwampConfig; with "auto" or "cuda" each process of a machine takes a GPU of its own
    """
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not started or not dist.is_available() or dist.is_initialized():
        yield current()
        return
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpus:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"each process takes a GPU of its own, and this machine offers torch {torch.cuda.device_count()}, but "
                f"a process {local + 1} was started on it; start fewer, or pass --device cpu."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    yield current()
    dist.destroy_process_group()  # not after an error: what is broken may not answer


_of_group: list[Any] = []  # the default group, and the one of gloo made beside it


def _gloo() -> dist.ProcessGroup:
    default = dist.group.WORLD
    if not _of_group or _of_group[0] is not default:
        _of_group[:] = [default, dist.new_group(backend="gloo", timeout=PATIENCE)]
    made: dist.ProcessGroup = _of_group[1]
    return made


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _packed(value: Any, error: Exception | None) -> bytes:
    file = io.BytesIO()
    torch.save((value, error and portable(error)), file)
    return file.getvalue()


def portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # one with arguments of its own
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _unpacked(sent: bytes) -> tuple[Any, Exception | None]:
    """What was on the first rank's GPU comes to this rank's."""

    def placed(storage: Any, place: str) -> Any:
        return storage.cuda() if place.startswith("cuda") else storage

    found: tuple[Any, Exception | None] = torch.load(io.BytesIO(sent), placed, weights_only=False)
    return found
