"""The processes (ranks) of a torch.distributed job, which train the lanes of a run together.

Every decision is made by the first rank and sent to the others. Messages use gloo on the CPU. The tensors of a bank on
a GPU use NCCL if the job's process group has it.
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

from swamp_fast.common.timing import Stopwatch

BEAT_SECONDS = 1.0  # time between two heartbeats
SILENT_SECONDS = 30.0  # a rank without a heartbeat for this long counts as gone
GRACE_SECONDS = 10.0  # once a rank is gone, the others have this long to end by themselves
BROKEN_SILENT_SECONDS = 3.0  # replaces SILENT_SECONDS after a connection broke
# The timeout of gloo. It is long because other ranks may evaluate or read data for hours; heartbeats detect lost ranks.
TIMEOUT = timedelta(days=30)
EXIT_STATUS = 70  # exit status of a process that ends because another rank is gone
ADVICE = "Start again with the same run_dir, on any number of ranks, to continue from the last checkpoint."

Value = TypeVar("Value")
CALLS = itertools.count()


class Ranks:
    """This process as number `rank` of `world` processes, all of which make the same calls in the same order.

    group  a gloo group for messages between ranks; None in a single process
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self.group = rank, world, group
        self.heartbeat: Heartbeat | None = None

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which makes decisions, writes files and prints."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Return which of `count` lanes belong to `rank`, by default this rank.

        The ranks' numbers of lanes differ by at most one. The first rank always has the largest number; with more
        ranks than lanes, some ranks have none.
        """
        rank = self.rank if rank is None else rank
        each, over = divmod(count, self.world)
        begin = rank * each + min(rank, over)
        return range(begin, begin + each + (rank < over))

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Gather all lanes [count, ...], in order, on every rank.

        own  [lanes of this rank, ...]  this rank's part
        """
        if self.world == 1:
            return own
        shape = (len(self.share(count, 0)), *own.shape[1:])  # the first rank has the largest part
        padded = own.new_zeros(shape)
        padded[: len(own)] = own
        group = self.group
        if own.is_cuda and "cuda:nccl" in dist.get_backend_config():
            self.all_reduce_max([0])  # a barrier on gloo, because NCCL would time out if a rank came late
            group = None
        else:
            padded = padded.cpu()
        sent = padded.flatten().view(torch.uint8)
        each = [torch.empty_like(sent) for _ in range(self.world)]
        with self._naming_who_is_gone():
            dist.all_gather(each, sent, group)
        rows = [part.view(own.dtype).view(shape)[: len(self.share(count, i))] for i, part in enumerate(each)]
        return torch.cat(rows).to(own.device)

    def broadcast_from_first(self, make: Callable[[], Value]) -> Value:
        """Call `make` on the first rank and return its value on every rank. If it raises, every rank raises."""
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
        """Return the values of all ranks on the first rank, and an empty list on the others.

        Tensors must be on the CPU.
        """
        if self.world == 1:
            return [own]
        found: list[Any] | None = [None] * self.world if self.first else None
        with self._naming_who_is_gone():
            dist.gather_object(own, found, 0, self.group)
        return found or []

    def all_reduce_max(self, numbers: list[int]) -> list[int]:
        """Return, for each of the numbers, its maximum over the ranks."""
        if self.world == 1:
            return numbers
        found = torch.tensor(numbers)
        with self._naming_who_is_gone():
            dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found.tolist()

    def agree(self, what: str, own: Tensor) -> None:
        """Check that a tensor has the same bits on every rank.

        what  names the tensor in the error
        own   the tensor on this rank

        Raises RuntimeError on every rank, naming the ranks on which the tensor differs from the first rank's.
        """
        if self.world == 1:
            return
        content = own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = bytearray(hashlib.blake2b(content.data, digest_size=16).digest())
        hashes = self.gather(torch.frombuffer(digest, dtype=torch.uint8)[None], self.world)
        others = [rank for rank in range(1, self.world) if not torch.equal(hashes[rank], hashes[0])]
        if others:
            raise RuntimeError(
                f"{what} must be the same on every rank, but on {_named(others)} it differs from rank 0's. Check that "
                f"all ranks run the same program and that their memory is sound. {ADVICE}"
            )

    @contextmanager
    def watched(self) -> Iterator[Ranks]:
        """A context in which all ranks send heartbeats. If a rank dies, the others print a message and end.

        Yields self.
        """
        if self.world == 1:
            yield self
            return
        store = PrefixStore(f"swamp_fast/{next(CALLS)}", _get_default_store().clone())
        self.heartbeat = Heartbeat(self.rank, self.world, store)
        self.heartbeat.start()
        try:
            yield self
        except BaseException as error:
            self.heartbeat.stop(f"failed: {type(error).__name__}: {error}")
            raise
        else:
            self.heartbeat.stop("left")
        finally:
            self.heartbeat = None

    def _broadcast(self, sent: bytes) -> bytes:
        """Return the bytes that the first rank sends; other ranks' `sent` is ignored."""
        with self._naming_who_is_gone():
            length = torch.tensor([len(sent)])
            dist.broadcast(length, 0, self.group)
            held = bytearray(sent) if self.first else bytearray(int(length))
            dist.broadcast(torch.frombuffer(held, dtype=torch.uint8), 0, self.group)
        return bytes(held)

    @contextmanager
    def _naming_who_is_gone(self) -> Iterator[None]:
        """A context for messages between ranks. If one fails, the error names the rank that is gone."""
        try:
            yield
        except RuntimeError as error:
            gone = None if self.heartbeat is None else self.heartbeat.wait_for_gone()
            raise RuntimeError(f"{gone or 'another rank is gone'}. {ADVICE}") from error


