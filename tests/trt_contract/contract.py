"""Fakes of TensorRT's classes that know only what the real bindings know.

A fake has an attribute when the real class has it, takes a call when an overload in the real docstring takes
it, and can be assigned to where the real property can. What it then answers comes from a behaviour, a plain
object with members of the same names; without one, from the documented type.
"""

import importlib.machinery
import inspect
import re
import types

SIGNATURE = re.compile(r"(\w+)\(([^\n]*)\) -> ([^\n]+)")
ARGUMENT = re.compile(r"(\w+): (.*?)(?=, \w+: |$)")
MADE_BY_FACTORIES = ("Builder", "OnnxParser", "Runtime")
SEQUENCES = ("Dims", "tuple", "list")


class Fake:
    """An instance of a real class, as far as callers can tell."""

    def __init__(self, contract, cls, behaviour):
        object.__setattr__(self, "_contract", contract)
        object.__setattr__(self, "_cls", cls)
        object.__setattr__(self, "_behaviour", behaviour)

    def __getattr__(self, name):
        real = None if name.startswith("__") else inspect.getattr_static(self._cls, name, None)
        if real is None:
            raise AttributeError(self._where(name))
        self._contract.used.add(f"{self._cls.__name__}.{name}")
        scripted = getattr(self._behaviour, name, None)
        if isinstance(real, property):
            documented = (real.fget.__doc__ or "").split("->")[-1]
            return self._contract.default(documented) if scripted is None else scripted

        def call(*args, **kwargs):
            fitting = [
                result
                for parameters, result in signatures(getattr(self._cls, name), name)
                if self._contract.fits(parameters, args, kwargs)
            ]
            if not fitting:
                raise TypeError(f"{self._where(name)}: no overload takes {args} {kwargs}")
            return self._contract.default(fitting[0]) if scripted is None else scripted(*args, **kwargs)

        return call

    def __setattr__(self, name, value):
        real = inspect.getattr_static(self._cls, name, None)
        if not isinstance(real, property) or real.fset is None:
            raise AttributeError(f"{self._where(name)} cannot be assigned to")
        documented = (real.fget.__doc__ or "").split("->")[-1]
        if not self._contract.matches(documented, value):
            raise TypeError(f"{self._where(name)} is a {documented.strip()}, got {value!r}")
        self._contract.used.add(f"{self._cls.__name__}.{name} =")
        setattr(self._behaviour, name, value)

    def _where(self, name):
        return f"{self._cls.__name__}.{name} (TensorRT {self._contract.trt.__version__})"


class Contract:
    """The fakes of one version of the bindings, and the names that were used of them."""

    def __init__(self, trt):
        self.trt = trt
        self.used = set()

    def fake(self, name, behaviour=None):
        return Fake(self, getattr(self.trt, name), behaviour or types.SimpleNamespace())

    def module(self, behaviours):
        """The `tensorrt` module: enums and base classes real, what the library's factories make fake.

        `behaviours` maps a class name to a function of the constructor's arguments.
        """
        module = types.ModuleType("tensorrt")
        module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        public = {name: value for name, value in vars(self.trt).items() if not name.startswith("_")}
        module.__dict__.update(public, __version__=self.trt.__version__)
        for name in MADE_BY_FACTORIES:
            setattr(module, name, self._factory(name, behaviours[name]))
        return module

    def _factory(self, name, behaviour):
        def make(*args, **kwargs):
            parameters = signatures(getattr(self.trt, name).__init__, "__init__")
            if not any(self.fits(parameter, args, kwargs) for parameter, _ in parameters):
                raise TypeError(f"{name}: no constructor takes {args} {kwargs}")
            self.used.add(name)
            return self.fake(name, behaviour(*args, **kwargs))

        return make

    def default(self, documented):
        """What a call of this documented type gives when no behaviour says more."""
        name = last_name(documented)
        cls = getattr(self.trt, name, None)
        if inspect.isclass(cls) and not hasattr(cls, "__members__"):
            return self.fake(name)
        return {"bool": True, "int": 1, "str": "x"}.get(name)

    def fits(self, parameters, args, kwargs):
        names = [name for name, _, _ in parameters]
        if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
            return False
        given = dict(zip(names, args, strict=False)) | kwargs
        return all(
            self.matches(annotation, given[name]) if name in given else optional
            for name, annotation, optional in parameters
        )

    def matches(self, annotation, value):
        """Whether the bindings convert the value; what is not understood passes."""
        name = last_name(annotation.split(" = ")[0])
        if name in ("int", "SupportsInt"):
            return isinstance(value, int) and not isinstance(value, bool)
        if name in ("str", "bool"):
            return type(value).__name__ == name
        if name.lower() == "buffer":
            return isinstance(value, bytes | bytearray | memoryview)
        if name in SEQUENCES:
            return isinstance(value, tuple | list)
        cls = getattr(self.trt, name, None)
        if not inspect.isclass(cls):
            return True
        return isinstance(value, cls) or (isinstance(value, Fake) and issubclass(value._cls, cls))


def last_name(annotation):
    return re.split(r"[.:]+", annotation.strip())[-1]


def signatures(function, name):
    """The overloads in a docstring: lists of (argument, annotation, has a default), and the type returned."""
    found = [
        (
            [
                (argument, text, " = " in text)
                for argument, text in ARGUMENT.findall(arguments)
                if argument != "self"
            ],
            result.strip(),
        )
        for called, arguments, result in SIGNATURE.findall(function.__doc__ or "")
        if called == name
    ]
    assert found, f"the docstring of {name} has no signature"
    return found
