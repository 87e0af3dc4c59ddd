"""Networks that `torch.fx` traced: one function calls all layers, and the modules between are found again."""

from collections.abc import Callable

from torch import fx, nn

_STACK = "nn_module_stack"
_CONTAINERS = "torch.nn.modules.container."


def with_modules(model: nn.Module) -> nn.Module:
    """`model`, in which each graph of torch.fx is a plain module that calls its parts as the traced network did.

    A part is a module of the traced network that took one value and gave one. Layers, and what a state_dict holds,
    keep their names. Graphs that tell nothing of the modules that they were traced from stay whole.
    """
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, fx.GraphModule)]:
        plain = _plain(module)
        if not name:
            return plain
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = plain
    return model


class GraphNetwork(nn.Module):
    """Runs a graph of torch.fx. A plain module, unlike a `GraphModule`: copies keep what was added to it.

    Args:
        source: whose parameters, buffers and modules the graph speaks of; they are shared, not copied.
        graph: what to run.
    """

    def __init__(self, source: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        own = set(vars(self))
        self.__dict__.update({key: value for key, value in vars(source).items() if key not in own and key != "_graph"})
        for values in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            getattr(self, values).update(getattr(source, values))
        self.training = source.training
        self.graph = graph
        self._run: Callable[..., object] | None = None

    def forward(self, *args: object, **kwargs: object) -> object:
        if self._run is None:  # not `fx.Interpreter`, which changes the exceptions that pass through it
            code = self.graph.python_code("self")
            scope = dict(code.globals)
            exec(code.src, scope)
            self._run = scope["forward"]
        return self._run(self, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_run": None}


def _plain(traced: fx.GraphModule) -> nn.Module:
    for shell in list(traced.modules()):
        for name, child in shell._modules.items():
            # What held the layers of a Sequential or ModuleList is a bare module after tracing.
            if type(child) is nn.Module and child._modules and all(key.isdigit() for key in child._modules):
                shell._modules[name] = nn.ModuleList(child._modules.values())
    graph = traced.graph
    network = GraphNetwork(traced, graph)
    paths = {path: kind for node in graph.nodes for path, kind in _stack(node)}
    for path in sorted(paths, key=lambda path: path.count("."), reverse=True):
        if not paths[path].startswith(_CONTAINERS):
            _call_as_module(network, graph, path)
    graph.lint()
    return network


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """Names and classes of the modules around a node, the outermost first, without a layer that the node calls."""
    found = []
    for path, kind in node.meta.get(_STACK, {}).values():
        if path and not (node.op == "call_module" and node.target == path):
            found.append((path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"))
    return found


def _call_as_module(network: nn.Module, graph: fx.Graph, path: str) -> None:
    """Lead the nodes of the module called `path` through one call of it, if that is a call of one value for one."""
    inside = [node for node in graph.nodes if path in dict(_stack(node))]
    known = set(inside)
    given = {value for node in inside for value in node.all_input_nodes if value not in known}
    gives = [node for node in inside if any(user not in known for user in node.users)]
    owned = [node for node in inside if node.op in ("call_module", "get_attr")]
    prefix = f"{path}."
    within = all(str(node.target).startswith(prefix) for node in owned)
    if len(given) != 1 or len(gives) != 1 or gives[0] is not inside[-1] or len(owned) < 2 or not within:
        return
    part = fx.Graph()
    copies = {next(iter(given)): part.placeholder("x")}
    for node in inside:
        copies[node] = part.node_copy(node, copies.__getitem__)
        if node in owned:
            copies[node].target = str(node.target).removeprefix(prefix)
    part.output(copies[gives[0]])
    parent, _, name = path.rpartition(".")
    owner = network.get_submodule(parent)
    owner._modules[name] = GraphNetwork(owner._modules[name], part)
    with graph.inserting_before(gives[0]):
        call = graph.call_module(path, tuple(given))
    stack = list(gives[0].meta[_STACK].items())
    call.meta[_STACK] = dict(stack[: [key for key, _ in stack].index(path) + 1] if path in dict(stack) else [])
    gives[0].replace_all_uses_with(call)
    for node in reversed(inside):
        graph.erase_node(node)
