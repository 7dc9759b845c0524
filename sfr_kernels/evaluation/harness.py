"""Runs inside a sandbox, as a program of its own: the process of an answer, or that of the tests of an answer.

The two are processes of two sandboxes that share a pair of pipes. The tests ask ("call this with these arguments"), the
answer replies, in lines of JSON that decode to plain data only. So the answer's process holds nothing of the tests and
cannot say how they went, and an object with an `__eq__` of its own never reaches a comparison.
"""

import builtins
import collections
import ctypes
import importlib
import itertools
import json
import os
import resource
import sys
import types

MOST_NESTED = 100
MOST_ITEMS = 100_000  # of an iterator, which may have no end
LONG = 2**64  # integers from here on travel in hexadecimal, since Python bounds the decimal digits that it reads
PLAIN = {type(None), bool, int, float, str}  # which JSON has too: a float is written with all of its digits
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, collections.deque)}
BYTES = {kind.__name__: kind for kind in (bytes, bytearray)}
VIEWS = {"keys": dict.fromkeys, "values": lambda items: dict(enumerate(items)), "items": dict}  # the dict of a view
TEXTS = {"Fraction": "fractions", "Decimal": "decimal", "date": "datetime", "datetime": "datetime"}  # made of their str
TYPES = {t.__name__: t for t in (object, bool, int, float, complex, str, bytes, dict, range, *SEQUENCES.values())}
NOT_CARRIED = "the tests need what cannot be carried"  # a reason that is not the answer's fault
ENDS = {101: "syntax error", 102: "out of memory", 103: "raised an exception"}  # by exit status, of a whole program


class NotCarried(ValueError):
    """A value, in the tests or in an answer, that has no form as data."""


def encode(value, opaque, depth: int = 0):
    """Plain data as what `json` can write; a subclass of a plain type as that type, an iterator as its items. What else
    there is, is `opaque`'s to name."""
    if depth > MOST_NESTED:
        raise NotCarried(f"nested more than {MOST_NESTED} deep")

    def items(values):
        return [encode(item, opaque, depth + 1) for item in values]

    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, int):
        value = int.__pos__(value)
        return value if -LONG < value < LONG else ["int", hex(value)]
    if type(value) is list and {*map(type, value)} <= PLAIN and all(-LONG < i < LONG for i in value if type(i) is int):
        return {"list": value}  # as it is, since tests may have 100,000 items
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    for name, kind in BYTES.items():
        if isinstance(value, kind):
            return [name, value.hex()]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, *items(value)]
    if isinstance(value, dict):
        return ["dict", items(value.keys()), items(value.values())]
    for name in VIEWS:
        if isinstance(value, type(getattr({}, name)())):
            return [name, *items(value)]
    if TEXTS.get(type(value).__name__, "") == type(value).__module__:
        return [type(value).__name__, str(value)]
    if isinstance(value, range):
        return ["range", *items((value.start, value.stop, value.step))]
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    if hasattr(type(value), "__next__"):
        found = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(found) > MOST_ITEMS:
            raise NotCarried(f"an iterator of more than {MOST_ITEMS} items")
        return ["iter", *items(found)]
    return opaque(value)


def decode(data, known):
    """What `encode` wrote; `known` gives what `opaque` named. Raises, of whatever type, for anything else."""
    if type(data) in PLAIN:
        return data
    if type(data) is dict:
        return list(data["list"])
    tag, *rest = data
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(item, known) for item in rest)
    if tag in VIEWS:
        return getattr(VIEWS[tag]([decode(item, known) for item in rest]), tag)()
    if tag == "iter":
        return iter([decode(item, known) for item in rest])
    if tag == "dict":
        keys, values = ([decode(item, known) for item in part] for part in rest)
        return dict(zip(keys, values, strict=True))
    if tag == "range":
        return range(*(decode(item, known) for item in rest))
    if tag == "complex":
        return complex(*map(float.fromhex, rest))
    (text,) = rest
    if tag == "int":
        return int(text, 16)
    if tag in BYTES:
        return BYTES[tag].fromhex(text)
    if tag in TEXTS:
        kind = getattr(importlib.import_module(TEXTS[tag]), tag)
        return getattr(kind, "fromisoformat", kind)(text)
    return TYPES[text] if tag == "type" else known(tag, text)


