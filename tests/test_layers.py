"""The arrows: which part may import which, and which package of others. A new arrow fails here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"mrss_provider": ROOT / "mrss_provider", "mrss_kernels": ROOT / "kernels/mrss_kernels"}

LEAVES = {
    "administration",
    "appending",
    "replacing",
    "errors",
    "config",
    "mixture",
    "sampling_params",
    "backend",
    "openai_schema",
    "chat",
}
TEXT = {"tokenizer", "stop"}
BOTH_SIDES = {
    "async_engine",
    "engine",
    "grammar",
    "model",
    "mrss_kernels",
    "client",
    "autostart",
    *TEXT,
}
ALLOWED = {
    **dict.fromkeys(LEAVES, LEAVES),
    "chat": LEAVES | {"jinja2"},
    "stop": LEAVES,
    "tokenizer": LEAVES | {"tokenizers", "pyrwkv_tokenizer", "numpy"},
    # leaves <- client <- provider
    "http1": {"httpx"},
    "client_stream": LEAVES | {"http1", "httpx"},
    "client": LEAVES | {"client_stream", "http1", "httpx"},
    "autostart": LEAVES | {"client", "client_stream", "http1", "httpx"},
    "provider": LEAVES | {"client", "autostart", "litellm", "httpx", "uvloop"},
    # leaves, mrss_kernels <- model <- engine <- async_engine <- server
    "mrss_kernels": {"torch", "triton", "fla"},
    "model": LEAVES | {"mrss_kernels", "torch", "numpy", "safetensors"},
    "engine": LEAVES | {"model", "mrss_kernels", "torch", "numpy"},
    # Knows no model: token ids, and what llguidance makes of them.
    "grammar": LEAVES | {"tokenizer", "llguidance", "numpy"},
    "async_engine": LEAVES | TEXT | {"engine", "model", "grammar"},
    "server": LEAVES
    | {"async_engine", "starlette", "uvicorn", "uvloop"}
    | {"prometheus_client", "opentelemetry"},
    # Beside `cli`, for Ray Serve.
    "ray_app": LEAVES | {"async_engine", "server", "starlette", "ray"},
    "resampling": {"numpy"},
    # {tune, evaluate, compare} <- cli stand on both
    "tune": LEAVES | BOTH_SIDES | {"resampling", "torch", "numpy", "safetensors", "fla"},
    "evaluate": LEAVES | BOTH_SIDES | {"resampling", "torch", "numpy"},
    "compare": LEAVES | {"evaluate", "resampling", "httpx", "numpy", "jsonschema", "litellm"},
    "cli": LEAVES
    | BOTH_SIDES
    | {"server", "tune", "evaluate", "compare", "http1", "provider"}
    | {"typer", "rich", "httpx", "huggingface_hub", "torch", "yaml", "litellm"}
    # The curve of `mrss tune`.
    | {"matplotlib"},
    # The lazy exports.
    "__init__": {"async_engine", "client", "config", "mixture", "provider", "sampling_params"},
}
# Slow to load, and absent where there is no CUDA or nobody wants it: never on import.
IN_FUNCTIONS_ONLY = {"fla", "matplotlib", "opentelemetry", "llguidance"}
# A comparison through a base URL does without these.
IN_FUNCTIONS_ONLY_OF = {"compare": {"evaluate", "jsonschema", "litellm"}}
FILES = [
    pytest.param(name, path, id=f"{name}/{path.relative_to(folder)}")
    for name, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
]


def part_of(package, path):
    """Return the part a file belongs to: the first name below the package."""
    if package == "mrss_kernels":
        return package
    return path.relative_to(PACKAGES[package]).with_suffix("").parts[0]


def arrows(node):
    """Yield what `node` imports: one of our parts, or the name of somebody else's package."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif node.module == "mrss_provider":
        modules = [f"mrss_provider.{alias.name}" for alias in node.names]
    else:
        modules = [node.module]
    for module in modules:
        top, *rest = module.split(".")
        if top != "mrss_provider":
            yield top
        elif rest and rest[0] in ALLOWED:
            yield rest[0]


def imports(tree):
    """Yield each import outside `if TYPE_CHECKING`, and whether it is inside a function."""
    waiting = [(tree, False)]
    while waiting:
        node, in_function = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_function
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        waiting += [(child, in_function) for child in ast.iter_child_nodes(node)]


@pytest.mark.parametrize(("package", "path"), FILES)
def test_imports_follow_the_arrows(package, path):
    part = part_of(package, path)
    assert part in ALLOWED, f"{part} is new: give it a row in ALLOWED"
    for node, in_function in imports(ast.parse(path.read_text())):
        assert not getattr(node, "level", 0), f"line {node.lineno}: a relative import"
        for target in arrows(node):
            if target == part or target in sys.stdlib_module_names:
                continue
            assert target in ALLOWED[part], f"line {node.lineno}: {part} -> {target} is a new arrow"
            lazy = IN_FUNCTIONS_ONLY | IN_FUNCTIONS_ONLY_OF.get(part, set())
            assert in_function or target not in lazy, (
                f"line {node.lineno}: {target} is imported inside functions only"
            )
