"""Safe reading of foreign pickles. Nothing in them is run, and time and memory are bounded by their size.

A pickle is a program. Here it may build plain values only, and call only the functions of a list. All these functions
are our own and check their arguments. Time and memory grow at most linearly with the size of the pickle.
`checkpoints.unpickling` adds what checkpoints need beside plain values.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

DEEPEST = 100
"""Largest depth of nested containers."""

LONGEST_KEY = 10_000
"""Largest length of a key, in characters. Equal keys are compared at each use."""
LARGEST_KEY = 2**60
"""Bound of whole numbers as keys. Python hashes smaller numbers to themselves, without collisions."""
LARGEST_KEY_IN_TUPLE = 2**31
"""Bound of whole numbers in a tuple as key."""
LONGEST_KEY_TUPLE = 8
"""Largest length of a tuple as key."""
LARGEST_INT_BITS = 128
"""Largest number of bits of a whole number."""
CHARACTERS_A_VALUE = 64
"""Number of characters or bytes of a text or an array that count as one value."""

_OPERATIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    GLOBAL STACK_GLOBAL REDUCE
"""
"""Operations that a pickle of plain values may use, by their names in the standard library."""


class Refused(Exception):
    """A pickle asks for something that is refused. The message continues the sentence "it ..." about the file."""


def allowance(size: int) -> int:
    """Return how many values a pickle of `size` bytes may hold. A shared value counts at each of its places."""
    return 100_000 + 2 * size


class Budget:
    """Number of values that the functions of a pickle may still copy: a short call may copy many.

    Attributes:
        remaining: the number.
    """

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def spend(self, number: int) -> None:
        """Count copied values.

        Raises:
            Refused: if too many values were copied.
        """
        self.remaining -= number
        if self.remaining < 0:
            raise Refused("copies its values again and again")


class PlainUnpickler(pickle._Unpickler):
    """Reads numbers, text, bytes, lists, tuples, dicts and sets, and the results of further functions.

    Args:
        stream: a stream at the start of the pickle. Bytes after the pickle are not read.
        size: largest size of the pickle in bytes, which determines its allowance.
        functions: functions and values that the pickle may name, by module and name.
        unlike: clause about a name that is not in the list, for errors.

    Attributes:
        budget: number of values that the functions may still copy.
        functions: functions and values that the pickle may name.
        unlike: clause about other names.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, size: int, functions: Mapping[str, Any], unlike: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self.budget = Budget(allowance(size))
        own = {f"builtins.{kind.__name__}": partial(_set_of, kind, self.budget) for kind in (set, frozenset)}
        self.functions = {"_codecs.encode": partial(_encoded, self.budget), **own, **functions}
        self.unlike = unlike

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or value of a name.

        Raises:
            Refused: if the name is not in the list.
        """
        path = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if path not in self.functions:
            raise Refused(
                f"asks for {brief(path.removeprefix('builtins.'))}, {self.unlike}; reading it the plain way could "
                "run any command"
            )
        return self.functions[path]

    def load_dict(self) -> None:
        """Make a dict of the items since the mark."""
        items = self.pop_mark()
        self.append({})
        self.add_items(items)

    def load_setitem(self) -> None:
        """Put an item into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self.add_items([key, value])

    def load_setitems(self) -> None:
        """Put the items since the mark into a dict."""
        self.add_items(self.pop_mark())

    def add_items(self, items: list[Any]) -> None:
        """Put alternating keys and values into the dict at the top of the stack."""
        target = self.target(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def load_frozenset(self) -> None:
        """Make a frozen set of the items since the mark."""
        items = self.pop_mark()
        self.append(frozenset(map(_checked_key, items)))

    def load_additems(self) -> None:
        """Put the items since the mark into a set."""
        items = self.pop_mark()
        self.target(set).update(map(_checked_key, items))

    def load_append(self) -> None:
        """Put an item into a list."""
        item = self.stack.pop()
        self.target(list).append(item)

    def load_appends(self) -> None:
        """Put the items since the mark into a list."""
        items = self.pop_mark()
        self.target(list).extend(items)

    def target(self, *types: type) -> Any:
        """Return the container at the top of the stack, which must have one of some types."""
        container = self.stack[-1]
        if type(container) not in types:
            raise ValueError(f"items for a {type(container).__name__}")
        return container

    def load_other(self) -> NoReturn:
        """Refuse an operation that is not in the list."""
        raise ValueError("an operation that plain values do not need")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict.fromkeys(range(256), load_other)
    dispatch |= {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS.split()
    }
    dispatch |= {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
    }


_CONTAINERS: frozenset[type] = frozenset({list, tuple, dict, set, frozenset, OrderedDict, Namespace})
_LEAVES = frozenset({bool, float, NoneType, torch.Tensor})


def check_extent(value: Any, limit: int) -> None:
    """Check that a value is plain, and neither too large nor too deep.

    A container at several places counts at each of them, since copying or writing the value visits it as often. Each
    is checked once.

    Args:
        value: the value.
        limit: largest number of values in it.

    Raises:
        Refused: if the value holds another type, too many values, itself, or a huge number.
        UnicodeEncodeError: if a text holds half a surrogate pair.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(container: Any, depth: int) -> tuple[int, int]:
        """Return the number of values in a container, with itself, and their depth."""
        size, height = 1, 1
        for child in _children(container):
            kind = type(child)
            if kind is str or kind is bytes:
                size += 1 + len(child) // CHARACTERS_A_VALUE
                if kind is str and not child.isascii() and id(child) not in measured:
                    child.encode()  # raises an error for half a surrogate pair, which cannot be written
                    measured[id(child)] = 1, 0
            elif kind in _CONTAINERS:
                if depth == DEEPEST:
                    raise Refused(f"nests lists more than {DEEPEST} deep, or puts one into itself")
                child_size, child_height = measured.get(id(child)) or measure(child, depth + 1)
                size += child_size
                height = max(height, 1 + child_height)
            elif kind is int:
                size += 1
                if child.bit_length() > LARGEST_INT_BITS:
                    raise Refused(f"holds a whole number of {child.bit_length()} bits")
            elif kind is np.ndarray:
                size += 1 + child.nbytes // CHARACTERS_A_VALUE
            elif kind in _LEAVES or isinstance(child, np.generic):
                size += 1
            else:
                raise Refused(f"holds a {kind.__name__}, and only plain values are read")
        if depth + height > DEEPEST + 1:
            raise Refused(f"nests lists more than {DEEPEST} deep, or puts one into itself")
        if size > limit:
            raise Refused(f"unfolds to more than {limit} values")
        measured[id(container)] = size, height
        return size, height

    measure([value], 0)


