"""Runs inside a sandbox, as a program of its own: the process of an answer, or that of the tests of an answer.

The two are processes of two sandboxes that share a pair of pipes. The tests ask ("call this with these arguments"), the
answer replies, in lines of JSON that decode to plain data only. So the answer's process holds nothing of the tests and
cannot say how they went, and an object with an `__eq__` of its own never reaches a comparison.
"""

import builtins
import ctypes
import itertools
import json
import os
import resource
import sys
import types

MOST_NESTED = 100
MOST_ITEMS = 100_000  # of an iterator, which may have no end
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
TYPES = {t.__name__: t for t in (object, bool, int, float, complex, str, bytes, dict, range, *SEQUENCES.values())}
ENDS = {101: "syntax error", 102: "out of memory", 103: "raised an exception"}  # by exit status, of a whole program


def encode(value, opaque, depth: int = 0):
    """Plain data as what `json` can write; a subclass of a plain type as that type, an iterator as its items. What else
    there is, is `opaque`'s to name."""
    if depth > MOST_NESTED:
        raise ValueError(f"nested more than {MOST_NESTED} deep")

    def items(values):
        return [encode(item, opaque, depth + 1) for item in values]

    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # in decimal, Python bounds the digits
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, *items(value)]
    if isinstance(value, dict):
        return ["dict", items(value.keys()), items(value.values())]
    if isinstance(value, range):
        return ["range", *items((value.start, value.stop, value.step))]
    if isinstance(value, type) and TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    if hasattr(type(value), "__next__"):
        found = list(itertools.islice(value, MOST_ITEMS + 1))
        if len(found) > MOST_ITEMS:
            raise ValueError(f"an iterator of more than {MOST_ITEMS} items")
        return ["iter", *items(found)]
    return opaque(value)


def decode(data, known):
    """What `encode` wrote; `known` gives what `opaque` named. Raises, of whatever type, for anything else."""
    if data is None or isinstance(data, bool | str):
        return data
    tag, *rest = data
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(item, known) for item in rest)
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
    if tag == "float":
        return float.fromhex(text)
    if tag == "bytes":
        return bytes.fromhex(text)
    return TYPES[text] if tag == "type" else known(tag, text)


class Channel:
    """Messages over a pair of pipes, a line each."""

    def __init__(self, read: int, write: int, most: int):
        self.reader, self.writer, self.most = os.fdopen(read, "rb"), os.fdopen(write, "wb"), most

    def send(self, message) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > self.most:
            raise ValueError(f"a message of more than {self.most} bytes")
        self.writer.write(line)
        self.writer.flush()

    def receive(self):
        """EOFError when the other side is gone, OverflowError for a line that is too long."""
        line = self.reader.readline(self.most + 1)
        if len(line) > self.most:
            raise OverflowError
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def load(job: dict, name: str) -> dict:
    """Runs the answer as the module `name`: the first of its readings that compiles. SyntaxError if none does."""
    module = sys.modules[name] = types.ModuleType(name)
    error = None
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
    """The answer as a program that reads standard input."""
    try:
        load(job, "__main__")
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
            args, kwargs = decode(request["given"], known)
            value = getattr(target, request["get"]) if request["get"] else target(*args, **kwargs)
            reply = {"value": encode(value, opaque), "given": encode([args, kwargs], opaque)}
            if reply["given"] == request["given"]:
                reply["given"] = None  # nothing was changed in place
            channel.send(reply)
        except SystemExit:
            raise
        except BaseException as error:
            channel.send(raised(error))


def update(old, new) -> None:
    """Makes what was passed as an argument what the answer's process made of it, in place."""
    if type(old) is set or (type(old) is dict and list(old) != list(new)):
        old.clear()
        old.update(new)
    elif type(old) is list and len(old) != len(new):
        old[:] = new
    else:
        for key in old if type(old) is dict else range(len(old)):
            if type(old[key]) is type(new[key]) and type(old[key]) in (list, tuple, dict, set):
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
        request = {"of": of, "get": get, "given": encode(given, self.opaque)}
        try:
            self.channel.send(request)
        except BrokenPipeError:
            self.end(False, "exited early")
        message = self.reply()
        try:
            if "raised" not in message:
                value = decode(message["value"], self.known)
                if message["given"] is not None:
                    update(given, decode(message["given"], self.known))
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
            raise TypeError(f"{type(value).__name__} cannot be given to an answer")
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
        names = set(self.job["names"])
        for test in tests:
            names |= {name for name in names_of(test) if name not in space and not hasattr(builtins, name)}
        space |= {name: Remote(self, ["global", name]) for name in names}
        try:
            for test in tests:
                exec(test, space)
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


def names_of(code: types.CodeType) -> set[str]:
    """Every name that code looks up, also in the functions it defines."""
    inner = [names_of(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def reason(error: BaseException) -> str:
    name = getattr(error, "of_answer", None)
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
    channel = Channel(read, write, job["most"])
    if job["role"] == "answer":
        return serve(job, channel)
    sys.set_int_max_str_digits(0)
    Tests(job, channel, *verdict).run()


if __name__ == "__main__":
    main()
