"""Which layers of a model get seeds: what ``target_layers`` says, looked up in the model."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from esper.kasmina.site import SiteType
from esper.kasmina.site_types import default_site_names, site_type, why_never

Predicate = Callable[[str, nn.Module], bool]
Target = str | type[nn.Module] | Predicate
Targets = Iterable[Target] | Predicate
Sites = dict[str, tuple[nn.Module, SiteType]]

_WILDCARDS = frozenset("*?[")


def find_sites(net: nn.Module, targets: Targets | None) -> Sites:
    """Return the layers that get seeds by their first name, in the order of the modules.

    Raises ``ValueError`` if there is none, or a target matches none, and ``TypeError`` for what is
    no target.
    """
    capable = {
        name: (module, kind)
        for name, module in net.named_modules()
        if (kind := site_type(module)) is not None
    }
    if targets is not None:
        chosen = {name for target in _listed(targets) for name in _match(net, capable, target)}
        if not chosen:
            raise ValueError(f"target_layers is empty: no layer of {type(net).__name__} is named")
        return {name: site for name, site in capable.items() if name in chosen}
    sites = {name: site for name, site in capable.items() if site[1].by_default}
    if not sites:
        raise ValueError(
            f"{type(net).__name__} has no layer that can carry seeds by default "
            f"(those that can: {', '.join(default_site_names())}){_by_name_hint(capable)}"
        )
    return sites


def aliases(net: nn.Module, sites: Sites) -> dict[str, str]:
    """Return the further names of shared layers, each with the name that its handle has."""
    first_names = {id(module): name for name, (module, _) in sites.items()}
    return {
        name: first_names[id(module)]
        for name, module in net.named_modules(remove_duplicate=False)
        if id(module) in first_names and name not in sites
    }


def _listed(targets: Targets) -> Iterable[Target]:
    if isinstance(targets, str | type):
        raise TypeError(
            "target_layers must be a list of names, patterns, types or predicates, or a predicate, "
            f"got {targets!r}"
        )
    return targets if isinstance(targets, Iterable) else [targets]


def _match(net: nn.Module, capable: Sites, target: Any) -> Iterator[str]:
    """Yield the names of the layers that a target chooses, at least one."""
    if isinstance(target, str) and not _WILDCARDS.intersection(target):
        yield _named(net, capable, target)
        return
    matches = _matcher(target)
    everything = dict(net.named_modules(remove_duplicate=False))
    found = {name: module for name, module in everything.items() if matches(name, module)}
    first_names = {id(module): name for name, (module, _) in capable.items()}
    fitting = {
        name: capable[name]
        for module in found.values()
        if (name := first_names.get(id(module))) is not None
    }
    if not fitting:
        raise ValueError(_nothing_matched(net, target, found))
    yield from _preferred(fitting)


def _preferred(sites: Sites) -> Sites:
    """Return the sites by default among those, or all if there is none."""
    by_default = {name: site for name, site in sites.items() if site[1].by_default}
    return by_default or sites


def _matcher(target: Any) -> Predicate:
    if isinstance(target, str):
        return lambda name, module: fnmatch.fnmatchcase(name, target)
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if callable(target):
        return lambda name, module: bool(target(name, module))
    raise TypeError(
        f"target_layers holds {target!r}; expected a name, a pattern such as 'encoder.*.linear1', "
        "a module type, or a predicate (name, module) -> bool"
    )


def _named(net: nn.Module, capable: Sites, name: str) -> str:
    everything = dict(net.named_modules(remove_duplicate=False))
    if name not in everything:
        raise ValueError(f"Layer {name} not found in {type(net).__name__}{near(name, everything)}")
    module = everything[name]
    for first_name, (capable_module, _) in capable.items():
        if capable_module is module:
            return first_name
    shown = name or "''"
    raise ValueError(f"Layer {shown} is a {type(module).__name__}, which {_why_not(module)}")


def _why_not(module: nn.Module) -> str:
    if (reason := why_never(type(module))) is not None:
        return f"cannot carry seeds: {reason}"
    if isinstance(module, nn.modules.loss._Loss):
        return "has no channels in its output, so it cannot carry seeds"
    return (
        "cannot carry seeds; if its output, or the first element of it, is a floating-point "
        f"tensor, say so by esper.register_site({type(module).__name__}, channel_dim=...)"
    )


def _nothing_matched(net: nn.Module, target: Any, found: dict[str, nn.Module]) -> str:
    if found:
        name, module = next(iter(found.items()))
        return (
            f"target_layers: {_shown(target)} matches no layer of {type(net).__name__} that can "
            f"carry seeds; '{name}', a {type(module).__name__}, {_why_not(module)}"
        )
    hint = ""
    if isinstance(target, str):
        hint = near(target, [name for name, _ in net.named_modules()])
    elif isinstance(target, type):
        types = {type(module).__name__ for module in net.modules()}
        hint = near(target.__name__, types)
    return f"target_layers: {_shown(target)} matches no layer of {type(net).__name__}{hint}"


def _shown(target: Any) -> str:
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def near(name: str, names: Iterable[str]) -> str:
    """Return a hint at those of ``names`` that ``name`` may stand for by mistake, or nothing."""
    found = difflib.get_close_matches(name, [known for known in names if known], n=3, cutoff=0.5)
    return f" (near: {', '.join(map(repr, found))})" if found else ""


def _by_name_hint(capable: Sites) -> str:
    if not capable:
        return ""
    names = ", ".join(f"'{name}'" for name in [*capable][:3])
    return f"; name {names} in target_layers to plant seeds there all the same"
