"""Every launched Triton kernel documents the shapes of its arguments and the source of its formula."""

import ast
import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
# A shape such as [L, P'], [2, L, C], [C] or [L, ...]. Before an index, as in mean[r, p], there is no blank.
SHAPE = re.compile(r"(?<=\s)\[(?=[^\]]*[A-Z])[\w']+(, [^\],]+)*\]")
# A line of its own that begins with "Source:" and names one.
SOURCE = re.compile(r"^Source: \S", re.MULTILINE)


def launched_kernels(*modules: ast.Module) -> list[ast.FunctionDef]:
    """The Triton functions that no other Triton function of these modules calls."""
    functions = [node for module in modules for node in module.body if isinstance(node, ast.FunctionDef)]
    compiled = [function for function in functions if _is_compiled(function)]
    called = {
        node.func.id
        for function in compiled
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return [function for function in compiled if function.name not in called]


def launched_names(*modules: ast.Module) -> set[str]:
    """The names that modules launch on a grid, as in name[grid](...)."""
    calls = [node.func for module in modules for node in ast.walk(module) if isinstance(node, ast.Call)]
    return {func.value.id for func in calls if isinstance(func, ast.Subscript) and isinstance(func.value, ast.Name)}


def missing_from(kernel: ast.FunctionDef) -> list[str]:
    """What a kernel's docstring lacks."""
    docstring = ast.get_docstring(kernel) or ""
    found = {"a shape in brackets": SHAPE.search(docstring), "a line `Source: ...`": SOURCE.search(docstring)}
    return [name for name, match in found.items() if match is None]


def _is_compiled(function: ast.FunctionDef) -> bool:
    """Whether a function is decorated with triton.jit or triton.jit(...)."""
    decorators = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(ast.unparse(decorator) == "triton.jit" for decorator in decorators)


def _modules() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(KERNELS.glob("*.py"))]


def test_every_launched_kernel_has_shapes_and_a_source():
    missing = {kernel.name: missing_from(kernel) for kernel in launched_kernels(*_modules())}
    assert missing
    assert {name: parts for name, parts in missing.items() if parts} == {}


def test_the_kernels_found_are_those_that_are_launched():
    modules = _modules()
    assert {kernel.name for kernel in launched_kernels(*modules)} == launched_names(*modules)


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        ("out[l] = sum.\n\nx_ptr  [L, P]\n\nSource: torch.sum.", []),
        ("out[l] = sum.\n\nx_ptr  [L, P]\n\nReference: torch.sum.", ["a line `Source: ...`"]),
        ("out[l] = sum.\n\nx_ptr  [L, P]\n\nGrid: L. Source: torch.sum.", ["a line `Source: ...`"]),
        ("out[l, P] = sum.\n\nSource: torch.sum.", ["a shape in brackets"]),
        ("", ["a shape in brackets", "a line `Source: ...`"]),
    ],
)
def test_a_docstring_that_lacks_a_part_is_found(docstring, missing):
    tree = ast.parse(f"@triton.jit\ndef kernel(x_ptr):\n    {docstring!r}\n")
    (kernel,) = launched_kernels(tree)
    assert missing_from(kernel) == missing