def texts_of(value: Any) -> Iterator[str]:
    """Yield all texts in a value, at each of their places."""
    if type(value) is str:
        yield value
    elif type(value) in _CONTAINERS:
        for child in _children(value):
            yield from texts_of(child)


def _children(container: Any) -> Iterable[Any]:
    if isinstance(container, Namespace):
        container = vars(container)
    return chain(container, container.values()) if isinstance(container, MutableMapping) else container


def _encoded(budget: Budget, text: str, encoding: str) -> bytes:
    """Return bytes that Python 3 wrote in a protocol of Python 2."""
    budget.spend(len(text))
    if encoding != "latin1":
        raise ValueError("bytes in an encoding other than latin1")
    return text.encode("latin1")


def _set_of(kind: type, budget: Budget, items: list[Any]) -> Any:
    """Return the set or frozen set of some items."""
    budget.spend(len(items))
    return kind(map(_checked_key, items))


def _checked_key(key: Any) -> Any:
    """Return a key that is quickly hashed and compared.

    Python hashes a tuple with all its parts at each use, and chosen numbers in tuples can make many of them collide.

    Raises:
        Refused: if the key is not plain, short and small.
    """
    if (type(key) is str and len(key) <= LONGEST_KEY) or _is_key(key, LARGEST_KEY):
        return key
    raise Refused(f"has a key of type {type(key).__name__} that is nested, too long, too large or not plain")


def _is_key(key: Any, largest: int) -> bool:
    kind = type(key)
    if kind is tuple:
        return len(key) <= LONGEST_KEY_TUPLE and all(
            type(part) is not tuple and _is_key(part, LARGEST_KEY_IN_TUPLE) for part in key
        )
    if kind is str or kind is bytes:
        return len(key) <= LONGEST_KEY
    return kind is bool or key is None or (kind is int and -largest < key < largest)


def brief(message: object) -> str:
    """Return a message, which may quote a file, as one short line of printable characters."""
    line = " ".join(str(message).split())
    return "".join(c if c.isprintable() else "?" for c in line[:200])
