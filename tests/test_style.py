"""The budgets and words of the code: what keeps a reader's way short."""

import ast
import pathlib
import re
import textwrap

import measures
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "scaletrain"
FILES = measures.files_in(PACKAGE)
LINES, FUNCTION_LINES, METHODS = 400, 60, 12
# More methods than METHODS, each with its reason.
LARGE_CLASSES = {
    "Workdir": "the map of a run's folder: a property for each file in it",
    "Reader": "a checkpoint is verified, compared and restored in one place",
    "Store": "the methods of a save, between which its state lies",
    "Peers": "one thread's protocol, a method for each message",
    "JsonTokenizer": "the protocol of a tokenizer, and conversations",
}
# Words that stand in the place of a noun, or are not the field's; the right-hand side
# of the glossary in docs/internals/style.md says what to write instead.
PRIVATE_WORDS = {
    "found", "told", "held", "whole", "how", "here", "what", "met", "ways", "said",
    "pull", "slope", "turned", "unbeaten", "parted", "magnitudes", "dropped",
}  # fmt: skip
_DIMS = re.compile(r"_([A-Z][A-Z0-9]*)$")


def names_of(tree):
    """Yields (line, name) of every variable, argument and function that is made."""
    for node in ast.walk(tree):
        if isinstance(node, measures.Function):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def private_words(tree):
    return [(line, name) for line, name in names_of(tree) if name in PRIVATE_WORDS]


def wrong_suffixes(tree):
    """Returns the arguments whose dims in their name are not those of their annotation.

    Dims that are written in another way than as letters ("...", sums) are left out.
    """
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.arg) or node.annotation is None:
            continue
        suffix = _DIMS.search(node.arg)
        shape = next(
            (
                leaf.value
                for leaf in ast.walk(node.annotation)
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
            ),
            None,
        )
        if suffix is None or shape is None or not re.fullmatch(r"[A-Z0-9 ]+", shape):
            continue
        if "".join(shape.split()) != suffix[1]:
            wrong.append((node.lineno, node.arg, shape))
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.path.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_budgets(file):
    assert file.lines <= LINES
    long = {f.name: measures.length(f) for f in file.functions}
    assert {n: lines for n, lines in long.items() if lines > FUNCTION_LINES} == {}
    large = {c.name for c in file.classes if measures.methods(c) > METHODS}
    assert large <= LARGE_CLASSES.keys()
    assert private_words(file.tree) == []
    assert wrong_suffixes(file.tree) == []


def undocumented(tree):
    """Returns the public functions of three arguments or more without `Args:`."""
    return [
        node.name
        for node in tree.body
        if isinstance(node, measures.Function)
        and not node.name.startswith("_")
        and len(node.args.args + node.args.kwonlyargs) >= 3
        and "Args:" not in (ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.path.relative_to(PACKAGE)))
def test_arguments_are_described(file):
    assert undocumented(file.tree) == []


def test_arguments_without_a_word_would_be_seen():
    assert undocumented(ast.parse("def f(a, b, *, c):\n    'One.'\n")) == ["f"]
    assert undocumented(ast.parse("def f(a, b):\n    'One.'\n")) == []


def test_every_exception_is_still_one():
    large = {
        c.name for file in FILES for c in file.classes if measures.methods(c) > METHODS
    }
    assert large == LARGE_CLASSES.keys()


def test_no_file_imports_itself_on_the_way():
    assert measures.cycles(measures.imports(FILES, PACKAGE)) == []


def test_a_cycle_would_be_seen():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert measures.cycles(arrows) == [{"b", "c"}]


def test_private_words_and_wrong_suffixes_would_be_seen():
    tree = ast.parse(
        textwrap.dedent(
            """
            def here(q_BTNH: Float[Array, "B T H N"], how: int) -> None:
                found = q_BTNH
            """
        )
    )
    assert [name for _, name in private_words(tree)] == ["here", "how", "found"]
    assert [name for _, name, _ in wrong_suffixes(tree)] == ["q_BTNH"]


def test_lengths_leave_docstrings_out():
    tree = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n')
    assert measures.length(tree.body[0]) == 2
