"""One decoder graph for first and later calls, made of two: `decoder_with_past_model` and `cross_kv`.

Both calls run the same nodes. They differ in where a layer's keys and values of the memory come from: an input, or a
product with the memory. So each layer has one `If`, around the nodes that attend to the memory. Everything else stands
outside of it once, all weights among them, which a runtime would prepare once for each branch.
"""

from collections.abc import Collection, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from florence2.lite.layout import CROSS, MERGED, USE_CACHE, cache_names


def merge_decoders(step: ModelProto, cross: ModelProto) -> ModelProto:
    """Return the merged decoder.

    Where the cache is used, the keys and values of the memory are not returned again: their outputs have the length 0.
    """
    projection = _with_own_weights(cross.graph)
    mask, *others = step.graph.input
    nodes: Sequence[NodeProto] = step.graph.node
    for past, present in _pairs(len(projection.output) // 2):
        nodes = _choose_memory(nodes, projection.node, past, present)
    graph = helper.make_graph(
        nodes,
        MERGED,
        [mask, *projection.input, *others, helper.make_tensor_value_info(USE_CACHE, TensorProto.BOOL, [1])],
        [*step.graph.output, *projection.output],
        [*step.graph.initializer, *projection.initializer],
    )
    return helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)


def _with_own_weights(graph: GraphProto) -> GraphProto:
    """Return a copy of a graph whose weights have names that no other graph has."""
    copy = GraphProto()
    copy.CopyFrom(graph)
    names = {tensor.name: f"{CROSS}/{tensor.name}" for tensor in graph.initializer}
    for tensor in copy.initializer:
        tensor.name = names[tensor.name]
    for node in copy.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return copy


def _pairs(layers: int) -> list[tuple[list[str], list[str]]]:
    """Return the names of each layer's keys and values of the memory, as inputs and as outputs."""
    past, present = (list(cache_names(prefix, "encoder", layers)) for prefix in ("past_key_values", "present"))
    return [(past[at : at + 2], present[at : at + 2]) for at in range(0, 2 * layers, 2)]


def _choose_memory(
    nodes: Sequence[NodeProto], cross: Sequence[NodeProto], past: Sequence[str], present: Sequence[str]
) -> list[NodeProto]:
    """Put the nodes that attend to the memory of one layer into an `If`; return all nodes."""
    inside = _attending(nodes, past)
    mixed = inside[-1].output[0]
    names = [mixed, *present]
    made = _leading_to(cross, present)
    given = _branch(f"{mixed}/given", [*_nothing(past, present), *inside], names, {})
    projected = _branch(f"{mixed}/projected", [*made, *inside], names, dict(zip(past, present, strict=True)))
    choice = helper.make_node("If", [USE_CACHE], names, f"{mixed}/If", then_branch=given, else_branch=projected)
    place = next(at for at, node in enumerate(nodes) if node is inside[-1])
    kept = [node for node in nodes if not any(node is other for other in inside)]
    # before the If stand all nodes that stood before the last one inside of it
    place -= len(inside) - 1
    return [*kept[:place], choice, *kept[place:]]


def _attending(nodes: Sequence[NodeProto], past: Sequence[str]) -> list[NodeProto]:
    """Return the nodes from the first that depends on the given keys to the one that reads the values."""
    keys, values = past
    known, inside = {keys}, []
    for node in nodes:
        if known & {*node.input}:
            known |= {*node.output}
            inside.append(node)
        if values in node.input:
            return inside
    raise AssertionError(f"no node reads {values}")


def _leading_to(nodes: Sequence[NodeProto], names: Sequence[str]) -> list[NodeProto]:
    """Return the nodes on which values depend, in their order."""
    wanted, found = {*names}, []
    for node in reversed(nodes):
        if wanted & {*node.output}:
            wanted |= {*node.input}
            found.append(node)
    return found[::-1]


def _nothing(past: Sequence[str], present: Sequence[str]) -> list[NodeProto]:
    """Return nodes that make no keys and no values, (B, heads, 0, d) each, in place of those that were given."""
    axis = f"{present[0]}/axis"
    bounds = {f"{present[0]}/none": 0, axis: 2}
    nodes = [helper.make_node("Constant", [], [name], name, value_ints=[value]) for name, value in bounds.items()]
    none = f"{present[0]}/none"
    nodes += [
        helper.make_node("Slice", [given, none, none, axis], [name], name)
        for given, name in zip(past, present, strict=True)
    ]
    return nodes


def _branch(prefix: str, nodes: Sequence[NodeProto], results: Sequence[str], renamed: Mapping[str, str]) -> GraphProto:
    """Return a branch whose values have names of their own; `renamed` says which of them take the place of inputs."""
    made: Collection[str] = {name for node in nodes for name in node.output}

    def rename(name: str) -> str:
        name = renamed.get(name, name)
        return f"{prefix}/{name}" if name in made else name

    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}/{node.name}"
        copy.input[:], copy.output[:] = map(rename, node.input), map(rename, node.output)
        copies.append(copy)
    # 4 dimensions of unknown size: some runtimes must know how many
    outputs = [helper.make_tensor_value_info(rename(name), TensorProto.FLOAT, [None] * 4) for name in results]
    return helper.make_graph(copies, prefix, [], outputs)
