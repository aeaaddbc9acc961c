"""Tell passing faults, after which a job is run again, from faults of the input."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator

from adasid.errors import AdasidError, InputError, TransientError
from adasid.storage import translated

_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EPIPE,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
}
_WORDS = re.compile(
    # disks
    r"No space left on device|Disk quota exceeded|File too large|Stale file handle|Input/output error"
    # networks; delta-rs and object_store, requests, Java
    r"|[Cc]onnection (?:was )?(?:refused|reset|aborted|timed out|closed)|Connect(?:ion)?Timeout|ReadTimeout"
    r"|[Oo]peration timed out|[Rr]equest timed out|SocketTimeoutException|UnknownHostException|NoRouteToHost"
    r"|Temporary failure in name resolution|error sending request|Broken pipe"
    # object stores and servers
    r"|SlowDown|Slow Down|ServiceUnavailable|Service Unavailable|TooManyRequests|Too Many Requests|RequestTimeout"
    r"|InternalError\b.{0,80}\btry again|(?:[Ss]tatus|[Cc]ode|HTTP)\W{0,3}(?:code\W{0,3})?(?:429|50[0234])\b"
    # Spark's executors and Python workers, and the JVM itself
    r"|ExecutorLostFailure|[Ee]xecutor heartbeat timed out|FetchFailed|executor \S+ exited|Lost executor"
    r"|Python worker exited unexpectedly|Cannot call methods on a stopped SparkContext|SparkContext was shut down"
    r"|adasid\.errors\.TransientError"
    r"|Answer from Java side is empty|An error occurred while trying to connect to the Java server"
)
_TYPES = {"Py4JNetworkError", "ActorDiedError", "ActorUnavailableError", "NodeDiedError", "WorkerCrashedError"}
_TYPES |= {"RaySystemError", "OutOfMemoryError", "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"}
"""Types of Py4J and Ray by name, as this module imports no engine."""


def passing(error: BaseException) -> bool:
    """Return whether the error, or one that caused it, is a passing fault: a lost executor or worker, a full disk, a
    server or network that is away or overloaded."""
    return any(_passes(cause) for cause in _causes(error))


def wrapped(error: BaseException, message: str) -> AdasidError:
    """Return the error to raise for an engine's: that of the object store it names, else a TransientError for a passing
    fault, else an InputError."""
    store = translated(error)
    if store and not (isinstance(store, InputError) and "does not exist (any more)" in str(store)):
        return store
    return TransientError(message) if passing(error) else InputError(message)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen, following = set[int](), [error]
    while following:
        cause = following.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        # Ray keeps the errors of workers, and requests those of urllib3, in attributes
        context = None if cause.__suppress_context__ else cause.__context__
        nested = [cause.__cause__, context, getattr(cause, "reason", None), getattr(cause, "cause", None)]
        failures = getattr(cause, "worker_failures", None)
        nested += failures.values() if isinstance(failures, dict) else []
        following += [inner for inner in nested if isinstance(inner, BaseException)]


def _passes(error: BaseException) -> bool:
    engines = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in {"ray", "py4j"}}
    if isinstance(error, TransientError) or _TYPES & engines:
        return True
    if isinstance(error, AdasidError):  # its message is that of a cause, which is asked itself
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno in _ERRNOS:
        return True
    try:
        text = str(error)
    except Exception:  # a Java error is asked for its text over a connection that may be gone
        return True
    return _WORDS.search(text) is not None
