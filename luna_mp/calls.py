"""One connection of a service: requests come in, replies go out, errors become data."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from luna_mp.deadline import Deadline, Patience
from luna_mp.errors import Broken, LunaError, OutOfMemory, Rejected, RemoteFailure, TimedOut
from luna_mp.faults import is_gpu_fault, is_out_of_memory
from luna_mp.sessions import Session, Sessions
from luna_mp.wire.carrier import Fence
from luna_mp.wire.channel import Channel, Packed
from luna_mp.wire.probe import Answerer

if TYPE_CHECKING:
    import torch

__all__ = ("Call", "Calls", "Exposed", "OnFault")

IDLE_SECONDS = 3600.0  # a client that needs a connection again opens one in a millisecond
SEND_SECONDS = 60.0  # for a client to take more of its reply
REFUSAL_SECONDS = 5.0
AWAY_SECONDS = 0.5  # there is room for so few bytes, unless the client never reads
MAX_CALL_SECONDS = 24 * 3600.0
WORK_SECONDS = 5e-3  # between two looks at whether the GPU is done, after the reply has left
WORK_SPIN = 100e-6  # seconds before that of looking awake: next to no work is done by then
LONGEST_WORK = 3600.0  # seconds that a GPU is given to be done

Exposed = Mapping[str, Callable[..., Any]]
#: told, before the client is, of an error that leaves the process without its GPU
OnFault = Callable[[BaseException], None]


class Call:
    """One request under way, as the worker sees it: a context that ends with its turn.

    On a GPU the work may run on by then; it is queued, and the next in line may queue theirs.
    """

    def __init__(
        self,
        channel: Channel,
        session: Session,
        answerer: Answerer,
        method: str,
        deadline: Deadline,
        to_host: bool,
    ) -> None:
        self._stream = channel.stream
        self._answerer = answerer
        self.client = session.identity.client_id
        self.method = method
        #: the client wants its tensors in the memory of the host
        self.to_host = to_host
        #: the event behind the work that the worker queued, where that is on a GPU
        self.after: Fence | None = None
        self.is_answered = False
        #: why an answer that left early did not arrive
        self.lost = ""
        self.deadline = deadline
        self._held: AbstractContextManager[Any] | None = None

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *error: Any) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(*error)

    def __repr__(self) -> str:
        return f"<Call {self.method} of {self.client[:8]}>"

    def wait_for_room(self) -> None:
        """Return once the client may be given more memory of the GPU. Raises `OutOfMemory`."""
        # What is copied to its host it lets go of at once.
        if not self.to_host:
            self._answerer.wait_for_room(self.deadline)

    def has_room(self) -> bool:
        """Whether it may be, now."""
        return self.to_host or self._answerer.has_room()

    def hold(self, context: AbstractContextManager[Any]) -> None:
        """Enter it now, and leave it once the reply is packed, or sent; once in a call."""
        assert self._held is None, f"{self!r} has its turn already"
        context.__enter__()
        self._held = context

    def place(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the last step of the result where the client may share its memory."""
        return self._answerer.place(step)

    def is_abandoned(self) -> bool:
        """True once nobody waits for the result: the client has gone, or has given up."""
        return self.deadline.has_passed or self._stream.peer_has_gone