class Channel:
    """Messages over a pair of pipes, a line each, of at most so many bytes."""

    def __init__(self, read: int, write: int, *, most_read: int = sys.maxsize - 1, most_written: int = sys.maxsize):
        self.reader, self.writer = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self.most_read, self.most_written = most_read, most_written

    def send(self, message) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > self.most_written:
            raise ValueError(f"a message of more than {self.most_written} bytes")
        self.writer.write(line)
        self.writer.flush()

    def receive(self):
        """EOFError when the other side is gone, OverflowError for a line that is too long."""
        line = self.reader.readline(self.most_read + 1)
        if len(line) > self.most_read:
            raise OverflowError
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def load(job: dict, name: str) -> dict:
    """Runs the answer as the module `name`: the first of its readings that compiles. SyntaxError if none does."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__, error = "<answer>", None
    builtins.exit = builtins.quit = sys.exit  # as Python's `site` has it, which does not run here
    exec(job["prelude"], module.__dict__)
    for text in job["programs"]:
        try:
            code = compile(text, "<answer>", "exec", dont_inherit=True)
            break
        except Exception as found:  # also null bytes, and nesting that the parser will not follow
            error = error or SyntaxError(str(found))
    else:
        raise error
    exec(code, module.__dict__)
    return module.__dict__


def run_program(job: dict) -> None:
    """The answer as a program that reads standard input. As in LiveCodeBench, any status that it exits with will do."""
    try:
        load(job, "__main__")
    except SystemExit:
        return
    except SyntaxError:
        os._exit(101)
    except MemoryError:
        os._exit(102)
    except Exception:
        os._exit(103)


def raised(error: BaseException) -> dict:
    """The nearest builtin type of an exception, since no other is known on the other side."""
    kind = next(k for k in type(error).__mro__ if vars(builtins).get(k.__name__) is k)
    return {"raised": [kind.__name__, type(error).__name__, str(error)[:1000]]}


def serve(job: dict, channel: Channel) -> None:
    """The answer's side. What it is asked for it does as an object's owner would: a handle it gave out comes back as
    the object. SystemExit ends the process, which fails the tests that are not done."""
    objects, numbers = [], {}

    def opaque(value):
        number = numbers.setdefault(id(value), len(objects))
        if number == len(objects):
            objects.append(value)  # which also keeps its id from being given again
        return ["handle", number]

    def known(tag, which):
        if tag == "handle":
            return objects[which]
        if which not in namespace:
            raise NameError(f"name {which!r} is not defined")
        return namespace[which]

    try:
        namespace = load(job, "answer")
    except Exception as error:
        return channel.send(raised(error))
    channel.send({"ready": True})
    while True:
        try:
            request = channel.receive()
        except EOFError:
            os._exit(0)
        try:
            target = decode(request["of"], known)
            args, kwargs = decode(json.loads(request["given"]), known)
            value = getattr(target, request["get"]) if request["get"] else target(*args, **kwargs)
            given = json.dumps(encode([args, kwargs], opaque))  # texts, which tell 1 from True
            changed = None if given == request["given"] else given
            channel.send({"value": encode(value, opaque), "given": changed})
        except SystemExit:
            raise
        except BaseException as error:
            channel.send(raised(error))


CHANGEABLE = (list, tuple, dict, set, collections.deque, bytearray)  # a tuple, in its items


def update(old, new) -> None:
    """Makes what was passed as an argument what the answer's process made of it, in place."""
    if type(old) is set or (type(old) is dict and list(old) != list(new)):
        old.clear()
        old.update(new)
    elif type(old) is collections.deque:
        old.clear()
        old.extend(new)
    elif type(old) is bytearray or (type(old) is list and len(old) != len(new)):
        old[:] = new
    else:
        for key in old if type(old) is dict else range(len(old)):
            if type(old[key]) is type(new[key]) and type(old[key]) in CHANGEABLE:
                update(old[key], new[key])
            elif type(old) is not tuple:
                old[key] = new[key]


