"""One decoder graph for first and later calls, made of two: `decoder_with_past_model` and `cross_kv`.

Both calls run the same nodes. They differ in where a layer's keys and values of the memory come from: an input, or a
product with the memory. So each layer has one `If`, around the nodes that attend to the memory. Everything else stands
outside of it once, all weights among them, which a runtime would prepare once for each branch.
"""

from collections.abc import Collection, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, compose, helper

from florence2.lite.layout import MERGED, USE_CACHE, cache_names


def merge_decoders(step: ModelProto, cross: ModelProto) -> ModelProto:
    """Return the merged decoder.

    Where the cache is used, the keys and values of the memory are not returned again: their outputs have the length 0.
    """
    cross = compose.add_prefix(cross, "cross/", rename_inputs=False, rename_outputs=False)
    mask, *others = step.graph.input
    nodes: Sequence[NodeProto] = step.graph.node
    outputs = {value.name: value for value in cross.graph.output}
    for past, present in _pairs(len(outputs) // 2):
        nodes = _choose_memory(nodes, cross.graph.node, past, [outputs[name] for name in present])
    graph = helper.make_graph(
        nodes,
        MERGED,
        [mask, *cross.graph.input, *others, helper.make_tensor_value_info(USE_CACHE, TensorProto.BOOL, [1])],
        [*step.graph.output, *cross.graph.output],
        [*step.graph.initializer, *cross.graph.initializer],
    )
    return helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)


def _pairs(layers: int) -> list[tuple[list[str], list[str]]]:
    """Return the names of each layer's keys and values of the memory, as inputs and as outputs."""
    past, present = (list(cache_names(prefix, "encoder", layers)) for prefix in ("past_key_values", "present"))
    return [(past[at : at + 2], present[at : at + 2]) for at in range(0, 2 * layers, 2)]


def _choose_memory(
    nodes: Sequence[NodeProto], cross: Sequence[NodeProto], past: Sequence[str], present: Sequence[ValueInfoProto]
) -> list[NodeProto]:
    """Put the nodes that attend to the memory of one layer into an `If`; return all nodes."""
    inside = _attending(nodes, past)
    mixed = inside[-1].output[0]
    names = [value.name for value in present]
    made = _leading_to(cross, names)
    given = _branch(f"{mixed}/given", [*_nothing(present), *inside], mixed, names, {})
    projected = _branch(f"{mixed}/projected", [*made, *inside], mixed, names, dict(zip(past, names, strict=True)))
    choice = helper.make_node(
        "If", [USE_CACHE], [mixed, *names], f"{mixed}/If", then_branch=given, else_branch=projected
    )
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


def _nothing(present: Sequence[ValueInfoProto]) -> list[NodeProto]:
    """Return constants (1, heads, 0, d) in place of keys and values that were given."""
    nodes = []
    for value in present:
        heads, width = (value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
        empty = helper.make_tensor(value.name, TensorProto.FLOAT, [1, heads, 0, width], [])
        nodes.append(helper.make_node("Constant", [], [value.name], value=empty))
    return nodes


def _branch(
    prefix: str, nodes: Sequence[NodeProto], mixed: str, names: Sequence[str], renamed: Mapping[str, str]
) -> GraphProto:
    """Return a branch whose values have names of their own; `renamed` says which inputs become which of its values."""
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
    outputs = [helper.make_tensor_value_info(rename(name), TensorProto.FLOAT, [None] * 4) for name in (mixed, *names)]
    return helper.make_graph(copies, prefix, [], outputs)