class Calls:
    """What one authenticated client asks on one connection. Belongs to that connection's thread."""

    def __init__(
        self,
        name: str,
        exposed: Exposed,
        channel: Channel,
        session: Session,
        sessions: Sessions,
        answerer: Answerer,
        on_fault: OnFault,
    ) -> None:
        self._name = name
        self._exposed = exposed
        self._channel = channel
        self._session = session
        self._sessions = sessions
        self._answerer = answerer
        self._on_fault = on_fault
        self._whose = f" for client {session.identity.client_id[:8]}"
        self._taking = f"{channel.stream.peer} taking more of its reply"

    def next(self) -> dict[str, Any] | None:
        """The next request, or None when there will be none.

        Raises `Rejected` for garbage, `RemoteFailure` when the GPU is lost.
        """
        try:
            return self._channel.recv(Deadline(IDLE_SECONDS, "an idle connection"))
        except (Broken, TimedOut):
            return None
        except Rejected as exc:
            if is_gpu_fault(exc.__cause__):
                self._give_up(exc.__cause__)
            self._channel.skip()
            # What follows cannot be told from the rest of the bad message.
            self._channel.send(_failure(exc), Deadline(REFUSAL_SECONDS, "a refusal"))
            raise
        except RuntimeError as exc:  # of what was let go of meanwhile
            if is_gpu_fault(exc):
                self._give_up(exc)
            raise

    def answer(self, request: dict[str, Any]) -> None:
        """Reply to one request. Raises `LunaError` when this was the last one.

        That is when the client does not take its reply, or when the GPU is lost, which shows
        wherever it is used: in the model, and as well while inputs are let go of or a reply packed.
        """
        try:
            self._answer(request)
        except RuntimeError as exc:
            if is_gpu_fault(exc):
                self._give_up(exc)
            raise

    def turn_away(self) -> None:
        """Say of a request that it is not run: the service ends, and the next one may take it."""
        deadline = Deadline(AWAY_SECONDS, "a refusal")
        self._channel.turn_away(f"the {self._name} service is ending", deadline)

    def _answer(self, request: dict[str, Any]) -> None:
        call = None
        try:
            if "method" in request:
                call = self._call(request)
                packed = self._run(call, request["args"], request["kwargs"])
            else:
                packed = self._agree(request)
        except Exception as exc:  # the one boundary: what a worker raises becomes data
            if is_gpu_fault(exc):
                raise
            if call is not None and call.is_answered:
                raise RemoteFailure(f"{call.method} failed after it was answered: {exc}") from exc
            packed = self._channel.pack(_failure(exc))
        after = call.after if call is not None else None
        # On a GPU the inputs are read until the work is done, which the reply does not wait for.
        self._channel.settle(after)
        if "method" in request:
            self._sessions.count(self._session, failed="error" in packed.message)
        try:
            if call is None or not call.is_answered:
                self._channel.send_packed(packed, Patience(SEND_SECONDS, self._taking))
            elif call.lost:
                raise Broken(call.lost)
        finally:
            self._see_to_the_end(after)

    def _run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        packed = None
        try:
            with call:
                result = self._exposed[call.method](call, *args, **kwargs)
                packed = self._channel.pack({"result": result}, to_host=call.to_host)
                # Before the turn is over, the end of which takes longer than this.
                self._answer_early(call, packed)
        except BaseException:  # whatever ends the turn, what never leaves is given back
            if packed is not None and not call.is_answered:
                packed.out.take_back()
            raise
        if not call.is_answered:
            packed.complete()
        return packed

    def _answer_early(self, call: Call, packed: Packed) -> None:
        try:
            call.is_answered = self._channel.send_at_once(packed, call.deadline)
        except LunaError as exc:
            # The turn ends as that of any other call.
            # Its words only: an error that is kept keeps the frames that it came through, and with
            # those the call and its result.
            call.is_answered, call.lost = True, str(exc)

    def _see_to_the_end(self, after: Fence | None) -> None:
        """Return when the GPU is done, or the client has another request.

        Until then the call counts as under way; and a fault of its work shows here, since its
        client, which waits for the same event, would never see one. A client that has gone is no
        reason to go on: to unpin its memory would make every thread wait for the GPU.
        """
        limit = Deadline(LONGEST_WORK, "the GPU")
        start = time.perf_counter()
        while after is not None and not after.query() and not limit.has_passed:
            # A thread that sleeps takes as long to wake as a whole call of nothing.
            is_soon = time.perf_counter() - start < WORK_SPIN
            if self._channel.stream.is_readable(0.0 if is_soon else WORK_SECONDS):
                if not self._channel.stream.has_closed:
                    return
                time.sleep(WORK_SECONDS)

    def _give_up(self, fault: BaseException) -> NoReturn:
        """Tell the service, then the client, that this process can use its GPU no more."""
        self._on_fault(fault)
        lost = RemoteFailure(
            f"the {self._name} service lost its GPU ({str(fault).splitlines()[0]}) and restarts; "
            "the next call finds it again"
        )
        lost.__cause__ = fault
        self._channel.send(_failure(lost), Deadline(REFUSAL_SECONDS, "the last reply"))
        raise lost

    def _agree(self, request: dict[str, Any]) -> Packed:
        with self._answerer.beside():
            packed = self._channel.pack(self._answerer.answer(request))
            packed.complete()
            self._channel.settle(None)
        if "use" in request:
            self._sessions.agree(self._session, self._channel.carrier, request["reason"])
        return packed

    def _call(self, request: dict[str, Any]) -> Call:
        # To match a pattern would take longer than all the rest of this.
        method, seconds = request["method"], request.get("timeout")
        if not (
            isinstance(method, str)
            and isinstance(seconds, (int, float))
            and isinstance(request.get("args"), tuple)
            and isinstance(request.get("kwargs"), dict)
        ):
            raise Rejected(f"a request is malformed: it has {sorted(map(str, request))}")
        if method not in self._exposed:
            raise Rejected(
                f"{method!r:.60} is not a call that {self._name} takes from "
                f"{self._session.origin}; it takes {', '.join(sorted(self._exposed))}"
            )
        deadline = Deadline(min(max(seconds, 0.0), MAX_CALL_SECONDS), method + self._whose)
        to_host = request.get("to_host") is True
        return Call(self._channel, self._session, self._answerer, method, deadline, to_host)


def _failure(exc: Exception) -> dict[str, Any]:
    text = str(exc) if isinstance(exc, LunaError) else f"{type(exc).__name__}: {exc}"
    trace = "".join(traceback.format_exception(exc))
    kind = OutOfMemory.__name__ if is_out_of_memory(exc) else type(exc).__name__
    return {"error": text, "kind": kind, "traceback": trace}