class Tests:
    """The tests' side. Its verdict goes down a pipe that the answer's process does not have."""

    def __init__(self, job: dict, channel: Channel, verdict: int):
        self.job, self.channel, self.verdict = job, channel, verdict

    def end(self, passed: bool, reason: str):
        os.write(self.verdict, json.dumps([passed, reason]).encode() + b"\n")
        os._exit(0)  # no test can catch this and go on

    def reply(self):
        """The answer's next message. Whatever breaks the protocol is a failure, and the end."""
        try:
            message = self.channel.receive()
        except EOFError:
            self.end(False, "exited early")
        except OverflowError:
            self.end(False, "too much output")
        except Exception:
            self.end(False, "broken reply")
        return message

    def ask(self, of, get, args, kwargs):
        given = [list(args), kwargs]
        text = json.dumps(encode(given, self.opaque))
        try:
            self.channel.send({"of": of, "get": get, "given": text})
        except BrokenPipeError:
            self.end(False, "exited early")
        message = self.reply()
        try:
            if "raised" not in message:
                value = decode(message["value"], self.known)
                if message["given"] is not None:
                    update(given, decode(json.loads(message["given"]), self.known))
                return value
            error = self.error(*message["raised"])
        except Exception:
            self.end(False, "broken reply")
        raise error

    def error(self, builtin: str, name: str, text: str) -> Exception:
        kind = vars(builtins)[builtin]
        # StopIteration would end a loop of the tests as if all were done
        if not issubclass(kind, Exception) or issubclass(kind, StopIteration | StopAsyncIteration):
            kind = RuntimeError
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and the like want more
            error = RuntimeError(text)
        error.of_answer = name if name.isidentifier() and len(name) < 80 else "an exception"
        return error

    def opaque(self, value):
        if not isinstance(value, Remote):
            raise NotCarried(f"{type(value).__name__} cannot be given to an answer")
        return value._ref

    def known(self, tag, which):
        if tag != "handle" or type(which) is not int:
            raise ValueError
        return Remote(self, [tag, which])

    def run(self) -> None:
        """Never returns."""
        first = self.reply()
        try:
            failure = None if "ready" in first else self.error(*first["raised"])
        except Exception:
            self.end(False, "broken reply")
        if failure is not None:
            self.end(False, reason(failure))
        space = {"__name__": "tests"}
        try:
            exec(self.job["setup"], space)
            tests = [compile(test, "<tests>", "exec") for test in self.job["tests"]]
        except BaseException as error:
            self.end(False, f"the problem's own code raised {type(error).__name__}")
        space |= {name: Remote(self, ["global", name]) for name in self.job["names"]}
        try:
            for test in tests:
                exec(test, space)
                os.write(self.verdict, b"\n")  # the next has time of its own
        except BaseException as error:
            self.end(False, reason(error))
        self.end(True, "passed")


class Remote:
    """Stands in the tests for an object of the answer's process: it can be called, handed back, and asked for its
    attributes. It equals only itself."""

    def __init__(self, tests: Tests, ref: list):
        self._tests, self._ref = tests, ref

    def __call__(self, *args, **kwargs):
        return self._tests.ask(self._ref, None, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tests.ask(self._ref, name, (), {})

    def __eq__(self, other):
        return type(other) is Remote and self._ref == other._ref

    def __hash__(self):
        return hash(tuple(self._ref))


def reason(error: BaseException) -> str:
    name = getattr(error, "of_answer", None)
    if isinstance(error, NotCarried) or name == NotCarried.__name__:
        return NOT_CARRIED
    if name is None:
        return "wrong answer" if isinstance(error, AssertionError) else f"wrong answer: {type(error).__name__}"
    if isinstance(error, SyntaxError):
        return "syntax error"
    return "out of memory" if isinstance(error, MemoryError) else f"raised {name}"


def confine(limits: dict, seccomp: bytes) -> None:
    """Bounds this process for good, before any code that is not ours runs. bwrap cannot load the filter, since it
    executes Python afterwards, and executing is denied too."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    program = Program(len(seccomp) // 8, seccomp)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))
    PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2  # bwrap has set no_new_privs, without which this is refused
    if ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) != 0:
        raise OSError("the kernel refused the seccomp filter")


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        job = json.load(file)
    confine(job["limits"], bytes.fromhex(job["seccomp"]))
    if job["role"] == "program":
        return run_program(job)
    read, write, *verdict = job["fds"]
    if job["role"] == "answer":
        return serve(job, Channel(read, write, most_written=job["most"]))
    sys.set_int_max_str_digits(0)
    Tests(job, Channel(read, write, most_read=job["most"]), *verdict).run()


if __name__ == "__main__":
    main()
