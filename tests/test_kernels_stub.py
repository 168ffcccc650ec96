"""The typed stub of the compiled extension against the extension itself."""

import ast
import inspect
import re
from pathlib import Path

from geoengine.kernels import _topk_cpu

STUB = ast.parse((Path(__file__).parents[1] / "kernels" / "_topk_cpu.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_names_what_the_extension_has():
    public = {name for name, value in vars(_topk_cpu).items() if inspect.isroutine(value)}
    assert set(FUNCTIONS) == public


def test_parameters_and_defaults_are_the_extensions():
    for name, node in FUNCTIONS.items():
        signature = vars(_topk_cpu)[name].__doc__.splitlines()[0]
        inside = re.fullmatch(rf"{name}\((.*)\) -> .*", signature)
        assert inside, signature
        # pybind11 writes `name: type = default`; types hold commas only within brackets.
        compiled = ast.parse(f"def f({re.sub(r'<.*?>', '0', inside[1])}): ...").body[0]
        assert isinstance(compiled, ast.FunctionDef)
        assert [argument.arg for argument in compiled.args.args] == [arg.arg for arg in node.args.args], name
        defaults = [ast.unparse(default) for default in compiled.args.defaults]
        assert defaults == [ast.unparse(default) for default in node.args.defaults], name
