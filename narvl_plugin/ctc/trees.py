"""Trees whose children may come in any order: as automata, and by an inside recursion over spans of queries.

Legend: B batch, N queries, V labels, U distinct labels, k children of a node.

A tree is written as tokens: those before its children, the children in any order with tokens between them, and those
after. `tree_automaton` writes all of this as one automaton for `language_loss`: fast, and exponential in the depth,
because each subset of a node's children leads through a copy of each other child. `tree_loss` needs no copies: how
probable it is that some queries spell a subtree does not depend on what stands around it. It takes a sum over
k 2^(k - 1) N^3 terms for each node.

Source: the inside algorithm of Baker, Trainable Grammars for Speech Recognition, 1979, over CTC's blanks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.constraints import Automaton
from narvl_plugin.ctc.languages import labels_log_probs, reduced
from narvl_plugin.ctc.lattice import IMPOSSIBLE

Tokens = tuple[int, ...]


class Tree(NamedTuple):
    """A tree whose children may come in any order.

    No text of a child may be the beginning of a text of a sibling that differs from it. Brackets see to that.

    Attributes:
        before: the tokens before the children.
        children: the children; equal ones are said as often as they occur.
        between: the tokens between neighbouring children.
        after: the tokens after the children.
    """

    before: Tokens
    children: tuple[Tree, ...] = ()
    between: Tokens = ()
    after: Tokens = ()

    def canonical(self) -> Tree:
        """Return the tree with its children sorted; equal trees become equal."""
        children = tuple(sorted(child.canonical() for child in self.children))
        return self._replace(children=children) if children else Tree(self.before + self.after)

    def tokens(self) -> Iterator[int]:
        """Yield the tokens of all nodes."""
        yield from self.before + self.between + self.after
        for child in self.children:
            yield from child.tokens()


def _check(tree: Tree, *, is_root: bool = True) -> None:
    """Check that each subtree begins and ends with tokens of its own.

    Raises:
        ValueError: if one does not.
    """
    if not is_root and not (tree.before and (tree.after or not tree.children)):
        raise ValueError("below the root, a node needs tokens before its children, and after them if it has any")
    for child in tree.children:
        _check(child, is_root=False)


# --- Automaton -------------------------------------------------------------------------------------------------------


def tree_automaton(tree: Tree) -> Automaton:
    """Return the automaton of all texts of a tree.

    Args:
        tree: the tree. Below the root, each node has tokens before its children, and after them if it has any.

    Raises:
        ValueError: if the tree has another form.
    """
    _check(tree)
    arcs: list[tuple[int, int, int]] = []
    size = 2  # state 0 is the start, state 1 the end

    def new_state() -> int:
        nonlocal size
        size += 1
        return size - 1

    def say(tokens: Tokens, source: int, target: int | None = None) -> int:
        """Add the arcs of tokens; return the state that they lead to, which is `target` if it is given."""
        if not tokens:
            return source
        between = [source, *(new_state() for _ in tokens[1:]), new_state() if target is None else target]
        arcs.extend((*ends, token) for ends, token in zip(pairwise(between), tokens, strict=True))
        return between[-1]

    def write(node: Tree, source: int, target: int) -> None:
        """Add the arcs of all texts of a node between two states."""
        if not node.children:
            say(node.before + node.after, source, target)
            return
        # What is left to say is a state.
        states = {node.children: say(node.before, source)}
        if not node.after:
            states[()] = target
        waiting = [node.children]
        for left in waiting:  # grows while it is read
            ready = say(node.between, states[left]) if left != node.children else states[left]
            for child in dict.fromkeys(left):
                rest = _without(left, child)
                if rest not in states:
                    states[rest] = new_state()
                if rest and rest not in waiting:
                    waiting.append(rest)
                write(child, ready, states[rest])
        say(node.after, states[()], target)

    whole = tree.canonical()
    write(whole, 0, 1)
    sources, targets, labels = torch.tensor(arcs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    accepting = torch.arange(size) == int(bool(arcs))  # a tree without a token is the empty text
    return Automaton(sources, labels, targets, accepting)


def _without(children: tuple[Tree, ...], child: Tree) -> tuple[Tree, ...]:
    """Return the children but for one."""
    place = children.index(child)
    return children[:place] + children[place + 1 :]


def tree_language(
    roots: Sequence[Tokens],
    nodes: Sequence[Tokens],
    leaves: Sequence[Tokens],
    *,
    opening: int,
    closing: int,
    most: int,
) -> Automaton:
    """Return the automaton of all bracketed trees of three levels, for decoding.

    A tree is `( root ( node ( leaf ) ( leaf ) ) ( node ( leaf ) ) )`. It has each node at most once, with one leaf or
    more, and at most `most` leaves in all, which may be equal. A root may have no node. The number of states is linear
    in `most`, and doubles with each node, because a state knows which nodes have been said.

    Args:
        roots: the labels of roots, each of one token or more, without brackets.
        nodes: the labels of nodes, in the same form, all different.
        leaves: the labels of leaves, in the same form, all different.
        opening: the token of an opening bracket.
        closing: the token of a closing bracket.
        most: the largest number of leaves.
    """
    states: dict[Hashable, int] = {}
    arcs: dict[tuple[int, int, int], None] = {}
    waiting: list[tuple[tuple[int, ...], int, str]] = []

    def state(*key: Hashable) -> int:
        return states.setdefault(key, len(states))

    def between(used: tuple[int, ...], number: int, last: str) -> int:
        """Return the state between texts: the nodes so far, the number of leaves, and the form of the last node."""
        if (used, number, last) not in states:
            waiting.append((used, number, last))
        return state(used, number, last)

    def say(source: int, tokens: Tokens, target: int) -> None:
        """Add the arcs of tokens between two states. Texts that begin alike share states."""
        for place, token in enumerate(tokens):
            here = state(source, tokens[:place]) if place else source
            there = state(source, tokens[: place + 1]) if place + 1 < len(tokens) else target
            arcs[here, there, token] = None

    start, end = state("start"), state("end")
    for root in roots:
        say(start, (opening, *root), between((), 0, "closed"))
    for used, number, last in waiting:  # grows while it is read
        here = between(used, number, last)
        if last == "closed":
            say(here, (closing,), end)
        elif last == "open with leaves":
            say(here, (closing,), between(used, number, "closed"))
        if number == most:
            continue
        if last == "closed":
            for node in sorted(set(range(len(nodes))) - set(used)):
                said = tuple(sorted((*used, node)))
                say(here, (opening, *nodes[node]), between(said, number, "open"))
        else:
            labelled = state(used, number, "leaf")
            for leaf in leaves:
                say(here, (opening, *leaf), labelled)
            say(labelled, (closing,), between(used, number + 1, "open with leaves"))
    sources, targets, labels = torch.tensor(list(arcs), dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Automaton(sources, labels, targets, torch.arange(len(states)) == end)


# --- Inside recursion ------------------------------------------------------------------------------------------------


def tree_loss(
    logits: Tensor, trees: Sequence[Tree], *, blank: int, reduction: Literal["none", "sum", "mean"] = "mean"
) -> Tensor:
    """Return the negative log of the probability that the queries spell a tree, with all children in any order.

    It equals `language_loss` of `tree_automaton`. For small trees, that is faster.

    Args:
        logits: (B, N, V), of any float type, unnormalised.
        trees: one for each sample; see `tree_automaton`.
        blank: the label of the blank.
        reduction: "none" for the losses, "sum" for their sum, "mean" for their mean over the batch.

    Returns:
        (B,) for "none", else a scalar (0 for an empty batch); in nats. A tree without a path has an infinite loss and
        no gradient.

    Raises:
        ValueError: for a tree of another form, a label outside [0, V) or equal to the blank, or another number of
            trees.
    """
    if len(trees) != len(logits):
        raise ValueError(f"{len(trees)} trees for {len(logits)} samples")
    alphabets = [sorted(set(tree.tokens())) for tree in trees]
    for tree, alphabet in zip(trees, alphabets, strict=True):
        _check(tree)
        if blank in alphabet or any(not 0 <= label < logits.size(2) for label in alphabet):
            raise ValueError(f"labels {alphabet} must be in [0, {logits.size(2)}) and differ from the blank {blank}")
    labels = torch.full((len(trees), 1 + max(map(len, alphabets), default=0)), blank)
    for sample, alphabet in enumerate(alphabets):
        labels[sample, 1 : 1 + len(alphabet)] = torch.tensor(alphabet)
    emissions = labels_log_probs(logits, labels.to(logits.device)).clamp(min=IMPOSSIBLE)
    totals = [
        _Spans(read, dict(zip(alphabet, range(1, 1 + len(alphabet)), strict=True))).total(tree.canonical())
        for read, alphabet, tree in zip(emissions, alphabets, trees, strict=True)
    ]
    return reduced(torch.stack(totals) if totals else emissions.sum((1, 2)), reduction)


class _Spans:
    """The probability that the queries of a span spell a text, for all spans of a sample at once.

    A matrix (R, N + 1) holds in row r and column j the log of a sum over paths that end before query j. All products
    are over the query at which one text ends and the next begins.

    Args:
        emissions: (N, U), the log-probabilities; those of the blank come first.
        numbers: the column of each token in the emissions.
    """

    def __init__(self, emissions: Tensor, numbers: dict[int, int]) -> None:
        size = len(emissions)
        place = torch.arange(size + 1, device=emissions.device)
        first, last, query = place[:, None, None], place[None, :, None], place[None, None, :size]
        inside = ((first <= query) & (query < last)).to(emissions.dtype)  # (N + 1, N + 1, N)
        sums = (inside @ emissions).movedim(2, 0)  # (U, N + 1, N + 1)
        self.numbers = numbers
        self.runs = sums.masked_fill(place[:, None] >= place, IMPOSSIBLE)
        self.blanks = sums[0].masked_fill(place[:, None] > place, IMPOSSIBLE)  # none or more
        self.whole = torch.where(place[:, None] == place, 0.0, IMPOSSIBLE).to(emissions)
        self.subtrees: dict[Tree, Tensor] = {}

    def total(self, tree: Tree) -> Tensor:
        """Return the log-probability that all queries spell the tree."""
        said, last = self.say(self.blanks[:1], None, tree)
        return (self.joined(said, last, None) if any(True for _ in tree.tokens()) else said)[0, -1]

    def joined(self, said: Tensor, last: int | None, following: int | None) -> Tensor:
        """Add the blanks between a text and the next: one or more if the label after them is the one before them."""
        if last is not None and last == following:
            return _product(said, self.runs[0])
        return _product(said, self.blanks)

    def tokens(self, said: Tensor, last: int | None, tokens: Tokens) -> tuple[Tensor, int | None]:
        """Add tokens to a text whose last token is given. Return the sums and the last token."""
        for token in tokens:
            ready = said if last is None else self.joined(said, last, token)
            said, last = _product(ready, self.runs[self.numbers[token]]), token
        return said, last

    def subtree(self, tree: Tree) -> tuple[Tensor, int]:
        """Return the sums over all spans that spell a tree, from its first token to its last, and the last one."""
        if tree not in self.subtrees:
            self.subtrees[tree] = self.say(self.whole, None, tree)[0]
        return self.subtrees[tree], (tree.before + tree.after)[-1]

    def say(self, said: Tensor, last: int | None, tree: Tree) -> tuple[Tensor, int | None]:
        """Add a tree to a text. Return the sums and the last token; None for the root if it has no tokens after it."""
        said, last = self.tokens(said, last, tree.before)
        if not tree.children:
            return self.tokens(said, last, tree.after)
        # For what is left to say: the sums by the last token.
        sums: dict[tuple[Tree, ...], dict[int | None, Tensor]] = {tree.children: {last: said}}
        waiting = [tree.children]
        for left in waiting:  # grows while it is read; all ways into a state come before it
            texts = sums.pop(left) if left else sums[left]
            if left != tree.children and left:
                texts = _summed(self.tokens(text, token, tree.between) for token, text in texts.items())
            for child in dict.fromkeys(left):
                rest = _without(left, child)
                spans, end = self.subtree(child)
                ready = [
                    text if token is None else self.joined(text, token, child.before[0])
                    for token, text in texts.items()
                ]
                after = _product(torch.stack(ready).logsumexp(0), spans)
                known = sums.setdefault(rest, {})
                known[end] = torch.logaddexp(known[end], after) if end in known else after
                if rest not in waiting:
                    waiting.append(rest)
        texts = sums[()]
        if tree.after:
            ((last, said),) = _summed(self.tokens(text, token, tree.after) for token, text in texts.items()).items()
            return said, last
        return torch.stack(list(texts.values())).logsumexp(0), None


def _summed(texts: Iterator[tuple[Tensor, int | None]]) -> dict[int | None, Tensor]:
    """Add up sums with the same last token."""
    found: dict[int | None, Tensor] = {}
    for text, last in texts:
        found[last] = torch.logaddexp(found[last], text) if last in found else text
    return found


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply matrices of logs: (R, N + 1), (N + 1, N + 1) -> (R, N + 1)."""
    return (first[:, :, None] + second).logsumexp(1)