class Heartbeat(threading.Thread):
    """Writes this rank's heartbeats to the job's store and reads those of the other ranks.

    A heartbeat is a counter rather than a time, because the clocks of two machines differ. A rank that leaves writes a
    last sign instead: "left", or "failed: " and its error.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        super().__init__(name="swamp_fast heart", daemon=True)
        store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        self.rank, self.store = rank, store
        self.signs: dict[int, tuple[str, Stopwatch]] = {}  # other rank -> its newest sign and the time since it
        self.others = [other for other in range(world) if other != rank]
        self.store_is_gone = False
        self.over = threading.Event()

    def run(self) -> None:
        """Send heartbeats until stopped. If another rank is gone, end this process after a grace period."""
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
                os._exit(EXIT_STATUS)  # the main thread may be waiting for a message that will never come
            if self.over.wait(BEAT_SECONDS):
                return

    def stop(self, sign: str) -> None:
        """Stop the heartbeats, and leave `sign` in the store as the last one."""
        self.over.set()
        self.join(2 * BEAT_SECONDS)
        with suppress(RuntimeError):
            self.store.set(str(self.rank), sign)

    def gone(self, seconds: float) -> str | None:
        """Return a sentence that says which rank is gone, or None if none is.

        A rank is gone if it sent no heartbeat for `seconds`, or if its last sign says that it failed.
        """
        signs = list(self.signs.items())
        silent = [rank for rank, (sign, age) in signs if age.seconds > seconds and sign.isdecimal()]
        if silent:
            return f"{_named(silent)} {'are' if len(silent) > 1 else 'is'} gone without an error message"
        if self.store_is_gone:
            return "rank 0 is gone, or the process that started the ranks is"
        for rank, (sign, _) in signs:
            if sign.startswith("failed: "):
                return f"rank {rank} {sign}"
        return None

    def wait_for_gone(self) -> str | None:
        """After a connection broke, wait until it is known which rank is gone. Returns the same as `gone`."""
        waited = Stopwatch()
        while waited.seconds < 2 * BROKEN_SILENT_SECONDS:
            gone = self.gone(BROKEN_SILENT_SECONDS)
            if gone is not None:
                return gone
            time.sleep(BEAT_SECONDS / 4)
        return None

    def _look(self) -> None:
        for other in self.others:
            if self.store.check([str(other)]):
                sign = self.store.get(str(other)).decode()
                if other not in self.signs or self.signs[other][0] != sign:
                    self.signs[other] = sign, Stopwatch()


ALONE = Ranks()


def current() -> Ranks:
    """Return this process's Ranks in the job's process group, or ALONE if there is no group.

    All processes of the group must call it together.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), _gloo())


@contextmanager
def start(device: str = "auto") -> Iterator[Ranks]:
    """Initialise the process group if torchrun started this process, and yield its Ranks.

    Without torchrun, or with a group that exists already, yields what `current` returns.

    device  as in SwampConfig; with "auto" or "cuda", each process on a machine takes a GPU of its own
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
                f"each process takes its own GPU, but this machine has {torch.cuda.device_count()} for at least "
                f"{local + 1} processes; start fewer, or pass --device cpu."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    yield current()
    dist.destroy_process_group()  # skipped after an error, because it may hang on a broken group


_of_group: list[Any] = []  # the default group, and the gloo group that was made for it


def _gloo() -> dist.ProcessGroup:
    default = dist.group.WORLD
    if not _of_group or _of_group[0] is not default:
        _of_group[:] = [default, dist.new_group(backend="gloo", timeout=TIMEOUT)]
    made: dist.ProcessGroup = _of_group[1]
    return made


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _packed(value: Any, error: Exception | None) -> bytes:
    file = io.BytesIO()
    torch.save((value, error and portable(error)), file)
    return file.getvalue()


def portable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with the same text if the error can't be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # for example a constructor that takes something other than a message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _unpacked(sent: bytes) -> tuple[Any, Exception | None]:
    """Return a value and an error from bytes that `_packed` made.

    Tensors from the first rank's GPU are placed on this rank's GPU.
    """

    def placed(storage: Any, place: str) -> Any:
        return storage.cuda() if place.startswith("cuda") else storage

    found: tuple[Any, Exception | None] = torch.load(io.BytesIO(sent), placed, weights_only=False)
    return found
