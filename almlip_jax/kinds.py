"""Kinds of a thing: each registers itself next to what it builds, and a config section takes any that is registered.

``class GateSettings(Spec)`` opens a family.  A class below it with ``kind: Literal["absolute"] = "absolute"`` is one of
its kinds, from the moment it is defined; a field of type ``GateSettings`` takes all of them.  Classes in between,
without a ``kind``, stand for the kinds below themselves.  Other packages add kinds through the entry point group
``almlip_jax.kinds``, whose entries name modules to import.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, reduce
from importlib import import_module
from importlib.metadata import entry_points, packages_distributions
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, cast

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationInfo,
    model_serializer,
)
from pydantic_core import PydanticSerializationError, core_schema

from almlip_jax.errors import InputError
from almlip_jax.settings import Settings, sections

_DESCRIBING: ContextVar[tuple[type, ...]] = ContextVar("families whose JSON schema is being made", default=())

Made = TypeVar("Made")

_UNIONS = 256  # families and their states that are remembered

PLUGINS = "almlip_jax.kinds"
"""Group of the entry points through which other packages add kinds."""


class Spec(Settings):
    """Settings that come in kinds, told apart by ``kind``; each builds what it describes."""

    default_kind: ClassVar[str | None] = None
    """The kind that is meant where a section names none; None where it must, unless its field has a default."""

    if TYPE_CHECKING:
        kind: str

    _below: ClassVar[dict[str, type[Spec]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.model_fields["kind"].default if "kind" in cls.model_fields else None
        cls._below = {}
        if isinstance(name, str):
            if inspect.isabstract(cls):
                missing = ", ".join(f"{method}()" for method in sorted(cls.__abstractmethods__))
                raise TypeError(f"{cls.__name__}, kind '{name}', does not define {missing}")
            for above in cls.__mro__[1:]:
                if issubclass(above, Spec) and above.__module__ != __name__:  # those of this module are no families
                    _add(above, name, cls)

    @classmethod
    def is_open(cls) -> bool:
        """Whether this class stands for the kinds below it, rather than being one."""
        return "kind" not in cls.__pydantic_fields__

    @classmethod
    def kinds(cls) -> Mapping[str, type[Self]]:
        """The kinds below this class by name, those of other packages too."""
        load_plugins()
        return cls._below  # type: ignore[return-value]

    @classmethod
    def kinds_without_keys(cls) -> Iterator[str]:
        """Names of the kinds below this class that will do without any key."""
        for name, kind in cls.kinds().items():
            if not any(field.is_required() for field in kind.model_fields.values()):
                yield name

    @classmethod
    def package(cls) -> str | None:
        """The package that adds this kind, by the name that it is installed under; None for those of our own."""
        top = cls.__module__.partition(".")[0]
        return None if top == __package__ else next(iter(packages_distributions().get(top, ())), top)

    @classmethod
    def alternatives(cls) -> Iterator[type[Settings]]:
        """The kinds of a family; of a kind itself."""
        yield from cls.kinds().values() if cls.is_open() else (cls,)

    @classmethod
    def union(cls) -> TypeAdapter[Self]:
        """Validates settings of any kind below this class."""
        return _union(tuple(cls.kinds().values()))

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Settings of any kind below this class, from plain data or JSON text."""
        return cls.union().validate_python(cls._with_kind(json.loads(given) if isinstance(given, str) else given))

    @classmethod
    def _with_kind(cls, given: Any) -> Any:
        if cls.default_kind is not None and isinstance(given, Mapping) and "kind" not in given:
            return {"kind": cls.default_kind} | dict(given)
        return given

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if not cls.is_open():
            return handler(source)

        def validate(given: Any, info: ValidationInfo) -> Any:
            return cls.union().validate_python(cls._with_kind(given), context=info.context)

        return core_schema.with_info_plain_validator_function(validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        if not cls.is_open():
            return super().__get_pydantic_json_schema__(schema, handler)
        if cls in _DESCRIBING.get():  # kinds that hold others of their own family
            return {"type": "object", "title": cls.__name__}
        token = _DESCRIBING.set((*_DESCRIBING.get(), cls))
        try:
            return handler(cls.union().core_schema)
        finally:
            _DESCRIBING.reset(token)


class Named(Spec):
    """Kinds most of which have no keys: their names alone will do, and are what is written."""

    @classmethod
    def _with_kind(cls, given: Any) -> Any:
        return super()._with_kind({"kind": given} if isinstance(given, str) else given)

    @model_serializer(mode="wrap")
    def _name_alone(self, handler: SerializerFunctionWrapHandler) -> Any:
        found = handler(self)
        return found["kind"] if found.keys() == {"kind"} else found

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        found = super().__get_pydantic_json_schema__(schema, handler)
        if not cls.is_open():
            return found
        return {"anyOf": [{"enum": list(cls.kinds_without_keys()), "type": "string"}, found]}


def _add(above: type[Spec], name: str, kind: type[Spec]) -> None:
    held = above._below.get(name)
    if held is not None and (held.__module__, held.__qualname__) != (kind.__module__, kind.__qualname__):
        raise TypeError(f"kind '{name}' of {above.__name__} is defined by {held.__module__} and by {kind.__module__}.")
    above._below[name] = kind


@lru_cache(maxsize=_UNIONS)
def _union(kinds: tuple[Any, ...]) -> TypeAdapter[Any]:
    """One for all kinds that there are now: a notebook may define one anew, and packages add some."""
    several: Any = Annotated[reduce(or_, kinds), Field(discriminator="kind")]
    return TypeAdapter(several if len(kinds) > 1 else kinds[0])


def load_plugins() -> None:
    """Imports the modules through which other packages add kinds, once.

    Not while modules of our own are being loaded, whose defaults are validated then: packages import these in turn.

    Raises:
        InputError: one cannot be imported; the package is named.
    """
    if not imported_plugins.cache_info().currsize and not _loading_ourselves():
        imported_plugins()


def _loading_ourselves() -> bool:
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == __package__]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)


@cache
def imported_plugins() -> None:
    """What `load_plugins` does once."""
    for entry in entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:  # whatever another package does while it is imported
            package = entry.dist.name if entry.dist is not None else entry.value
            why = f"{type(error).__name__}: {error}"
            raise InputError(
                f"the kinds of package '{package}' cannot be loaded ({why}); update or remove it."
            ) from error


_KEPT: OrderedDict[Hashable, Any] = OrderedDict()
"""What factories of users made, the last used last."""
_MOST_KEPT = 64


class UserCode(Settings):
    """What points to a factory of the user's own."""

    also_given: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments that the factory gets besides `parameters`."""

    function: str
    """Where the factory is, as ``module:function``."""
    parameters: dict[str, Any] = {}
    """Keyword arguments of the factory."""

    def check_code(self) -> None:
        """Refuses what cannot be used, before anything is paid for; kinds whose factory needs no other input call it.

        Raises:
            InputError: the factory cannot be imported, or does not take the arguments that it will be given.
        """
        why = refusal(import_function(self.function), **dict.fromkeys(self.also_given), **self.parameters)
        if why is not None:
            raise InputError(f"'{self.function}' does not take the parameters given ({why}).")

    def call(self, **fixed: Any) -> Any:
        """What the factory makes.

        Raises:
            InputError: it cannot be imported, or does not take these arguments.
        """
        factory = import_function(self.function)
        try:
            return factory(**fixed, **self.parameters)
        except TypeError as error:
            raise InputError(f"'{self.function}' does not take the parameters given ({error}).") from error

    def kept(self, make: Callable[[], Made], *given: Hashable) -> Made:
        """What ``make`` makes of these settings, made once in a process for equal ones, and so compiled once.

        Programs are kept by what they are made of, and a user's closure or class without an equality of its own equals
        nothing but itself.

        Args:
            make: makes it.
            given: what it is made from besides the settings.
        """
        try:
            key = (type(self), import_function(self.function), self.model_dump_json(), *given)
        except PydanticSerializationError:  # a script may hand over whatever its factory takes
            return make()
        if key not in _KEPT:
            _KEPT[key] = make()
            while len(_KEPT) > _MOST_KEPT:
                _KEPT.popitem(last=False)
        _KEPT.move_to_end(key)
        return cast(Made, _KEPT[key])

    @contextmanager
    def tried_on(self, what: str) -> Iterator[None]:
        """Tells in a sentence why what the factory made fails on something, while a ``with`` lasts.

        Args:
            what: it is tried on, in words.

        Raises:
            InputError: it fails.
        """
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # whatever the user's function does
            why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise InputError(f"'{self.function}' returns a function that fails on {what} ({why}).") from error

    def call_for(self, methods: tuple[str, ...], attributes: tuple[str, ...] = (), **fixed: Any) -> Any:
        """What the factory makes, which has some methods and attributes.

        Raises:
            InputError: as for `call`, or what it makes lacks one of them.
        """
        made = self.call(**fixed)
        missing = [name for name in methods if not callable(getattr(made, name, None))]
        if missing:
            raise InputError(f"'{self.function}' returns a {type(made).__name__} that has no {missing[0]}().")
        for name in attributes:
            if not hasattr(made, name):
                raise InputError(f"'{self.function}' returns a {type(made).__name__} that has no '{name}'.")
        return made

    def call_for_function(self, *names: str, **fixed: Any) -> Any:
        """What the factory makes, which is a function of some arguments, given in this order.

        Raises:
            InputError: as for `call`, or what it makes is none.
        """
        made = self.call(**fixed)
        if not callable(made):
            raise InputError(f"'{self.function}' must return a function, but returns a {type(made).__name__}.")
        why = refusal(made, *names)
        if why is not None:
            raise InputError(f"'{self.function}' must return a function of {', '.join(names)}, but returns one: {why}.")
        return made


def refusal(function: Callable[..., Any], *given: Any, **named: Any) -> str | None:
    """Why a function does not take some arguments; None where it does, or does not tell what it takes."""
    try:
        inspect.signature(function).bind(*given, **named)
    except TypeError as error:
        return str(error)
    except ValueError:  # some that are written in C have no signature
        return None
    return None


def check_user_code(settings: Settings, above: str = "") -> None:
    """Refuses user code that cannot be used, wherever it stands in some settings: see `UserCode.check_code`.

    Args:
        settings: whatever holds them.
        above: what the keys that lead there begin with.

    Raises:
        InputError: names the key.
    """
    for where, code in user_code(settings):
        try:
            code.check_code()
        except InputError as error:
            raise InputError(f"{above}{where}: {error}") from error


def user_code(settings: Any) -> Iterator[tuple[str, UserCode]]:
    """All user code in some settings, wherever it stands, with the dotted keys that lead there."""
    return sections(settings, UserCode)


def import_function(path: str) -> Callable[..., Any]:
    """The function behind ``module:function``.

    Raises:
        InputError: the path is not of that form, or does not lead to a function.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise InputError(f"'{path}' is not of the form module:function.")
    try:
        holder = import_module(module)
    except ImportError as error:
        raise InputError(f"'{path}' cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    except Exception as error:  # whatever the user's module does while it is imported
        raise InputError(f"'{path}' cannot be imported ({type(error).__name__}: {error}).") from error
    if not hasattr(holder, name):
        raise InputError(f"module '{module}' has no function '{name}'.")
    function = getattr(holder, name)
    if not callable(function):
        raise InputError(f"'{path}' is not a function.")
    return function
